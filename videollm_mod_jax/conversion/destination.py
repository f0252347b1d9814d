"""The directory that a conversion writes: complete or absent, never over anything else."""

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import rich.console
from rich import progress

from videollm_mod_jax.errors import UserError

JOURNAL = "journal.json"
"""In a work directory: that a conversion made it, and what is in it."""

REPLACED = "replaced"
"""In a work directory: what was at the destination."""

_FULL = tuple(os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT))


def check_free(destination: Path, overwrite: bool, mark: str) -> None:
    """Checks, before any work, that the destination may be written.

    Args:
      destination: the directory that will appear.
      overwrite: whether one that is there may be replaced.
      mark: glob of a file that tells a directory of this kind from anything else.

    Raises:
      UserError: it exists and may not be replaced.
    """
    if not destination.exists() or (destination.is_dir() and not any(destination.iterdir())):
        return
    if not overwrite:
        raise UserError(f"{destination} exists; name another directory or add --overwrite")
    if not destination.is_dir() or not any(destination.glob(mark)):
        raise UserError(
            f"{destination} holds no {mark}, so it is nothing that a conversion wrote, and "
            "--overwrite does not delete it; name another directory"
        )


def check_work(work: Path) -> None:
    """Checks that a work directory is free, or left by an interrupted conversion of this user.

    Its name can be guessed: in a directory that others may write to, one of them may have put a
    link there, or a directory whose content is theirs to change.

    Raises:
      UserError: it is a link, a file, a directory of somebody else, or holds something without the
        journal that every conversion writes first.
    """
    try:
        found = work.lstat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"{work} cannot be read: {error.strerror}") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        kind = "a link" if stat.S_ISLNK(found.st_mode) else "no directory of yours"
        raise UserError(
            f"{work} is in the way and is {kind}; expected nothing there, or the directory of an "
            "interrupted conversion: move it elsewhere or name another destination"
        )
    names = [path.name for path in work.iterdir()]
    if JOURNAL not in names and any(not name.startswith(".") for name in names):
        raise UserError(f"{work} is in the way and no conversion wrote it; move it elsewhere")


def check_space(directory: Path, needed: int) -> None:
    """Checks that a directory's file system has room for `needed` more bytes.

    Raises:
      UserError: it has not.
    """
    while not directory.exists():
        directory = directory.parent
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise UserError(
            f"{directory}: {needed:,} bytes are needed and {free:,} are free; make room there or "
            "name a destination on another disk"
        )


@contextlib.contextmanager
def full_disk_is_a_user_error(directory: Path) -> Iterator[None]:
    """Turns the many errors that mean "no space left on device" into one line."""
    try:
        yield
    except (OSError, ValueError) as error:
        if any(text in str(error) for text in _FULL):
            raise UserError(
                f"{directory}: the disk is full; make room there or name a destination on another "
                "disk"
            ) from error
        raise


def put_in_place(complete: Path, destination: Path) -> None:
    """Renames a complete directory to the destination, and removes the work directory it was in.

    What is at the destination is moved to the work directory first, and back if that fails.
    """
    work = complete.parent
    if destination.exists():
        shutil.rmtree(work / REPLACED, ignore_errors=True)
        os.rename(destination, work / REPLACED)
    try:
        os.rename(complete, destination)
    except OSError:
        if (work / REPLACED).exists():
            os.rename(work / REPLACED, destination)
        raise
    # The journal last: it says of the others whose they are.
    for path in work.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
    shutil.rmtree(work, ignore_errors=True)


def byte_progress(console: rich.console.Console) -> progress.Progress:
    """A progress bar that counts bytes: done and in all, per second, and the time left."""
    return progress.Progress(
        progress.BarColumn(bar_width=20),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.description}", markup=False),
        console=console,
        # Logs get the report that follows, not a bar.
        disable=not console.is_terminal,
    )
