r"""Trains a streaming video LLM as a config file says.

    python -m videollm_mod_jax.train --config configs/digits.py --workdir runs/digits
    python -m videollm_mod_jax.train --config configs/digits.py --workdir runs/half \
        --config.model.routing.keep_ratio=0.5 --config.training.steps=300

Draws the dataset, pretrains the vision tower or takes a converted model's, stores the features of
all frames, evaluates, trains, and evaluates again. What the working directory already holds is not
made again, so an interrupted run continues with the same command, and with the very losses that it
would have had.

  --config FILE        a file of configs/; any key of it can be overridden, as above
  --workdir DIR        of the run; made if missing
  --profile N          trace N updates into DIR/profile, for TensorBoard or xprof

On several machines, run the same command on each, with one DIR that all of them see. On Cloud TPU,
GKE, SLURM and under Open MPI the processes find each other; elsewhere give each of them

  --coordinator HOST:PORT --num-processes N --process-id I        (or JAX_COORDINATOR_ADDRESS,
                                                     JAX_NUM_PROCESSES and JAX_PROCESS_ID)

They wait for each other for --coordinator-timeout seconds (300). When one dies, process 0 says
which, and the others end with status 1.

SIGTERM and Ctrl-C save, once an update is done, and say so; the same command continues there. The
status is 0 after SIGTERM, which schedulers send, and 130 after Ctrl-C. At other moments there is
nothing to save: what is complete stays, and the status is 143 or 130. A second signal ends at once.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections
from rich.console import Console
from rich.table import Table

from videollm_mod_jax import cli
from videollm_mod_jax.console import make_console
from videollm_mod_jax.data import digits, files
from videollm_mod_jax.data.pipeline import Examples, evaluation_batches
from videollm_mod_jax.data.sources import TRAIN, TRAINED_ON, Sources, check_stored
from videollm_mod_jax.data.tokenizer import Tokenizer
from videollm_mod_jax.encode import encode_split, fingerprint
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.evaluation.stream import StreamReport, evaluate_stream
from videollm_mod_jax.experiment import Experiment, examples_for, plain
from videollm_mod_jax.models import VideoLLM, VideoLLMConfig
from videollm_mod_jax.training import checkpoint, distributed, loop
from videollm_mod_jax.training.checkpoint import LoadedModel
from videollm_mod_jax.training.initial import carry_manifest, check_start, variables_from
from videollm_mod_jax.training.sharding import (
    Layout,
    abstract_variables,
    init_sharded,
)
from videollm_mod_jax.training.step import HostBatch
from videollm_mod_jax.training.tower import pretrain_tower

TOWER = "tower"
HELD_OUT = "held_out.mp4"
EVALUATION = "evaluation.json"
VALIDATION = "validation"
SAMPLES = "samples.jsonl"

_CUT_SAMPLE = 256

Report = dict[str, dict[str, float]]


def train(
    config: ml_collections.ConfigDict,
    workdir: str | Path,
    profile_steps: int = 0,
    *,
    verify: bool = True,
) -> Report:
    """Runs an experiment in `workdir`, or what is left of it.

    Args:
      config: the table of a file in `configs/`.
      workdir: of the run; holds the model, the logs, the data and the evaluation afterwards.
      profile_steps: how many updates to trace.
      verify: whether to compare the weights to start from with their checksums; what the run itself
        has written is always compared.

    Returns:
      The streaming metrics by name, `before` and `after` training, as in `evaluation.json`.

    Raises:
      Stopped: SIGTERM came while training; the state is saved.
      UserError: the config does not fit, or `workdir` holds a run with another one, or another
        process trains there.
    """
    table, workdir = plain(config), Path(workdir)
    console = make_console(quiet=not distributed.is_lead())
    experiment = Experiment.from_table(table)
    # Refuse what cannot be used before anything is written.
    if experiment.data.tokenizer:
        Tokenizer.load(experiment.data.tokenizer)
    check_stored(experiment.data)
    if experiment.init:
        check_start(Path(experiment.init), experiment.model)
    with distributed.holding(workdir, "train"):
        loop.claim_workdir(workdir, table)
        return _train(experiment, table, workdir, profile_steps, verify, console)


def progress(workdir: Path) -> str:
    """Return where the same command goes on in a run's directory, in words."""
    steps = checkpoint.checkpoint_steps(workdir) if workdir.is_dir() else []
    if steps:
        return f"the same command continues after update {max(steps)}, the newest that is saved"
    return (
        "no update is saved yet; the same command keeps the dataset, tower and features that are "
        "complete, and starts training from update 1"
    )


