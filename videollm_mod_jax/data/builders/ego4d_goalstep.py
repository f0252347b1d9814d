"""`ego4d_goalstep_chat`: dialogues about cooking, with questions and unasked help.

Turns and frames are those of VideoLLM-online (showlab/videollm-online, `Ego4DGoalStepLiveChat` of
data/ego4d/livechat.py).
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from videollm_mod_jax.data.annotations import (
    Dataset,
    FieldError,
    Parsed,
    Record,
    Source,
    Turn,
    ceil_frame,
    field,
    seconds_field,
    shown,
    text_field,
    time_before,
)
from videollm_mod_jax.data.builders import ego4d_splits
from videollm_mod_jax.data.builders.ego4d_stream import draw, floor_frame
from videollm_mod_jax.data.builders.json_members import array_members
from videollm_mod_jax.errors import UserError

FILE = "goalstep_livechat_trainval_filtered_21k.json"
MOST_WAITING = 20  # frames before the first question

PAGE = f"""\
Dialogues about cooking videos: the user asks now and then, the assistant also helps unasked.

**Get it.** huggingface.co/datasets/chenjoya/videollm-online-chat-ego4d-134k (accept its terms).
Llama 3 wrote the dialogues from the steps of Ego4D Goal-Step, with random questions at random
times: data/livechat/ of showlab/videollm-online makes others like them, not the same. Features are
of the videos of Ego4D, named by their uid.

**Files.** `{FILE}`: an array of
`{{"video_uid", "conversation": [{{"role": "user" or "assistant", "time": seconds, "content"}}]}}`,
21 thousand by upstream's count. Those of less than a minute or more than an hour, and those that
speak of seconds, have been left out there.

{ego4d_splits.PAGE}
Upstream trains on all dialogues, also on those about videos on which narration is validated; these
are in `validation` and `test` here.

**Records.** One for each dialogue. A question comes after the last frame at or before its time, an
answer at the same time follows it, another answer comes after the first frame at or after its
time. The record begins 1 to {MOST_WAITING} frames before the first question (upstream draws 0 to
{MOST_WAITING} of them, here the name of the record decides) and ends with the last answer. At
2 fps, a question Q at 10.3 s with its answer A, help H at 12.1 s, two frames to wait:

    |9.5 |10.0 Q A |10.5 |11.0 |11.5 |12.0 |12.5 H

