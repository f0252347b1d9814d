"""The one exception type that means "the input is wrong, and here is what to do"."""


class UserError(ValueError):
    """Bad input: a missing file, an unknown key, a field out of range.

    The message is one line that names the file, record or field, what was expected and what was
    found. The command-line modules print it on stderr and exit with status 2; anything else that
    escapes is a bug and keeps its traceback.
    """