def _train(
    experiment: Experiment,
    table: Mapping[str, Any],
    workdir: Path,
    profile_steps: int,
    verify: bool,
    console: Console,
) -> Report:
    console.rule("Data")
    with distributed.lead_first("dataset"):
        sources = Sources(experiment.data, workdir)
    start = _Start.prepare(experiment, sources, workdir, console, verify)
    model, tokenizer, tower = start.model, start.tokenizer, start.tower
    _remember_data(sources, workdir)
    tower_name = fingerprint(model, tower)

    def examples(name: str, split: str, training: bool = False) -> Examples:
        streams = sources.unencoded(name, split)
        if streams is not None:
            encode_split(model, tower, streams, sources.features_path(name, split))
        return examples_for(model, tower_name, sources, name, split, tokenizer, training)

    learnt = {name: examples(name, TRAIN, training=True) for name in sources.trained}
    _report_cuts(learnt, console)
    # They end early where training conversations would, and are never disturbed.
    validated = [
        examples(name, VALIDATION, training=True)
        for name in sources.trained
        if experiment.training.validate_every and VALIDATION in sources.dataset(name).splits
    ]

    def validation_batches() -> Iterator[HostBatch]:
        # What a device works on at once in training, so that it fits.
        size = experiment.data.batch_size // experiment.training.microbatches
        for held in validated:
            yield from evaluation_batches(held, size, jax.process_index(), jax.process_count())

    judged = experiment.evaluation.around_training
    split = experiment.evaluation.benchmarks.get(judged)
    held_out = examples(judged, split) if judged else None
    drawn = experiment.data.drawn
    if drawn is not None and distributed.is_lead() and not (workdir / HELD_OUT).exists():
        digits.stream_to_video(sources.dataset(drawn).streams("test")[0], workdir / HELD_OUT)

    def evaluate(model: LoadedModel) -> StreamReport:
        return evaluate_stream(model, held_out, batch_size=experiment.evaluation.batch_size)

    report = _read_report(workdir)
    if judged and "before" not in report:
        console.rule("Evaluation before training")
        layout = distributed.own_layout(experiment.training.sharding, experiment.training.mesh)
        variables = start.variables(layout)
        untrained = LoadedModel(model, variables, tokenizer, experiment.data.system)
        report["before"] = dataclasses.asdict(evaluate(untrained).metrics)
        _write_report(workdir, report)

    console.rule("Training")
    training = experiment.training
    training = dataclasses.replace(training, steps=sources.updates(training.steps))
    trained = loop.train(
        training,
        workdir,
        run_config=table,
        model_config=model,
        initial_variables=start.variables,
        tokenizer=tokenizer,
        system=experiment.data.system,
        batches_from=lambda start: sources.training_batches(
            learnt, start, jax.process_index(), jax.process_count()
        ),
        validation_batches=validation_batches if validated else None,
        profile_steps=profile_steps,
    )

    if judged:
        console.rule("Evaluation after training")
        after = evaluate(trained)
        report["after"] = dataclasses.asdict(after.metrics)
        _write_report(workdir, report)
        if distributed.is_lead():
            after.write_samples(workdir / SAMPLES)
        console.print(_table(report, f"{judged}: {len(after.samples)} held-out streams"))
    console.print(f"Model, logs and loss curve: {workdir}.")
    if (workdir / HELD_OUT).exists():
        console.print("Narrate a video nobody trained on:")
        console.print(
            f"  python -m videollm_mod_jax.stream --checkpoint {workdir} "
            f"--video {workdir / HELD_OUT} --out {workdir / 'narrated.mp4'}",
            soft_wrap=True,
        )
    return report


def _remember_data(sources: Sources, workdir: Path) -> None:
    """Writes what is learnt from, which a run that goes on must find as it was.

    Raises:
      UserError: it differs from what the run began with.
    """
    path, stretches = workdir / TRAINED_ON, sources.training_stretches()
    with distributed.lead_first("data") as lead:
        if path.exists() and files.read_json(path) != stretches:
            raise UserError(
                f"{path}: the run began with other records than there are now; prepare the "
                "datasets as they were, or choose another workdir"
            )
        if lead:
            checkpoint.write_json(path, stretches)


