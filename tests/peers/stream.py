r"""Times our frame step, Full and MoD, beside the PyTorch stack's; see README.md.

python -m tests.peers.stream --config configs/benchmark.py:tiny --minutes 1 10 60 --out DIR
"""

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console

from tests.peers import running
from videollm_mod_jax import cli
from videollm_mod_jax.benchmarking import report
from videollm_mod_jax.experiment import plain, read_training

NAME = "peer_stream"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = running.parser("stream", __doc__.splitlines()[0])
    add = parser.add_argument
    add("--minutes", type=running.positive, nargs="+", default=[1, 10, 60], help="of the stream")
    add("--fps", type=running.positive, default=2, help="frames per second (2)")
    arguments, overrides = parser.parse_known_args(argv)
    return cli.report_user_errors(lambda: _run(arguments, overrides))


def _run(arguments: argparse.Namespace, overrides: list[str]) -> None:
    model, _, training = read_training(plain(cli.read_config(arguments.config, overrides)))
    file = report.path(arguments.out, NAME)
    threads = running.prepare(arguments.threads)
    from tests.peers.streaming import benchmark_streaming

    console = Console()
    result = benchmark_streaming(
        model,
        training.kernels,
        minutes=tuple(arguments.minutes),
        fps=arguments.fps,
        rounds=arguments.rounds,
        warmup=arguments.warmup,
        compiled=arguments.compile,
        announce=console.print,
    )
    report.write(
        arguments.out,
        NAME,
        {
            "config": arguments.config,
            "overrides": overrides,
            "threads": threads,
            "versions": running.versions(),
            "fps": arguments.fps,
            "tokens_per_frame": model.tokens_per_frame,
            "model": model.to_dict(),
            "contexts": result,
        },
    )
    for row in result:
        title = f"Frame step behind {row['minutes']} minutes ({row['frames']} frames)"
        console.print(report.table(title, list(row["seconds"]), running.rows(row)))
    console.print(f"written: {file}")


if __name__ == "__main__":
    sys.exit(main())
