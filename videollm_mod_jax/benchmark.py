r"""Measures what routing saves: times, operations and memory of both models, beside the floor.

    python -m videollm_mod_jax.benchmark train --config configs/benchmark.py:tiny --out results
    python -m videollm_mod_jax.benchmark memory --config configs/benchmark.py:llama3-8b \
        --topology v5p:2x2x2 --frames 600 1200 2400 4800 --out results
    python -m videollm_mod_jax.benchmark summary results

The model of a config, with random weights, and the same without routing take turns in one process.
Every result is a table, OUT/NAME.json with all that it depends on, and pictures. Any key of the
config can be overridden: --config.data.batch_size=2. `launch/benchmark.sh` runs all of it.
"""

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import rich.console
from rich.table import Table

from videollm_mod_jax import cli
from videollm_mod_jax.benchmarking import (
    kernels,
    plots,
    report,
    stream_tables,
    summary,
    tables,
)
from videollm_mod_jax.benchmarking.kernels import benchmark_kernels
from videollm_mod_jax.benchmarking.memory import benchmark_memory, check_rising
from videollm_mod_jax.benchmarking.streaming import StreamSettings, benchmark_stream
from videollm_mod_jax.benchmarking.training import benchmark_training
from videollm_mod_jax.console import make_console
from videollm_mod_jax.data.config import DataConfig
from videollm_mod_jax.experiment import plain, read_training
from videollm_mod_jax.locks import locked
from videollm_mod_jax.models import VideoLLMConfig
from videollm_mod_jax.planning import (
    Plan,
    longest_stream,
    plan_streaming,
    plan_training,
    scale_frames,
)
from videollm_mod_jax.training import compiled
from videollm_mod_jax.training.run import TrainingConfig

