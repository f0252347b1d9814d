"""Frozen dataclasses from plain nested values, such as JSON and config files hold, strictly.

A field says its range where it says its type, and every way to make the dataclass keeps it:

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class OptimizerConfig(Checked):
        beta1: Annotated[float, Interval("[0, 1)")]

    build(OptimizerConfig, {"beta1": 1.5}, "config.training.optimizer")
    UserError: config.training.optimizer.beta1 is 1.5; expected a number in [0, 1)
    OptimizerConfig(beta1=math.nan)
    UserError: OptimizerConfig.beta1 is nan; expected a finite number
"""

import dataclasses
import difflib
import functools
import re
import sys
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any

from videollm_mod_jax.errors import UserError, shown


@dataclasses.dataclass(frozen=True)
class Interval:
    """The range of a number, in the notation of mathematics; `inf` is no bound.

    ```
    [1, inf)   1 or more             (0, 1]     a number in (0, 1]
    (0, inf)   more than 0           [0, 2**31) a number in [0, 2**31)
    ```

    Attributes:
      text: a bracket, two bounds, a bracket; a bound is a number, a power `a**b`, or `inf`.
    """

    text: str

    def __contains__(self, value: float) -> bool:
        # Comparisons with NaN are false, and infinity lies in no interval that ends at inf.
        low, high = self._bounds
        return (low <= value if self.text[0] == "[" else low < value) and (
            value <= high if self.text[-1] == "]" else value < high
        )

    def __str__(self) -> str:
        low, high = self._texts
        if high != "inf":
            return f"a number in {self.text}"
        return f"{low} or more" if self.text[0] == "[" else f"more than {low}"

    @functools.cached_property
    def _texts(self) -> tuple[str, str]:
        low, high = self.text[1:-1].split(",")
        return low.strip(), high.strip()

    @functools.cached_property
    def _bounds(self) -> tuple[float, float]:
        return tuple(_number(text) for text in self._texts)


def _number(text: str) -> float:
    base, power, exponent = text.partition("**")
    if power:
        return int(base) ** int(exponent)
    return float(text) if re.search(r"[.einf]", text) else int(text)


COUNT = Annotated[int, Interval("[1, 2**31)")]
"""How many there are of what there must be at least one; fits the int32 of an index."""

COUNT_OR_NONE = Annotated[int, Interval("[0, 2**31)")]
"""How many there are, or 0 for none."""

SHARE = Annotated[float, Interval("[0, 1]")]
"""A part of a whole, or a probability."""

SEED = Annotated[int, Interval("[0, 2**31)")]
"""Of random numbers; what NumPy and JAX both take."""


def require(condition: bool, message: str) -> None:
    """Raises a UserError with the message unless the condition holds."""
    if not condition:
        raise UserError(message)


def require_choice(field: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises a UserError that lists the choices unless `value` is one of them."""
    require(value in choices, f"{field} is {shown(value)}; choose one of {', '.join(choices)}")


def build(cls: type, values: Mapping[str, Any], where: str) -> Any:
    """Builds the frozen dataclass `cls` from nested plain values, refusing what does not fit.

    Args:
      cls: a dataclass.
      values: a mapping with exactly its field names; lists stand for tuples, as JSON has them.
      where: the path of `values` in its file, for messages.

    Raises:
      UserError: an unknown, missing or wrongly typed field, named.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{where} is {shown(values)}; expected a table of fields")
    hints = _hints(cls)
    for key in values:
        if key not in hints:
            close = difflib.get_close_matches(key, hints, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(hints)}"
            raise UserError(f"{where}.{key!s:.80} is not a known field; {hint}")
    for key in hints:
        require(key in values, f"{where}.{key} is missing")
    return cls(**{k: _convert(hints[k], values[k], f"{where}.{k}") for k in hints})


class Checked:
    """Base of dataclasses whose fields are checked however they are made.

    A dataclass that checks more, such as how two fields go together, does so in its own
    `__post_init__`, after `super().__post_init__()`.

    Raises:
      UserError: from the constructor and `dataclasses.replace`: a wrongly typed field, or one out
        of its range, named.
    """

    def __post_init__(self):
        check_fields(self)


def check_fields(instance: Any) -> None:
    """Checks types and ranges of a dataclass that was made by its constructor.

    Raises:
      UserError: a wrongly typed field or one out of its range, named.
    """
    for name, hint in _hints(type(instance)).items():
        where, value = f"{type(instance).__name__}.{name}", getattr(instance, name)
        # Not a list for a tuple, nor a table for a dataclass, as a file has them.
        if _convert(hint, value, where) != value:
            raise _unexpected(hint, value, where)


def interval_of(cls: type, field: str) -> Interval:
    """The range of a field of a dataclass, for numbers that become that field."""
    hint = _hints(cls)[field]
    for option in (hint, *typing.get_args(hint)):
        if typing.get_origin(option) is Annotated:
            return next(part for part in option.__metadata__ if isinstance(part, Interval))
    raise ValueError(f"{cls.__name__}.{field} has no range")


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        value = _convert(arguments[0], value, where)
        for interval in arguments[1:]:
            if value not in interval:
                raise UserError(f"{where} is {shown(value)}; expected {interval}")
        return value
    if origin in (typing.Union, types.UnionType):
        for option in arguments:
            if _fits(option, value):
                return _convert(option, value, where)
        raise _unexpected(hint, value, where)
    if not _fits(hint, value):
        raise _unexpected(hint, value, where)
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else build(hint, value, where)
    if origin is Mapping:
        return {k: _convert(arguments[1], v, f"{where}.{k!s:.80}") for k, v in value.items()}
    if origin is tuple:
        if Ellipsis in arguments:
            return tuple(_convert(arguments[0], v, f"{where}[{i}]") for i, v in enumerate(value))
        if len(value) != len(arguments):
            raise _unexpected(hint, value, where)
        return tuple(
            _convert(h, v, f"{where}[{i}]")
            for i, (h, v) in enumerate(zip(arguments, value, strict=True))
        )
    if hint is float:
        # A whole number may be too large for a float.
        if not abs(value) <= sys.float_info.max:
            raise UserError(f"{where} is {shown(value)}; expected a finite number")
        return float(value)
    return value


def _fits(hint: Any, value: Any) -> bool:
    if typing.get_origin(hint) is Annotated:
        hint = typing.get_args(hint)[0]
    if hint is types.NoneType:
        return value is None
    if dataclasses.is_dataclass(hint):
        return isinstance(value, (Mapping, hint))
    if typing.get_origin(hint) is Mapping:
        return isinstance(value, Mapping)
    if typing.get_origin(hint) is tuple:
        return isinstance(value, (tuple, list))
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


def _unexpected(hint: Any, value: Any, where: str) -> UserError:
    return UserError(f"{where} is {shown(value)}; expected {_spell(hint)}")


def _spell(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _spell(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return " | ".join(map(_spell, arguments))
    if origin is not None:
        inner = ", ".join("..." if a is Ellipsis else _spell(a) for a in arguments)
        return f"{origin.__name__}[{inner}]"
    return "None" if hint is types.NoneType else hint.__name__
