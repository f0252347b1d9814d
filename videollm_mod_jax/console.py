"""The one way to make a console of `rich`: names and paths are printed as they are, and safely.

By default rich takes `[/x]` in a path for the end of a style and fails, `[bold]` for the beginning
of one and drops it, and lets a terminal act on what a file name holds.
"""

from typing import Any

import rich.console
import rich.text

from videollm_mod_jax.errors import printable


def make_console(*, stderr: bool = False, quiet: bool = False) -> rich.console.Console:
    """Returns a console that prints texts, and cells and titles of tables, without markup.

    ```
    videos/[bold]a[/x].mp4        videos/[bold]a[/x].mp4
    a\\x1b[2Jb (with an ESC)       a\\\\x1b[2Jb
    ```

    Args:
      stderr: write there, not to stdout.
      quiet: write nothing.
    """
    return _Console(stderr=stderr, quiet=quiet, markup=False, highlight=False, emoji=False)


class _Console(rich.console.Console):
    def render_str(self, text: str, **options: Any) -> rich.text.Text:
        return super().render_str("\n".join(map(printable, text.split("\n"))), **options)
