"""Atomic output: write beside the target, then rename."""

import contextlib
import os
import pathlib
import shutil
from collections.abc import Iterator


@contextlib.contextmanager
def written_aside(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yields a free path beside `path`; a clean exit renames it to `path`, an error removes it.

    Works for a file (replaced when it exists) and for a directory (which must not exist yet). The
    aside path keeps the suffix of `path`, so that writers that go by suffix see the right one.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        yield aside
        os.replace(aside, path)
    finally:
        if aside.is_dir():
            shutil.rmtree(aside)
        else:
            aside.unlink(missing_ok=True)
