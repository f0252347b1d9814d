r"""Runs the paper's study in miniature: which tokens, which layers, how many.

    python -m videollm_mod_jax.study --config configs/study_digits.py --workdir runs/study
    python -m videollm_mod_jax.study --config configs/study_digits.py --workdir runs/study \
        --only full,mod,random

Draws the streams, pretrains the vision tower and stores the features once; trains and evaluates
every variant with every seed, as many at a time as there are GPUs or CPU cores; times all variants
in turn; and writes DIR/report.md with figures. What DIR already holds is not done again, so the
same command continues an interrupted study, and a report is there after every call.

    DIR/report.md, *.png              the report
        runs/VARIANT/seed-N/          a run as `train` leaves one, and its result.json
        measured.json                 what every variant costs
        baselines.json                what is got without looking
        data/ tower/ features/        streams, tower and features, shared by all runs
        start/                        the model that all runs start from
"""

import argparse
import dataclasses
import functools
import itertools
import json
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, as_completed
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from videollm_mod_jax import cli
from videollm_mod_jax.config_dict import build
from videollm_mod_jax.console import make_console
from videollm_mod_jax.data import files
from videollm_mod_jax.data.files import read_json
from videollm_mod_jax.data.sources import TRAIN, Sources
from videollm_mod_jax.encode import encode_split, fingerprint
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.experiment import Experiment, examples_for, plain
from videollm_mod_jax.locks import locked
from videollm_mod_jax.studying import figures, tables
from videollm_mod_jax.studying.baselines import baselines
from videollm_mod_jax.studying.config import StudyConfig
from videollm_mod_jax.studying.measuring import measure_all
from videollm_mod_jax.studying.running import Held, Material, held, run_variant, train_variant
from videollm_mod_jax.studying.variants import FULL, ONLINE, Variant, chosen, variants
from videollm_mod_jax.studying.workers import Devices, in_process, pool_of, slots_of
from videollm_mod_jax.train import TOWER, tower_of
from videollm_mod_jax.training import loop
from videollm_mod_jax.training.checkpoint import write_json

TASK = "digits_scenes"
RUNS, RESULT, START = "runs", "result.json", "start"
MEASURED, BASELINES, HERE = "measured.json", "baselines.json", "devices.json"
REPORT = "report.md"

Table = Mapping[str, Any]


def study(
    table: Table, workdir: Path, only: Sequence[str], workers: int | None, console: Console
) -> None:
    """Runs what is left of a study, and writes its report.

    Args:
      table: of the config file.
      workdir: of the study.
      only: names of the variants to run; () for all.
      workers: runs at a time; None for one per GPU or CPU core.
      console: progress.

    Raises:
      UserError: the config does not fit, a name is unknown, or the workdir holds another study.
    """
    settings, experiment = read(table)
    names = list(chosen(experiment.model, tuple(only)))
    with locked(workdir, "study"):
        files.remove_leftovers(workdir)
        _study(settings, table, workdir, names, workers, console)


def _study(
    settings: StudyConfig,
    table: Table,
    workdir: Path,
    names: Sequence[str],
    workers: int | None,
    console: Console,
) -> None:
    _, experiment = read(table)
    # Seeds and rounds may change: they add runs, and alter none.
    loop.claim_workdir(workdir, _without_study(table))
    watch = _Stopwatch(workdir)
    if not (workdir / BASELINES).exists():
        console.print("drawing streams, pretraining the tower, encoding frames")
        if settings.pretraining_steps:
            console.print(
                f"then {settings.pretraining_steps} updates of the model that all runs start from; "
                f"their losses: {workdir / START}"
            )
        in_process(_prepare, workdir, table, workdir)
        watch.save()
    jobs = [
        (name, seed)
        for seed, name in itertools.product(settings.seeds, names)
        if not _result_path(workdir, name, seed).exists()
    ]
    if jobs:
        _run_all(table, workdir, jobs, workers, watch, console)
    measured = _read_if(workdir / MEASURED, "measured", variants(experiment.model))
    if measured is None or measured["variants"].keys() != set(_to_measure(table, workdir)):
        console.print("measuring what every variant costs")
        in_process(_measure, workdir, table, workdir)
    watch.save()
    write_report(table, workdir)
    console.print(f"report: {workdir / REPORT}")


