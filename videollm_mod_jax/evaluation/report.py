"""Results as tables in the layout of the paper, for the terminal and as Markdown.

A report is what `evaluate` writes: what the model is, and scores by benchmark. Several reports, of
models that are to be compared, share their tables, one row each.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from videollm_mod_jax.data import files
from videollm_mod_jax.evaluation.running import (
    ANSWERS,
    SELF_CONDITIONED,
    STREAM,
    TEACHER_FORCED,
)
from videollm_mod_jax.models import VideoLLMConfig, config_plan
from videollm_mod_jax.models.flops import flops
from videollm_mod_jax.names import check_name

Report = Mapping[str, Any]

ABSENT = "-"
_TRAINED_ON = "†"
_BOUNDLESS = 10_000  # characters, wider than any table
# The stream for which arXiv 2408.16730 counts operations.
_FRAMES, _TEXT_TOKENS = 600, 601


@dataclasses.dataclass(frozen=True)
class Grid:
    """A table of texts.

    Attributes:
      title: of it.
      columns: their headings.
      rows: as many texts each as there are columns.
      notes: what must be known to read it.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class _Column:
    """Where a number comes from and how it is shown; `scale` makes percent of a share."""

    heading: str
    dataset: str
    part: str
    score: str
    scale: float = 100.0
    decimals: int = 1


_LAYOUT: tuple[tuple[str, tuple[_Column, ...]], ...] = (
    (
        "COIN, top-1 accuracy (%)",
        (
            _Column("Step ↑", "coin_step", ANSWERS, "accuracy"),
            _Column("Task ↑", "coin_task", ANSWERS, "accuracy"),
            _Column("Next ↑", "coin_next", ANSWERS, "accuracy"),
            _Column("Procedure ↑", "coin_procedure", ANSWERS, "accuracy"),
            _Column("Procedure + goal ↑", "coin_procedure_goal", ANSWERS, "accuracy"),
        ),
    ),
    (
        "Ego4D LTA, edit distance at 20",
        (
            _Column("Verb ↓", "ego4d_lta", ANSWERS, "verb", 1.0, 3),
            _Column("Noun ↓", "ego4d_lta", ANSWERS, "noun", 1.0, 3),
            _Column("Action ↓", "ego4d_lta", ANSWERS, "action", 1.0, 3),
        ),
    ),
    (
        "Ego-Exo4D keystep, top-1 accuracy (%)",
        (_Column("Accuracy ↑", "egoexo4d_keystep", ANSWERS, "accuracy", decimals=2),),
    ),
    (
        "Video-MME without subtitles, accuracy (%)",
        (
            _Column("Overall ↑", "videomme", ANSWERS, "accuracy"),
            _Column("Short ↑", "videomme", ANSWERS, "short"),
            _Column("Medium ↑", "videomme", ANSWERS, "medium"),
            _Column("Long ↑", "videomme", ANSWERS, "long"),
        ),
    ),
    (
        "Images",
        (
            _Column("GQA (%) ↑", "image_qa_gqa", ANSWERS, "accuracy"),
            _Column("MME perception ↑", "image_qa_mme", ANSWERS, "perception", 1.0),
            _Column("POPE F1 (%) ↑", "image_qa_pope", ANSWERS, "f1"),
            _Column("ScienceQA-IMG (%) ↑", "image_qa_scienceqa", ANSWERS, "accuracy"),
        ),
    ),
    (
        "Open video question answering, accuracy (%)",
        (
            _Column("MSVD ↑", "video_qa_msvd", ANSWERS, "accuracy"),
            _Column("MSRVTT ↑", "video_qa_msrvtt", ANSWERS, "accuracy"),
            _Column("ActivityNet ↑", "video_qa_activitynet", ANSWERS, "accuracy"),
        ),
    ),
)


def _stream_columns(dataset: str) -> tuple[_Column, ...]:
    own = f", {SELF_CONDITIONED}"
    return (
        _Column("LM-PPL ↓", dataset, TEACHER_FORCED, "lm_ppl", 1.0, 2),
        _Column("TimeDiff (s) ↓", dataset, TEACHER_FORCED, "time_diff", 1.0, 2),
        _Column("Fluency (%) ↑", dataset, TEACHER_FORCED, "fluency"),
        _Column("LM-Correctness (%) ↑", dataset, TEACHER_FORCED, "lm_correctness"),
        _Column(f"F1 at IoU 0.5 (%){own} ↑", dataset, SELF_CONDITIONED, "f1"),
        _Column(f"F1 within a frame (%){own} ↑", dataset, SELF_CONDITIONED, "f1_in_window"),
        _Column(f"CIDEr{own} ↑", dataset, SELF_CONDITIONED, "cider"),
    )


def describe_model(config: VideoLLMConfig) -> dict[str, Any]:
    """What tables say of a model: the paper's name of the variant, tokens per frame, operations.

    `macs` counts as the paper's "FLOPs" do, for its stream of 600 frames; see `Flops.paper_macs`.
    """
    return {
        "name": variant(config),
        "tokens_per_frame": config.tokens_per_frame,
        "macs": flops(config, _FRAMES, _TEXT_TOKENS, 0).paper_macs,
    }


