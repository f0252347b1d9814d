"""The one exception type that means "the input is wrong, and here is what to do", and its words."""

import errno
import os

_REMEDIES = {
    errno.ENOSPC: "make room there, or write to another disk",
    errno.EDQUOT: "make room there, or write to another disk",
    errno.EROFS: "write elsewhere",
    errno.EACCES: "give yourself the permission, or name another path",
    errno.EPERM: "give yourself the permission, or name another path",
    errno.EIO: "the disk may be failing: look at the system's log",
    errno.EMFILE: "raise the limit of open files: ulimit -n 65536",
    errno.ENFILE: "close other programs",
}
"""What helps against faults of the machine that libraries report as errors of many types."""


_LONGEST = 1000
"""Characters of a message."""


class UserError(ValueError):
    """Bad input: a missing file, an unknown key, a field out of range.

    The message is one line that names the file, record or field, what was expected and what was
    found. The command-line modules print it on stderr and exit with status 2; anything else that
    escapes is a bug and keeps its traceback.

    What a message quotes may come from a stranger: it is escaped as `printable` does, and the
    middle of a message that fills more than a screen is left out.
    """

    def __init__(self, message: str):
        message = printable(message)
        if len(message) > _LONGEST:
            message = f"{message[: _LONGEST - 300]} ... {message[-290:]}"
        super().__init__(message)


def shown(value: object) -> str:
    """Returns a value as a message shows it: cut to fit a line, however large it is."""
    try:
        text = repr(value)
    except ValueError:
        # Python refuses to spell whole numbers of thousands of digits.
        text = f"a {type(value).__name__} too large to show"
    return text if len(text) <= 120 else f"{text[:120]}..."


def printable(text: str) -> str:
    """Returns a text with an escape for every character that a terminal would act on.

    ```
    a b \u00e9              a b \u00e9
    a\\x1b[2Jb (ESC)      a\\\\x1b[2Jb
    two\\nlines           two\\\\nlines
    ```
    """
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )


def fault_of_machine(error: BaseException) -> str | None:
    """Return the one line of an error that the machine is to blame for, or None.

    ```
    PermissionError(13, "Permission denied", "x")        x: Permission denied; give yourself ...
    ValueError("INTERNAL: ... No space left on device")  No space left on device (ValueError); ...
    KeyError("loss")                                     None: a mistake of this program
    ```

    That is any error of the operating system, and one of a library that quotes a full disk, a
    missing permission or the like; those that it came from are looked at, too.
    """
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        known = isinstance(error, OSError) and error.errno in _REMEDIES
        # An error that is not the last one may have been expected, a missing file above all.
        if known or (len(seen) == 1 and isinstance(error, OSError) and error.errno is not None):
            # A library's own text is longer, and says the path if no field does.
            what = os.strerror(error.errno) if known else error.strerror
            where = f"{error.filename}: " if error.filename is not None else ""
            remedy = _REMEDIES.get(error.errno)
            return f"{where}{what or error}" + (f"; {remedy}" if remedy else "")
        error = error.__cause__ or error.__context__
    for error in seen:
        for code, remedy in _REMEDIES.items():
            if isinstance(error, Exception) and os.strerror(code) in str(error):
                return f"{os.strerror(code)} ({type(error).__name__}); {remedy}"
    return None