def read(table: Table) -> tuple[StudyConfig, Experiment]:
    """The checked parts of a config.

    Raises:
      UserError: an unknown, missing or wrongly typed key, or a task without objects.
    """
    if "study" not in table:
        raise UserError("the config has no study; expected one such as configs/study_digits.py")
    settings = build(StudyConfig, table["study"], "config.study")
    experiment = Experiment.from_table(_without_study(table))
    if experiment.data.drawn != TASK:
        raise UserError(f"data.sources draws {experiment.data.drawn}; the study needs {TASK}")
    if experiment.init or experiment.evaluation.benchmarks.keys() != {TASK}:
        raise UserError(
            f"the study starts from random weights and is judged by {TASK} alone; set init to '' "
            f"and evaluation.benchmarks to {TASK} and its split"
        )
    return settings, experiment


def write_report(table: Table, workdir: Path) -> None:
    """Writes `report.md` and the figures from the results that there are."""
    settings, experiment = read(table)
    known = variants(experiment.model)
    results: dict[str, dict[int, Any]] = {}
    for name, seed in itertools.product(known, settings.seeds):
        path = _result_path(workdir, name, seed)
        run = _read_if(path, "results", known)
        if run is not None:
            results.setdefault(name, {})[seed] = run
    measured = _read_if(workdir / MEASURED, "measured", known)
    prepared = _read_if(workdir / BASELINES, "baselines", known)
    here = _read_devices(workdir)
    model, data, training = experiment.model, experiment.data, experiment.training
    runs = [run for by_seed in results.values() for run in by_seed.values()]
    setting = {
        "runs": f"{len(runs)} of {len(known) * len(settings.seeds)}, "
        f"{len(known)} variants with seeds {', '.join(map(str, settings.seeds))}",
        "model": f"{model.decoder.num_layers} layers of width {model.decoder.hidden_size}, "
        f"{model.tokens_per_frame} tokens per frame, {data.frames} frames",
        "start": _start(settings),
        "routing": f"{model.routing.insertion}, {model.routing.selection}, r = "
        f"{model.routing.keep_ratio}, weighting {model.routing.weighting}, "
        f"exploration {model.routing.exploration}; every other variant "
        "changes one thing of it",
        "training": f"{training.steps} updates of {data.batch_size} streams, "
        f"{data.draw.train} streams drawn, learning rate {training.optimizer.learning_rate:g}",
        "judged on": f"{data.draw.test} streams of scans that no training stream shows",
        "time": f"{here.seconds / 60:.0f} minutes in all, {here.workers} runs at a time",
    }
    text = tables.report(known, results, measured, prepared, setting)
    drawn = figures.draw(known, results, measured, workdir)
    text += "\n## Figures\n\n" + "\n\n".join(f"![{p.stem}]({p.name})" for p in drawn) + "\n"
    with files.written_aside(workdir / REPORT) as aside:
        aside.write_text(text, encoding="utf-8")


def _start(settings: StudyConfig) -> str:
    if not settings.pretraining_steps:
        return "random weights"
    return f"one model after {settings.pretraining_steps} updates with full computation"


def _without_study(table: Table) -> dict[str, Any]:
    return {key: value for key, value in table.items() if key != "study"}


def _result_path(workdir: Path, name: str, seed: int) -> Path:
    return workdir / RUNS / name / f"seed-{seed}" / RESULT


def _read_if(path: Path, kind: str, known: Mapping[str, Variant]) -> Any:
    """Reads results that the report can be made of; None if there are none.

    Args:
      path: of the file.
      kind: the argument of `tables.report` that they are, or "results" for a run's.
      known: the variants.

    Raises:
      UserError: the file holds something else.
    """
    if not path.exists():
        return None
    found = read_json(path)
    alone = {"results": {}, "measured": None, "baselines": None, "setting": {}}
    with files.understanding(str(path), "remove it, and the same command makes it again"):
        tables.report(known, **alone | {kind: {FULL: {0: found}} if kind == "results" else found})
    return found


