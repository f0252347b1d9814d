"""What the command-line modules share: config flags, and one line instead of a traceback."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from videollm_mod_jax.errors import UserError


def report_user_errors(run: Callable[[], None], interrupted: str = "interrupted") -> int:
    """Calls `run` and turns bad input into one line on stderr.

    Args:
      run: does the work.
      interrupted: what to say after Ctrl-C.

    Returns:
      The exit status: 0; 2 after a UserError; 130 after an interrupt (Ctrl-C).
    """
    # Libraries report every file they touch; what a user wants to see, we print.
    logging.set_verbosity(logging.FATAL)
    try:
        run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
    return 0


def run_with_config(run: Callable[[ml_collections.ConfigDict, str], None]) -> None:
    """The main of a module that takes `--config FILE`, overrides of its keys, and `--workdir DIR`.

    Exits with status 2 and one line for a missing file, an unknown key or a value of a wrong type.

    Args:
      run: called with the overridden config and the working directory.
    """
    config = config_flags.DEFINE_config_file(
        "config",
        None,
        "Config file. Every key can be overridden: --config.training.steps=300.",
        lock_config=True,
    )
    workdir = flags.DEFINE_string(
        "workdir", None, "Directory of the run; made if missing, resumed if it holds this run."
    )
    flags.mark_flags_as_required(["config", "workdir"])

    def refuse(message: str) -> NoReturn:
        print(f"error: {message}; see --help", file=sys.stderr)
        sys.exit(2)

    def parse(argv: Sequence[str]) -> list[str]:
        try:
            rest = flags.FLAGS(list(argv))
        # Everything that reading a config file and its overrides raises for a user's mistake.
        except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
            refuse(_one_line(error))
        if len(rest) > 1:
            refuse(f"unexpected argument {rest[1]!r}")
        # The flag library leaves a missing file for later.
        file = config_flags.get_config_filename(flags.FLAGS["config"])
        if not Path(file.partition(":")[0]).is_file():
            refuse(f"--config: there is no file {file}")
        return rest

    def main(argv: Sequence[str]) -> None:
        del argv
        resumable = "interrupted; the same command continues where it stopped"
        sys.exit(report_user_errors(lambda: run(config.value, workdir.value), resumable))

    app.run(main, flags_parser=parse)


def _one_line(error: BaseException) -> str:
    """What went wrong: the UserError that a config file raised, if any, or the message's end."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, UserError):
        cause = cause.__cause__ or cause.__context__
    return str(cause or error).strip().splitlines()[-1]
