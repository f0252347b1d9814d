"""Lays timed turns along the frames of a video, and cuts long videos into records."""

import dataclasses
import math
from collections.abc import Iterator, Sequence

from videollm_mod_jax.data.annotations import Record, Source, Turn, ceil_frame

Located = tuple[str, Turn]
"""A turn, and the file and record that it comes from."""


def cut(video: str, turns: Sequence[Located], source: Source) -> Iterator[Record]:
    """Makes records of a video's turns, in any order, and counts every turn.

    A record ends after `max_frames` frames, or earlier where a question and its answer would be
    separated; one in which nothing is said is left out. With 10 frames, `max_frames` 4, N a
    narration after its frame, Q and A a question before and its answer after a frame:

    ```
    frames    0 1 2 3   4  5 6 7   8 9
    turns       N         Q    A
    records   [     ]   [      ]
    ```

    What is said in the frame of the narration or answer before it is joined to that. What is said
    after the last frame, but not after the end of the video, is said at that frame.

    Args:
      video: its name in `source.videos`.
      turns: what is said, and where that is written.
      source: the lengths of videos and records; its report counts turns that became part of a
        record, and those that are duplicates, come after the end of the video, are questions
        without an answer, or questions that are answered more than `max_frames` frames later.

    Yields:
      Records in order of time, named VIDEO/FIRST-END by their frames.
    """
    fps, longest = source.videos.fps, source.max_frames

    def record(first: int, end: int, said: list[_Exchange]) -> Record:
        source.report.keep(sum(len(exchange.sources) for exchange in said))
        return Record(
            id=f"{video}/{first}-{end}",
            video=video,
            start=first / fps,
            stop=end / fps,
            turns=tuple(turn for exchange in said for turn in exchange.turns),
        )

    start, said = 0, []
    for exchange in _exchanges(turns, source, source.videos.frames[video]):
        if exchange.end - exchange.first > longest:
            for where in exchange.sources:
                found = f"expected at most {longest} frames, found {exchange.end - exchange.first}"
                source.report.drop("question and answer too far apart", where, found)
            continue
        while exchange.end > start + longest:
            end = min(start + longest, max(exchange.first, said[-1].end if said else 0))
            if said:
                yield record(start, end, said)
            start, said = end, []
        said.append(exchange)
    if said:
        yield record(start, min(source.videos.frames[video], start + longest), said)


@dataclasses.dataclass
class _Exchange:
    """A narration, or questions and their answer, which stay in one record.

    Attributes:
      first: the first frame that it needs: its own, or that before the question.
      end: frames of the video that are seen before its last turn.
      turns: what is said.
      sources: where that is written.
    """

    first: int
    end: int
    turns: list[Turn]
    sources: list[str]


def _exchanges(turns: Sequence[Located], source: Source, num_frames: int) -> list[_Exchange]:
    """The exchanges of a video, no two in one frame; `dialogue.conversation_from_turns` says when.

    Times are ceiled to frames as there.
    """
    fps = source.videos.fps
    last, duration = (num_frames - 1) / fps, num_frames / fps
    exchanges: list[_Exchange] = []
    questions: list[Located] = []
    seen: set[Turn] = set()
    for where, turn in sorted(turns, key=lambda located: located[1].time):
        if turn.time > duration:
            found = f"expected at most {duration:g} s, found {turn.time:g} s"
            source.report.drop("after the end of the video", where, found)
            continue
        if turn in seen:
            source.report.drop("duplicate", where, f"{turn.role} at {turn.time:g} s again")
            continue
        seen.add(turn)
        if turn.role == "user":
            questions.append((where, turn))
            continue
        frame = min(ceil_frame(turn.time, fps), num_frames - 1)
        shown = exchanges[-1].end if exchanges else 0
        if questions:
            asked, latest = ceil_frame(questions[0][1].time, fps), questions[-1][1].time
            shown = max(shown, ceil_frame(latest, fps))
            at_once = turn.time == latest or frame < shown
            # Later than the question, or it would be answered at once.
            waited = max(min(turn.time, last), math.nextafter(latest, math.inf))
            time = latest if at_once else waited
            said = [*(question for _, question in questions), dataclasses.replace(turn, time=time)]
            sources = [*(place for place, _ in questions), where]
            end = shown if at_once else frame + 1
            exchanges.append(_Exchange(max(asked - 1, 0), end, said, sources))
            questions = []
        elif frame < shown:
            before = exchanges[-1].turns[-1]
            text = f"{before.text} {turn.text}"
            exchanges[-1].turns[-1] = dataclasses.replace(before, text=text)
            exchanges[-1].sources.append(where)
        else:
            before = exchanges[-1].turns[-1].time if exchanges else 0.0
            said = [dataclasses.replace(turn, time=max(min(turn.time, last), before))]
            exchanges.append(_Exchange(frame, frame + 1, said, [where]))
    for where, question in questions:
        source.report.drop("question without an answer", where, f"{question.text!r}")
    return exchanges
