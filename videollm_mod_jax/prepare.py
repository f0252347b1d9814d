"""Makes a dataset of annotated videos ready for training and evaluation.

    python -m videollm_mod_jax.prepare --dataset own --source my_annotations \
        --features features/my_videos --out datasets

reads the annotations below `--source` as the page of the dataset (`--page own`) describes them,
and writes records about the videos of the feature store, which `encode` made, to `datasets/own`.
Every annotation that is not used is counted under a reason, with the file, record and field of the
first ones; the counts are kept in `datasets/own/*/dataset.json`.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from videollm_mod_jax import cli
from videollm_mod_jax.console import make_console
from videollm_mod_jax.data import files
from videollm_mod_jax.data.annotations import Report, Source
from videollm_mod_jax.data.builders import registry
from videollm_mod_jax.data.builders.stored import Split, check_dataset, open_dataset, write_dataset
from videollm_mod_jax.data.features import FeatureSource
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.locks import locked

MAX_FRAMES = 600
"""Five minutes at 2 fps: `data.frames` of configs/ego4d_narration.py."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    arguments = _parser().parse_args(argv)
    return cli.report_user_errors(
        lambda: _run(arguments), "interrupted; nothing was written, the same command starts again"
    )


def _run(arguments: argparse.Namespace) -> None:
    if arguments.list:
        _print_names()
    elif arguments.page is not None:
        print(registry.find_dataset(arguments.page).page)
    else:
        _prepare(arguments)


def _print_names() -> None:
    table = Table.grid("name", "summary", padding=(0, 2))
    for name, dataset in registry.DATASETS.items():
        paragraphs = (p for p in dataset.page.split("\n\n") if p and p[0] != "#")
        table.add_row(name, Text(" ".join(next(paragraphs).split())))
    make_console().print(table)


def _prepare(arguments: argparse.Namespace) -> None:
    needed = ("dataset", "source", "features")
    missing = [f"--{name}" for name in needed if getattr(arguments, name) is None]
    if missing:
        raise UserError(f"{' and '.join(missing)}: missing; see --help, or --list for the datasets")
    if arguments.max_frames < 1:
        raise UserError(f"--max-frames is {arguments.max_frames}; expected 1 or more")
    dataset = registry.find_dataset(arguments.dataset)
    if not Path(arguments.source).is_dir():
        raise UserError(f"--source: there is no directory {arguments.source}")
    source = Source(
        directory=Path(arguments.source),
        videos=FeatureSource(arguments.features).videos,
        max_frames=arguments.max_frames,
        report=Report(),
    )
    try:
        if arguments.check:
            splits = check_dataset(dataset, source)
        else:
            path = Path(arguments.out) / dataset.name
            with locked(path, "prepare", beside=True):
                files.remove_leftovers_of(path)
                existed = path.exists()
                write_dataset(dataset, source, Path(arguments.out))
            splits = open_dataset(path).splits
    except UserError:
        _print_report(source.report)
        raise
    _print_report(source.report)
    _print_splits(splits)
    if not arguments.check:
        print(f"{path} holds these records already" if existed else f"wrote {path}")


def _print_report(report: Report) -> None:
    """Prints how many annotations were kept and dropped, why, and the first of every reason."""
    dropped = report.dropped.total()
    print(f"{report.kept:,} annotations kept, {dropped:,} dropped")
    for reason, count in report.dropped.most_common():
        print(f"  {count:>9,}  {reason}")
        for example in report.examples[reason]:
            print(f"{'':>13}{_printable(example)}")


def _printable(text: str) -> str:
    """On one line, for any terminal: the names in damaged files hold line ends and worse."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _print_splits(splits: Mapping[str, Split]) -> None:
    table = Table()
    table.add_column("split")
    for column in ("records", "videos", "frames", "turns"):
        table.add_column(column, justify="right")
    for name, split in splits.items():
        counts = (split.records, split.videos, split.frames, split.turns)
        table.add_row(name, *(f"{count:,}" for count in counts))
    make_console().print(table)


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="python -m videollm_mod_jax.prepare",
        description="Turns the annotations of a dataset into records about encoded videos.",
    )
    add = parser.add_argument
    add("--list", action="store_true", help="print the names of the datasets")
    add("--page", metavar="NAME", help="print where to get a dataset, its files and its records")
    add("--dataset", metavar="NAME", help="which dataset to prepare")
    add("--source", metavar="DIR", help="directory of its annotations")
    add("--features", metavar="DIR", help="feature store of its videos, made by encode")
    add("--out", metavar="DIR", default="datasets", help="writes DIR/NAME (default: datasets)")
    add(
        "--max-frames",
        type=cli.whole_number("[1, 2**20]"),
        metavar="F",
        default=MAX_FRAMES,
        help="frames of the longest record, data.frames of the config that will use it; the page "
        "of the dataset says what becomes of longer videos (default: %(default)s)",
    )
    add("--check", action="store_true", help="read everything and report, but write nothing")
    return parser


if __name__ == "__main__":
    cli.leave(main())
