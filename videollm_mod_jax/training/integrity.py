"""Checksums of what Orbax writes: recorded before it gets its name, checked before it is read.

    checkpoints/400/checksums.json              of _CHECKPOINT_METADATA, trained/checksums.json, ...
    checkpoints/400/trained/checksums.json      of every file below trained/

A directory that has a `checksums.json` of its own stands in that of its parent with this one file:
so a part is checked without reading the rest, and a part of another checkpoint is noticed.

Checksums tell damage from what was written. They are no signature: who writes to a directory can
write its checksums too.
"""

import asyncio
import concurrent.futures
import errno
import hashlib
import json
import os
import stat
import time
from pathlib import Path, PurePath
from typing import Any

import jax
import orbax.checkpoint as ocp

from videollm_mod_jax.data.files import read_json_object
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.training import distributed

CHECKSUMS = "checksums.json"
_ALGORITHM = "sha256"
_OF_RECORD = "sha256_of_this_table"
_LARGEST_RECORD = 64 * 2**20
"""Bytes of a `checksums.json`; that of a model of 100 GB has a thousandth of it."""

_Recorded = dict[str, tuple[int, str]]
"""Sizes and SHA-256 by path in the directory."""

_verified: dict[Path, object] = {}
"""What each directory looked like when this process verified it, so that it does so once."""


