"""What a dataset of annotated videos is before it is stored: records, labels, a count of the rest.

A `Dataset` reads the files of a public download. Every annotation of it either becomes part of a
`Record` or is counted in the `Report` under a reason, with the file, record and field of the first
few; nothing is lost in silence. What is wrong with a file as a whole raises a UserError.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

PLACEHOLDER = "<v>"
"""What stands for vision in the text of a dialogue (`data/dialogue.py`), so that no text may."""

EXAMPLES_PER_REASON = 3
MAX_TEXT = 100_000  # characters; a longer "annotation" is damage


@dataclasses.dataclass(frozen=True)
class Turn:
    """What is said at a moment of a video.

    Attributes:
      role: "user" or "assistant".
      time: seconds from the beginning of the video; `dialogue.conversation_from_turns` says before
        or after which frame it comes. What is asked before the very first frame may have a time
        before 0, by less than a frame.
      text: what is said.
      learn: whether the model is trained to say it.
    """

    role: str
    time: float
    text: str
    learn: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """One conversation about one stretch of a video.

    Attributes:
      id: unique in its dataset.
      video: name of the video (or image) in the feature store.
      start, stop: the stretch in seconds: frames i with start <= i / fps < stop.
      turns: in order of time.
      stride: only every stride-th frame of the stretch belongs to the record, from its first on:
        how a question about an hour of video fits into an example.
      target: what a benchmark compares the model's answer with, as json types; {} for none.
    """

    id: str
    video: str
    start: float
    stop: float
    turns: tuple[Turn, ...]
    stride: int = 1
    target: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def frame_range(record: Record, fps: float) -> range:
    """The frames of a record's video that belong to it: start <= i / fps < stop, by its stride.

    ```
    2 fps, start 1.2, stop 3.0             ->   frames 3 4 5 (at 1.5, 2.0 and 2.5 s)
    2 fps, start 1.2, stop 3.0, stride 2   ->   frames 3 5
    ```
    """
    first, end = (ceil_frame(seconds, fps) for seconds in (record.start, record.stop))
    return range(first, end, record.stride)


def ceil_frame(seconds: float, fps: float) -> int:
    """The first frame at or after a time: `ceil_time_by_fps` of VideoLLM-online (data/utils.py).

    ```
    2 fps    1.2 s   ->   frame 3, at 1.5 s
    25 fps   0.28 s  ->   frame 7, though 7 / 25 * 25 is more than 7
    ```
    """
    return math.ceil(round(seconds * fps, 6))


def time_before(frame: int, fps: float) -> float:
    """When a question is put that comes before a frame: half a frame earlier.

    An answer is said at the time of a frame, so that it is never at the very time of the question,
    which would put it before the frame too:

    ```
    2 fps, question before frame 7   ->   3.25 s, between the frames at 3.0 and 3.5 s
    ```
    """
    return (frame - 0.5) / fps


@dataclasses.dataclass(frozen=True)
class Videos:
    """The videos whose features are stored.

    Attributes:
      fps: frames per second of the features.
      frames: number of frames by name.
    """

    fps: float
    frames: Mapping[str, int]

    def duration(self, video: str) -> float:
        """Seconds that the stored frames of a video last."""
        return self.frames[video] / self.fps


class Report:
    """Counts what becomes of annotations.

    Attributes:
      kept: annotations that became part of a record.
      dropped: number by reason.
      examples: the first few of every reason, each as `where: what`, with backslashes for what
        UTF-8 cannot hold.
    """

    def __init__(self) -> None:
        self.kept = 0
        self.dropped: collections.Counter[str] = collections.Counter()
        self.examples: dict[str, list[str]] = collections.defaultdict(list)

    def keep(self, count: int = 1) -> None:
        """Counts annotations that became part of a record."""
        self.kept += count

    def drop(self, reason: str, where: str, what: str = "", count: int = 1) -> None:
        """Counts annotations that did not.

        Args:
          reason: one of a few, such as "empty text"; what the count goes by.
          where: file, record and field, such as "coin.json: xyz: annotation 3: field 'segment'".
          what: what was found there.
          count: how many are dropped with what stands there; 0 when it holds none.
        """
        if not count:
            return
        self.dropped[reason] += count
        if len(self.examples[reason]) < EXAMPLES_PER_REASON:
            example = f"{where}: {what}" if what else where
            # The name of a damaged record must not damage the report.
            self.examples[reason].append(example.encode(errors="backslashreplace").decode())


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a dataset is read from.

    Attributes:
      directory: of the download.
      videos: whose features are stored; annotations of others are dropped and counted.
      max_frames: most frames of a record. What becomes of longer stretches its dataset says on its
        page: they are shown with a stride, cut into several records, or cut off or left out, as in
        the code that the dataset follows.
      report: what became of the annotations.
    """

    directory: Path
    videos: Videos
    max_frames: int
    report: Report

    def stride(self, num_frames: int) -> int:
        """How far apart frames are shown, evenly from beginning to end, to be `max_frames` at most.

        ```
        10 frames, max_frames 4   ->   3: frames 0 3 6 9
        ```
        """
        return -(-num_frames // self.max_frames)


@dataclasses.dataclass(frozen=True)
class Parsed:
    """What a dataset gives.

    Attributes:
      splits: records by split, read as they are asked for.
      labels: the answers among which a benchmark looks for the nearest; () for open answers.
    """

    splits: Mapping[str, Iterable[Record]]
    labels: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
    """A public dataset and how it is read.

    Attributes:
      name: of the dataset.
      page: where to get it, the files expected, their schema, record counts, what is dropped and
        why, as Markdown.
      read: gives its records; raises UserError where a file as a whole cannot be used.
      benchmark: how it is evaluated: a name of `evaluation/benchmarks.py`.
    """

    name: str
    page: str
    read: Callable[[Source], Parsed]
    benchmark: str


class FieldError(Exception):
    """An annotation that cannot be used.

    Attributes:
      reason: as `Report.drop` counts it.
      where: the record and field.
      what: what was expected and found.
    """

    def __init__(self, reason: str, where: str, what: str):
        super().__init__(f"{where}: {what}")
        self.reason, self.where, self.what = reason, where, what


def field(record: Any, name: str, kind: type | tuple[type, ...], where: str) -> Any:
    """A field of a json object.

    Args:
      record: what should be the object.
      name: of the field.
      kind: the json type it must have; a bool is no number.
      where: what error messages call the object.

    Raises:
      FieldError: "not an object", "missing field" or "wrong type".
    """
    if not isinstance(record, Mapping):
        raise FieldError("not an object", where, f"expected an object, found {shown(record)}")
    where = f"{where}: field '{name}'"
    if name not in record:
        raise FieldError("missing field", where, f"absent; there are {shown(sorted(record))}")
    value, kinds = record[name], kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        names = " or ".join(k.__name__ for k in kinds)
        raise FieldError("wrong type", where, f"expected {names}, found {shown(value)}")
    return value


def text_field(record: Any, name: str, where: str) -> str:
    """A field of text, stripped.

    Raises:
      FieldError: as `field` and `check_text`, or "empty text", "text too long".
    """
    text = field(record, name, str, where).strip()
    if not text:
        raise FieldError("empty text", f"{where}: field '{name}'", "expected a text, found none")
    if len(text) > MAX_TEXT:
        raise FieldError(
            "text too long",
            f"{where}: field '{name}'",
            f"expected at most {MAX_TEXT} characters, found {len(text)}",
        )
    check_text(text, f"{where}: field '{name}'")
    return text


def check_text(text: str, where: str) -> None:
    """Refuses a text that no dialogue can hold; `text_field` does so for every field of text.

    Raises:
      FieldError: as `check_unicode`, or "reserved text" for one with `<v>`.
    """
    check_unicode(text, where)
    if PLACEHOLDER in text:
        raise FieldError(
            "reserved text",
            where,
            f"expected no {PLACEHOLDER!r}, which stands for vision, found {shown(text)}",
        )


def check_unicode(text: str, where: str) -> None:
    """Refuses half of a surrogate pair, which a name or text of a json file may have.

    Raises:
      FieldError: "not Unicode".
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        what = f"expected no half of a surrogate pair, found {shown(text)}"
        raise FieldError("not Unicode", where, what) from error


def seconds_field(record: Any, name: str, where: str) -> float:
    """A field of seconds.

    Raises:
      FieldError: as `field`, or "bad time" unless it is finite and not negative.
    """
    seconds = field(record, name, (int, float), where)
    try:
        seconds = float(seconds)
    except OverflowError:
        seconds = math.inf
    if not (math.isfinite(seconds) and seconds >= 0):
        raise FieldError(
            "bad time", f"{where}: field '{name}'", f"expected seconds >= 0, found {seconds:g}"
        )
    return seconds


def shown(value: Any) -> str:
    """A value for an error message, cut to fit a line."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
