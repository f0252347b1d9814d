"""Atomic output, written next to the target and renamed; and json files of any origin, read safely.

A json file may come from a stranger: it may be a pipe that never ends, of terabytes, nested a
million deep, or say two things at once. Whatever it is costs a second at most, and one line.
"""

import collections
import contextlib
import errno
import glob
import json
import math
import os
import pathlib
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from typing import Any

from videollm_mod_jax.errors import UserError, shown

LARGEST_JSON = 64 << 20
"""Bytes of a json file that is read as a whole, unless its reader knows better."""


_ASIDE = re.compile(r"\..*\.\d+-[0-9a-f]{8}\.partial(\..*)?", re.DOTALL)
_TFDS_ASIDE = re.compile(r"incomplete\.\w+_.*|.*\.incomplete\w+", re.DOTALL)


@contextlib.contextmanager
def written_aside(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yields a free path next to `path`; a clean exit renames it to `path`, an error removes it.

    ```
    runs/digits/model.json   ->   runs/digits/.model.4711-9f3a01c7.partial.json
    ```

    Works for a file (replaced when it exists) and for a directory (which must not exist yet). The
    aside path keeps the suffix of `path`, so that writers that go by suffix see the right one, and
    nobody can guess it, so that nothing is put in its place. What has its name is on the disk, and
    not only in the system's memory.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unique = f"{os.getpid()}-{secrets.token_hex(4)}"
    aside = path.with_name(f".{path.stem}.{unique}.partial{path.suffix}")
    try:
        yield aside
        sync(aside)
        os.replace(aside, path)
        _sync_one(path.parent)
    finally:
        _remove(aside)


def sync(path: pathlib.Path) -> None:
    """Has the system write a file, or a directory with all that is in it, to the disk."""
    for directory, _, names in os.walk(path):
        for name in names:
            _sync_one(pathlib.Path(directory, name))
        _sync_one(pathlib.Path(directory))
    if not path.is_dir():
        _sync_one(path)


def remove_leftovers(directory: str | os.PathLike) -> None:
    """Removes what killed processes wrote aside below a directory, which this process has locked.

    That is what `written_aside` names, and what TFDS writes aside.
    """
    for inside, directories, names in os.walk(directory):
        for name in (*names, *directories):
            if _ASIDE.fullmatch(name) or _TFDS_ASIDE.fullmatch(name):
                _remove(pathlib.Path(inside, name))
        directories[:] = [name for name in directories if pathlib.Path(inside, name).exists()]


def remove_leftovers_of(path: str | os.PathLike) -> None:
    """Removes what killed processes wrote aside for one path, which this process has locked."""
    path = pathlib.Path(path)
    for aside in path.parent.glob(f".{glob.escape(path.stem)}.*.partial{glob.escape(path.suffix)}"):
        if _ASIDE.fullmatch(aside.name):
            _remove(aside)


def _sync_one(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems sync no directories.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _remove(path: pathlib.Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class DuplicateName(ValueError):
    """An object has two members of one name."""


def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Makes the object of its members; the `object_pairs_hook` of `json`.

    Raises:
      DuplicateName: a name comes twice.
    """
    members = dict(pairs)
    if len(members) < len(pairs):
        names = collections.Counter(name for name, _ in pairs)
        raise DuplicateName(f"the name {shown(names.most_common(1)[0][0])} comes twice")
    return members


def read_json(path: str | os.PathLike, *, largest: int = LARGEST_JSON, finite: bool = True) -> Any:
    """Reads a json file.

    ```
    {"a": [1, 2.5]}                        {"a": [1, 2.5]}
    {"a": 1, "a": 2}                       refused: which of them counts?
    [[[[... a million of them              refused
    {"a": NaN}   {"a": 1e999}              refused, unless not `finite`
    {"a": "\\ud800"}                       refused: half a character, which no file can hold
    a directory, a pipe, a device          refused, unopened or unread
    ```

    Args:
      path: of the file.
      largest: bytes; a larger file is not read.
      finite: refuse numbers that are not finite, which JSON does not have, but Python writes.

    Raises:
      UserError: it is missing, no file, too large, not UTF-8, or no such json.
    """
    return parse_json(read_bytes(path, largest), str(path), finite=finite)


def parse_json(data: bytes, where: str, *, finite: bool = True) -> Any:
    """Returns the value of a json text, such as a file or a line of one; see `read_json`.

    Args:
      data: the text in UTF-8, with or without a byte order mark.
      where: what it is of, for messages.
      finite: refuse numbers that are not finite.

    Raises:
      UserError: it is not UTF-8, or no such json.
    """
    hooks = {"parse_constant": _finite, "parse_float": _finite} if finite else {}
    try:
        # Some editors put a byte order mark first, which means nothing.
        value = json.loads(data.decode("utf-8-sig"), object_pairs_hook=refuse_duplicates, **hooks)
        if b"\\ud" in data.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeError as error:
        raise UserError(f"{where} is not UTF-8: {error.reason}") from error
    except RecursionError as error:
        raise UserError(f"{where} is nested too deeply to be read") from error
    except ValueError as error:
        raise UserError(f"{where} is not json: {error}") from error
    return value


@contextlib.contextmanager
def understanding(what: str, remedy: str) -> Iterator[None]:
    """Refuses results that are not as the command that wrote them made them.

    For results that are only shown, whose every field would be declared for this alone.

    Args:
      what: the results, for the message.
      remedy: what to do.

    Raises:
      UserError: what is done with them raised what values of another shape do.
    """
    try:
        yield
    except UserError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        said = shown(str(error))
        raise UserError(f"{what}: damaged ({type(error).__name__}: {said}); {remedy}") from error


def read_json_object(
    path: str | os.PathLike, *, largest: int = LARGEST_JSON, finite: bool = True
) -> dict[str, Any]:
    """Reads a json file that holds an object (a table of named values); see `read_json`.

    Raises:
      UserError: as `read_json`, or it holds something else.
    """
    value = read_json(path, largest=largest, finite=finite)
    if not isinstance(value, dict):
        raise UserError(f"{path} holds {shown(value)}; expected an object, {{...}}")
    return value


def read_bytes(path: str | os.PathLike, largest: int = LARGEST_JSON) -> bytes:
    """Reads a file whole, unless it is no file, or too large.

    Raises:
      UserError: it is missing, a directory, a pipe or a device, or has more than `largest` bytes.
    """
    try:
        # A pipe that nobody writes to would be waited for.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise UserError(f"{path} is no file; expected a json file")
            # Files of the system have no size that is known before they are read.
            data = b"" if status.st_size > largest else file.read(largest + 1)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if max(len(data), status.st_size) > largest:
        raise UserError(f"{path} has more than {largest} bytes; expected a smaller json file")
    return data


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text:.80} is not finite")
    return value