def _report_cuts(learnt: Mapping[str, Examples], console: Console) -> None:
    for name, examples in learnt.items():
        cut, looked_at = examples.count_cut(_CUT_SAMPLE)
        if cut:
            console.print(
                f"{name}: {cut} of {looked_at} training conversations exceed data.frames, "
                "text_tokens or labels and end early; raise them to learn the rest"
            )


@dataclasses.dataclass(frozen=True)
class _Start:
    """What a run starts from: a model that exists, or random weights and a pretrained tower.

    Attributes:
      init: directory of the model; None for random weights.
      model: the architecture.
      tokenizer: of the run.
      tower: parameters of the vision tower, in the host's memory.
      seed: of what is initialised.
      verify: whether to compare what is stored in `init` with its checksums.
    """

    init: Path | None
    model: VideoLLMConfig
    tokenizer: Tokenizer
    tower: Mapping[str, Any]
    seed: int
    verify: bool

    @classmethod
    def prepare(
        cls,
        experiment: Experiment,
        sources: Sources,
        workdir: Path,
        console: Console,
        verify: bool,
    ) -> "_Start":
        seed = experiment.training.seed
        if not experiment.init:
            tokenizer = sources.make_tokenizer()
            decoder = dataclasses.replace(experiment.model.decoder, vocab_size=tokenizer.vocab_size)
            model = dataclasses.replace(experiment.model, decoder=decoder)
            tower = tower_of(model, experiment, workdir / TOWER, console)
            return cls(None, model, tokenizer, tower, seed, verify)
        init, model = Path(experiment.init), experiment.model
        tokenizer = Tokenizer.load(experiment.data.tokenizer or init)
        tokenizer.check_rows(model.decoder.vocab_size, str(init), checkpoint.ROWS_REMEDY)
        if distributed.is_lead():
            carry_manifest(init, workdir)
        tower = jax.device_get(checkpoint.load_tower(init, verify=verify))
        return cls(init, model, tokenizer, tower, seed, verify)

    def variables(self, layout: Layout) -> Mapping[str, Any]:
        """All variables before the first update."""
        key = jax.random.key(self.seed)
        if self.init:
            return variables_from(self.init, self.model, key, layout, verify=self.verify)
        variables = init_sharded(VideoLLM(self.model), key, layout)
        return variables | {"params": variables["params"] | {"vision": self.tower}}


def tower_of(
    model: VideoLLMConfig, experiment: Experiment, directory: Path, console: Console
) -> Mapping[str, Any]:
    """Parameters of the vision tower: of an earlier run, or pretrained now."""
    if not (directory / checkpoint.WEIGHTS).exists():
        # In every process: it takes less time than it would take to wait for one.
        tower = pretrain_tower(model.vision, experiment.tower, experiment.canvas)
        console.print(
            f"Vision tower on unseen scans: {tower.digit_accuracy:.1%} of digits and "
            f"{tower.empty_accuracy:.1%} of empty places are named right."
        )
        checkpoint.write_weights(directory, jax.device_get(tower.params))
    target = abstract_variables(VideoLLM(model), None)["params"]["vision"]
    return jax.device_get(checkpoint.read_weights(directory, target))


def _read_report(workdir: Path) -> Report:
    path = workdir / EVALUATION
    return files.read_json(path) if path.exists() else {}


def _write_report(workdir: Path, report: Report) -> None:
    if distributed.is_lead():
        checkpoint.write_json(workdir / EVALUATION, report)


def _table(report: Report, title: str) -> Table:
    table = Table(title=title)
    columns = ("LM-PPL ↓", "TimeDiff ↓", "Fluency ↑", "LM-Correctness ↑")
    for column in ("", *columns):
        table.add_column(column, justify="right")
    for name, values in report.items():
        table.add_row(
            f"{name} training",
            f"{values['lm_ppl']:.2f}",
            f"{values['time_diff']:.2f} s",
            f"{values['fluency']:.1%}",
            f"{values['lm_correctness']:.1%}",
        )
    return table


if __name__ == "__main__":
    cli.run_with_config(train, progress)
