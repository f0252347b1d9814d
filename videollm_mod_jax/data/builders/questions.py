"""Questions about a whole video or image: what the question answering datasets share.

All frames come first, then every question with its answer, at the end of the video:

    \\n[<v><v>,<v><v>]
    \\nUser: How many?
    \\nAssistant: One.<eos>

An image is a video of one frame.
"""

import collections
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from videollm_mod_jax.data.annotations import (
    FieldError,
    Record,
    Report,
    Source,
    Turn,
    Videos,
    check_text,
    check_unicode,
    shown,
)
from videollm_mod_jax.data.builders import json_members
from videollm_mod_jax.data.files import refuse_duplicates
from videollm_mod_jax.errors import UserError

# What LLaVA-1.5 appends to a question (haotian-liu/LLaVA, docs/Evaluation.md).
SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
OPTION_LETTER = "\nAnswer with the option's letter from the given choices directly."

OPTIONS = "ABCDE"


class StoredNames:
    """Finds the video of a feature store that a published name means.

    A name is that of the stored video, or its end, when only one stored video ends so; then one
    store can serve datasets that were published with different folders:

    ```
    stored      coco/train2017/0001   gqa/images/0001   pope/val2014/0002
    published   coco/train2017/0001   images/0001       0002                0001 is ambiguous
    ```
    """

    def __init__(self, videos: Videos):
        """Args: videos: of the feature store."""
        self._frames = videos.frames
        self._by_last_part: dict[str, list[str]] = collections.defaultdict(list)
        for name in videos.frames:
            self._by_last_part[name.rpartition("/")[2]].append(name)

    def find(self, where: str, *published: str) -> str:
        """The stored name of the first of some published names that is there.

        Args:
          where: what error messages call the annotation.
          *published: names, without extension, that the video may have.

        Raises:
          FieldError: "unknown video", "ambiguous video", or "no frames".
        """
        for name in published:
            matches = [name] if name in self._frames else self._ending(name)
            if len(matches) > 1:
                raise FieldError(
                    "ambiguous video",
                    where,
                    f"the features have {len(matches)} videos that end in {shown(name)}, such as "
                    f"{shown(sorted(matches)[:2])}; encode a folder that has one",
                )
            if matches:
                if not self._frames[matches[0]]:
                    raise FieldError("no frames", where, f"{shown(matches[0])} has no frames")
                return matches[0]
        raise FieldError(
            "unknown video", where, f"the features have no {shown(' or '.join(published))}"
        )

    def _ending(self, name: str) -> list[str]:
        candidates = self._by_last_part.get(name.rpartition("/")[2], ())
        return [stored for stored in candidates if stored.endswith("/" + name)]


def without_extension(path: str) -> str:
    """A published path as the feature store names it: "coco/1.jpg" -> "coco/1"."""
    stem, _, extension = path.rpartition(".")
    return stem if stem and "/" not in extension else path


def whole_video(
    record_id: str,
    video: str,
    exchanges: Sequence[tuple[str, str]],
    source: Source,
    target: Mapping[str, Any],
) -> Record:
    """A record that shows a whole video and then puts questions.

    A video of more than `source.max_frames` frames is shown with a stride, so that a question about
    its last minute can be answered too.

    Args:
      record_id: unique in the dataset.
      video: as the feature store names it.
      exchanges: questions and their answers, in order.
      source: whose videos and `max_frames` count.
      target: of the record.
    """
    stop = source.videos.duration(video)
    return Record(
        id=record_id,
        video=video,
        start=0.0,
        stop=stop,
        turns=tuple(
            Turn(role, stop, text)
            for exchange in exchanges
            for role, text in zip(("user", "assistant"), exchange, strict=True)
        ),
        stride=source.stride(source.videos.frames[video]),
        target=target,
    )


def count_records(
    annotations: Iterable[tuple[str, Any]], build: Callable[[str, Any], Record], report: Report
) -> Iterator[Record]:
    """Makes a record of every annotation that can be used, and counts them all.

    Args:
      annotations: what error messages call each, and the annotation.
      build: makes the record of an annotation, or raises FieldError.
      report: is told which are kept, and which are dropped: those that `build` refuses, those whose
        id is a "duplicate id" or "not Unicode", and those of which `check_text` refuses a text.
    """
    seen: set[str] = set()
    for where, annotation in annotations:
        try:
            record = build(where, annotation)
            check_unicode(record.id, where)
            for turn in record.turns:
                check_text(turn.text, where)  # put together of fields: "<<image>v>" without <image>
            if record.id in seen:
                raise FieldError("duplicate id", where, f"{shown(record.id)} came before")
        except FieldError as error:
            report.drop(error.reason, error.where, error.what)
            continue
        seen.add(record.id)
        report.keep()
        yield record


def listed(entry: Any, name: str) -> list[Any]:
    """The annotations that a field of an entry lists, whatever they hold, to count them.

    An entry without the list counts as one annotation.
    """
    found = entry.get(name) if isinstance(entry, Mapping) else None
    return found if isinstance(found, list) else [None]


def numbered(path: Path, download: str) -> Iterator[tuple[str, Any]]:
    """The entries of a json file that holds a list, as they are read, each with its place in it.

    Args:
      path: of the file, which may be larger than memory.
      download: where to get it, for the error message.

    Raises:
      UserError: there is no such file; while iterating, it holds something else.
    """
    entries = enumerate(json_members.array_members(_existing(path, download)))
    return ((f"{path.name}: annotation {i}", entry) for i, entry in entries)


def keyed(path: Path, download: str) -> Iterator[tuple[str, Any]]:
    """The members of a json file that holds an object, as they are read.

    Raises:
      UserError: as `numbered`.
    """
    return json_members.object_members(_existing(path, download))


def whole(path: Path, download: str) -> dict[str, Any]:
    """A json file that holds an object, in which no name comes twice.

    Raises:
      UserError: as `numbered`.
    """
    return json_members.whole_object(_existing(path, download))


def lines(path: Path, download: str) -> Iterator[tuple[str, str]]:
    """The lines of a text file that are not empty, each with its number, from 1.

    Raises:
      UserError: the file cannot be read or is not UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise UserError(f"{path} cannot be read: {reason}; download it from {download}") from error
    rows = enumerate(text.split("\n"), start=1)
    return ((f"{path.name}: line {number}", line.strip()) for number, line in rows if line.strip())


def parsed_line(where: str, line: str) -> Any:
    """The json value of a line.

    Raises:
      FieldError: "not json".
    """
    try:
        return json.loads(line, object_pairs_hook=refuse_duplicates)
    except (ValueError, RecursionError) as error:
        raise FieldError("not json", where, f"{error}; found {shown(line)}") from error


def _existing(path: Path, download: str) -> Path:
    if not path.is_file():
        raise UserError(f"{path}: there is no such file; download it from {download}")
    return path
