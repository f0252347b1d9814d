"""For scripts that tests kill at any moment and listen to."""

import os
import sys


def say(line: str) -> None:
    """Writes a line in one call, so that a kill leaves it whole or not there.

    Not by `print`, which writes word by word where PYTHONUNBUFFERED is set.
    """
    os.write(sys.stdout.fileno(), f"{line}\n".encode())
