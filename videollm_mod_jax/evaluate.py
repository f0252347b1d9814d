"""Evaluates a trained model on a split of the dataset of its run.

    python -m videollm_mod_jax.evaluate --checkpoint runs/digits --split test

Prints LM-PPL, TimeDiff, Fluency and LM-Correctness, as VideoLLM-online defines them. Several
processes share the streams.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from videollm_mod_jax import cli
from videollm_mod_jax.data.sources import Sources
from videollm_mod_jax.encode import encode_split, fingerprint
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.evaluation.stream import StreamReport, evaluate_stream
from videollm_mod_jax.experiment import Experiment, examples_for
from videollm_mod_jax.streaming.triggers import check_threshold
from videollm_mod_jax.training import distributed
from videollm_mod_jax.training.checkpoint import CONFIG_FILE, load_model, read_json


def evaluate(
    checkpoint: str | Path,
    split: str | None = None,
    batch_size: int | None = None,
    silence_threshold: float | None = None,
) -> StreamReport:
    """Evaluates the model of a run; needs only its directory.

    Args:
      checkpoint: directory of the run.
      split: of its dataset; None is the one that its config names.
      batch_size: streams per forward; None is that of its config.
      silence_threshold: see `triggers.breaks_silence`.

    Raises:
      UserError: no run there, an unknown split, or a setting out of range.
    """
    check_threshold(silence_threshold)
    directory = Path(checkpoint)
    model = load_model(directory)
    if not (directory / CONFIG_FILE).exists():
        raise UserError(
            f"{directory} holds no {CONFIG_FILE}, which names the dataset; expected the directory "
            "of a training run"
        )
    experiment = Experiment.from_table(read_json(directory / CONFIG_FILE))
    name = experiment.evaluation.around_training
    split = experiment.evaluation.benchmarks[name] if split is None else split
    batch_size = experiment.evaluation.batch_size if batch_size is None else batch_size
    if batch_size < 1:
        raise UserError(f"--batch-size is {batch_size}; expected at least 1")
    with distributed.lead_first("dataset"):
        sources = Sources(experiment.data, directory)
    tower = model.variables["params"]["vision"]
    streams = sources.unencoded(name, split)
    if streams is not None:
        encode_split(model.config, tower, streams, sources.features_path(name, split))
    examples = examples_for(
        model.config, fingerprint(model.config, tower), sources, name, split, model.tokenizer
    )
    return evaluate_stream(
        model, examples, batch_size=batch_size, silence_threshold=silence_threshold
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    arguments = _parser().parse_args(argv)
    return cli.report_user_errors(lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> None:
    cli.join_processes(arguments)
    report = evaluate(
        arguments.checkpoint, arguments.split, arguments.batch_size, arguments.silence_threshold
    )
    if not distributed.is_lead():
        return
    console, metrics = Console(), report.metrics
    turns = sum(sample.turns for sample in report.samples)
    table = Table(title=f"{len(report.samples)} streams, {turns} turns")
    for column in ("LM-PPL ↓", "TimeDiff ↓", "Fluency ↑", "LM-Correctness ↑"):
        table.add_column(column, justify="right")
    table.add_row(
        f"{metrics.lm_ppl:.3f}",
        f"{metrics.time_diff:.3f} s",
        f"{metrics.fluency:.1%}",
        f"{metrics.lm_correctness:.1%}",
    )
    console.print(table)
    if arguments.out is not None:
        report.write_samples(arguments.out)
        console.print(f"wrote {arguments.out}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m videollm_mod_jax.evaluate",
        description="Evaluates a trained model, teacher-forced, on streams of its run's dataset.",
    )
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="directory of a training run")
    add("--split", help="of the dataset; by default the one that the run's config names")
    add("--batch-size", type=int, metavar="B", help="streams at a time; by default the config's")
    add(
        "--silence-threshold",
        type=float,
        metavar="P",
        help="the model speaks where the probability of silence is below P in [0, 1]; by default "
        "where silence is not the likeliest",
    )
    add("--out", metavar="FILE.jsonl", help="write the metrics of every stream")
    cli.add_process_arguments(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
