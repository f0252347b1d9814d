"""Reads frames of any video at n frames per second, and writes H.264, both by PyAV (FFmpeg)."""

import contextlib
import fractions
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import av
import numpy as np

from videollm_mod_jax.data import files
from videollm_mod_jax.data.display import (
    Matrix,
    display_matrix,
    exif_orientation,
    shown_size,
    turned,
)
from videollm_mod_jax.errors import UserError

# Containers round time stamps, Matroska to a millisecond.
_TIME_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Frame:
    """A frame sampled from a video: `time` in seconds, `image` (H, W, 3) uint8 RGB."""

    time: float
    image: np.ndarray


def read_video(
    path: str | os.PathLike, fps: float, size: int | None = None, stream: int | None = None
) -> Iterator[Frame]:
    """Samples a video at `fps`: frame k, at k / fps, is the last one that begins at or before it.

    With a video of 5 frames per second sampled at 2 (time runs from the first frame):

        video    0.0  0.2  0.4  0.6  0.8  1.0
        sampled  0.0       0.5            1.0
                 =0.0      =0.4           =1.0

    Args:
      path: a file, or anything else that FFmpeg opens.
      fps: frames per second to sample, more or fewer than the video has.
      size: resizes the longest side to it (bicubic), keeping the aspect ratio, and pads the other
        with zeros on both sides to a square; None keeps the frames as they are.
      stream: index of the stream in the file; by default the video stream with the most pixels
        that is not a cover picture.

    Yields:
      Frames with time = k / fps, k = 0, 1, ... up to the time of the last frame of the video.

    Raises:
      UserError: a missing or unreadable file, no such video stream, no frames, or `fps`
        is not in (0, 1000].
    """
    # A rate without bound would repeat the first frame without end.
    if not 0 < fps <= 1000:
        raise UserError(f"{path}: fps: expected more than 0 and at most 1000, found {fps}")
    try:
        with av.open(location(path)) as container:
            chosen = _video_stream(container, stream, path)
            chosen.thread_type = "AUTO"
            # Only a picture's file has it; FFmpeg reads such a file as a video of one frame.
            still = container.format.name.endswith("_pipe") or container.format.name == "image2"
            shown = _Shown(chosen, exif_orientation(path) if still else None)
            yield from _sample(container.decode(chosen), fps, size, shown, path)
    except av.FFmpegError as error:
        advice = (
            "check the path"
            if isinstance(error, FileNotFoundError)
            else "download it again, or if a player shows it: ffmpeg -i FILE new.mp4"
        )
        raise UserError(f"{path}: cannot read the video: {error.strerror}; {advice}") from error


def location(path: str | os.PathLike) -> str:
    """How FFmpeg is told what to open.

    ```
    clip.mp4 (a file)            file:clip.mp4
    12:30 lunch.mp4 (a file)     file:12:30 lunch.mp4, where FFmpeg would look for a protocol "12"
    rtsp://10.0.0.5/door         rtsp://10.0.0.5/door
    ```
    """
    text = os.fspath(path)
    return f"file:{text}" if os.path.lexists(text) else text


def write_video(
    path: str | os.PathLike, frames: Iterable[np.ndarray], fps: float, crf: int = 12
) -> None:
    """Writes (F, H, W, 3) uint8 RGB, or an iterator of such frames, as by `video_writer`."""
    with video_writer(path, fps, crf) as write:
        for image in frames:
            write(image)


