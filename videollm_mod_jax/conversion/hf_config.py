"""Reading a Hugging Face `config.json` strictly: what is not understood is refused by its key.

A number has the range of the field of ours that it becomes. A key is named as the file spells it:

    config.json: text_config.rope_theta is 0; expected a number in [1, 1e12]
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from videollm_mod_jax.config_dict import Interval, interval_of
from videollm_mod_jax.conversion.links import check_inside
from videollm_mod_jax.data.files import read_json
from videollm_mod_jax.errors import UserError, shown

LARGEST = 4 << 20
"""Bytes of a config.json that is read; those of the Hub have some thousands."""


def read_table(path: Path, of: str) -> dict[str, Any]:
    """Reads a json file of the Hub that holds a table of keys.

    Args:
      path: in the directory that was downloaded.
      of: what it is the table of, for messages.

    Raises:
      UserError: it is missing, a link out of its directory, too large, no table of keys, or holds a
        number that is not finite; the key is named.
    """
    check_inside(path.parent, [path])
    values = read_json(path, largest=LARGEST, finite=False)
    if not isinstance(values, Mapping):
        raise UserError(f"{path} is not a table of keys; expected that of {of}")
    for key, value in _numbers(values):
        if not math.isfinite(value):
            raise refusal(str(path), key, value, "a finite number")
    return values


def with_defaults(defaults: Mapping[str, Any], hf: Mapping[str, Any]) -> dict[str, Any]:
    """A config whose absent and null keys have the values that transformers would give them."""
    return {**defaults, **{key: value for key, value in hf.items() if value is not None}}


def inside(where: str, key: str) -> str:
    """The `where` of what a key holds: `config.json: text_config.`."""
    return f"{named(where, key)}."


def named(where: str, key: str) -> str:
    """A key as messages name it: `config.json: text_config.rope_theta`."""
    return f"{where}{'' if where.endswith('.') else ': '}{key:.80}"


def refusal(where: str, key: str, found: Any, expected: str) -> UserError:
    """The error for a key whose value is not supported."""
    return UserError(f"{named(where, key)} is {shown(found)}; expected {expected}")


def integer(
    hf: Mapping[str, Any], key: str, where: str, becomes: tuple[type, str] | None = None
) -> int:
    """A key that must be a whole number, in the range of what it becomes.

    Args:
      hf: the config.
      key: in it.
      where: the config, for messages.
      becomes: a dataclass of ours, and its field; None for what becomes none.

    Raises:
      UserError: it is missing, something else, or out of range.
    """
    value = hf.get(key)
    if isinstance(value, bool) or not isinstance(value, int):
        raise refusal(where, key, value, "a whole number")
    return value if becomes is None else _within(interval_of(*becomes), value, key, where)


def number(hf: Mapping[str, Any], key: str, where: str, becomes: tuple[type, str]) -> float:
    """A key that must be a number, in the range of what it becomes; arguments as of `integer`.

    Raises:
      UserError: it is missing, something else, or out of range.
    """
    value = hf.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise refusal(where, key, value, "a number")
    return float(_within(interval_of(*becomes), value, key, where))


def table(hf: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    """A key that must be a table of keys.

    Raises:
      UserError: it is missing or something else.
    """
    value = hf.get(key)
    if not isinstance(value, Mapping):
        raise refusal(where, key, value, "a table of keys")
    return value


def require_one_of(hf: Mapping[str, Any], key: str, choices: tuple[Any, ...], where: str) -> Any:
    """A key whose value must be one of a few.

    Raises:
      UserError: it is none of them.
    """
    value = hf.get(key)
    # To Python, 1 is True.
    if not any(isinstance(value, bool) == isinstance(c, bool) and value == c for c in choices):
        expected = " or ".join(repr(choice) for choice in choices)
        raise refusal(where, key, value, f"{expected}: nothing else is supported")
    return value


def require_type(hf: Mapping[str, Any], types: tuple[str, ...], what: str, where: str) -> str:
    """The `model_type` of a config, which must be one of some.

    Raises:
      UserError: it is none of them.
    """
    value = hf.get("model_type")
    if not isinstance(value, str) or value not in types:
        raise refusal(where, "model_type", value, f"{what}: {' or '.join(types)}")
    return value


def refuse_keys(hf: Mapping[str, Any], reasons: Mapping[str, str], where: str) -> None:
    """Refuses a config that states any of some keys.

    Args:
      hf: the config.
      reasons: what to say, by key.
      where: the config, for messages.

    Raises:
      UserError: one of them is neither absent nor null.
    """
    for key, reason in reasons.items():
        if hf.get(key) is not None:
            raise UserError(f"{named(where, key)} is set; {reason}")


def _within(interval: Interval, value: float, key: str, where: str) -> float:
    if value not in interval:
        raise refusal(where, key, value, str(interval))
    return value


def _numbers(values: Any, key: str = "") -> Iterator[tuple[str, float]]:
    """Every number of a json value that is not whole, with its key."""
    if isinstance(values, float):
        yield key, values
    elif isinstance(values, Mapping):
        for name, value in values.items():
            yield from _numbers(value, f"{key}.{name:.80}" if key else name)
    elif isinstance(values, list):
        for i, value in enumerate(values):
            yield from _numbers(value, f"{key}[{i}]")
