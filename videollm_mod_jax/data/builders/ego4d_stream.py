"""Turns along the frames of a video, as VideoLLM-online lays them (data/ego4d/ of its code).

A question is put after a frame, an answer is said after a frame. `Turn.time` says so for both: the
time of frame i for an answer after it, the middle between frames i and i + 1 for a question after
frame i, so that it is never taken for the time of an answer.
"""

import math
import zlib

from videollm_mod_jax.data.annotations import FieldError, Videos, text_field


def ceil_frame(seconds: float, fps: float) -> int:
    """The first frame at or after a time; upstream `ceil_time_by_fps` (data/utils.py)."""
    return math.ceil(round(seconds * fps, 6))


def floor_frame(seconds: float, fps: float) -> int:
    """The last frame at or before a time; upstream `floor_time_by_fps`."""
    return math.floor(round(seconds * fps, 6))


def time_after(frame: int, fps: float) -> float:
    """The time of a question that is put after a frame: before the next."""
    return (frame + 0.5) / fps


def check_inside(seconds: float, video: str, videos: Videos, where: str) -> None:
    """Upstream moves what comes after the last frame to it, whatever its time; we do not.

    Within a frame of the end we do, because the sampling of frames rounds the length of a video.

    Raises:
      FieldError: "after the end of the video".
    """
    end = videos.duration(video) + 1 / videos.fps
    if seconds > end:
        raise FieldError(
            "after the end of the video",
            where,
            f"expected at most {end:g} s ({videos.frames[video]} frames at {videos.fps:g} fps), "
            f"found {seconds:g} s",
        )


def check_text(text: str, where: str) -> None:
    """A json text may hold half a surrogate pair, which no file can.

    Raises:
      FieldError: "not Unicode".
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise FieldError("not Unicode", where, str(error)) from error


def spoken_field(record: object, name: str, where: str) -> str:
    """A field of text that can be written.

    Raises:
      FieldError: as `text_field` and `check_text`.
    """
    text = text_field(record, name, where)
    check_text(text, f"{where}: field '{name}'")
    return text


def draw(count: int, record: str) -> int:
    """A number from 0 to count - 1 by the name of a record, where upstream draws at random."""
    return zlib.crc32(record.encode()) % count
