"""Reads json files that do not fit memory, one member of one object or array at a time.

Ego4D's narrations are one object of a gigabyte; decoded at once they take several times that. Here
the text is read in pieces, and the decoder of the standard library is put at each member in turn.
It is as fast as on a whole text, and takes what a streaming parser such as ijson refuses together
with the rest of the file: NaN, which Python writes, and numbers of more than 64 bits. What is wrong
with one annotation then costs that one, but for a name that comes twice in an object: which of the
two values counts, nobody knows, and the standard library would lose one in silence.
"""

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from videollm_mod_jax.data.annotations import shown
from videollm_mod_jax.data.files import DuplicateName, refuse_duplicates
from videollm_mod_jax.errors import UserError

_PIECE = 1 << 24  # characters read at a time
_LONGEST = 1 << 26  # characters of a member; of a longer one, or a broken one, we give up
_SPACE = re.compile(r"[ \t\n\r]*")
_FOLLOWING = frozenset(",:]}")  # what may come after a value in an array or object


_decode = json.JSONDecoder(object_pairs_hook=refuse_duplicates).raw_decode


def object_members(path: Path, field: str | None = None) -> Iterator[tuple[str, Any]]:
    """The members of an object, in the order of the file.

    Their own names may come twice, which is for the caller to count.

    ```
    {"_map_errs": [...], "videos": {"a": {...}, "b": {...}}}    field "videos"
        ->  ("a", {...}), ("b", {...})
    ```

    Args:
      path: of the file.
      field: of the object at the top that holds them; None for the object at the top itself.

    Raises:
      UserError: the file cannot be read, is no json, not UTF-8, or has another layout.
    """
    yield from _members(path, field, "{")


def array_members(path: Path, field: str | None = None) -> Iterator[Any]:
    """The elements of an array, in the order of the file; see `object_members`."""
    for _, value in _members(path, field, "["):
        yield value


def whole_object(path: Path) -> dict[str, Any]:
    """A file that holds an object, which fits memory.

    Raises:
      UserError: as `object_members`, or a name comes twice.
    """
    try:
        return refuse_duplicates(list(object_members(path)))
    except DuplicateName as error:
        raise UserError(f"{path}: {error}; correct the file or download it again") from error


def _members(path: Path, field: str | None, opening: str) -> Iterator[tuple[Any, Any]]:
    try:
        # Line ends as they are: they are white space, or wrong, and positions count them.
        with path.open(encoding="utf-8", newline="") as file:
            text = _Text(file, path)
            if field is None:
                for key in text.keys(opening):
                    yield key, text.value()
            else:
                yield from _members_of_field(text, field, opening)
            if text.next_character():
                raise text.error("expected the end of the file")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def _members_of_field(text: "_Text", field: str, opening: str) -> Iterator[tuple[Any, Any]]:
    names = set()
    for name in text.keys("{"):
        names.add(name)
        if name == field:
            for key in text.keys(opening):
                yield key, text.value()
        elif text.next_character() in ("{", "["):
            for _ in text.keys("{["):
                text.value()
        else:
            text.value()
    if field not in names:
        raise text.error(f"expected a field '{field}' at the top; there are {shown(sorted(names))}")


class _Text:
    """A json text of which only a piece is in memory, and a place in it."""

    def __init__(self, file: TextIO, path: Path):
        self._file, self._path = file, path
        self._piece, self._at, self._before = "", 0, 0
        self._key: str | int | None = None

    def keys(self, opening: str) -> Iterator[str | int]:
        """The names (or indices) of the members here; the caller reads each value in between."""
        closing = "}" if self._take(opening) == "{" else "]"
        if self.next_character() == closing:
            self._at += 1
            return
        for index in itertools.count():
            key = index
            if closing == "}":
                key = self.value()
                if not isinstance(key, str):
                    raise self.error(f"expected a name, found {shown(key)}")
                self._take(":")
            self._key = key
            yield key
            if self._take("," + closing) == closing:
                return

    def value(self) -> Any:
        """Decodes the value that begins here."""
        self.next_character()
        while True:
            too_long = len(self._piece) - self._at > _LONGEST
            try:
                value, end = _decode(self._piece, self._at)
            except DuplicateName as error:
                raise self.error(str(error)) from error
            # JSONDecodeError, or an integer of too many digits.
            except (ValueError, RecursionError) as error:
                if too_long or not self._read_on():
                    what = error.msg if isinstance(error, json.JSONDecodeError) else error
                    raise self.error(f"not json: {what}") from error
                continue
            follows = _SPACE.match(self._piece, end).end()
            # Before the end of a piece, 12 may be the beginning of 12.5.
            if self._piece[follows : follows + 1] in _FOLLOWING or too_long or not self._read_on():
                self._at = end
                return value

    def next_character(self) -> str:
        """The character that follows white space, "" at the end."""
        while True:
            self._at = _SPACE.match(self._piece, self._at).end()
            if self._at < len(self._piece):
                return self._piece[self._at]
            if not self._read_on():
                return ""

    def error(self, what: str) -> UserError:
        """What is wrong here, or in the value that begins here."""
        where = "at the top" if self._key is None else f"in {shown(self._key)}"
        return UserError(
            f"{self._path}: {where}, after character {self._before + self._at}: {what}; correct "
            "the file or download it again"
        )

    def _take(self, allowed: str) -> str:
        character = self.next_character()
        if not character or character not in allowed:
            expected = " or ".join(allowed)
            raise self.error(f"expected {expected}, found {character or 'the end of the file'}")
        self._at += 1
        return character

    def _read_on(self) -> bool:
        try:
            more = self._file.read(_PIECE)
        except UnicodeDecodeError as error:
            raise self.error(f"not UTF-8: {error.reason}") from error
        if not more:
            return False
        self._piece, self._before = self._piece[self._at :] + more, self._before + self._at
        self._at = 0
        return True
