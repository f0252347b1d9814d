"""How a command ended, whether its flags or its work ended it."""

from collections.abc import Callable, Sequence


def status_of(main: Callable[[Sequence[str]], int], flags: Sequence[str]) -> int:
    """Return the exit status of a command."""
    try:
        return main(flags)
    except SystemExit as end:
        return end.code