class CheckedPath(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """Where Orbax writes a directory before it is complete: checksums are its last file.

    Pass it as `temporary_path_class`. When the directory gets its name, its checksums are there and
    all of it is on the disk.
    """

    async def finalize(self) -> None:
        """As in Orbax, which renames at once and would leave no moment to record anything."""
        if store := self._checkpoint_metadata_store:
            await asyncio.to_thread(store.wait_until_finished)
            await asyncio.to_thread(
                store.update,
                file_path=self.get() / "_CHECKPOINT_METADATA",
                commit_timestamp_nsecs=time.time_ns(),
            )
            await asyncio.to_thread(store.wait_until_finished)
        await asyncio.to_thread(self._complete)

    def _complete(self) -> None:
        temporary, final = Path(self.get()), Path(self.get_final())
        record(temporary)
        os.rename(temporary, final)
        _sync_directory(final.parent)


def record(directory: Path) -> None:
    """Write `checksums.json` for a directory that is complete, and see all of it to the disk.

    ```
    d/1f       b"ab"                 {"sha256": {"_METADATA": [2, "44136f..."],
    _METADATA  b"{}"       ->                    "d/1f": [2, "fb8e20..."]},
                                      "sha256_of_this_table": "..."}
    ```

    Args:
      directory: that nothing writes to any more.

    Raises:
      OSError: the disk is full or failing.
    """
    files = _scan(directory)
    with _pool() as pool:
        digests = list(pool.map(lambda name: _hash(directory / name, sync=True), files))
    recorded = {
        name: [status.st_size, digest]
        for (name, status), digest in zip(files.items(), digests, strict=True)
    }
    with (directory / CHECKSUMS).open("w", encoding="utf-8") as file:
        json.dump({_ALGORITHM: recorded, _OF_RECORD: _digest(recorded)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    for folder in {parent for name in files for parent in PurePath(name).parents}:
        _sync_directory(directory / folder)


def verify(directory: Path, remedy: str, *, index: int = 0, count: int = 1) -> None:
    """Check that a directory is what was recorded.

    Names and sizes are compared before anything is read. Links are followed to regular files, as
    download caches make them. What this process has verified and did not change since is not read
    again.

    Args:
      directory: as `record` left it.
      remedy: what to do about damage, other than to restore a copy.
      index: which share of the contents to read, from 0.
      count: of how many.

    Raises:
      UserError: it has no checksums, a file is missing, cut, changed or one too many, or cannot be
        read; the file is named.
    """
    recorded = _read(directory / CHECKSUMS, remedy)
    try:
        found = _scan(directory)
    except OSError as error:
        raise _unreadable(Path(error.filename or directory), error) from error
    for name in sorted({**recorded, **found}):
        if fault := _difference(recorded.get(name), found.get(name)):
            raise damaged(directory / name, fault, remedy)
    look = (
        (index, count, recorded),
        {n: (s.st_dev, s.st_ino, s.st_mtime_ns, s.st_ctime_ns) for n, s in found.items()},
    )
    if _verified.get(directory.absolute()) == look:
        return
    # Every process takes files of all sizes.
    names = sorted(recorded, key=lambda name: (recorded[name][0], name))[index::count]
    with _pool() as pool:
        hashes = {name: pool.submit(_hash, directory / name) for name in names}
        try:
            for name, digest in hashes.items():
                if digest.result() != recorded[name][1]:
                    raise damaged(directory / name, "its content is not what was written", remedy)
        except OSError as error:
            raise _unreadable(directory / name, error) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    _verified[directory.absolute()] = look


def verify_together(directory: Path, remedy: str) -> None:
    """Check as `verify` does, in all processes: each reads a share, and all raise what one found.

    A large model is read once from where it is stored, and not by every process.
    """
    try:
        verify(directory, remedy, index=jax.process_index(), count=jax.process_count())
        fault = None
    except UserError as error:
        fault = str(error)
    faults = distributed.gather(fault) if jax.process_count() > 1 else [fault]
    if found := next(filter(None, faults), None):
        raise UserError(found)


def damaged(path: Path, what: str, remedy: str) -> UserError:
    """Return the error that says what is wrong with a stored file or directory."""
    return UserError(f"{_shown(path)} is damaged: {what}; restore it from a copy, or {remedy}")


def _difference(recorded: tuple[int, str] | None, found: os.stat_result | None) -> str | None:
    """Return what names and sizes alone tell about a file."""
    if found is None:
        return "it is missing"
    if not stat.S_ISREG(found.st_mode):
        return "it is not a regular file"
    if recorded is None:
        return f"no such file was written ({CHECKSUMS} has no record of it)"
    if found.st_size != recorded[0]:
        return f"it has {found.st_size} bytes where {recorded[0]} were written"
    return None


def _read(path: Path, remedy: str) -> _Recorded:
    """Read a `checksums.json`.

    Raises:
      UserError: it is missing, or not one.
    """
    try:
        # A pipe that nobody writes to would be waited for: no pipe is read.
        table = read_json_object(path, largest=_LARGEST_RECORD)
    except UserError as error:
        cause = error.__cause__
        if isinstance(cause, FileNotFoundError | NotADirectoryError):
            raise UserError(
                f"{path} is missing, so that damage would not be seen; restore it from a copy, or "
                f"{remedy}, or load without checksums: --no-verify, verify=False"
            ) from None
        if isinstance(cause, OSError):
            raise _unreadable(path, cause) from error
        what = str(error).removeprefix(f"{path} ")
        raise damaged(path, f"it {what}", remedy) from error
    try:
        if table[_OF_RECORD] != _digest(table[_ALGORITHM]):
            raise damaged(path, "its content is not what was written", remedy)
        recorded = {name: (size, digest) for name, (size, digest) in table[_ALGORITHM].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise damaged(path, "it holds no checksums", remedy) from error
    return recorded


def _scan(directory: Path) -> dict[str, os.stat_result]:
    """Return what there is to record, by path in the directory: see the head of this file.

    Hidden files, which systems leave everywhere, belong to nobody.
    """
    found, folders = {}, [""]
    while folders:
        prefix = folders.pop()
        with os.scandir(directory / prefix) as entries:
            for entry in entries:
                name = prefix + entry.name
                if entry.name.startswith(".") or name == CHECKSUMS:
                    continue
                if not entry.is_dir(follow_symlinks=False):
                    found[name] = _status(entry)
                elif (directory / name / CHECKSUMS).is_file():
                    found[f"{name}/{CHECKSUMS}"] = (directory / name / CHECKSUMS).stat()
                else:
                    folders.append(f"{name}/")
    return dict(sorted(found.items()))


def _status(entry: os.DirEntry) -> os.stat_result:
    try:
        return entry.stat()
    except FileNotFoundError:
        # A link to nowhere: no regular file.
        return entry.stat(follow_symlinks=False)


def _digest(recorded: Any) -> str:
    return hashlib.new(_ALGORITHM, json.dumps(recorded, sort_keys=True).encode()).hexdigest()


def _hash(path: Path, sync: bool = False) -> str:
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, _ALGORITHM).hexdigest()


def _pool() -> concurrent.futures.ThreadPoolExecutor:
    # Hashing releases the interpreter's lock.
    return concurrent.futures.ThreadPoolExecutor(min(16, os.cpu_count() or 1))


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems do not sync directories.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(f"{_shown(path)} cannot be read: {error.strerror or error}")


def _shown(path: Path) -> str:
    text = str(path)
    return text if text.isprintable() else ascii(text)
