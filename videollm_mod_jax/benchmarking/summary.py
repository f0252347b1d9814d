"""One page of Markdown: what is to be reached, beside what the results in a directory say."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from videollm_mod_jax.benchmarking import device, report
from videollm_mod_jax.benchmarking.targets import TARGETS, Figure, Target
from videollm_mod_jax.data.files import understanding, written_aside
from videollm_mod_jax.errors import UserError

PAGE = "README.md"
BENCHMARKS = ("train", "stream", "memory", "kernels", "peer_train", "peer_stream")
"""Names of the files that are read, at any depth."""

_HEAD = """# Benchmarks

Written from the JSON files below by `python -m videollm_mod_jax.benchmark summary DIR`; full is
the model without routing, MoD the one with. A share is of the floor: operations or bytes that the
step cannot do without, at the peak measured on the same device in the same run.

| what | target | measured | | share of the floor | on |
|---|---|---|---|---|---|
"""


def write(directory: Path) -> Path:
    """Writes `DIRECTORY/README.md`, replacing it.

    Raises:
      UserError: there are no results in the directory.
    """
    files = sorted(
        file for file in directory.rglob("*.json") if file.stem in BENCHMARKS and file.is_file()
    )
    if not files:
        raise UserError(
            f"{directory} holds no results; expected files such as train.json, which "
            "`benchmark train --out` writes"
        )
    results = {file: report.read(file) for file in files}
    page = directory / PAGE
    for file, result in results.items():
        with understanding(str(file), "run the benchmark again"):
            text({file: result}, directory)
    with written_aside(page) as aside:
        aside.write_text(text(results, directory), encoding="utf-8")
    return page


def text(results: Mapping[Path, Mapping[str, Any]], directory: Path) -> str:
    """The page.

    Args:
      results: by file.
      directory: that the links start from.
    """
    lines = [line for target in TARGETS for line in _lines(target, results.values())]
    parts = [_HEAD + "\n".join(lines), "## Results"]
    for file, result in results.items():
        link = Path(os.path.relpath(file, directory)).as_posix()
        versions = ", ".join(f"{k} {v}" for k, v in result["device"]["versions"].items())
        config = " ".join([result["config"], *result["overrides"]])
        place = device.name(result["device"])
        where = (
            f"compiled for {result['target']['topology']}" if "target" in result else f"on {place}"
        )
        flags = result["device"].get("xla_flags")
        flags = f"; `XLA_FLAGS={flags}`" if flags else ""
        parts.append(f"[{link}]({link}): `{config}` {where}; {versions}{flags}.")
    for folder in sorted({file.parent for file in results}):
        for picture in sorted(folder.glob("*.png")):
            link = Path(os.path.relpath(picture, directory)).as_posix()
            parts.append(f"![{link}]({link})")
    return "\n\n".join(parts) + "\n"


def _lines(target: Target, results: Any) -> Iterator[str]:
    """A line of the table for every figure of a target, or one that says there is none."""
    figures: list[Figure] = [figure for result in results for figure in target.find(result)]
    if not figures:
        yield f"| {target.what} | {target.bound} | not measured | | | |"
    for figure in figures:
        verdict = {True: "met", False: "not met", None: ""}[target.verdict(figure.value)]
        yield (
            f"| {target.what} | {target.bound} | {figure.text} | {verdict} | {figure.share} "
            f"| {figure.where} |"
        )
