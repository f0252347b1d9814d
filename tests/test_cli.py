"""Numbers of the command line: read in one place, in their range or refused with one message."""

import argparse

import pytest

from videollm_mod_jax import benchmark, cli, convert, encode, evaluate, plan, prepare, stream, study


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
