r"""Evaluates a trained model on all benchmarks of a config.

    python -m videollm_mod_jax.evaluate --checkpoint runs/digits
    python -m videollm_mod_jax.evaluate --checkpoint runs/coin --config configs/coin.py:v5p-16 \
        --benchmarks coin_step,coin_task --out results/coin

Without `--config`, the benchmarks are those of the run. Writes, below `--out`,

    DATASET.jsonl                     what was asked and answered, one record per line
    DATASET.teacher-forced.jsonl      of streams: LM-PPL, TimeDiff, Fluency and LM-Correctness
    DATASET.self-conditioned.jsonl    of streams: what the model says with its own words as history
    report.json, report.md            all scores, and the tables of the paper with them

and prints the tables. A killed evaluation goes on where it stopped. Several processes share the
records; each needs devices of its own that hold the model together.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from videollm_mod_jax import cli
from videollm_mod_jax.console import make_console
from videollm_mod_jax.data import files
from videollm_mod_jax.data.files import read_json
from videollm_mod_jax.data.sources import TRAINED_ON, Sources
from videollm_mod_jax.encode import encode_split, fingerprint
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.evaluation import report as reporting
from videollm_mod_jax.evaluation import samples
from videollm_mod_jax.evaluation.held_out import count_learnt
from videollm_mod_jax.evaluation.judge import ChatJudge, ExactMatch, Judge
from videollm_mod_jax.evaluation.running import (
    ANSWERS,
    SELF_CONDITIONED,
    Part,
    Subject,
    parts_of,
    run_part,
)
from videollm_mod_jax.experiment import Experiment, examples_for, plain
from videollm_mod_jax.names import check_name
from videollm_mod_jax.streaming.int8 import quantize
from videollm_mod_jax.streaming.triggers import check_threshold
from videollm_mod_jax.training import distributed
from videollm_mod_jax.training.checkpoint import (
    CONFIG_FILE,
    LoadedModel,
    checkpoint_steps,
    load_model,
    write_json,
)

EVALUATION = "evaluation"
REPORT, MARKDOWN = "report.json", "report.md"
SEED = 0

_JUDGE = {"timeout": 60.0, "attempts": 6, "backoff": 2.0}


def evaluate(
    checkpoint: str | Path,
    experiment: Experiment | None = None,
    *,
    benchmarks: Sequence[str] = (),
    split: str | None = None,
    batch_size: int | None = None,
    step: int | None = None,
    silence_threshold: float | None = None,
    self_conditioned: bool = True,
    judge: Judge | None = None,
    out: str | Path | None = None,
    force: bool = False,
    int8: bool = False,
    verify: bool = True,
) -> reporting.Report:
    """Evaluates a model, or what is left of that.

    Args:
      checkpoint: directory of a run, or of a converted model.
      experiment: whose data and evaluation; None is that of the run.
      benchmarks: names of datasets; () is all of `experiment.evaluation.benchmarks`.
      split: of the datasets; None is the one that the experiment names for each.
      batch_size: conversations at a time; None is that of the experiment.
      step: of the run's checkpoint; None is the newest.
      silence_threshold: see `triggers.breaks_silence`.
      self_conditioned: whether streams are also watched with the model's own words as history.
      judge: of open answers; None is `ExactMatch`, which tables name.
      out: directory of the results; None is DIR/evaluation, or DIR/evaluation/SPLIT with `split`.
      force: evaluate on videos that the model was trained on, and say so in the report.
      int8: round the decoder's weights to 8 bits before.
      verify: whether to compare the stored weights with their checksums.

    Returns:
      What `report.json` holds.

    Raises:
      UserError: no model there, an unknown dataset or split, a setting out of range, videos that
        the model was trained on, or results of other settings in `out`.
    """
    check_threshold(silence_threshold)
    directory = Path(checkpoint)
    # Whole, on the devices of this process; each holds a part of the weights.
    layout = distributed.own_layout("fsdp", (1, -1, 1))
    model = load_model(directory, layout, step=step, verify=verify)
    described = reporting.describe_model(model.config)
    if int8:
        described["name"] += ", int8"
        model = quantize(model)
    if experiment is None:
        if not (directory / CONFIG_FILE).exists():
            raise UserError(
                f"{directory} holds no {CONFIG_FILE}, which names the benchmarks; expected the "
                "directory of a training run, or --config"
            )
        experiment = Experiment.from_table(read_json(directory / CONFIG_FILE))
    settings = experiment.evaluation
    batch_size = settings.batch_size if batch_size is None else batch_size
    if batch_size < 1:
        raise UserError(f"--batch-size is {batch_size}; expected at least 1")
    if split is not None:
        check_name(split, "--split")
    splits = _splits(settings.benchmarks, benchmarks, split)
    out = directory / EVALUATION / (split or "") if out is None else Path(out)
    with distributed.lead_first("dataset"):
        sources = Sources(experiment.data, directory)
    trained_on = count_learnt(directory / TRAINED_ON, sources, splits, force=force)

    with distributed.holding(out, "evaluate"):
        with distributed.lead_first("report"):
            newest = max(checkpoint_steps(directory), default=None)
            described |= {"step": newest if step is None else step}
            report = _read_report(out, described)
        for name, chosen in splits.items():
            dataset = sources.dataset(name)
            subject = Subject(
                model=model,
                examples=_examples(model, sources, name, chosen),
                labels=tuple(dataset.labels),
                batch_size=batch_size,
                answer_tokens=settings.answer_tokens,
                silence_threshold=silence_threshold,
                judge=judge or ExactMatch(),
                seed=SEED,
            )
            count = len(subject.examples)
            entry = report["benchmarks"].setdefault(name, {"parts": {}})
            entry |= {
                "benchmark": dataset.benchmark,
                "split": chosen,
                "records": count,
                "trained_on": trained_on[name],
            }
            shared = {"split": chosen, "records": count, "model": report["model"]["step"]}
            for part in parts_of(dataset.benchmark, subject):
                if self_conditioned or part.name != SELF_CONDITIONED:
                    _run(part, subject, name, shared, entry["parts"], out, report)
    return report


def _run(
    part: Part,
    subject: Subject,
    name: str,
    shared: Mapping[str, Any],
    parts: dict[str, Any],
    out: Path,
    report: reporting.Report,
) -> None:
    """Adds a part to the report, unless it is there."""
    settings = {**shared, **part.settings}
    file = name if part.name == ANSWERS else f"{name}.{part.name}"
    if part.name in parts:
        samples.check_same(parts[part.name]["settings"], settings, out / REPORT)
    else:
        scores = run_part(part, subject.examples, file, settings, out)
        parts[part.name] = {"settings": settings, "scores": scores}
        if distributed.is_lead():
            write_report(out, report)
    if distributed.is_lead():
        samples.forget(out, file)


def _splits(
    configured: Mapping[str, str], names: Sequence[str], split: str | None
) -> dict[str, str]:
    """The split of every benchmark that is asked for."""
    for name in names:
        if name not in configured:
            raise UserError(
                f"--benchmarks names {name!r}; expected some of {', '.join(configured)}, which "
                "evaluation.benchmarks of the config has"
            )
    if not configured:
        raise UserError("evaluation.benchmarks of the config is empty; name a dataset and a split")
    return {name: split or configured[name] for name in names or configured}


def _examples(model: LoadedModel, sources: Sources, name: str, split: str) -> Any:
    tower = model.variables["params"]["vision"]
    streams = sources.unencoded(name, split)
    if streams is not None:
        encode_split(model.config, tower, streams, sources.features_path(name, split))
    return examples_for(
        model.config, fingerprint(model.config, tower), sources, name, split, model.tokenizer
    )


def _read_report(out: Path, described: dict[str, Any]) -> dict[str, Any]:
    """The report that is there of a model described so, or an empty one."""
    path = out / REPORT
    if not path.exists():
        return {"model": described, "benchmarks": {}}
    report = reporting.read(path)
    samples.check_same(report["model"], described, path)
    return report


def write_report(out: Path, report: reporting.Report) -> None:
    """Writes `report.json`, and its tables as `report.md`."""
    # The tables first: what the report has, a command that goes on takes for done.
    with files.written_aside(out / MARKDOWN) as aside:
        aside.write_text(reporting.as_markdown(reporting.grids([report])), encoding="utf-8")
    write_json(out / REPORT, report)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    arguments, overrides = _parser().parse_known_args(argv)
    again = "interrupted; the same command continues where it stopped"
    return cli.report_user_errors(lambda: _main(arguments, overrides), again)


def _main(arguments: argparse.Namespace, overrides: list[str]) -> None:
    cli.join_processes(arguments)
    experiment = None
    if arguments.config is not None:
        experiment = Experiment.from_table(plain(cli.read_config(arguments.config, overrides)))
    elif overrides:
        raise UserError(f"unexpected argument {overrides[0]!r}; see --help")
    beside = [_read_beside(Path(other)) for other in arguments.beside]
    report = evaluate(
        arguments.checkpoint,
        experiment,
        benchmarks=[name for name in (arguments.benchmarks or "").split(",") if name],
        split=arguments.split,
        batch_size=arguments.batch_size,
        step=cli.chosen_step(arguments.checkpoint, arguments.step),
        verify=arguments.verify,
        silence_threshold=arguments.silence_threshold,
        self_conditioned=arguments.self_conditioned,
        judge=_judge(arguments),
        out=arguments.out,
        force=arguments.force,
        int8=arguments.int8,
    )
    if distributed.is_lead():
        reporting.show([*beside, report], make_console())


def _read_beside(out: Path) -> reporting.Report:
    if not (out / REPORT).exists():
        raise UserError(f"--beside: {out} holds no {REPORT}; expected what another --out was")
    return reporting.read(out / REPORT)


def _judge(arguments: argparse.Namespace) -> Judge:
    if arguments.judge_url is None:
        return ExactMatch()
    return ChatJudge(
        url=arguments.judge_url,
        key_variable=arguments.judge_key,
        model=arguments.judge_model,
        **_JUDGE,
    )


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="python -m videollm_mod_jax.evaluate",
        description="Evaluates a trained model on all benchmarks of a config.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="directory of a training run or a model")
    cli.add_step_argument(parser)
    cli.add_verify_argument(add)
    add(
        "--config",
        metavar="FILE",
        help="whose benchmarks to run; by default the run's own. Any key can be overridden: "
        "--config.evaluation.batch_size=4",
    )
    add("--benchmarks", metavar="A,B", help="datasets, of those of the config; by default all")
    add("--split", help="of the datasets; by default those that the config names")
    add(
        "--batch-size",
        type=cli.whole_number("[1, 2**20]"),
        metavar="B",
        help="conversations at a time; default: the config's",
    )
    add(
        "--silence-threshold",
        type=cli.number("[0, 1]"),
        metavar="P",
        help="the model speaks where the probability of silence is below P in [0, 1]; by default "
        "where silence is not the likeliest",
    )
    add(
        "--self-conditioned",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also watch streams with the model's own words as history, which takes longest",
    )
    add("--out", metavar="DIR", help="of the results; by default evaluation below the checkpoint")
    add(
        "--beside",
        nargs="*",
        default=[],
        metavar="DIR",
        help="results of other models, to show in the same tables",
    )
    add(
        "--force",
        action="store_true",
        help="evaluate on videos that the model was trained on, and mark the report",
    )
    cli.add_int8_argument(parser)
    group = parser.add_argument_group("a judge of open answers, without which exact matches count")
    group.add_argument("--judge-url", metavar="URL", help="of OpenAI-compatible chat completions")
    group.add_argument("--judge-model", default="gpt-3.5-turbo", metavar="NAME", help="to ask")
    group.add_argument(
        "--judge-key",
        default="OPENAI_API_KEY",
        metavar="VARIABLE",
        help="environment variable that holds the key; empty for none",
    )
    cli.add_process_arguments(parser)
    return parser


if __name__ == "__main__":
    cli.leave(main())
