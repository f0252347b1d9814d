"""What a benchmark leaves: a JSON file, and a table for whoever looks on."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from videollm_mod_jax.benchmarking import device
from videollm_mod_jax.data.files import read_json
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.training.checkpoint import write_json


def path(out: Path, name: str) -> Path:
    """Where the result of a benchmark goes, `OUT/NAME.json`, before it is measured.

    Raises:
      UserError: it is there.
    """
    file = out / f"{name}.json"
    if file.exists():
        raise UserError(f"{file} exists; give another --out, or remove it to measure again")
    return file


def write(out: Path, name: str, result: dict[str, Any]) -> Path:
    """Writes `OUT/NAME.json`: `result`, and under `device` what it was measured on.

    Args:
      out: directory; made if missing.
      name: of the benchmark.
      result: what JSON can hold.

    Raises:
      UserError: there is such a file.
    """
    file = path(out, name)
    write_json(file, {"benchmark": name, "device": device.describe(), **result})
    return file


def read(file: Path) -> dict[str, Any]:
    """What `write` wrote.

    Raises:
      UserError: it is missing, or not a result of a benchmark.
    """
    result = read_json(file)
    if not isinstance(result, dict) or not {"benchmark", "device"} <= set(result):
        raise UserError(f"{file} is not what a benchmark wrote; expected `benchmark` and `device`")
    return result


def table(title: str, columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> Table:
    """A table with one column per variant.

    Args:
      title: above it.
      columns: names of the variants.
      rows: by what a row tells, one text per column.
    """
    out = Table(title=title)
    out.add_column("")
    for column in columns:
        out.add_column(column, justify="right")
    for label, cells in rows.items():
        out.add_row(label, *cells)
    return out
