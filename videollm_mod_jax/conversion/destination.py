"""The directory that a conversion writes: complete or absent, never over anything else."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import rich.console
from rich import progress

from videollm_mod_jax.errors import UserError

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
    """Renames a complete directory to the destination, which is replaced if it is there."""
    replaced = destination.with_name(f".{destination.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if destination.exists():
        os.rename(destination, replaced)
    os.rename(complete, destination)
    shutil.rmtree(replaced, ignore_errors=True)


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