def _read_devices(workdir: Path) -> Devices:
    path = workdir / HERE
    return build(Devices, read_json(path), str(path))


def _write_devices(workdir: Path, here: Devices) -> None:
    write_json(workdir / HERE, dataclasses.asdict(here))


class _Stopwatch:
    """Adds up what a study takes, over all processes that go on with it."""

    def __init__(self, workdir: Path):
        self._workdir, self._saved = workdir, time.perf_counter()

    def save(self) -> None:
        """Adds what has passed since it was last called, so that a killed study loses little."""
        here, now = _read_devices(self._workdir), time.perf_counter()
        seconds = here.seconds + now - self._saved
        _write_devices(self._workdir, dataclasses.replace(here, seconds=seconds))
        self._saved = now


def _run_all(
    table: Table,
    workdir: Path,
    jobs: Sequence[tuple[str, int]],
    workers: int | None,
    watch: _Stopwatch,
    console: Console,
) -> None:
    """Runs jobs on all devices, with a line for each that is done."""
    here = _read_devices(workdir)
    slots = slots_of(here)
    workers = min(workers or len(slots), len(jobs))
    _write_devices(workdir, dataclasses.replace(here, workers=workers))
    began = time.perf_counter()
    with pool_of(workdir, workers, [slots[i % len(slots)] for i in range(workers)]) as pool:
        waiting = {pool.submit(_run, table, workdir, *job): job for job in jobs}
        try:
            for done, future in enumerate(as_completed(waiting), 1):
                name, seed = waiting[future]
                left = (time.perf_counter() - began) / done * (len(jobs) - done)
                console.print(
                    f"{done}/{len(jobs)} {name}, seed {seed}: {_line(future)}; about "
                    f"{left / 60:.0f} min left"
                )
                watch.save()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _line(future: Future) -> str:
    result = future.result()
    if "failed" in result:
        return result["failed"]
    scores, seconds = result["teacher_forced"], sum(result["seconds"].values())
    return (
        f"LM-Correctness {scores['lm_correctness']:.1%}, Fluency {scores['fluency']:.1%}, "
        f"{seconds:.0f} s"
    )


