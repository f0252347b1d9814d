"""What the command-line modules share: flags, joining processes, one line and no traceback."""

import argparse
import contextlib
import io
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO

import jax
import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from videollm_mod_jax import signals
from videollm_mod_jax.config_dict import Interval
from videollm_mod_jax.errors import UserError, fault_of_machine, printable
from videollm_mod_jax.training import distributed, liveness
from videollm_mod_jax.training.checkpoint import best_step

_MISTAKES = (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, UserError)
"""Everything that reading a config file and its overrides raises for a user's mistake."""

_BUG = (
    "This is a mistake in videollm_mod_jax and not in what you gave it. Please report it with the "
    "lines above: https://github.com/videollm-mod-jax/videollm_mod_jax/issues"
)

_PROCESSES = {
    "coordinator": (str, "host:port of process 0, for several processes that JAX cannot find"),
    "num-processes": (int, "how many processes there are"),
    "process-id": (int, "which of them this is, from 0"),
}
_TIMEOUT = "how many seconds to wait for the other processes"


def report_user_errors(
    run: Callable[[], None], interrupted: str | Callable[[], str] = "interrupted"
) -> int:
    """Calls `run` and turns bad input, and faults of the machine, into one line on stderr.

    What ends one of several processes ends all of them, with the same status and one message.

    Args:
      run: does the work.
      interrupted: what to say after Ctrl-C or SIGTERM, or what gives it.

    Returns:
      The exit status: 0; 2 after a UserError or a fault of the machine; 130 after Ctrl-C; 143 after
      SIGTERM, or 0 where it had the work saved.
    """

    def left(signum: int, again: bool) -> None:
        """Ends the process from the thread that hears signals."""
        text = interrupted if isinstance(interrupted, str) else interrupted()
        _say(f"{text} (stopped at once)" if again else text)
        os._exit(signals.status_of(signum))

    _open_missing_streams()
    # Libraries report every file they touch; what a user wants to see, we print.
    logging.set_verbosity(logging.FATAL)
    prepare_output()
    try:
        with signals.interruptible(left, _say):
            run()
            # Here, and not at exit, where a reader that has enough could not be told from a
            # mistake.
            sys.stdout.flush()
            distributed.barrier("end")
    except distributed.Stopped as stopped:
        if distributed.is_lead():
            _say(str(stopped))
        return stopped.status
    except UserError as error:
        return _end(2, f"error: {error}")
    except KeyboardInterrupt as error:
        signum = getattr(error, "signum", signal.SIGINT)
        text = interrupted if isinstance(interrupted, str) else interrupted()
        return _end(signals.status_of(signum), text)
    except BrokenPipeError:
        # Whoever read the output, `head` say, has enough.
        _give_up(sys.stdout)
    except Exception as error:
        if (fault := fault_of_machine(error)) is not None:
            _give_up_if_full(sys.stdout)
            return _end(2, f"error: {fault}")
        error.add_note(_BUG)
        if not jax.distributed.is_initialized():
            raise
        liveness.end_all(1, None)
    return 0


def leave(status: int) -> NoReturn:
    """Ends the process of a command with its exit status.

    What failed or was interrupted may leave threads of JAX or TensorStore at work, which crash in
    an interpreter that takes itself down.
    """
    if status:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(status)
    sys.exit(status)


def _open_missing_streams() -> None:
    """Opens /dev/null for standard streams that were closed before Python started.

    Files that are opened later would get their numbers, and all that is printed.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDWR)
            if descriptor != number:
                os.dup2(descriptor, number)
                os.close(descriptor)
            stream = os.fdopen(number, "w" if number else "r", encoding="utf-8")
            setattr(sys, name, stream)


def _say(message: str) -> None:
    """Prints one line on stderr, if anybody can read it."""
    with contextlib.suppress(OSError, ValueError):
        print(printable(message), file=sys.stderr, flush=True)


def _give_up(stream: TextIO) -> None:
    """Has a stream that cannot be written go nowhere, so that Python does not fail at its exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _give_up_if_full(stream: TextIO) -> None:
    try:
        stream.flush()
    except OSError:
        _give_up(stream)


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line, as all others are."""

    def error(self, message: str) -> NoReturn:
        """Ends the command with status 2.

        ```
        argument --fps: found '0'; expected x    ->    error: --fps is '0'; expected x; see --help
        ```
        """
        said = message.removeprefix("argument ").replace(": found ", " is ", 1)
        prepare_output()
        self.exit(2, f"error: {printable(said)}; see --help\n")


def number(interval: str) -> Callable[[str], float]:
    """Returns a `type=` of argparse that reads a number and keeps its range.

    ```
    number("(0, 1000]")        "2.5"  2.5         "0", "nan", "inf", "two"   refused
    ```

    Args:
      interval: see `Interval`.
    """
    return _reader(float, Interval(interval))


def whole_number(interval: str) -> Callable[[str], int]:
    """Returns a `type=` of argparse that reads a whole number and keeps its range; see `number`."""
    return _reader(int, Interval(interval))


def _reader(kind: Callable[[str], float], interval: Interval) -> Callable[[str], Any]:
    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or value not in interval:
            whole = "a whole number: " if kind is int else ""
            raise argparse.ArgumentTypeError(f"found {text!r:.80}; expected {whole}{interval}")
        return value

    return read


def prepare_output() -> None:
    """Has stdout and stderr print an escape for a character that their encoding lacks."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def add_process_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that join several processes."""
    group = parser.add_argument_group("several processes")
    for name, (kind, text) in _PROCESSES.items():
        group.add_argument(f"--{name}", type=kind, help=text)
    group.add_argument(
        "--coordinator-timeout",
        type=number("(0, 86400]"),
        metavar="SECONDS",
        default=distributed.TIMEOUT,
        help=f"{_TIMEOUT} (default: %(default)g)",
    )


