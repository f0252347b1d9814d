"""Reads pickles without the power to run anything.

A pickle is a program for a stack machine, whose instructions import and call any Python function.
`pickle` is not used here: the instructions that data needs are interpreted one by one, names are
looked up in a table of the caller, never imported, and all else is refused by its name.
"""

import pickletools
import reprlib
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from videollm_mod_jax.errors import shown

_LITERALS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


class RefusedError(Exception):
    """The pickle asks for more than data; the message says for what: "asks for 'os.system'"."""


def interpret(
    program: bytes, names: Mapping[str, Any], load_persistent: Callable[[Any], Any]
) -> Any:
    """Builds the object that a pickle describes.

    ```
    pickle of {"w": collections.OrderedDict()}, protocol 2      the stack after each instruction

    PROTO 2, EMPTY_DICT                                         {}
    BINUNICODE 'w'                                              {}  'w'
    GLOBAL 'collections OrderedDict'                            {}  'w'  names[...]
    EMPTY_TUPLE, REDUCE                                         {}  'w'  names[...]()
    SETITEM, STOP                                               {'w': names[...]()}
    ```

    Args:
      program: the pickle.
      names: what the dotted names in it stand for; functions among them may be called with whatever
        the pickle holds, so they must check it.
      load_persistent: makes an object of a persistent id, which it must check as well.

    Returns:
      None, bool, int, float, str, tuple, list and dict, and what `names` and `load_persistent`
      make. State that the pickle sets on a dict (attributes of an OrderedDict) is dropped.

    Raises:
      RefusedError: any other name or instruction; nothing was run.
      ArithmeticError, LookupError, TypeError, ValueError: the program is damaged, or a function in
        `names` was given what it does not take.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def pop_to(start: int) -> list[Any]:
        items = stack[start:]
        del stack[start:]
        return items

    for instruction, argument, _ in pickletools.genops(program):
        match instruction.name:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "NONE" | "NEWTRUE" | "NEWFALSE" | "EMPTY_TUPLE":
                stack.append(_LITERALS[instruction.name])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                stack.append(argument)
            case "BINUNICODE" | "SHORT_BINUNICODE":
                stack.append(argument)
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "MARK":
                marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(pop_to(marks.pop())))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(pop_to(-int(instruction.name[-1]))))
            case "SETITEM":
                _set_items(stack[-3], pop_to(-2))
            case "SETITEMS":
                _set_items(stack[marks[-1] - 1], pop_to(marks.pop()))
            case "APPEND":
                _append(stack[-2], pop_to(-1))
            case "APPENDS":
                _append(stack[marks[-1] - 1], pop_to(marks.pop()))
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(_look_up(names, argument.replace(" ", ".")))
            case "STACK_GLOBAL":
                module, name = pop_to(-2)
                stack.append(_look_up(names, f"{module}.{name}"))
            case "REDUCE":
                function, arguments = pop_to(-2)
                stack.append(_call(function, arguments))
            case "BUILD":
                stack.pop()
                if type(stack[-1]) is not dict:
                    raise RefusedError(f"sets the state of a {type(stack[-1]).__name__}")
            case "BINPERSID":
                stack.append(load_persistent(stack.pop()))
            case other:
                asked = "" if argument is None else f" {reprlib.repr(argument)}"
                raise RefusedError(f"uses the instruction {other}{asked}")
    return stack.pop()


def _look_up(names: Mapping[str, Any], name: str) -> Any:
    if name not in names:
        raise RefusedError(f"asks for {shown(name)}")
    return names[name]


def _call(function: Any, arguments: Any) -> Any:
    # Whatever else the pickle can put here, only the caller's own functions are of this type.
    if type(function) is not types.FunctionType or type(arguments) is not tuple:
        raise TypeError(f"a {type(function).__name__} is called with a {type(arguments).__name__}")
    return function(*arguments)


def _set_items(target: Any, items: Sequence[Any]) -> None:
    if type(target) is not dict:
        raise TypeError(f"items are set on a {type(target).__name__}")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, str | int | float | None):
            raise TypeError(f"a {type(key).__name__} is a key")
        if key in target:
            raise ValueError(f"the key {shown(key)} is set twice")
        target[key] = value


def _append(target: Any, items: Sequence[Any]) -> None:
    if type(target) is not list:
        raise TypeError(f"something is appended to a {type(target).__name__}")
    target.extend(items)
