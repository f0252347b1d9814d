"""Frames of many videos in batches of one shape, as a vision tower wants them.

Axes: B frames of a batch, A pixels of a side, C colours.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np


class VideoError(Exception):
    """A video that cannot be decoded, or not to its end; the message says why in one line."""


@dataclass(frozen=True)
class Part:
    """Frames of one video in a batch.

    Attributes:
      name: of the video.
      frames: how many; 0 for a bad video without any.
      ends: whether they are its last.
      error: why the video is bad, if it is; then it ends.
    """

    name: str
    frames: int
    ends: bool
    error: str | None = None


@dataclass(frozen=True)
class Batch:
    """Frames of consecutive videos.

    Attributes:
      images_BAAC: uint8 RGB; zeros behind the frames of the parts.
      parts: in order.
      last: whether it is the last batch of these videos.
    """

    images_BAAC: np.ndarray
    parts: tuple[Part, ...]
    last: bool


def batched(
    videos: Iterable[tuple[str, Iterable[np.ndarray]]], batch_size: int, side: int
) -> Iterator[Batch]:
    """Puts the frames of videos of any length into batches that run across videos.

    ```
    videos   a a a   b b b b b   c      batch_size 4
    batches  [a a a b] [b b b b] [c . . .]        . is zeros
    parts    a 3 ends, b 1 | b 4 ends | c 1 ends
    ```

    Args:
      videos: names and frames [A, A, 3] uint8; a VideoError ends the frames of a bad one.
      batch_size: B.
      side: A.

    Yields:
      One batch or more.
    """
    shape = (batch_size, side, side, 3)
    images_BAAC, filled, parts = np.zeros(shape, np.uint8), 0, []
    for name, frames in videos:
        count, error = 0, None
        try:
            for image_AAC in frames:
                if filled == batch_size:
                    if count:
                        parts.append(Part(name, count, ends=False))
                    yield Batch(images_BAAC, tuple(parts), last=False)
                    images_BAAC, filled, parts, count = np.zeros(shape, np.uint8), 0, [], 0
                images_BAAC[filled] = image_AAC
                filled, count = filled + 1, count + 1
        except VideoError as problem:
            error = str(problem)
        parts.append(Part(name, count, ends=True, error=error))
    yield Batch(images_BAAC, tuple(parts), last=True)
