"""The text of a compiled XLA program as computations of instructions."""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

_NAME = r"%([\w.\-]+)"
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
_COMPUTATION = re.compile(rf"^(ENTRY )?{_NAME} .*\{{$")
_START = re.compile(rf"^\s+(ROOT )?{_NAME} = ")
_END = re.compile(r"^\}(, execution_thread=.*)?$")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    ```
    %y = f32[8,16]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
    name y; shape f32[8,16]{1,0}; opcode dot; arguments %x, %w; attributes all behind them
    ```
    """

    name: str
    shape: str
    opcode: str
    arguments: str
    attributes: str

    @property
    def operands(self) -> list[str]:
        """Names of the instructions that it reads."""
        return re.findall(_NAME, self.arguments)

    def computation(self, role: str) -> str | None:
        """Name of the computation that it runs as `role`: calls, body, condition; or None."""
        found = re.search(rf"\b(?:{role})={_NAME}", self.attributes)
        return found and found[1]


@dataclasses.dataclass(frozen=True)
class Computation:
    """A function of the program: its instructions by name, and which of them it returns."""

    root: str
    instructions: Mapping[str, Instruction]


def parse(text: str) -> tuple[str, dict[str, Computation]]:
    """The name of the entry, and all computations, of what `compiled.as_text()` gives."""
    computations, entry, name = {}, "", None
    for line in text.splitlines():
        header = _COMPUTATION.match(line)
        if header:
            name, lines = header[2], []
            entry = name if header[1] else entry
        elif name and _END.match(line):
            computations[name] = _computation(lines)
            name = None
        elif name and _START.match(line):
            lines.append(line.strip())
        elif name and lines:
            # Attributes of kernels hold line breaks.
            lines[-1] += line
    return entry, computations


def _computation(lines: list[str]) -> Computation:
    instructions = [_instruction(line) for line in lines]
    root = next(i for i, line in zip(instructions, lines, strict=True) if line.startswith("ROOT "))
    return Computation(root.name, {i.name: i for i in instructions})


def _instruction(line: str) -> Instruction:
    name, _, rest = line.removeprefix("ROOT ").partition(" = ")
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].strip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    return Instruction(
        name=name.lstrip("%"),
        shape=shape,
        opcode=rest[:opening],
        arguments=rest[opening + 1 : closing],
        attributes=rest[closing + 1 :],
    )


def _closing(text: str, opening: int) -> int:
    depth = 0
    for index in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if not depth:
            return index
    return len(text)


def arrays(shape: str) -> Iterator[tuple[int, tuple[int, ...], bool]]:
    """Bits per element, sizes, and whether it lies in device memory, of every array of a shape."""
    for dtype, sizes, layout in _ARRAY.findall(shape):
        bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0])
        # S(1) and up are other memories: on-chip, host.
        yield bits, tuple(int(s) for s in sizes.split(",") if s), "S(" not in layout


def size_of(shape: str, *, everywhere: bool = True) -> int:
    """Bytes of all arrays of a shape, or of those in device memory alone."""
    return sum(
        math.prod(sizes) * bits // 8
        for bits, sizes, is_hbm in arrays(shape)
        if is_hbm or everywhere
    )


def sizes_of(shape: str) -> tuple[int, ...]:
    """Sizes of the axes of a single array."""
    return next(arrays(shape))[1]