def _cache_programs(workdir: Path) -> None:
    """Keeps compiled programs, so that the seeds of a variant compile once."""
    jax.config.update("jax_compilation_cache_dir", str(workdir / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _prepare(table: Table, workdir: Path) -> None:
    """Draws, pretrains and encodes what all runs share, and counts what needs no model."""
    learnt, judged = (_held(json.dumps(table), workdir, split, False) for split in (TRAIN, "test"))
    settings, experiment = read(table)
    if settings.pretraining_steps:
        # A checkpoint as often as a run ends, so that a killed study loses no more by it.
        training = dataclasses.replace(
            experiment.training,
            steps=settings.pretraining_steps,
            checkpoint_every=experiment.training.steps,
        )
        model = _sized(variants(experiment.model)[FULL].model(experiment.model), learnt)
        material = dataclasses.replace(_open(json.dumps(table), workdir), start=None)
        train_variant(model, training, material, learnt, training.seed, workdir / START)
    devices = jax.local_devices()
    ids = tuple(device.id for device in devices)
    _write_devices(workdir, Devices(platform=devices[0].platform, ids=ids, seconds=0.0, workers=1))
    # Last: it says that everything before is there.
    write_json(workdir / BASELINES, baselines(learnt, judged))


@functools.cache
def _open(table: str, workdir: Path) -> Material:
    """What all runs share, made unless it is there; once per process."""
    settings, experiment = read(json.loads(table))
    console = make_console(quiet=True)
    sources = Sources(experiment.data, workdir)
    tokenizer = sources.make_tokenizer()
    model = experiment.model
    tower = tower_of(model, experiment, workdir / TOWER, console)
    examples = {}
    for split in (TRAIN, experiment.evaluation.benchmarks[TASK]):
        streams = sources.unencoded(TASK, split)
        if streams is not None:
            encode_split(model, tower, streams, sources.features_path(TASK, split))
        examples[split] = examples_for(
            model, fingerprint(model, tower), sources, TASK, split, tokenizer
        )
    learnt, judged = examples.values()
    streams = sources.dataset(TASK).streams(experiment.evaluation.benchmarks[TASK])
    return Material(
        learnt=learnt,
        judged=judged,
        objects_RFP=np.stack([stream["objects"] for stream in streams]),
        tower=tower,
        start=workdir / START if settings.pretraining_steps else None,
        batch_size=experiment.data.batch_size,
        evaluation_batch=experiment.evaluation.batch_size,
        answer_tokens=experiment.evaluation.answer_tokens,
    )


@functools.cache
def _held(table: str, workdir: Path, split: str, summary_only: bool) -> Held:
    material = _open(table, workdir)
    examples = material.learnt if split == TRAIN else material.judged
    _, experiment = read(json.loads(table))
    name = ONLINE if summary_only else FULL
    return held(examples, variants(experiment.model)[name].model(experiment.model))


def _run(table: Table, workdir: Path, name: str, seed: int) -> dict[str, Any]:
    """One run, in a worker; its result is on disk before it is returned."""
    _cache_programs(workdir)
    _, experiment = read(table)
    variant, key = variants(experiment.model)[name], json.dumps(table)
    material = _open(key, workdir)
    learnt, judged = (_held(key, workdir, s, variant.summary_only) for s in (TRAIN, "test"))
    model = _sized(variant.model(experiment.model), learnt)
    path = _result_path(workdir, name, seed)
    try:
        result = run_variant(
            model, experiment.training, material, learnt, judged, seed, path.parent
        )
    except FloatingPointError as error:
        result = {"failed": str(error)}
    write_json(path, result)
    return result


def _to_measure(table: Table, workdir: Path) -> list[str]:
    """Full computation, with which all are compared, and the variants that were run."""
    settings, experiment = read(table)
    return [
        name
        for name in variants(experiment.model)
        if name == FULL
        or any(_result_path(workdir, name, seed).exists() for seed in settings.seeds)
    ]


def _measure(table: Table, workdir: Path) -> None:
    _cache_programs(workdir)
    settings, experiment = read(table)
    learnt = _held(json.dumps(table), workdir, TRAIN, False)
    known = variants(experiment.model)
    models = {
        name: _sized(known[name].model(experiment.model), learnt)
        for name in _to_measure(table, workdir)
    }
    measured = measure_all(
        models, experiment.data, experiment.training, settings, announce=lambda text: None
    )
    write_json(workdir / MEASURED, measured)


def _sized(model: Any, examples: Held) -> Any:
    """The model with the vocabulary of the tokenizer."""
    decoder = dataclasses.replace(model.decoder, vocab_size=examples.tokenizer.vocab_size)
    return dataclasses.replace(model, decoder=decoder)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    arguments, overrides = _parser().parse_known_args(argv)

    def run() -> None:
        # Devices belong to the processes that use them.
        jax.config.update("jax_platforms", "cpu")
        table = plain(cli.read_config(arguments.config, overrides))
        only = [name for name in arguments.only.split(",") if name]
        study(table, arguments.workdir.absolute(), only, arguments.workers, make_console())

    return cli.report_user_errors(run, "interrupted; the same command continues the study")


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="python -m videollm_mod_jax.study",
        description="Trains and evaluates all variants of the paper's study at small size, "
        "measures what they cost, and writes a report with the paper's tables beside its own.",
        epilog="Keys of the config are overridden as in train: --config.training.steps=100. The "
        "same command continues a study; more --config.study.seeds add runs to it.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", required=True, metavar="FILE", help="configs/study_digits.py")
    add("--workdir", required=True, type=Path, metavar="DIR", help="of the study; made if missing")
    add(
        "--only",
        default="",
        metavar="NAMES",
        help="variants to run now, such as full,mod,random; the report covers all that were run",
    )
    add(
        "--workers",
        type=cli.whole_number("[1, 1024]"),
        metavar="N",
        help="runs at a time (default: one per GPU; without a GPU one per CPU core)",
    )
    return parser


if __name__ == "__main__":
    cli.leave(main())
