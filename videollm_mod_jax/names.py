"""Names that become parts of paths, checked where they come in.

A dataset, a split or a part that a stranger's file names may become a directory; one called
`../../home` must not.
"""

from videollm_mod_jax.errors import UserError, shown

_LONGEST = 200
"""Bytes of a name; file systems take 255, and what is written aside has a longer name."""


def check_name(name: object, field: str) -> str:
    """Returns a name that is safe as one component of a path.

    ```
    ego4d_narration     safe
    video 1.mp4         safe
    ../x   a/b   .   .hidden   a\\nb   ""       not
    ```

    Args:
      name: as it was found.
      field: where, for the message.

    Raises:
      UserError: it is no text, empty, too long, starts with a dot, or has a separator or a
        character that cannot be printed.
    """
    if not isinstance(name, str) or not _is_safe(name):
        raise UserError(
            f"{field} is {shown(name)}; expected a name of 1 to {_LONGEST} bytes that can be "
            "printed, has no / and no \\, and does not start with a dot"
        )
    return name


def check_relative_path(path: object, field: str) -> str:
    """Returns a relative path whose every component is a safe name, such as that of a video.

    ```
    kitchen/0017        safe
    /etc/x   a//b   a/../b                  not
    ```

    Args:
      path: as it was found, its components separated by `/`.
      field: where, for the message.

    Raises:
      UserError: it is no text, or a component is not safe; see `check_name`.
    """
    if not isinstance(path, str) or not all(map(_is_safe, path.split("/"))):
        raise UserError(
            f"{field} is {shown(path)}; expected a relative path such as kitchen/0017, of names "
            "that can be printed and do not start with a dot"
        )
    return path


def _is_safe(name: str) -> bool:
    # Surrogates, from names that are not UTF-8, are not printable and do not encode.
    return (
        name.isprintable()
        and not name.startswith(".")
        and not set(name) & {"/", "\\"}
        and 0 < len(name.encode()) <= _LONGEST
    )
