"""`own`: anybody's videos, with one table of what is said when."""

import csv
import dataclasses
import io
import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from videollm_mod_jax.data.annotations import (
    Dataset,
    FieldError,
    Parsed,
    Record,
    Report,
    Source,
    Turn,
    Videos,
    field,
    seconds_field,
    shown,
    text_field,
)
from videollm_mod_jax.data.builders.cutting import cut
from videollm_mod_jax.data.files import refuse_duplicates
from videollm_mod_jax.data.video_folder import IMAGES, VIDEOS
from videollm_mod_jax.errors import UserError

PAGE = """\
Your own videos, with narrations or questions and answers in one table.

**Get it.** Encode a folder of videos, then write the table into a directory of its own: `--source`.

**Files.** Exactly one of:

- `annotations.csv`: UTF-8, a header, cells separated by commas, semicolons or tabs. A text that
  contains the separator stands between double quotes.

      video,time,role,text
      kitchen,3.5,,The person opens the fridge.
      kitchen,1:12,user,What is in the pan?
      kitchen,1:12,assistant,"Two eggs, sunny side up."

- `annotations.json`: a list of objects with the same fields.

      [{"video": "kitchen", "time": 3.5, "text": "The person opens the fridge."},
       {"video": "kitchen", "time": "1:12", "role": "user", "text": "What is in the pan?"},
       {"video": "kitchen", "time": "1:12", "text": "Two eggs, sunny side up."}]

| field | what it is |
|---|---|
| `video` | the file below the folder that was encoded: `monday/kitchen` or `monday/kitchen.mp4` |
| `time` | since the beginning of the video: seconds (`3.5`), `m:ss` or `h:mm:ss` (`1:02:03.5`) |
| `text` | what is said |
| `role` | `assistant` (also when it is left out): the model says it; `user`: somebody asks it |
| `split` | `train` (also when it is left out), `validation` or `test`; one for all of a video |

An answer at the time of its question follows it at once; at a later time it makes the model wait
and watch. A standing instruction ("Narrate what I do.") is no question: it belongs into `system` of
the configuration, which opens every record.

Splits: `train`, `validation`, `test`.

Without the field everything is `train`, and there is nothing to evaluate on: evaluation refuses
videos that were trained on. Give some videos the split `validation`.

**Records.** All frames of a video with its annotations in order of time. A video of more than
`max_frames` frames is cut into several records, never between a question and its answer; a piece in
which nothing is said makes no record. What the model says in one frame becomes one turn, joined by
a space. What it says after the last frame but before the end of the video comes at the last frame.

**Dropped**, and counted: an annotation with a field that is missing, empty or malformed; one whose
video has no features, or ends before it; one with another split than the first of its video; one
that is there already; a text with `<v>`, which marks the place of vision in a dialogue, or with
half of a surrogate pair; a question without an answer; question and answer more than `max_frames`
frames apart.
"""

_FILES = ("annotations.csv", "annotations.json")
_COLUMNS = {"video", "time", "text"}
_ROLES = ("assistant", "user")
_SPLITS = ("train", "validation", "test")
_TIME = re.compile(
    r"(?:(?:(\d+):(?=[0-5]\d:))?(\d+):(?=[0-5]\d(?:\.|$)))?(\d+(?:\.\d*)?)", re.ASCII
)


@dataclasses.dataclass(frozen=True)
class _Row:
    """An annotation whose fields are right, and where it is."""

    where: str
    video: str
    split: str
    turn: Turn


def read(source: Source) -> Parsed:
    """Reads the table.

    Raises:
      UserError: there is not exactly one, or it is no table.
    """
    videos: dict[str, list[_Row]] = {}
    for where, fields in _table(source.directory, source.report):
        try:
            row = _row(fields, where, source.videos)
            of_video = videos.setdefault(row.video, [row])
            if row.split != of_video[0].split:
                expected = f"expected {of_video[0].split!r} as at {of_video[0].where}"
                raise FieldError(
                    "video in two splits",
                    f"{where}: field 'split'",
                    f"{expected}, found {row.split!r}",
                )
            if row is not of_video[0]:
                of_video.append(row)
        except FieldError as error:
            source.report.drop(error.reason, error.where, error.what)

    def records(split: str) -> Iterator[Record]:
        for video, rows in videos.items():
            if rows[0].split == split:
                yield from cut(video, [(row.where, row.turn) for row in rows], source)

    return Parsed({split: records(split) for split in _SPLITS})