def add_step_argument(parser: argparse.ArgumentParser) -> None:
    """Adds the flag that chooses a checkpoint of a run."""
    parser.add_argument(
        "--step",
        metavar="N",
        help="checkpoint of a run: of update N, or the `best` by validation loss; by default the "
        "newest",
    )


def add_verify_argument(add: Callable[..., Any]) -> None:
    """Adds, by a parser's `add_argument`, the flag that skips the checksums of weights."""
    add(
        "--no-verify",
        dest="verify",
        action="store_false",
        help="do not compare the stored weights with their checksums: damage goes unnoticed",
    )


def add_int8_argument(parser: argparse.ArgumentParser) -> None:
    """Adds the flag that rounds the decoder's weights."""
    parser.add_argument(
        "--int8",
        action="store_true",
        help="round the decoder's weights to 8 bits: half the memory of bfloat16, and less to read "
        "per token",
    )


def chosen_step(directory: str, step: str | None) -> int | None:
    """The checkpoint that `--step` names; None takes the newest.

    Raises:
      UserError: it is neither a number nor `best`, or no checkpoint has a validation loss.
    """
    if step == "best":
        return best_step(directory)
    if step is not None and not step.isdecimal():
        raise UserError(f"--step is {step!r}; expected the number of an update, or best")
    return None if step is None else int(step)


def join_processes(arguments: argparse.Namespace) -> None:
    """Joins the processes that the flags of `add_process_arguments` name.

    Raises:
      UserError: see `distributed.initialize`.
    """
    distributed.initialize(
        arguments.coordinator,
        arguments.num_processes,
        arguments.process_id,
        timeout=arguments.coordinator_timeout,
    )


def _end(status: int, message: str) -> int:
    if jax.distributed.is_initialized():
        liveness.end_all(status, printable(message))
    _say(message)
    return status


def run_with_config(run: Callable[..., None], progress: Callable[[Path], str]) -> None:
    """The main of a module that takes `--config FILE`, overrides of its keys, and `--workdir DIR`.

    Exits with status 2 and one line for a missing file, an unknown key or a value of a wrong type.

    Args:
      run: called with the overridden config, the working directory, and how many updates to
        profile, and with `verify`, whether to compare the weights to start from with their
        checksums; several processes have been joined before.
      progress: says where the same command goes on in the working directory, after a signal.
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
    profile = flags.DEFINE_integer(
        "profile", 0, "Trace this many updates into WORKDIR/profile.", lower_bound=0
    )
    no_verify = flags.DEFINE_bool(
        "no-verify", False, "Do not compare the weights of --config.init with their checksums."
    )
    joined = [
        (flags.DEFINE_integer if kind is int else flags.DEFINE_string)(name, None, text)
        for name, (kind, text) in _PROCESSES.items()
    ]
    timeout = flags.DEFINE_float("coordinator-timeout", distributed.TIMEOUT, _TIMEOUT)
    flags.mark_flags_as_required(["config", "workdir"])

    def refuse(message: str) -> NoReturn:
        prepare_output()
        print(f"error: {printable(message)}; see --help", file=sys.stderr)
        sys.exit(2)

    def parse(argv: Sequence[str]) -> list[str]:
        try:
            rest = flags.FLAGS(list(argv))
        except _MISTAKES as error:
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

        def joined_run() -> None:
            distributed.initialize(*(flag.value for flag in joined), timeout=timeout.value)
            run(config.value, workdir.value, profile.value, verify=not no_verify.value)

        def interrupted() -> str:
            return f"interrupted; {progress(Path(workdir.value))}"

        leave(report_user_errors(joined_run, interrupted))

    app.run(main, flags_parser=parse)


def read_config(file: str, overrides: Sequence[str]) -> ml_collections.ConfigDict:
    """The table of a config file with `--config.key=value` applied, outside `run_with_config`.

    Args:
      file: `configs/NAME.py`, or `configs/NAME.py:ARGUMENT`.
      overrides: flags of the command line that are not its own.

    Raises:
      UserError: no such file, an unknown key, a value of a wrong type, or another flag.
    """
    if not Path(file.partition(":")[0]).is_file():
        raise UserError(
            f"--config: there is no file {file}; expected one such as configs/digits.py"
        )
    values = flags.FlagValues()
    argv = ["", f"--config={file}", *overrides]
    config = config_flags.DEFINE_config_file(
        "config", lock_config=True, flag_values=values, sys_argv=argv
    )
    try:
        rest = values(argv)
    except _MISTAKES as error:
        raise UserError(_one_line(error)) from error
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}; see --help")
    return config.value


def _one_line(error: BaseException) -> str:
    """What went wrong: the UserError that a config file raised, if any, or the message's end."""
    cause, chained = None, error
    while chained is not None:
        # The flag library wraps an error of the config file in others of the same kind.
        cause = chained if isinstance(chained, UserError) else cause
        chained = chained.__cause__ or chained.__context__
    wrapped = error.args[0] if error.args else None
    if cause is None and isinstance(wrapped, KeyError):
        # An unknown key, quoted, and perhaps "Did you mean ..." in a second line.
        key, _, hint = str(wrapped.args[0]).partition("\n")
        return f"the config has no key {key}" + (f"; {hint[:1].lower()}{hint[1:]}" if hint else "")
    return str(cause or error).strip().splitlines()[-1]
