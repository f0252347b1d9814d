"""What the command-line modules share: config flags, and one line instead of a traceback."""

import sys
from collections.abc import Callable, Sequence

import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from videollm_mod_jax.errors import UserError


def report_user_errors(run: Callable[[], None]) -> int:
    """Calls `run` and turns bad input into one line on stderr.

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
        print("interrupted; the same command continues where it stopped", file=sys.stderr)
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

    def parse(argv: Sequence[str]) -> list[str]:
        try:
            rest = flags.FLAGS(list(argv))
        # Everything that reading a config file and its overrides raises for a user's mistake.
        except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
            message = " ".join(str(error).split())
            print(f"error: {message}; see --help", file=sys.stderr)
            sys.exit(2)
        if len(rest) > 1:
            print(f"error: unexpected argument {rest[1]!r}; see --help", file=sys.stderr)
            sys.exit(2)
        return rest

    def main(argv: Sequence[str]) -> None:
        del argv
        sys.exit(report_user_errors(lambda: run(config.value, workdir.value)))

    app.run(main, flags_parser=parse)
