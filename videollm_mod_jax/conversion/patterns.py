"""Regular expressions of strangers, matched in bounded time.

Python's `re` goes back and tries again, which for `(a*)*b` takes longer than anyone waits. Here all
ways through an expression are followed at once, as sets of places in the text:

    (a|ab)c   in  abcd       a|ab ends at {1, 2}, then c at {3}

What depends on one way alone, such as a reference to a group, is refused.
"""

import functools
from collections.abc import Callable
from re import _constants as op
from re import _parser, error

from videollm_mod_jax.errors import UserError, shown

_MOST_CHARACTERS = 10_000
_MOST_STEPS = 200_000
"""In one text; published expressions take some hundreds."""

_END = {op.AT_END, op.AT_END_STRING}
_BEGINNING = {op.AT_BEGINNING, op.AT_BEGINNING_STRING}
_REPEATS = (op.MAX_REPEAT, op.MIN_REPEAT)


class PatternError(UserError):
    """An expression that is none, or that is not matched here; the message says why."""


def check(pattern: str) -> None:
    """Checks that an expression can be matched.

    Raises:
      PatternError: it cannot.
    """
    ends(pattern, "")


def matches(pattern: str, text: str) -> bool:
    """Whether a whole text is what an expression describes, as `re.fullmatch` says.

    Raises:
      PatternError: the expression cannot be matched, or not in bounded time.
    """
    return len(text) in ends(pattern, text)


def ends(pattern: str, text: str) -> frozenset[int]:
    """Where what an expression describes can end, if it begins where the text does.

    Raises:
      PatternError: the expression cannot be matched, or not in bounded time.
    """
    return frozenset(_Walk(text).sequence(_parsed(pattern), {0}))


@functools.lru_cache(maxsize=4096)
def _parsed(pattern: str) -> _parser.SubPattern:
    if len(pattern) > _MOST_CHARACTERS:
        raise PatternError(f"it has more than {_MOST_CHARACTERS} characters")
    try:
        parsed = _parser.parse(pattern)
    except (error, OverflowError, RecursionError) as reason:
        raise PatternError(str(reason)) from reason
    if parsed.state.flags & ~32:  # re.UNICODE, which every expression of text has
        raise PatternError("flags such as (?i) are not supported")
    return parsed


class _Walk:
    """One text, and the steps that are left to match it."""

    def __init__(self, text: str):
        self._text = text
        self._left = _MOST_STEPS

    def sequence(self, items: _parser.SubPattern, places: set[int]) -> set[int]:
        """The places behind all items, one after the other."""
        for kind, argument in items:
            places = self._item(kind, argument, places)
        return places

    def _item(self, kind: object, argument: object, places: set[int]) -> set[int]:
        self._left -= 1 + len(places)
        if self._left < 0:
            raise PatternError(
                f"it takes more than {_MOST_STEPS} steps to match a regular expression of the "
                f"adapter with {shown(self._text)}; write out the names of the modules"
            )
        if kind in (op.LITERAL, op.NOT_LITERAL, op.ANY, op.IN):
            fits = _one(kind, argument)
            size = len(self._text)
            return {p + 1 for p in places if p < size and fits(self._text[p])}
        if kind is op.BRANCH:
            return set().union(*(self.sequence(branch, places) for branch in argument[1]))
        if kind is op.SUBPATTERN and not any(argument[1:3]):
            return self.sequence(argument[3], places)
        if kind in _REPEATS:
            return self._repeated(*argument, places)
        if kind is op.AT and argument in _END | _BEGINNING:
            wanted = len(self._text) if argument in _END else 0
            return places & {wanted}
        if kind in (op.ASSERT, op.ASSERT_NOT) and argument[0] == 1:
            self.sequence(argument[1], set())
            follows = kind is op.ASSERT
            return {p for p in places if bool(self.sequence(argument[1], {p})) is follows}
        raise PatternError(f"{str(kind).lower()} is not supported")

    def _repeated(
        self, least: int, most: int, items: _parser.SubPattern, places: set[int]
    ) -> set[int]:
        # Once without a place, so that what is not supported is found wherever it is.
        self.sequence(items, set())
        found, count = (set(places) if least == 0 else set()), 0
        while places and count < most:
            following = self.sequence(items, places)
            count += 1
            if count >= least:
                following -= found
                found |= following
            elif following == places:
                count = least - 1
            places = following
        return found


def _one(kind: object, argument: object) -> Callable[[str], bool]:
    """Whether a character is one that an item describes."""
    match kind:
        case op.LITERAL:
            return lambda c: ord(c) == argument
        case op.NOT_LITERAL:
            return lambda c: ord(c) != argument
        case op.ANY:
            return lambda c: c != "\n"
    negated = argument[0][0] is op.NEGATE

    def fits(c: str) -> bool:
        return any(_in(c, *item) for item in argument[negated:]) is not negated

    return fits


def _in(c: str, kind: object, argument: object) -> bool:
    match kind:
        case op.LITERAL:
            return ord(c) == argument
        case op.RANGE:
            return argument[0] <= ord(c) <= argument[1]
        case op.CATEGORY:
            name = str(argument).removeprefix("CATEGORY_")
            tests = {"DIGIT": str.isdecimal, "SPACE": str.isspace, "WORD": _is_word}
            return tests[name.removeprefix("NOT_")](c) is not name.startswith("NOT_")
    raise PatternError(f"{str(kind).lower()} is not supported")


def _is_word(c: str) -> bool:
    return c.isalnum() or c == "_"
