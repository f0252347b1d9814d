"""Numbers of the command line: read in one place, in their range or refused with one message."""

import argparse
import os
import subprocess
import sys

import pytest
import rich.table

from videollm_mod_jax import benchmark, cli, convert, encode, evaluate, plan, prepare, stream, study
from videollm_mod_jax.console import make_console
from videollm_mod_jax.errors import UserError


def actions(parser):
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from actions(inner)
        else:
            yield action


VERBS = [benchmark, convert, encode, evaluate, plan, prepare, stream, study]


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.__name__)
def test_every_number_of_every_command_has_a_range(verb):
    for action in actions(verb._parser()):
        assert action.type not in (int, float) or action.dest in ("num_processes", "process_id")
        if getattr(action.type, "__qualname__", "").startswith("_reader"):
            for nonsense in ("nan", "inf", "-inf", "1e400", "-3", "two", "", "9" * 5000):
                with pytest.raises(argparse.ArgumentTypeError, match="expected"):
                    action.type(nonsense)


def test_numbers_in_their_range_are_read():
    assert cli.number("(0, 1000]")("2.5") == 2.5
    assert cli.whole_number("[1, 2**20]")("8") == 8
    message = r"found '0'; expected a number in \(0, 1000\]"
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        cli.number("(0, 1000]")("0")
    with pytest.raises(argparse.ArgumentTypeError, match=r"found '2.5'; expected a whole number"):
        cli.whole_number("[1, 2**20]")("2.5")


NAME = "a[/x] [bold]b :smile: \x1b[2J"


def test_a_console_prints_names_as_they_are_and_no_control_sequences(capsys):
    table = rich.table.Table(NAME, title=NAME)
    table.add_row(NAME)
    console = make_console()
    console.print(NAME)
    console.print(table)
    console.print("two\nlines")
    printed = capsys.readouterr().out
    assert printed.count("a[/x] [bold]b :smile: \\x1b[2J") == 4
    assert "\x1b" not in printed
    assert "two\nlines" in printed


def test_an_error_is_one_line_without_control_sequences(capsys):
    def fail():
        raise UserError(f"{NAME}\nis no video")

    assert cli.report_user_errors(fail) == 2
    error = capsys.readouterr().err
    assert error == "error: a[/x] [bold]b :smile: \\x1b[2J\\nis no video\n"


def test_an_output_that_has_few_characters_is_written_with_escapes():
    code = "import sys; from videollm_mod_jax import cli; from videollm_mod_jax.console import *; "
    code += "sys.exit(cli.report_user_errors(lambda: make_console().print('\\u2193 \\xe9')))"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
    assert (done.returncode, done.stdout) == (0, b"\\u2193 \\xe9\n"), done.stderr


@pytest.mark.parametrize("status", [0, 2, 130])
def test_what_failed_leaves_without_taking_the_interpreter_down(status):
    program = (
        "import atexit; from videollm_mod_jax import cli; atexit.register(print, 'taken down'); "
        f"print('said'); cli.leave({status})"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == status
    assert done.stdout.split("\n") == (["said", ""] if status else ["said", "taken down", ""])


SWALLOWING = """
import os, signal, time
from videollm_mod_jax import cli, signals

signals.PATIENCE = 0.5

class Swallows:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        sum(range(10**6))

def run():
    Swallows()
    time.sleep(30)

cli.leave(cli.report_user_errors(run))
"""


def test_a_signal_that_a_destructor_swallows_ends_the_command_in_one_line():
    done = subprocess.run(
        [sys.executable, "-c", SWALLOWING], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (130, "interrupted\n")
