"""One writer at a time: a lock on every directory that a command writes.

The kernel keeps the lock (`flock`) and drops it when the process ends, however it ends. It holds
between the hosts of a shared file system where that supports `flock`: NFS (Linux 2.6.12 and newer),
CephFS, GPFS, BeeGFS, and Lustre mounted with `-o flock`. Where the file system has no locks at all,
a note says so, and nothing is locked.
"""

import contextlib
import errno
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import filelock

from videollm_mod_jax.errors import UserError

LOCK = ".lock"

_UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL)


@contextlib.contextmanager
def locked(directory: str | os.PathLike, command: str, *, beside: bool = False) -> Iterator[None]:
    """Holds a directory for this process in the block.

    ```
    locked("runs/digits", "train")                     runs/digits/.lock
    locked("features/own", "encode", beside=True)      features/.own.lock
    ```

    Whoever holds it already may enter again. A lock that is released leaves no file, and no
    directory that was made for it and is empty.

    Args:
      directory: what the block writes; made if missing, with its parents.
      command: who holds it, for the message to others.
      beside: the directory itself appears only when it is complete, so that the lock file lies
        next to it.

    Raises:
      UserError: another process holds the directory; it is named.
    """
    directory = Path(directory).absolute()
    path = directory.with_name(f".{directory.name}{LOCK}") if beside else directory / LOCK
    made = [parent for parent in path.parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path, thread_local=False, is_singleton=True)
    try:
        # Somebody may just remove the file; the library notices, and takes another.
        lock.acquire(timeout=0.5)
    except filelock.Timeout as error:
        raise UserError(
            f"{directory} is in use by {_holder(path)}; wait for its end, or stop it"
        ) from error
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        print(
            f"{directory}: the file system has no locks ({error.strerror}); see to it that no "
            "other command writes there",
            file=sys.stderr,
        )
        yield
        return
    try:
        _sign(path, command)
        yield
    finally:
        if lock.lock_counter == 1:
            path.unlink(missing_ok=True)
        lock.release()
        with contextlib.suppress(OSError):
            for parent in made:
                parent.rmdir()


def _sign(path: Path, command: str) -> None:
    """Write who holds a lock into its file."""
    holder = {
        "command": command,
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    with open(path, "r+", encoding="utf-8") as file:
        file.write(json.dumps(holder))
        file.truncate()


def _holder(path: Path) -> str:
    """Return what a lock file says of its holder, as far as it can be read."""
    try:
        holder = json.loads(path.read_bytes()[:4096])
        return "`{command}`, process {pid} on {host}, since {since}".format(**holder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"another process (see {path})"
