r"""Times our training update, Full and MoD, beside the PyTorch stack's; see README.md.

python -m tests.peers.train --config configs/benchmark.py:tiny --out DIR
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence

from rich.console import Console

from tests.peers import running
from videollm_mod_jax import cli
from videollm_mod_jax.benchmarking import report
from videollm_mod_jax.experiment import plain, read_training

NAME = "peer_train"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = running.parser("train", __doc__.splitlines()[0])
    arguments, overrides = parser.parse_known_args(argv)
    return cli.report_user_errors(lambda: _run(arguments, overrides))


def _run(arguments: argparse.Namespace, overrides: list[str]) -> None:
    model, data, training = read_training(plain(cli.read_config(arguments.config, overrides)))
    file = report.path(arguments.out, NAME)
    threads = running.prepare(arguments.threads)
    from tests.peers.training import benchmark_training

    result = benchmark_training(
        model,
        data,
        training,
        rounds=arguments.rounds,
        warmup=arguments.warmup,
        compiled=arguments.compile,
    )
    report.write(
        arguments.out,
        NAME,
        {
            "config": arguments.config,
            "overrides": overrides,
            "threads": threads,
            "versions": running.versions(),
            "shapes": {
                "batch_size": data.batch_size,
                "frames": data.frames,
                "tokens_per_frame": model.tokens_per_frame,
                "text_tokens": data.text_tokens,
                "labels": data.labels,
            },
            "model": model.to_dict(),
            "training": dataclasses.asdict(training),
            **result,
        },
    )
    title = (
        f"Training update, {data.batch_size} x ({data.frames} frames x {model.tokens_per_frame} + "
        f"{data.text_tokens} text tokens)"
    )
    console = Console()
    console.print(report.table(title, list(result["seconds"]), running.rows(result)))
    console.print(f"written: {file}")


if __name__ == "__main__":
    sys.exit(main())
