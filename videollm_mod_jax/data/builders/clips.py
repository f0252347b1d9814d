"""A question, the clip that it is about, the answer: what datasets of labelled clips share.

    \\nUser: What is the action in the video?
    \\n[<v><v>,<v><v>]
    \\nAssistant: Jack up the car.<eos>

The layout and the frames are those of VideoLLM-online (showlab/videollm-online,
data/coin/benchmarks.py, and `ceil_time_by_fps` of data/utils.py).
"""

from collections.abc import Sequence

from videollm_mod_jax.data.annotations import (
    FieldError,
    Record,
    Source,
    Turn,
    ceil_frame,
    time_before,
)


def clip_frames(start: float, end: float, fps: float, num_frames: int) -> range:
    """The frames of a clip: both ends are rounded up to frames, inside the video, and included.

    ```
    2 fps, 12 frames   1.2 s to 3.0 s   ->   frames 3 4 5 6
                       5.0 s to 9.0 s   ->   frames 10 11
    ```

    Args:
      start, end: seconds from the beginning of the video.
      fps: frames per second of the features.
      num_frames: of the video.
    """
    first, last = (
        min(ceil_frame(min(seconds, num_frames / fps), fps), num_frames - 1)
        for seconds in (start, end)
    )
    return range(first, last + 1)


def clip_record(
    source: Source,
    *,
    record_id: str,
    video: str,
    start: float,
    end: float,
    question: str,
    labels: Sequence[str],
    where: str,
) -> Record:
    """A record that asks a question, shows the clip that it is about, and answers.

    A clip of more than `source.max_frames` frames is shown with a stride, from its beginning to its
    end.

    Args:
      source: whose videos and `max_frames` count.
      record_id: unique in the dataset.
      video: as the feature store names it.
      start, end: of the clip, in seconds from the beginning of the video.
      question: what the user asks.
      labels: what the answer says, in order; `target` is `{"labels": labels}`.
      where: what error messages call the clip.

    Raises:
      FieldError: "unordered times" or "outside the video".
    """
    videos = source.videos
    if end < start:
        raise FieldError("unordered times", where, f"begins at {start:g} s, ends at {end:g} s")
    if start >= videos.duration(video):
        raise FieldError(
            "outside the video",
            where,
            f"begins at {start:g} s, the features end at {videos.duration(video):g} s",
        )
    frames = clip_frames(start, end, videos.fps, videos.frames[video])
    shown = frames[:: source.stride(len(frames))]
    return Record(
        id=record_id,
        video=video,
        start=shown.start / videos.fps,
        stop=frames.stop / videos.fps,
        turns=(
            Turn("user", time_before(shown[0], videos.fps), question),
            Turn("assistant", shown[-1] / videos.fps, answer_text(labels)),
        ),
        stride=shown.step,
        target={"labels": list(labels)},
    )


def answer_text(labels: Sequence[str]) -> str:
    """One label as it is, several on numbered lines (`/` is a line end).

    ```
    Jack up the car.                     ->   Jack up the car.
    Jack up the car.  Remove the tire.   ->   1. Jack up the car./2. Remove the tire.
    ```
    """
    if len(labels) == 1:
        return labels[0]
    return "\n".join(f"{number}. {label}" for number, label in enumerate(labels, 1))


def label(name: str) -> str:
    """The name of a class as answers say it, in lower case but for its first letter.

    ```
    take out the laptop CD drive   ->   Take out the laptop cd drive.
    ```
    """
    return name.capitalize() + "."
