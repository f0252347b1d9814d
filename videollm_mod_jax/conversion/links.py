"""Where the files of a directory that a stranger made may lie: in it.

A link in a downloaded directory may name any file of whoever reads it, and what a conversion copies
or writes is then handed on. The cache of the Hub is made of links, to one folder beside:

    models--google--siglip/snapshots/4f2a/config.json  ->  models--google--siglip/blobs/9e61
"""

import os
from collections.abc import Iterable
from pathlib import Path

from videollm_mod_jax.errors import UserError


def check_inside(directory: Path, files: Iterable[Path]) -> None:
    """Checks that files of a directory lie in it, whatever links lead to them.

    ```
    config.json                                      inside
    config.json -> revised.json                      inside
    config.json -> ../../blobs/9e61                  inside, in models--*/snapshots/* alone
    config.json -> ../credentials.json               not
    ```

    Args:
      directory: that a stranger may have made; it may be a link itself.
      files: paths in it; those that are absent are inside.

    Raises:
      UserError: one does not, or is a link that leads nowhere.
    """
    root = Path(os.path.realpath(directory))
    allowed = (root, *_blobs(root))
    for file in files:
        place = Path(os.path.realpath(file))
        if not any(place.is_relative_to(one) for one in allowed):
            raise UserError(
                f"{file} is a link to {place}, outside of {directory}, and is not followed; put "
                "the file itself there if it belongs to what you downloaded"
            )
        if file.is_symlink() and not place.exists():
            raise UserError(f"{file} is a link to {place}, which does not exist; download it again")


def _blobs(root: Path) -> list[Path]:
    """Where the Hub's cache keeps the files of a snapshot, or of a directory in one."""
    return [
        parent.parent / "blobs"
        for parent in root.parents
        if parent.name == "snapshots" and parent.parent.name.startswith("models--")
    ]
