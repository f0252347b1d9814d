"""Reading a Hugging Face `config.json` strictly: what is not understood is refused by its key."""

from collections.abc import Mapping
from typing import Any

from videollm_mod_jax.errors import UserError


def with_defaults(defaults: Mapping[str, Any], hf: Mapping[str, Any]) -> dict[str, Any]:
    """A config whose absent and null keys have the values that transformers would give them."""
    return {**defaults, **{key: value for key, value in hf.items() if value is not None}}


def refusal(where: str, key: str, found: Any, expected: str) -> UserError:
    """The error for a key whose value is not supported."""
    return UserError(f"{where}: {key} is {found!r}; expected {expected}")


def integer(hf: Mapping[str, Any], key: str, where: str) -> int:
    """A key that must be a whole number.

    Raises:
      UserError: it is missing or something else.
    """
    value = hf.get(key)
    if isinstance(value, bool) or not isinstance(value, int):
        raise refusal(where, key, value, "a whole number")
    return value


def number(hf: Mapping[str, Any], key: str, where: str) -> float:
    """A key that must be a number.

    Raises:
      UserError: it is missing or something else.
    """
    value = hf.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise refusal(where, key, value, "a number")
    return float(value)


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
    if value not in choices:
        expected = " or ".join(repr(choice) for choice in choices)
        raise refusal(where, key, value, f"{expected}: nothing else is supported")
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
            raise UserError(f"{where}: {key} is set; {reason}")
