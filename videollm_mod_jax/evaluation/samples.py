"""What was found out about every record of a benchmark, kept as it comes.

    OUT/unfinished/NAME/settings.json     what the rows were made with
                        0-of-2.jsonl      rows of process 0 of 2, appended a line at a time
    OUT/NAME.jsonl                        all rows in the order of the records, once all are there

So a killed evaluation goes on where it stopped, with as many processes as there then are.
"""

import contextlib
import itertools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from videollm_mod_jax.data import files
from videollm_mod_jax.errors import UserError, printable, shown
from videollm_mod_jax.names import check_name

INDEX = "index"
"""The field of a row that says which record it is about."""

_SETTINGS, _ROWS = "settings.json", "*-of-*.jsonl"

Row = dict[str, Any]


class Samples:
    """The rows of one process, on disk from the moment they are added.

    Attributes:
      rows: of the files that are this process's to read, by index of the record.
    """

    def __init__(
        self, out: Path, name: str, settings: Mapping[str, Any], process: int, processes: int
    ):
        """Reads what an earlier run left. Process 0 comes first; none adds before all have read.

        Args:
          out: directory of the evaluation.
          name: of the benchmark.
          settings: everything that the rows depend on, as json types.
          process: index of this one; it reads the files i-of-N with i % processes == process.
          processes: how many there are.

        Raises:
          UserError: rows were left that other settings made, or that are damaged.
        """
        check_name(name, "name of a benchmark")
        self._directory = Path(out) / "unfinished" / name
        self._path = self._directory / f"{process}-of-{processes}.jsonl"
        self._target = Path(out) / f"{name}.jsonl"
        self._directory.mkdir(parents=True, exist_ok=True)
        _check_settings(self._directory / _SETTINGS, settings)
        self.rows: dict[int, Row] = {}
        for path in sorted(self._directory.glob(_ROWS)):
            if int(path.name.partition("-")[0]) % processes == process:
                self.rows.update((row[INDEX], row) for row in _read_rows(path))

    def add(self, row: Row) -> None:
        """Appends a row, which has the field `INDEX`, and lets the system write it."""
        line = json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(line)
        self.rows[row[INDEX]] = row

    def publish(self, rows: Iterable[Row]) -> None:
        """Writes OUT/NAME.jsonl whole."""
        write_rows(self._target, rows)


def forget(out: Path, name: str) -> None:
    """Removes the unfinished rows of a benchmark, once they are published and scored."""
    directory = Path(out) / "unfinished" / name
    for path in (directory / _SETTINGS, *directory.glob(_ROWS)):
        path.unlink(missing_ok=True)
    # Not empty while another benchmark is unfinished, or where somebody else put something.
    with contextlib.suppress(OSError):
        directory.rmdir()
        directory.parent.rmdir()


def write_rows(path: str | os.PathLike[str], rows: Iterable[Row]) -> None:
    """Writes a json line per row, all or none."""
    with files.written_aside(path) as aside, open(aside, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")


def in_order(parts: Iterable[Sequence[Row]], ids: Sequence[str], name: str) -> list[Row]:
    """The rows of all processes in the order of the records.

    Args:
      parts: of every process.
      ids: of the records.
      name: what error messages call the rows.

    Raises:
      UserError: a row is about another record than the one of its index, or one is missing.
    """
    rows = {row[INDEX]: row for row in itertools.chain.from_iterable(parts)}
    for index, record in enumerate(ids):
        found = rows[index]["id"] if index in rows else None
        if found != record:
            raise UserError(
                f"{name}: sample {index}: expected one of record {record!r}, found {found!r}; the "
                "dataset has changed since: remove the samples, or give another --out"
            )
    return [rows[index] for index in range(len(ids))]


def _check_settings(path: Path, settings: Mapping[str, Any]) -> None:
    settings = json.loads(json.dumps(settings))
    if not path.exists():
        with files.written_aside(path) as aside:
            aside.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        return
    check_same(files.read_json_object(path), settings, path.parent)


def check_same(found: Mapping[str, Any], expected: Mapping[str, Any], where: Path) -> None:
    """Refuses to mix what different settings made.

    Raises:
      UserError: they differ; it names the first difference.
    """
    for key in {**expected, **found}:
        if found.get(key) != expected.get(key):
            raise UserError(
                f"{where} holds samples of another evaluation: {printable(key):.80} is "
                f"{shown(found.get(key))} there and {shown(expected.get(key))} now; give another "
                "--out, or remove it"
            )


def _read_rows(path: Path) -> list[Row]:
    """The complete lines of a file; what a killed process left behind the last is cut off."""
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with open(path, "r+b") as file:
            file.truncate(len(whole))
    rows = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            row = files.parse_json(line, f"{path}: line {number}")
            if type(row[INDEX]) is not int:
                raise TypeError(f"the index is {shown(row[INDEX])}")
            rows.append(row)
        except (UserError, LookupError, TypeError) as error:
            raise UserError(
                f"{path}: line {number}: expected a sample, found damage; remove the file, and its "
                "records are evaluated again"
            ) from error
    return rows