DATASETS = (Dataset(name="own", page=PAGE, read=read, benchmark="stream"),)


def _table(directory: Path, report: Report) -> Iterator[tuple[str, Any]]:
    """Where each annotation is, and its fields."""
    found = [directory / name for name in _FILES if (directory / name).exists()]
    if len(found) != 1:
        raise UserError(
            f"{directory}: expected {' or '.join(_FILES)}, found "
            + ("both; remove one" if found else "neither; write one")
        )
    path = found[0]
    try:
        # Spreadsheets begin a file in UTF-8 with a byte order mark.
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: expected UTF-8, found {error.object[error.start]:#04x} at byte "
            f"{error.start}; save the table as UTF-8"
        ) from error
    return _csv_rows(path, text, report) if path.suffix == ".csv" else _json_rows(path, text)


def _csv_rows(path: Path, text: str, report: Report) -> Iterator[tuple[str, Any]]:
    delimiter = max(",;\t", key=text.partition("\n")[0].count)
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        names = [name.strip().lower() for name in next(rows, [])]
        if not _COLUMNS.issubset(names) or len(set(names)) < len(names):
            raise UserError(
                f"{path}: line 1: expected a header with video, time and text, each column once, "
                f"found {shown(names)}"
            )
        line = rows.line_num + 1
        for cells in rows:
            where, line = f"{path.name}: line {line}", rows.line_num + 1
            if len(cells) > len(names):
                expected = f"expected {len(names)} cells, found {len(cells)}; quote the text"
                report.drop("too many cells", where, expected)
            elif any(cell.strip() for cell in cells):
                yield where, dict(zip(names, cells, strict=False))
    except csv.Error as error:
        raise UserError(f"{path}: line {rows.line_num}: {error}; correct the quotes") from error


def _json_rows(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    try:
        rows = json.loads(text, object_pairs_hook=refuse_duplicates)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: expected a list in json, but {error}; correct it") from error
    if not isinstance(rows, list):
        raise UserError(f"{path}: expected a list of annotations, found {shown(rows)}")
    for number, row in enumerate(rows):
        yield f"{path.name}: annotation {number}", row


def _row(fields: Any, where: str, videos: Videos) -> _Row:
    """One annotation, checked.

    Raises:
      FieldError: a field is missing, empty or malformed.
    """
    video = text_field(fields, "video", where)
    stem, dot, ending = video.rpartition(".")
    if video not in videos.frames and dot + ending.lower() in VIDEOS | IMAGES:
        video = stem
    if video not in videos.frames:
        raise FieldError(
            "unknown video",
            f"{where}: field 'video'",
            f"expected a video of the features, found {shown(fields['video'])}",
        )
    text = text_field(fields, "text", where)
    role = _choice(fields, "role", _ROLES, where)
    split = _choice(fields, "split", _SPLITS, where)
    return _Row(where, video, split, Turn(role, _seconds(fields, where), text))


def _choice(fields: Any, name: str, choices: Sequence[str], where: str) -> str:
    """A field with one of a few values, the first when it is left out."""
    if fields.get(name) in (None, ""):
        return choices[0]
    value = field(fields, name, str, where).strip().lower()
    if value not in choices:
        expected = f"expected {' or '.join(choices)}, found {shown(value)}"
        raise FieldError(f"unknown {name}", f"{where}: field '{name}'", expected)
    return value


def _seconds(fields: Any, where: str) -> float:
    """The time: `3.5`, `1:12` or `1:02:03.5`, as a number or text."""
    if not isinstance(fields.get("time"), str):
        return seconds_field(fields, "time", where)
    time = text_field(fields, "time", where)
    match = _TIME.fullmatch(time)
    parts = [float(part or 0) for part in match.groups()] if match else [math.inf]
    total = sum(part * unit for part, unit in zip(reversed(parts), (1, 60, 3600), strict=False))
    if math.isinf(total):
        expected = f"expected seconds, m:ss or h:mm:ss, found {shown(time)}"
        raise FieldError("bad time", f"{where}: field 'time'", expected)
    return total