def variant(config: VideoLLMConfig) -> str:
    """The paper's name of an architecture.

    ```
    routed layers    keep    tokens per frame
    none             -       1                   VideoLLM-online
    none             -       10                  Full-computation
    2, 3, ... last   0       10                  EarlyExit (layer 2)
    1, 3, 5, ...     0       10                  LayerSkip
    1, 3, 5, ...     0.2     10                  VideoLLM-MoD r=0.2
    all              0.2     10                  VideoLLM-MoD r=0.2, all
    ```
    """
    routing = config.routing
    keeps = [spec.keep for spec in config_plan(config)]
    routed = [i for i, keep in enumerate(keeps) if keep is not None]
    if not routed:
        return "VideoLLM-online" if config.tokens_per_frame == 1 else "Full-computation"
    if not any(keeps[i] for i in routed):
        from_there_on = routed == list(range(routed[0], len(keeps)))
        return f"EarlyExit (layer {routed[0]})" if from_there_on else "LayerSkip"
    ratio = routing.keep_ratio
    ratio = f"{ratio:g}" if isinstance(ratio, float | int) else "by layer"
    unusual = [
        str(value)
        for value, usual in ((routing.insertion, "interleaved"), (routing.selection, "learned"))
        if value != usual
    ]
    return ", ".join([f"VideoLLM-MoD r={ratio}", *unusual])


def read(path: Path) -> dict[str, Any]:
    """Reads a report that `evaluate` wrote.

    Raises:
      UserError: it is missing, or not such a report.
    """
    report = files.read_json(path)
    with files.understanding(str(path), "evaluate again, with another --out"):
        as_markdown(grids([report]))
        for name, entry in report["benchmarks"].items():
            check_name(name, "a benchmark")
            entry["parts"].items()
    return report


def grids(reports: Sequence[Report]) -> tuple[Grid, ...]:
    """The tables of reports: only those, and of them only the columns, for which one has a number.

    The tables of streams come first, one for each dataset; then the paper's others; then one for
    each dataset that the paper does not have.
    """
    kinds: dict[str, str] = {}
    for report in reports:
        kinds |= {name: found["benchmark"] for name, found in report["benchmarks"].items()}
    layout = [
        (f"{name}, streaming", _stream_columns(name))
        for name, kind in kinds.items()
        if kind == STREAM
    ]
    layout += _LAYOUT
    placed = {column.dataset for _, columns in layout for column in columns}
    for name in kinds:
        if name not in placed:
            scores = dict.fromkeys(s for r in reports for s in _scores(r, name, ANSWERS))
            layout.append((name, tuple(_Column(s, name, ANSWERS, s, 1.0, 3) for s in scores)))
    return tuple(grid for title, columns in layout if (grid := _grid(title, columns, reports)))


def _scores(report: Report, dataset: str, part: str) -> Mapping[str, float]:
    parts = report["benchmarks"].get(dataset, {}).get("parts", {})
    return parts.get(part, {}).get("scores", {})


def _grid(title: str, columns: Iterable[_Column], reports: Sequence[Report]) -> Grid | None:
    shown = [c for c in columns if any(c.score in _scores(r, c.dataset, c.part) for r in reports)]
    datasets = dict.fromkeys(column.dataset for column in shown)
    rows, notes = [], {}
    for report in reports:
        present = [name for name in datasets if name in report["benchmarks"]]
        if not present:
            continue
        found = {name: report["benchmarks"][name] for name in present}
        forced = any(one["trained_on"] for one in found.values())
        model = report["model"]
        rows.append(
            (
                model["name"] + (f" {_TRAINED_ON}" if forced else ""),
                str(model["tokens_per_frame"]),
                f"{model['macs'] / 1e12:.4g}T",
                *(_cell(report, column) for column in shown),
            )
        )
        for name, one in found.items():
            notes |= dict.fromkeys(_notes(name, one))
    if not rows:
        return None
    heads = ("Model", "Tokens per frame", "FLOPs, 600 frames", *(c.heading for c in shown))
    return Grid(title, heads, tuple(rows), tuple(notes))


def _cell(report: Report, column: _Column) -> str:
    value = _scores(report, column.dataset, column.part).get(column.score)
    return ABSENT if value is None else f"{column.scale * value:.{column.decimals}f}"


def _notes(name: str, found: Mapping[str, Any]) -> Iterable[str]:
    yield f"{name}: {found['records']} records of split {found['split']}."
    for part in found["parts"].values():
        if judge := part["settings"].get("judge"):
            yield f"{name}: judge: {judge}."
    if found["trained_on"]:
        yield (
            f"{_TRAINED_ON} {name}: {found['trained_on']} of its videos show what the "
            "model was trained on (--force)."
        )


def show(reports: Sequence[Report], console: Console) -> None:
    """Prints the tables of reports, those too wide for the terminal with a column per model."""
    for grid in grids(reports):
        console.print(_fitting(grid, console))
        for note in grid.notes:
            console.print(note, soft_wrap=True, highlight=False)


def _fitting(grid: Grid, console: Console) -> Table:
    cells = [grid.columns, *grid.rows]
    table = _table(grid, cells)
    boundless = console.options.update(max_width=_BOUNDLESS)
    if console.measure(table, options=boundless).minimum > console.width:
        table = _table(grid, list(zip(*cells, strict=True)))
    return table


def _table(grid: Grid, cells: Sequence[Sequence[str]]) -> Table:
    table = Table(title=grid.title)
    for i, heading in enumerate(cells[0]):
        table.add_column(heading, justify="right" if i else "left")
    for row in cells[1:]:
        table.add_row(*row)
    return table


def as_markdown(tables: Sequence[Grid]) -> str:
    """Tables as Markdown.

    ```
    ## COIN, top-1 accuracy (%)

    | Model | Step ↑ |
    |---|---:|
    | Full-computation | 63.1 |

    coin_step: 20 records of split test.
    ```
    """
    texts = []
    for grid in tables:
        rule = "|---|" + "---:|" * (len(grid.columns) - 1)
        lines = [f"| {' | '.join(row)} |" for row in (grid.columns, *grid.rows)]
        texts.append(
            "\n".join([f"## {grid.title}", "", lines[0], rule, *lines[1:], "", *grid.notes])
        )
    return "\n\n".join(texts) + "\n"
