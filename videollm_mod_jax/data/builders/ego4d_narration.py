"""`ego4d_narration` and `ego4d_refined_narration`: what the camera wearer does, told as it happens.

Cleaning, splits and frames are those of VideoLLM-online (showlab/videollm-online,
data/ego4d/narration.py; the layout of its files, data/ego4d/ego4d.py and data/stream.py).
"""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from videollm_mod_jax.data.annotations import (
    Dataset,
    FieldError,
    Parsed,
    Record,
    Report,
    Source,
    Turn,
    ceil_frame,
    check_text,
    check_unicode,
    field,
    seconds_field,
    shown,
    text_field,
    time_before,
)
from videollm_mod_jax.data.builders import ego4d_splits
from videollm_mod_jax.data.builders.ego4d_narration_page import PAGE, REFINED_PAGE
from videollm_mod_jax.data.builders.ego4d_stream import check_inside, draw
from videollm_mod_jax.data.builders.json_members import object_members
from videollm_mod_jax.errors import UserError

INSTRUCTIONS = (
    "Please concisely narrate the video in real time. Use the tag 'C' to denote the camera "
    "wearer, and other letter tags, such as 'X', to denote other individuals in the scene.",
)
"""What the user asks for in `ego4d_narration`: `Ego4DNarrationStream.instructions`."""

REFINED_INSTRUCTIONS = (
    "Please concisely narrate the video in real time.",
    "Help me to illustrate my view in short.",
    "Please simply describe what do you see.",
    "Continuously answer what you observed with simple text.",
    "Do concise real-time narration.",
    "Hey assistant, do you know the current video content? Reply me concisely.",
    "Simply interpret the scene for me.",
    "What can you tell me about? Be concise.",
    "Use simple text to explain what is shown in front of me.",
    "What is the action now? Please response in short.",
)
"""The same in `ego4d_refined_narration`: `Ego4DRefinedNarrationStream.instructions`."""

