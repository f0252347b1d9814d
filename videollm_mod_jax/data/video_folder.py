"""A folder of videos and images: their names, about how long they are, and which go together."""

import os
from collections.abc import Sequence
from pathlib import Path

import av

from videollm_mod_jax.data.video import location
from videollm_mod_jax.errors import UserError

# fmt: off
VIDEOS = frozenset((
    ".3gp", ".avi", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg",
    ".mts", ".ogv", ".ts", ".vob", ".webm", ".wmv",
))
# fmt: on
IMAGES = frozenset((".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"))

MOST_BYTES = 2**29  # of a shard
_MOST_AT_ONCE = 32  # shards that can be decoded side by side, of a folder that makes one or more
LEAST_FRAMES = 512  # of a shard, so that its last batch, partly padding, is one of several


def find_videos(directory: str | os.PathLike) -> dict[str, Path]:
    """Every video and image below a directory, links followed, in the order of their names.

    ```
    DIR/kitchen/0017.mp4 -> kitchen/0017      DIR/a.b.JPG -> a.b
    ```

    The endings are those of `VIDEOS` and `IMAGES`, in any case. Files and directories whose name
    begins with a dot, and files of other endings, are passed over.

    Returns:
      Paths by name: relative to the directory, `/` between folders, without the ending.

    Raises:
      UserError: no such directory, no video in it, a link to a directory around it or to nothing,
        a pipe or device with the name of a video, or two files of one name.
    """
    directory, found = Path(directory), {}
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory; expected one that holds videos")
    for folder, folders, names in os.walk(directory, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for link in (Path(folder, name) for name in folders if Path(folder, name).is_symlink()):
            if Path(folder).resolve().is_relative_to(link.resolve()):
                raise UserError(f"{link} links to a directory around it; remove the link")
        for path in (Path(folder, name) for name in names if not name.startswith(".")):
            if path.suffix.lower() not in VIDEOS | IMAGES:
                continue
            if not path.is_file():
                # A pipe would be waited for without end.
                what = "a link to nothing" if path.is_symlink() else "no file"
                raise UserError(f"{path} is {what}; expected a video: remove or rename it")
            name = path.relative_to(directory).with_suffix("").as_posix()
            if name in found:
                raise UserError(
                    f"{path} and {found[name]}: both are named {name!r}; rename or remove one"
                )
            found[name] = path
    if not found:
        endings = " ".join(sorted(VIDEOS | IMAGES))
        raise UserError(f"{directory} holds no video; expected files that end in {endings}")
    return dict(sorted(found.items()))


def about_frames(path: Path, fps: float) -> int:
    """The number of frames at `fps` as the file's header tells it; 1 where it does not."""
    if path.suffix.lower() in IMAGES:
        return 1
    try:
        with av.open(location(path)) as container:
            return max(1, round((container.duration or 0) / av.time_base * fps))
    # It will fail again where it is reported, when its frames are to be decoded.
    except Exception:
        return 1


def divide(frames: Sequence[int], frame_bytes: int) -> list[range]:
    """Divides videos, in order, into the shards of a store.

    A shard ends before it would have more than 512 MiB of features, or more than a 32nd of the
    whole (but at least 512 frames), so that a small store too is encoded by several processes. A
    function of the arguments alone: a run that was killed finds the same shards again.

    ```
    frames  300 300 100 600 20 1      limit 512
    shards  0..1 1..3 3..4 4..6
    ```

    Args:
      frames: of every video, about.
      frame_bytes: of the features of one frame.

    Returns:
      The numbers of the videos of every shard.
    """
    limit = min(MOST_BYTES // frame_bytes, max(LEAST_FRAMES, sum(frames) // _MOST_AT_ONCE))
    starts, filled = [0], 0
    for number, count in enumerate(frames):
        if filled and filled + count > limit:
            starts.append(number)
            filled = 0
        filled += count
    return [range(*ends) for ends in zip(starts, [*starts[1:], len(frames)], strict=True)]
