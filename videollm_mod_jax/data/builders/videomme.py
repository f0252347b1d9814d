"""`videomme`: multiple choice questions about videos of eleven seconds to an hour."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from videollm_mod_jax.data.annotations import (
    Dataset,
    FieldError,
    Parsed,
    Record,
    Source,
    field,
    shown,
    text_field,
)
from videollm_mod_jax.data.builders import questions
from videollm_mod_jax.errors import UserError

PAGE = """\
# videomme

Video-MME: 2,700 multiple choice questions about 900 videos, 300 each of the classes short (below 2
minutes), medium (4 to 15) and long (30 to 60). For evaluation only; its licence forbids training.

## Where to get it
https://huggingface.co/datasets/lmms-lab/Video-MME (videos in `videos_chunked_*.zip`), or by the
authors' form, https://github.com/BradyFU/Video-MME.

## Files
The source directory has one of
- `test-00000-of-00001.parquet` (the dataset's folder `videomme`), with the columns video_id,
  duration, domain, sub_category, url, videoID, question_id, task_type, question, options, answer;
- `videomme.json`: a list of those rows as objects, or the authors' list of videos,

      {"video_id": "001", "duration_category": "short", "video_category": "Knowledge",
       "video_subcategory": "Law", "url": "https://www.youtube.com/watch?v=fFjv93ACGo8",
       "questions": [{"question_id": "001-1", "task_type": "Counting Problem",
                      "question": "How many?", "choices": ["A. 4.", "B. 9.", "C. 5.", "D. 13."],
                      "answer": "B"}]}

Videos are called by their YouTube id, as in the archives: `fFjv93ACGo8`.

## Records
Splits: `test`.

One per question, called by its question_id: the whole video, then the authors' prompt for the
setting without subtitles (README of BradyFU/Video-MME), then the letter of the right option.

    Select the best answer to the following multiple-choice question based on the video. Respond
    with only the letter (A, B, C, or D) of the correct option.
    How many?
    A. 4.
    B. 9.
    C. 5.
    D. 13.
    The best answer is:

The first two lines are one. A video of more than `max_frames` frames is shown with a stride: at 2
frames per second and 600 frames, an hour has every twelfth frame, one in 6 seconds.

## Target
`options` (four texts, each with its letter), `duration` (short, medium, long), `domain`,
`sub_category`, `task` (of 12, such as "Counting Problem"): what the authors report accuracy by.

## Dropped
- "unknown video", "ambiguous video", "no frames": what the features lack.
- "bad options": not four texts that begin "A.", "B.", "C.", "D."
- "unknown duration", "unknown answer", "unknown address"; "duplicate id".
- Fields that are missing, mistyped, empty, too long, or hold `<v>` or half of a surrogate pair; a
  video without a list of questions counts as one.
"""

_DOWNLOAD = "https://huggingface.co/datasets/lmms-lab/Video-MME"
_PROMPT = (
    "Select the best answer to the following multiple-choice question based on the video. Respond "
    "with only the letter (A, B, C, or D) of the correct option."
)
_LETTERS = questions.OPTIONS[:4]
_DURATIONS = ("short", "medium", "long")
_YOUTUBE = re.compile(r"(?:[?&]v=|youtu\.be/|/shorts/)([\w-]+)")


def _read(source: Source) -> Parsed:
    table, listed = (
        source.directory / name for name in ("test-00000-of-00001.parquet", "videomme.json")
    )
    if table.is_file():
        rows = _table_rows(table)
    elif listed.is_file():
        rows = _listed_rows(listed)
    else:
        raise UserError(
            f"{source.directory}: expected {table.name} or {listed.name}, found neither; download "
            f"the former from {_DOWNLOAD}"
        )
    names = questions.StoredNames(source.videos)

    def build(where: str, row: Any) -> Record:
        row = _row(where, row)
        video = names.find(where, text_field(row, "videoID", where))
        prompt, answer, target = _question(where, row)
        question_id = text_field(row, "question_id", where)
        return questions.whole_video(question_id, video, [(prompt, answer)], source, target)

    return Parsed({"test": questions.count_records(rows, build, source.report)})


def _question(where: str, row: Any) -> tuple[str, str, dict[str, Any]]:
    """The prompt, the letter of the right option, and what the benchmark needs beside it."""
    options = field(row, "options", list, where)
    if not (
        len(options) == len(_LETTERS)
        and all(isinstance(option, str) for option in options)
        and all(o.startswith(f"{letter}.") for o, letter in zip(options, _LETTERS, strict=True))
    ):
        raise FieldError(
            "bad options",
            f"{where}: field 'options'",
            f"expected four texts, from 'A. ...' to 'D. ...', found {shown(options)}",
        )
    answer = _one_of(row, "answer", tuple(_LETTERS), where)
    prompt = "\n".join(
        (_PROMPT, text_field(row, "question", where), *options, "The best answer is:")
    )
    target = {
        "options": options,
        "duration": _one_of(row, "duration", _DURATIONS, where),
        "domain": text_field(row, "domain", where),
        "sub_category": text_field(row, "sub_category", where),
        "task": text_field(row, "task_type", where),
    }
    return prompt, answer, target


def _one_of(row: Any, name: str, known: tuple[str, ...], where: str) -> str:
    value = text_field(row, name, where)
    if value not in known:
        raise FieldError(
            f"unknown {name}",
            f"{where}: field '{name}'",
            f"expected one of {', '.join(known)}, found {shown(value)}",
        )
    return value


def _table_rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        rows = parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} is not a parquet file ({type(error).__name__}); download it again from "
            f"{_DOWNLOAD}"
        ) from error
    return ((f"{path.name}: row {i}", row) for i, row in enumerate(rows))


def _listed_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Rows of a json file; of the authors' list of videos, a question with its video."""
    for where, entry in questions.numbered(path, _DOWNLOAD):
        if not (isinstance(entry, dict) and "questions" in entry):
            yield where, entry
        elif not isinstance(entry["questions"], list):
            yield where, (entry, None)
        else:
            for i, question in enumerate(entry["questions"]):
                yield f"{where}: question {i}", (entry, question)


def _row(where: str, row: Any) -> Any:
    """A row as the table has it."""
    if not isinstance(row, tuple):
        return row
    video, question = row
    field(video, "questions", list, where)
    url = text_field(video, "url", where)
    found = _YOUTUBE.search(url)
    if not found:
        raise FieldError(
            "unknown address", f"{where}: field 'url'", f"expected YouTube's, found {shown(url)}"
        )
    # The authors' README and template write the one and the other.
    sub = "video_subcategory" if "video_subcategory" in video else "video_sub_category"
    return {
        "videoID": found[1],
        "duration": field(video, "duration_category", str, where),
        "domain": field(video, "video_category", str, where),
        "sub_category": field(video, sub, str, where),
        "question_id": field(question, "question_id", str, where),
        "task_type": field(question, "task_type", str, where),
        "question": field(question, "question", str, where),
        "options": field(question, "choices", list, where),
        "answer": field(question, "answer", str, where),
    }


DATASETS = (Dataset(name="videomme", page=PAGE, read=_read, benchmark="choices"),)