REFINED = {
    "train": "refined_narration_stream_train.json",
    "validation": "refined_narration_stream_val.json",
}
"""The files of refined narrations by split."""


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Where a file has its narrations.

    Attributes:
      file: its name.
      field: the field at the top that holds the videos by name; None for the top itself.
      paths: the fields below a video that lead to its lists of narrations.
      time, text: fields of a narration.
      group: the field that says which narrations belong together; None if a list is a group.
      tagged: whether texts must be cleaned.
      instructions: what the user may ask for.
    """

    file: str
    field: str | None
    paths: Callable[[Mapping[str, Any]], Sequence[tuple[str, ...]]]
    time: str
    text: str
    group: str | None
    tagged: bool
    instructions: tuple[str, ...]


def _passes(video: Mapping[str, Any]) -> Sequence[tuple[str, ...]]:
    """A video may have been narrated by two annotators, by one or by none."""
    names = ("narration_pass_1", "narration_pass_2")
    return [(name, "narrations") for name in names if name in video]


_NARRATIONS = (
    _Layout(
        file="all_narrations_redacted.json",
        field="videos",
        paths=lambda video: [("narrations",)],
        time="time",
        text="text",
        group="_annotation_uid",
        tagged=True,
        instructions=INSTRUCTIONS,
    ),
    _Layout(
        file="narration.json",
        field=None,
        paths=_passes,
        time="timestamp_sec",
        text="narration_text",
        group="annotation_uid",
        tagged=True,
        instructions=INSTRUCTIONS,
    ),
)
_REFINED = {
    split: _Layout(
        file=file,
        field=None,
        paths=lambda video: [(group,) for group in video],
        time="time",
        text="text",
        group=None,
        tagged=False,
        instructions=REFINED_INSTRUCTIONS,
    )
    for split, file in REFINED.items()
}


class Narration(NamedTuple):
    """A narration: seconds from the beginning of the video, what is said, and where it stands."""

    time: float
    text: str
    where: str


def clean_text(text: str) -> str:
    """A narration as it is learnt: `Ego4DNarrationStream._clean_text` of upstream.

    ```
    "#C C picks a bag #unsure"          ->  "C picks a bag."
    "#O a man X walks, around the,."    ->  "A man X walks, around the."
    "#unsure"                           ->  "."
    ```
    """
    for tag in ("#C", "#c", "@c", "#O", "#o", "#Unsure", "#unsure", "#"):
        text = text.replace(tag, "")
    first, *others = (text.strip(".,\n ") + ".").split()
    return " ".join([first.capitalize(), *others])


def place(
    narrations: Sequence[Narration], fps: float, num_frames: int, max_frames: int, report: Report
) -> list[tuple[int, str]]:
    """The frame after which each narration of one stretch is said; counts those that are not.

    With 8 frames at 2 fps, of which a record may have 7:

    ```
    1.2 A   1.4 B   2.0 C   2.1 C   3.2 D   3.5 E
    frame 3 (A is dropped for B): B    frame 4: C (not twice)    frame 7: D (E comes too late)
    ```

    Args:
      narrations: not later than the end of the video.
      fps: frames per second of the features.
      num_frames: of the video.
      max_frames: longest stretch.
      report: counts.

    Returns:
      Pairs of frame and text; frames rise.
    """
    placed: list[tuple[int, str]] = []
    said: list[Narration] = []
    for narration in sorted(narrations, key=lambda one: one.time):
        frame = min(ceil_frame(narration.time, fps), num_frames - 1)
        if placed and placed[-1][0] == num_frames - 1:
            report.drop("after the last frame was narrated", narration.where)
        elif placed and said[-1].text == narration.text:
            report.drop("repeats the narration before it", narration.where, narration.text)
        elif placed and frame - placed[0][0] >= max_frames:
            report.drop(f"more than {max_frames} frames into the record", narration.where)
        else:
            if placed and placed[-1][0] == frame:
                report.drop("two narrations in one frame", said.pop().where)
                placed.pop()
            placed.append((frame, narration.text))
            said.append(narration)
    report.keep(len(placed))
    return placed


def read_narration(source: Source) -> Parsed:
    """Reads `ego4d_narration`; see its page.

    Raises:
      UserError: no file of narrations, or no rule for the splits.
    """
    for layout in _NARRATIONS:
        if (source.directory / layout.file).exists():
            splits = ego4d_splits.read_splits(source.directory)
            return Parsed(
                {
                    split: _records(source, layout, _videos_of(split, splits, source, layout))
                    for split in ego4d_splits.SPLITS
                }
            )
    raise UserError(
        f"{source.directory}: expected {' or '.join(layout.file for layout in _NARRATIONS)}, found "
        "neither; download the annotations of Ego4D (ego4d-data.org)"
    )


def read_refined(source: Source) -> Parsed:
    """Reads `ego4d_refined_narration`; see its page.

    Raises:
      UserError: neither of its files is there.
    """
    splits = {
        split: _records(source, layout, _refined_videos(source, layout))
        for split, layout in _REFINED.items()
        if (source.directory / layout.file).exists()
    }
    if not splits:
        raise UserError(
            f"{source.directory}: expected {' or '.join(REFINED.values())}, found neither; "
            "download them from huggingface.co/datasets/chenjoya/videollm-online-chat-ego4d-134k"
        )
    return Parsed(splits)


# The name of a video, what the file says of it, and why that cannot be used, if so.
_Video = tuple[str, Any, str | None]


def _videos_of(
    split: str, splits: ego4d_splits.VideoSplits, source: Source, layout: _Layout
) -> Iterator[_Video]:
    for video, value in object_members(source.directory / layout.file, layout.field):
        found = splits.of(video)
        if found == split:
            yield video, value, None
        elif found is None and split == "train":  # one split counts them
            yield video, value, "video in no list"


def _refined_videos(source: Source, layout: _Layout) -> Iterator[_Video]:
    held_out: set[str] = set()
    validation = source.directory / REFINED["validation"]
    if layout.file == REFINED["train"] and validation.exists():
        held_out = {video for video, _ in object_members(validation)}
    for video, value in object_members(source.directory / layout.file, layout.field):
        yield video, value, "video of the validation file" if video in held_out else None


def _records(source: Source, layout: _Layout, videos: Iterable[_Video]) -> Iterator[Record]:
    seen = set()
    for video, value, refusal in videos:
        if not source.videos.frames.get(video):
            refusal = refusal or "unknown video"
        if video in seen:
            refusal = "duplicate video"
        seen.add(video)
        groups: dict[str, list[Narration]] = collections.defaultdict(list)
        place_of_video = f"{layout.file}: {video}"
        for group, entry, where in _entries(layout, value, place_of_video, source.report):
            try:
                if refusal:
                    raise FieldError(refusal, where, "")
                name, narration = _narration(layout, group, entry, where)
                check_inside(narration.time, video, source.videos, where)
                groups[name].append(narration)
            except FieldError as error:
                source.report.drop(error.reason, error.where, error.what)
        for name, narrations in groups.items():
            yield _record(source, layout, video, name, narrations)


def _entries(
    layout: _Layout, video: Any, where: str, report: Report
) -> Iterator[tuple[str, Any, str]]:
    """What a video lists, each with the name and the place of its list."""
    if not isinstance(video, Mapping):
        report.drop("not an object", where, f"expected an object, found {shown(video)}")
        return
    for path in layout.paths(video):
        found = video
        try:
            for name in path:
                kind = list if name is path[-1] else dict
                found = field(found, name, kind, where)
        except FieldError as error:
            report.drop(error.reason, error.where, error.what)
            continue
        for i, entry in enumerate(found):
            yield path[0], entry, f"{where}: {path[0]}: {i}"


def _narration(layout: _Layout, group: str, entry: Any, where: str) -> tuple[str, Narration]:
    """The name of its group, and a narration."""
    if layout.group:
        group = text_field(entry, layout.group, where)
    else:
        check_unicode(group, where)
    text = text_field(entry, layout.text, where)
    if layout.tagged:
        text = clean_text(text)
        check_text(text, f"{where}: field '{layout.text}'")
        if " " not in text:
            raise FieldError("fewer than two words", where, f"found {shown(text)}")
    return group, Narration(seconds_field(entry, layout.time, where), text, where)


def _record(
    source: Source, layout: _Layout, video: str, group: str, narrations: Sequence[Narration]
) -> Record:
    name, fps, num_frames = f"{video}/{group}", source.videos.fps, source.videos.frames[video]
    placed = place(narrations, fps, num_frames, source.max_frames, source.report)
    (first, answer), *others = placed
    asked = time_before(first + 1, fps)
    return Record(
        id=name,
        video=video,
        start=first / fps,
        stop=(placed[-1][0] + 1) / fps,
        turns=(
            Turn("user", asked, layout.instructions[draw(len(layout.instructions), name)]),
            Turn("assistant", asked, answer),
            *(Turn("assistant", frame / fps, text) for frame, text in others),
        ),
    )


DATASETS = (
    Dataset(name="ego4d_narration", page=PAGE, read=read_narration, benchmark="stream"),
    Dataset(
        name="ego4d_refined_narration", page=REFINED_PAGE, read=read_refined, benchmark="stream"
    ),
)