Dropped and counted, as upstream does: a dialogue that does not begin with a question inside the
video; an answer that another follows at the same time, or that no frame separates from the turn
before it; a turn after the end of the video, before the turn before it, or a question at the time
of another turn, and all turns after it; turns more than `max_frames` frames into the record. Not as
upstream: an answer with fields that are missing, mistyped, empty, too long, or hold `<v>` or half
of a surrogate pair goes alone, such a question with all turns after it; a question that nothing
answers goes from the end of a dialogue.
"""


# What ends a dialogue also when it happens to an answer.
_ENDS = frozenset({"begins without a question", "after the end of the video", "unordered times"})


class _Message(NamedTuple):
    """A turn, the time that the file gives it, the frame that it follows, and where it stands."""

    turn: Turn
    time: float
    frame: int
    where: str


def read(source: Source) -> Parsed:
    """Reads `ego4d_goalstep_chat`; see PAGE.

    Raises:
      UserError: the file is missing, or there is no rule for the splits.
    """
    if not (source.directory / FILE).exists():
        raise UserError(
            f"{source.directory}: expected {FILE}, which is not there; download it from "
            "huggingface.co/datasets/chenjoya/videollm-online-chat-ego4d-134k"
        )
    splits = ego4d_splits.read_splits(source.directory)
    return Parsed({split: _records(source, splits, split) for split in ego4d_splits.SPLITS})


def _records(source: Source, splits: ego4d_splits.VideoSplits, split: str) -> Iterator[Record]:
    for i, dialogue in enumerate(array_members(source.directory / FILE)):
        where = f"{FILE}: dialogue {i}"
        mine = split == "train"  # which counts what has no split
        try:
            video = text_field(dialogue, "video_uid", where)
            found = splits.of(video)
            mine = split == (found or "train")
            conversation = field(dialogue, "conversation", list, where)
        except FieldError as error:
            if mine:
                source.report.drop(error.reason, error.where, error.what)
            continue
        if not mine:
            continue
        if found is None or not source.videos.frames.get(video):
            reason = "video in no list" if found is None else "unknown video"
            source.report.drop(reason, where, video, len(conversation))
        elif record := _record(source, f"{video}/{i}", video, conversation, where):
            yield record


def _record(
    source: Source, name: str, video: str, conversation: Sequence[Any], where: str
) -> Record | None:
    report, fps, longest = source.report, source.videos.fps, source.max_frames
    kept: list[_Message] = []
    first, over = 0, ""
    for i, entry in enumerate(conversation):
        place = f"{where}: turn {i}"
        try:
            if over:
                raise FieldError(over, place, "")
            before = kept[-1] if kept else None
            message = _message(entry, before, fps, source.videos.frames[video] - 1, place)
            if before is None:
                first = message.frame - draw(max(1, min(MOST_WAITING, message.frame)), name)
            if message.frame - first >= longest:
                over = f"more than {longest} frames into the record"
                raise FieldError(over, place, "")
        except FieldError as error:
            report.drop(error.reason, error.where, error.what)
            answer = isinstance(entry, Mapping) and entry.get("role") == "assistant"
            if not answer or error.reason in _ENDS:
                over = over or "after a turn that cannot be used"
            continue
        if before and before.turn.role == "assistant" and message.time == before.time:
            report.drop("another answer at the same time", kept.pop().where)
        kept.append(message)
    while kept and kept[-1].turn.role == "user":
        report.drop("question without an answer", kept.pop().where)
    if not kept:
        return None
    report.keep(len(kept))
    return Record(
        id=name,
        video=video,
        start=first / fps,
        stop=(kept[-1].frame + 1) / fps,
        turns=tuple(message.turn for message in kept),
    )


def _message(
    entry: Any, before: _Message | None, fps: float, last_frame: int, where: str
) -> _Message:
    """Lays a turn of the file along the frames, after the one before it."""
    role = text_field(entry, "role", where)
    if role not in ("user", "assistant"):
        raise FieldError("unknown role", where, f"expected user or assistant, found {shown(role)}")
    if before is None and role != "user":
        raise FieldError("begins without a question", where, "expected role user")
    time = seconds_field(entry, "time", where)
    if time > last_frame / fps or (before is None and time == 0):
        reason = "after the end of the video" if time else "question before the first frame"
        raise FieldError(
            reason,
            where,
            f"expected more than 0 and at most {last_frame / fps:g} s, found {time:g}",
        )
    text = text_field(entry, "content", where)
    earliest = 0 if before is None else before.frame
    if before is not None and time < before.time:
        raise FieldError("unordered times", where, f"{time:g} s comes after {before.time:g} s")
    if role == "user":
        if before is not None and time == before.time:
            raise FieldError("question at the time of another turn", where, f"at {time:g} s")
        frame = max(floor_frame(time, fps), earliest)
        return _Message(Turn("user", time_before(frame + 1, fps), text), time, frame, where)
    if time == before.time:
        turn = Turn("assistant", before.turn.time, text)
        return before._replace(turn=turn, where=where)
    frame = max(ceil_frame(time, fps), earliest)
    if frame == before.frame:
        raise FieldError("no frame since the turn before", where, f"at {time:g} s")
    return _Message(Turn("assistant", frame / fps, text), time, frame, where)


DATASETS = (Dataset(name="ego4d_goalstep_chat", page=PAGE, read=read, benchmark="stream"),)
