"""Times along the frames of a video, as VideoLLM-online lays them (data/ego4d/ of its code).

A question is put after a frame, an answer is said after a frame. `Turn.time` says so for both: the
time of frame i for an answer after it, `annotations.time_before` of frame i + 1 for a question.
"""

import math
import zlib

from videollm_mod_jax.data.annotations import FieldError, Videos


def floor_frame(seconds: float, fps: float) -> int:
    """The last frame at or before a time; upstream `floor_time_by_fps` (data/utils.py)."""
    return math.floor(round(seconds * fps, 6))


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


def draw(count: int, record: str) -> int:
    """A number from 0 to count - 1 by the name of a record, where upstream draws at random."""
    return zlib.crc32(record.encode()) % count
