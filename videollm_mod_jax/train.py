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

SIGTERM saves, ends with status 0 and says so; the same command continues there.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections
from rich.console import Console
from rich.table import Table

from videollm_mod_jax import cli
from videollm_mod_jax.data import digits
from videollm_mod_jax.data.tokenizer import Tokenizer
from videollm_mod_jax.encode import encode_split
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.evaluation.stream import evaluate_stream
from videollm_mod_jax.experiment import Dataset, Experiment, plain
from videollm_mod_jax.models import VideoLLM, VideoLLMConfig
from videollm_mod_jax.training import checkpoint, distributed, loop
from videollm_mod_jax.training.checkpoint import LoadedModel
from videollm_mod_jax.training.initial import carry_manifest, check_start, variables_from
from videollm_mod_jax.training.sharding import (
    Layout,
    abstract_variables,
    init_sharded,
)
from videollm_mod_jax.training.tower import TowerConfig, pretrain_tower

TOWER = "tower"
HELD_OUT = "held_out.mp4"
EVALUATION = "evaluation.json"
SAMPLES = "samples.jsonl"

Report = dict[str, dict[str, float]]


def train(config: ml_collections.ConfigDict, workdir: str | Path, profile_steps: int = 0) -> Report:
    """Runs an experiment in `workdir`, or what is left of it.

    Args:
      config: the table of a file in `configs/`.
      workdir: of the run; holds the model, the logs, the data and the evaluation afterwards.
      profile_steps: how many updates to trace.

    Returns:
      The streaming metrics by name, `before` and `after` training, as in `evaluation.json`.

    Raises:
      Stopped: SIGTERM came while training; the state is saved.
      UserError: the config does not fit, or `workdir` holds a run with another one.
    """
    table, workdir = plain(config), Path(workdir)
    console = Console(quiet=not distributed.is_lead())
    experiment = Experiment.from_table(table)
    # Refuse what cannot be used before anything is written.
    if experiment.data.tokenizer:
        Tokenizer.load(experiment.data.tokenizer)
    if experiment.init:
        check_start(Path(experiment.init), experiment.model)
    loop.claim_workdir(workdir, table)

    console.rule("Data")
    with distributed.lead_first("dataset"):
        dataset = Dataset(experiment.data, workdir)
    start = _Start.prepare(experiment, dataset, workdir, console)
    model, tokenizer, tower = start.model, start.tokenizer, start.tower
    examples = {}
    for split in dict.fromkeys(("train", experiment.evaluation.split)):
        if not dataset.features_path(split).exists():
            encode_split(model, tower, dataset.records(split), dataset.features_path(split))
        examples[split] = dataset.examples(split, tokenizer, model)
    if distributed.is_lead() and not (workdir / HELD_OUT).exists():
        digits.stream_to_video(dataset.records("test")[0], workdir / HELD_OUT)

    def evaluate(model: LoadedModel) -> Any:
        split, batch_size = experiment.evaluation.split, experiment.evaluation.batch_size
        return evaluate_stream(model, examples[split], batch_size=batch_size)

    report = _read_report(workdir)
    if "before" not in report:
        console.rule("Evaluation before training")
        training = experiment.training
        variables = start.variables(distributed.own_layout(training.sharding, training.mesh))
        untrained = LoadedModel(model, variables, tokenizer, experiment.data.system)
        report["before"] = dataclasses.asdict(evaluate(untrained).metrics)
        _write_report(workdir, report)

    console.rule("Training")
    trained = loop.train(
        experiment.training,
        workdir,
        run_config=table,
        model_config=model,
        initial_variables=start.variables,
        tokenizer=tokenizer,
        system=experiment.data.system,
        batches_from=lambda start: dataset.training_batches(examples["train"], start),
        profile_steps=profile_steps,
    )

    console.rule("Evaluation after training")
    after = evaluate(trained)
    report["after"] = dataclasses.asdict(after.metrics)
    _write_report(workdir, report)
    if distributed.is_lead():
        after.write_samples(workdir / SAMPLES)
    console.print(_table(report, f"{len(after.samples)} held-out streams"))
    console.print(f"Model, logs and loss curve: {workdir}. Narrate a video nobody trained on:")
    console.print(
        f"  python -m videollm_mod_jax.stream --checkpoint {workdir} --video {workdir / HELD_OUT} "
        f"--out {workdir / 'narrated.mp4'}",
        soft_wrap=True,
    )
    return report


@dataclasses.dataclass(frozen=True)
class _Start:
    """What a run starts from: a model that exists, or random weights and a pretrained tower.

    Attributes:
      init: directory of the model; None for random weights.
      model: the architecture.
      tokenizer: of the run.
      tower: parameters of the vision tower, in the host's memory.
      seed: of what is initialised.
    """

    init: Path | None
    model: VideoLLMConfig
    tokenizer: Tokenizer
    tower: Mapping[str, Any]
    seed: int

    @classmethod
    def prepare(
        cls, experiment: Experiment, dataset: Dataset, workdir: Path, console: Console
    ) -> "_Start":
        seed = experiment.training.seed
        if not experiment.init:
            tokenizer = dataset.make_tokenizer()
            decoder = dataclasses.replace(experiment.model.decoder, vocab_size=tokenizer.vocab_size)
            model = dataclasses.replace(experiment.model, decoder=decoder)
            tower = _tower(model, experiment.tower, workdir / TOWER, console)
            return cls(None, model, tokenizer, tower, seed)
        init, model = Path(experiment.init), experiment.model
        tokenizer = Tokenizer.load(experiment.data.tokenizer or init)
        if tokenizer.vocab_size > model.decoder.vocab_size:
            raise UserError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, and the model in {init} has "
                f"embeddings for {model.decoder.vocab_size}; use the tokenizer it came with"
            )
        if distributed.is_lead():
            carry_manifest(init, workdir)
        tower = jax.device_get(checkpoint.load_tower(init))
        return cls(init, model, tokenizer, tower, seed)

    def variables(self, layout: Layout) -> Mapping[str, Any]:
        """All variables before the first update."""
        key = jax.random.key(self.seed)
        if self.init:
            return variables_from(self.init, self.model, key, layout)
        variables = init_sharded(VideoLLM(self.model), key, layout)
        return variables | {"params": variables["params"] | {"vision": self.tower}}


def _tower(
    model: VideoLLMConfig, config: TowerConfig, directory: Path, console: Console
) -> Mapping[str, Any]:
    """Parameters of the vision tower: of an earlier run, or pretrained now."""
    if not (directory / checkpoint.WEIGHTS).exists():
        # In every process: it takes less time than it would take to wait for one.
        tower = pretrain_tower(model.vision, config)
        console.print(
            f"Vision tower on unseen scans: {tower.digit_accuracy:.1%} of digits and "
            f"{tower.empty_accuracy:.1%} of empty places are named right."
        )
        checkpoint.write_weights(directory, jax.device_get(tower.params))
    target = abstract_variables(VideoLLM(model), None)["params"]["vision"]
    return jax.device_get(checkpoint.read_weights(directory, target))


def _read_report(workdir: Path) -> Report:
    path = workdir / EVALUATION
    return checkpoint.read_json(path) if path.exists() else {}


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
    cli.run_with_config(train)