Parts = tuple[VideoLLMConfig, DataConfig, TrainingConfig]


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A subcommand that measures.

    Attributes:
      run: given the flags, what reads the config, and what announces the next stage: the result.
      tables, draw: of the result, the latter into a directory.
    """

    run: Callable[[argparse.Namespace, Callable[[], Parts], Callable[[str], None]], dict[str, Any]]
    tables: Callable[[dict[str, Any]], list[Table]]
    draw: Callable[[dict[str, Any], Path], list[Path]]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    arguments, overrides = _parser().parse_known_args(argv)
    return cli.report_user_errors(lambda: _run(arguments, overrides))


def _run(arguments: argparse.Namespace, overrides: list[str]) -> None:
    console = make_console(stderr=True)
    if arguments.verb == "summary":
        console.print(f"wrote {summary.write(arguments.directory)}")
        return
    with locked(arguments.out, "benchmark"):
        _measure(arguments, overrides, console)


def _measure(
    arguments: argparse.Namespace, overrides: list[str], console: rich.console.Console
) -> None:
    # Before an hour of measuring, not after it.
    report.path(arguments.out, arguments.verb)
    benchmark = _BENCHMARKS[arguments.verb]

    def read() -> Parts:
        return read_training(plain(cli.read_config(arguments.config, overrides)))

    result = {"config": arguments.config, "overrides": overrides}
    result |= benchmark.run(arguments, read, console.print)
    file = report.write(arguments.out, arguments.verb, result)
    written = report.read(file)
    for table in benchmark.tables(written):
        make_console().print(table)
    for path in (file, *benchmark.draw(written, arguments.out)):
        console.print(f"wrote {path}")


def _train(
    arguments: argparse.Namespace, read: Callable[[], Parts], announce: Callable[[str], None]
) -> dict[str, Any]:
    model, data, training = read()
    frames = arguments.frames or [data.frames]
    check_rising("--frames", frames)
    return benchmark_training(
        model,
        [scale_frames(data, count) for count in frames],
        training,
        rounds=arguments.rounds,
        warmup=arguments.warmup,
        announce=announce,
    )


def _memory(
    arguments: argparse.Namespace, read: Callable[[], Parts], announce: Callable[[str], None]
) -> dict[str, Any]:
    compiled.claim_no_device(arguments.topology)
    model, data, training = read()
    target = compiled.find_target(arguments.topology)

    def train(model: VideoLLMConfig, frames: int) -> Plan:
        return plan_training(model, scale_frames(data, frames), training, target)

    def stream(model: VideoLLMConfig, frames: int) -> dict[str, Any]:
        return dataclasses.asdict(plan_streaming(model, scale_frames(data, frames), target))

    def longest(model: VideoLLMConfig) -> dict[str, Any] | None:
        found = longest_stream(
            lambda frames: train(model, frames),
            data.frames,
            lambda plan: announce(f"{plan.frames} frames: {'fits' if plan.fits else 'too large'}"),
        )
        return found and dataclasses.asdict(found)

    found = benchmark_memory(
        model,
        arguments.frames or [data.frames],
        plan_training=lambda model, frames: dataclasses.asdict(train(model, frames)),
        plan_streaming=stream,
        longest=longest if arguments.max_frames else None,
        announce=announce,
    )
    where = {"topology": arguments.topology, "devices": len(target.devices)}
    return {"target": where, "batch_size": data.batch_size, **found}


def _stream(
    arguments: argparse.Namespace, read: Callable[[], Parts], announce: Callable[[str], None]
) -> dict[str, Any]:
    model, data, training = read()
    settings = StreamSettings(
        minutes=tuple(arguments.minutes),
        fps=arguments.fps,
        streams=tuple(arguments.streams),
        new_tokens=arguments.new_tokens,
        rounds=arguments.rounds,
        warmup=arguments.warmup,
        int8=arguments.int8,
    )
    return benchmark_stream(model, data, training.kernels, settings, announce)


def _kernels(
    arguments: argparse.Namespace, read: Callable[[], Parts], announce: Callable[[str], None]
) -> dict[str, Any]:
    check_rising("--lengths", arguments.lengths)
    return benchmark_kernels(
        *read(),
        lengths=arguments.lengths,
        rounds=arguments.rounds,
        warmup=arguments.warmup,
        announce=announce,
    )


_BENCHMARKS = {
    "train": Benchmark(_train, tables.training_tables, plots.draw_training),
    "stream": Benchmark(_stream, stream_tables.tables, plots.draw_streaming),
    "memory": Benchmark(_memory, tables.memory_tables, plots.draw_memory),
    "kernels": Benchmark(_kernels, kernels.tables, lambda result, out: []),
}


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="python -m videollm_mod_jax.benchmark",
        description="Measures what routing saves: times, operations and memory of the model of a "
        "config and of the same without routing, in turn, beside the floor.",
        allow_abbrev=False,
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    epilog = "Keys of the config are overridden as in train: --config.data.batch_size=2."

    def add(name: str, text: str) -> argparse.ArgumentParser:
        verb = verbs.add_parser(
            name, help=text, description=text, epilog=epilog, allow_abbrev=False
        )
        verb.add_argument(
            "--config", required=True, metavar="FILE", help="configs/benchmark.py:tiny, say"
        )
        verb.add_argument(
            "--out", required=True, type=Path, metavar="DIR", help="for NAME.json and pictures"
        )
        return verb

    def add_rounds(verb: argparse.ArgumentParser) -> None:
        verb.add_argument(
            "--rounds",
            type=cli.whole_number("[1, 2**31)"),
            default=10,
            help="timed calls of each variant (10)",
        )
        verb.add_argument(
            "--warmup",
            type=cli.whole_number("[1, 2**31)"),
            default=2,
            help="calls before them, not timed (2)",
        )

    train = add("train", "time the training step on the devices of this machine")
    train.add_argument(
        "--frames",
        type=cli.whole_number("[0, 2**31)"),
        nargs="+",
        metavar="F",
        help="also for other lengths, text in proportion; by default that of the config",
    )
    add_rounds(train)
    stream = add("stream", "time a frame and a token of streams of several lengths")
    stream.add_argument(
        "--minutes",
        type=cli.number("(0, 1e6]"),
        nargs="+",
        default=[1, 10, 60],
        metavar="M",
        help="of video before the frame (1 10 60)",
    )
    stream.add_argument(
        "--fps",
        type=cli.number("[1e-3, 1000]"),
        default=2,
        help="frames per second of the video (2)",
    )
    stream.add_argument(
        "--streams",
        type=cli.whole_number("[1, 2**31)"),
        nargs="+",
        default=[1],
        metavar="B",
        help="that advance together; more than one behind the middle one of the minutes (1)",
    )
    stream.add_argument(
        "--new-tokens", type=cli.whole_number("[1, 2**31)"), default=32, help="of an answer (32)"
    )
    cli.add_int8_argument(stream)
    add_rounds(stream)
    parts = add("kernels", "time attention, layers and routing apart, at the shapes of the config")
    parts.add_argument(
        "--lengths",
        type=cli.whole_number("[1, 2**31)"),
        nargs="+",
        default=[1024, 8192, 65536],
        metavar="U",
        help="filled entries of a cache, the largest its capacity (1024 8192 65536)",
    )
    add_rounds(parts)
    memory = add("memory", "compile for devices that need not be here, and read what memory it is")
    memory.add_argument(
        "--topology", required=True, metavar="NAME", help="v5e:4x4, v5p:2x2x2, h200:8, cpu:1"
    )
    memory.add_argument(
        "--frames",
        type=cli.whole_number("[0, 2**31)"),
        nargs="+",
        metavar="F",
        help="lengths, text in proportion",
    )
    memory.add_argument(
        "--max-frames", action="store_true", help="find the longest training stream that fits, too"
    )
    page = verbs.add_parser(
        "summary",
        help="write DIR/README.md: the targets beside what was measured",
        allow_abbrev=False,
    )
    page.add_argument("directory", type=Path, metavar="DIR", help="holds results, at any depth")
    return parser


if __name__ == "__main__":
    cli.leave(main())
