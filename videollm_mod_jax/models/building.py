"""Frozen dataclasses from plain nested values, such as JSON and config files hold, strictly."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any

from videollm_mod_jax.errors import UserError


def require(condition: bool, message: str) -> None:
    """Raises a UserError with the message unless the condition holds."""
    if not condition:
        raise UserError(message)


def require_choice(field: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises a UserError that lists the choices unless `value` is one of them."""
    require(value in choices, f"{field} is {value!r}; choose one of {', '.join(choices)}")


def build(cls: type, values: Mapping[str, Any], where: str) -> Any:
    """Builds the frozen dataclass `cls` from nested plain values, refusing what does not fit.

    Args:
      cls: a dataclass.
      values: a mapping with exactly its field names; lists stand for tuples, as JSON has them.
      where: the path of `values` in its file, for messages.

    Raises:
      UserError: an unknown, missing or wrongly typed field, named.
    """
    require(isinstance(values, Mapping), f"{where} is {values!r}; expected a table of fields")
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in hints:
            close = difflib.get_close_matches(key, hints, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(hints)}"
            raise UserError(f"{where}.{key} is not a known field; {hint}")
    for key in hints:
        require(key in values, f"{where}.{key} is missing")
    return cls(**{k: _convert(hints[k], values[k], f"{where}.{k}") for k in hints})


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for option in arguments:
            if _fits(option, value):
                return _convert(option, value, where)
        raise UserError(f"{where} is {value!r}; expected {_spell(hint)}")
    require(_fits(hint, value), f"{where} is {value!r}; expected {_spell(hint)}")
    if dataclasses.is_dataclass(hint):
        return build(hint, value, where)
    if origin is Mapping:
        return {key: _convert(arguments[1], v, f"{where}.{key}") for key, v in value.items()}
    if origin is tuple:
        if Ellipsis in arguments:
            return tuple(_convert(arguments[0], v, f"{where}[{i}]") for i, v in enumerate(value))
        require(len(value) == len(arguments), f"{where} is {value!r}; expected {_spell(hint)}")
        return tuple(
            _convert(h, v, f"{where}[{i}]")
            for i, (h, v) in enumerate(zip(arguments, value, strict=True))
        )
    return float(value) if hint is float else value


def _fits(hint: Any, value: Any) -> bool:
    if hint is types.NoneType:
        return value is None
    if dataclasses.is_dataclass(hint):
        return isinstance(value, Mapping)
    if typing.get_origin(hint) is Mapping:
        return isinstance(value, Mapping)
    if typing.get_origin(hint) is tuple:
        return isinstance(value, (tuple, list))
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


def _spell(hint: Any) -> str:
    if isinstance(hint, type) and typing.get_origin(hint) is None:
        return hint.__name__
    return str(hint).replace("typing.", "").replace("videollm_mod_jax.models.config.", "")