@contextlib.contextmanager
def video_writer(
    path: str | os.PathLike, fps: float, crf: int = 12
) -> Iterator[Callable[[np.ndarray], None]]:
    """A function that adds a frame to a video: H.264 (yuv420p), which every browser plays.

    The file appears when it is complete. Frames are (H, W, 3) uint8 RGB of one size; an odd height
    or width is padded by repeating its last line, as yuv420p needs even ones.

    Args:
      path: the .mp4 (or .mkv) to write.
      fps: frames per second.
      crf: x264's constant rate factor: 0 loses only what yuv420p does, 12 is hard to tell from the
        original, 23 is x264's default.

    Raises:
      UserError: no frames.
    """
    with files.written_aside(path) as aside, av.open(f"file:{aside}", "w") as container:
        stream = None

        def write(image: np.ndarray) -> None:
            nonlocal stream
            odd = (image.shape[0] % 2, image.shape[1] % 2)
            image = np.pad(image, ((0, odd[0]), (0, odd[1]), (0, 0)), mode="edge")
            if stream is None:
                rate = fractions.Fraction(fps).limit_denominator(100_000)
                stream = container.add_stream("libx264", rate=rate)
                stream.height, stream.width = image.shape[:2]
                stream.pix_fmt = "yuv420p"
                stream.options = {"crf": str(crf)}
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            container.mux(stream.encode(frame))

        yield write
        if stream is None:
            raise UserError(f"{path}: expected 1 frame or more to write, found none")
        container.mux(stream.encode())


def _video_stream(
    container: av.container.InputContainer, index: int | None, path: str | os.PathLike
) -> av.video.stream.VideoStream:
    streams = container.streams.video
    if index is not None:
        streams = [stream for stream in streams if stream.index == index]
        if not streams:
            found = [stream.index for stream in container.streams.video]
            raise UserError(
                f"{path}: stream: expected one of the video streams {found}, found {index}"
            )
    if not streams:
        raise UserError(
            f"{path}: expected a video, found no video stream; take a file with pictures, not with "
            "sound alone"
        )
    attached = av.stream.Disposition.attached_pic
    if index is None and all(stream.disposition & attached for stream in streams):
        raise UserError(
            f"{path}: expected a video, found sound with a cover picture; take a file with moving "
            "pictures"
        )
    return max(streams, key=lambda s: (not s.disposition & attached, s.width * s.height, -s.index))


@dataclass(frozen=True)
class _Shown:
    """How a player shows the pictures of a stream: see `display.py`."""

    stream: av.video.stream.VideoStream
    exif: Matrix | None

    def aspect(self) -> fractions.Fraction | None:
        return self.stream.codec_context.sample_aspect_ratio or self.stream.sample_aspect_ratio


def _sample(
    decoded: Iterator[av.VideoFrame],
    fps: float,
    size: int | None,
    shown: _Shown,
    path: str | os.PathLike,
) -> Iterator[Frame]:
    k, first, current, sampled, untimed = 0, None, None, None, 0
    for frame in decoded:
        if frame.pts is None:
            untimed += 1
            continue
        first = frame.time if first is None else first
        while current is not None and k / fps + _TIME_TOLERANCE < frame.time - first:
            # A slow video shows one frame at several samples: it is converted once.
            sampled = _image(current, size, shown) if sampled is None else sampled
            yield Frame(k / fps, sampled)
            k += 1
        current, sampled = frame, None
    if current is None and untimed:
        raise UserError(
            f"{path}: the video has no time stamps, so that nobody knows when its {untimed} frames "
            "are shown (a bare stream of a codec has none); give it some, at its rate: ffmpeg "
            "-framerate 25 -i FILE new.mp4"
        )
    if current is None:
        raise UserError(
            f"{path}: the video has no frames; it was cut off: record or download it again"
        )
    while k / fps <= current.time - first + _TIME_TOLERANCE:
        sampled = _image(current, size, shown) if sampled is None else sampled
        yield Frame(k / fps, sampled)
        k += 1


def _image(frame: av.VideoFrame, size: int | None, shown: _Shown) -> np.ndarray:
    width, height = shown_size(frame, shown.aspect())
    if size is not None:
        scale = size / max(width, height)
        width, height = max(1, round(width * scale)), max(1, round(height * scale))
    image = frame.reformat(width, height, "rgb24", interpolation="BICUBIC").to_ndarray()
    image = turned(image, shown.exif or display_matrix(frame))
    if size is None:
        return np.ascontiguousarray(image)
    top, left = (size - image.shape[0]) // 2, (size - image.shape[1]) // 2
    square = np.zeros((size, size, 3), np.uint8)
    square[top : top + image.shape[0], left : left + image.shape[1]] = image
    return square
