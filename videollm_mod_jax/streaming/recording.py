"""What a command looks at before it loads a model: the video to read, and the files to write."""

import contextlib
import os
import stat
from collections.abc import Mapping
from pathlib import Path

from videollm_mod_jax.data.video import read_video
from videollm_mod_jax.errors import UserError

ENDINGS = (".mp4", ".mkv", ".mov")
"""Of files that hold H.264."""


def check_video(video: str, fps: float) -> None:
    """Reads the first frame of a file; leaves pipes and URLs alone, which open but once.

    Raises:
      UserError: it cannot be read as a video.
    """
    path = Path(video)
    with contextlib.suppress(OSError):
        if "://" in video or not (stat.S_ISREG(path.stat().st_mode) or path.is_dir()):
            return
    if "://" not in video:
        with contextlib.closing(read_video(video, fps)) as frames:
            next(frames, None)


def check_recordings(video: str, files: Mapping[str, str | None]) -> None:
    """Compares the videos to write with the one that is read, and with each other.

    Args:
      video: that is read.
      files: to write, by their flags; None is not wanted.

    Raises:
      UserError: one has an ending that cannot be written, is a directory, or would replace the
        video or another one.
    """
    wanted = {flag: file for flag, file in files.items() if file is not None}
    taken = {os.path.realpath(video): "the video that is read (--video)"}
    for flag, file in wanted.items():
        if Path(file).suffix.lower() not in ENDINGS:
            raise UserError(
                f"{flag} is {file}; expected a file that ends in {', '.join(ENDINGS)}, which hold "
                "what is written (H.264)"
            )
        if Path(file).is_dir():
            raise UserError(f"{flag} is {file}, a directory; name a file in it")
        with contextlib.suppress(OSError):
            # Also by another name: a hard link.
            if os.path.samefile(file, video):
                taken.setdefault(os.path.realpath(file), taken[os.path.realpath(video)])
        other = taken.setdefault(os.path.realpath(file), flag)
        if other != flag:
            raise UserError(f"{flag} is {file}, which is {other} as well; name another file")
