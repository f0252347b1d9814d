"""Reads what a compiled program costs from its text, loops multiplied out.

XLA's own cost analysis counts the body of a loop once, however often it runs, so a scanned model of
32 layers seems to cost as much as one of two. Here every loop's body counts as often as it runs.
"""

import dataclasses
import math
import operator
import re
from collections.abc import Mapping

import numpy as np

from videollm_mod_jax.training.hlo_kernels import kernel_flops, kernel_name, kernel_target
from videollm_mod_jax.training.hlo_text import (
    Computation,
    Instruction,
    arrays,
    parse,
    size_of,
    sizes_of,
)

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_COMPARE = {
    "LT": operator.lt,
    "LE": operator.le,
    "GT": operator.gt,
    "GE": operator.ge,
    "NE": operator.ne,
}
_ARITHMETIC = {"add": operator.add, "subtract": operator.sub, "multiply": operator.mul}
_MOST_TRIPS = 1_000_000

# Give names to memory that is there, or hand it on.
_FREE = {
    "parameter",
    "constant",
    "get-tuple-element",
    "tuple",
    "bitcast",
    "while",
    "call",
    "conditional",
    "optimization-barrier",
    "after-all",
    "partition-id",
    "iota",
}


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of communication between devices, summed over a whole step.

    Attributes:
      kind: one of `COLLECTIVES`.
      count: how often it runs.
      result_bytes: of what it leaves on one device, all runs together.
      sent_bytes: that one device sends, on a ring: of n devices, (n - 1) / n of the result for
        all-gather and all-to-all, twice that for all-reduce, n - 1 times the result for
        reduce-scatter, the result for collective-permute.
    """

    kind: str
    count: int
    result_bytes: int
    sent_bytes: int


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one device does in one run of a program.

    Attributes:
      flops: of matrix products and convolutions, those of known kernels included (`hlo_kernels`);
        a multiply-add is two. Nothing else is counted.
      memory_bytes: estimate of the traffic with device memory: an argument is read once, and what
        an operation leaves there is written once and read once. On-chip memory is left out.
      collectives: by kind, in the order of `COLLECTIVES`; absent kinds are left out.
      unknown_loops: loops whose number of runs the text does not tell; counted once.
      unknown_kernels: calls of kernels that may hold products, of which nothing was counted: the
        target and where it comes from, each once.
    """

    flops: int
    memory_bytes: int
    collectives: tuple[Collective, ...]
    unknown_loops: int
    unknown_kernels: tuple[str, ...]


@dataclasses.dataclass
class _Tally:
    """A computation's cost; collectives by channel: (kind, result bytes, sent bytes, runs)."""

    flops: int
    memory: int
    collectives: dict
    unknown: int


def cost(text: str) -> Cost:
    """Counts a compiled program: the text of `compiled.as_text()`.

    ```
    body { dot f32[8,16] = f32[8,32] x f32[32,16] }     2 * 8 * 16 * 32 = 8192
    ENTRY { while, known_trip_count 3, body }           flops 3 * 8192 = 24576
    ```
    """
    reader = _Reader(text)
    tally = reader.total()
    entry = reader.computations[reader.entry].instructions.values()
    arguments = sum(size_of(i.shape, everywhere=False) for i in entry if i.opcode == "parameter")
    kinds = {}
    for kind, result, sent, runs in tally.collectives.values():
        count, total, moved = kinds.get(kind, (0, 0, 0))
        kinds[kind] = (count + runs, total + runs * result, moved + runs * sent)
    return Cost(
        flops=tally.flops,
        memory_bytes=arguments + tally.memory,
        collectives=tuple(Collective(k, *kinds[k]) for k in COLLECTIVES if k in kinds),
        unknown_loops=tally.unknown,
        unknown_kernels=tuple(sorted(reader.unknown_kernels)),
    )


class _Reader:
    """Walks the computations of one program, each once."""

    def __init__(self, text: str):
        self.entry, self.computations = parse(text)
        self.tallies: dict[str, _Tally] = {}
        self.unknown_kernels: set[str] = set()

    def total(self) -> _Tally:
        return self._tally(self.entry)

    def _tally(self, name: str) -> _Tally:
        if name in self.tallies:
            return self.tallies[name]
        computation = self.computations[name]
        total = _Tally(0, 0, {}, 0)
        for instruction in computation.instructions.values():
            self._add(total, computation, instruction)
        self.tallies[name] = total
        return total

    def _add(self, total: _Tally, within: Computation, instruction: Instruction) -> None:
        opcode = instruction.opcode
        if opcode == "dot":
            total.flops += _dot_flops(within, instruction)
        elif opcode == "convolution":
            total.flops += _convolution_flops(within, instruction)
        elif opcode == "custom-call":
            flops = kernel_flops(within, instruction)
            if flops is None:
                name = f"{kernel_target(instruction)} ({kernel_name(instruction)})"
                self.unknown_kernels.add(name)
            total.flops += flops or 0
        elif opcode == "while":
            trips = self._trips(within, instruction)
            total.unknown += trips is None
            body = self._tally(instruction.computation("body"))
            total.flops += body.flops * (trips or 1)
            total.memory += body.memory * (trips or 1)
            total.unknown += body.unknown
            for channel, (*collective, runs) in body.collectives.items():
                key = (instruction.name, channel)
                total.collectives[key] = (*collective, runs * (trips or 1))
        elif opcode in ("fusion", "call", "async-start"):
            inner = self._tally(instruction.computation("calls|to_apply"))
            total.flops += inner.flops
            total.unknown += inner.unknown
            # A collective that runs beside other work appears in all of it, under one channel.
            total.collectives.update(inner.collectives)
            total.memory += inner.memory * (opcode == "call")
        elif opcode == "conditional":
            total.unknown += 1
        kind = opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            channel = re.search(r"channel_id=(\d+)", instruction.attributes)
            key = channel[1] if channel else instruction.name
            total.collectives[key] = _collective(kind, instruction)
        if opcode not in _FREE and not opcode.endswith("-start"):
            total.memory += 2 * self._written(within, instruction)

    def _written(self, within: Computation, instruction: Instruction) -> int:
        """Bytes that an instruction writes; an update in place writes what it updates."""
        if instruction.opcode == "dynamic-update-slice":
            return size_of(within.instructions[instruction.operands[1]].shape, everywhere=False)
        if instruction.opcode == "fusion":
            inner = self.computations[instruction.computation("calls")]
            root = inner.instructions[inner.root]
            parts = root.operands if root.opcode == "tuple" else [inner.root]
            updates = [_behind_bitcasts(inner, part) for part in parts]
            if any(part.opcode == "dynamic-update-slice" for part in updates):
                return sum(self._written(inner, part) for part in updates)
        return size_of(instruction.shape, everywhere=False)

    def _trips(self, within: Computation, loop: Instruction) -> int | None:
        """How often a loop's body runs, or None."""
        known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if known:
            return int(known[1])
        condition = self.computations[loop.computation("condition")]
        body = self.computations[loop.computation("body")]
        test = condition.instructions[condition.root]
        compare = re.search(r"direction=(\w+)", test.attributes)
        if test.opcode != "compare" or compare[1] not in _COMPARE:
            return None
        counter, limit = (condition.instructions[name] for name in test.operands)
        index = re.search(r"index=(\d+)", counter.attributes)
        start = within.instructions[loop.operands[0]]
        if counter.opcode != "get-tuple-element" or start.opcode != "tuple":
            return None
        index = int(index[1])
        next_name = body.instructions[body.root].operands[index]
        value = self._scalar(within, start.operands[index], {})
        bound = self._scalar(condition, limit.name, {})
        trips = 0
        while None not in (value, bound) and _COMPARE[compare[1]](value, bound):
            value = self._scalar(body, next_name, {index: value})
            trips += 1
            if trips > _MOST_TRIPS:
                return None
        return None if None in (value, bound) else trips

    def _scalar(self, within: Computation, name: str, known: Mapping[int, int]) -> int | None:
        """The value of an integer, given those of its computation's parameters, or None."""
        instruction = within.instructions[name]
        opcode, operands = instruction.opcode, instruction.operands
        if opcode == "constant":
            return int(instruction.arguments) if instruction.arguments.isdigit() else None
        if opcode == "parameter":
            return known.get(int(instruction.arguments))
        if opcode == "get-tuple-element":
            index = int(re.search(r"index=(\d+)", instruction.attributes)[1])
            source = within.instructions[operands[0]]
            return known.get(index) if source.opcode == "parameter" else None
        values = [self._scalar(within, operand, known) for operand in operands]
        if None in values:
            return None
        if opcode in _ARITHMETIC:
            return _ARITHMETIC[opcode](*values)
        if opcode in ("copy", "bitcast", "convert", "copy-start", "copy-done"):
            return values[0]
        if opcode == "fusion":
            inner = self.computations[instruction.computation("calls")]
            return self._scalar(inner, inner.root, dict(enumerate(values)))
        return None


def _behind_bitcasts(within: Computation, name: str) -> Instruction:
    instruction = within.instructions[name]
    while instruction.opcode == "bitcast":
        instruction = within.instructions[instruction.operands[0]]
    return instruction


def _collective(kind: str, instruction: Instruction) -> tuple[str, int, int, int]:
    shape = instruction.shape
    if instruction.opcode.endswith("-start") and kind in ("all-gather", "collective-permute"):
        # (operand, result, ...)
        bits, sizes, _ = list(arrays(shape))[1]
        size = math.prod(sizes) * bits // 8
    else:
        size = size_of(shape)
    n = _group_size(instruction.attributes)
    sent = {
        "all-gather": size * (n - 1) // n,
        "all-reduce": 2 * size * (n - 1) // n,
        "reduce-scatter": size * (n - 1),
        "all-to-all": size * (n - 1) // n,
        "collective-permute": size,
    }[kind]
    return kind, size, sent, 1


def _group_size(attributes: str) -> int:
    """Devices that communicate with each other.

    ```
    replica_groups={{0,1},{2,3}}                            2
    replica_groups=[4,2]<=[8]                               2
    replica_groups=mesh['data'=4,'fsdp'=2] {'fsdp'}         2
    ```
    """
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return len(found[1].split(","))
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
        return int(found[1])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes):
        axes = dict(re.findall(r"('\w+')=(\d+)", found[1]))
        return math.prod(int(axes[axis]) for axis in found[2].split(","))
    return 1


def _dot_flops(within: Computation, dot: Instruction) -> int:
    lhs = sizes_of(within.instructions[dot.operands[0]].shape)
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", dot.attributes)
    depth = math.prod(lhs[int(d)] for d in contracted[1].split(",")) if contracted else 1
    return 2 * math.prod(sizes_of(dot.shape)) * depth


def _convolution_flops(within: Computation, convolution: Instruction) -> int:
    """The products that a convolution really sums; TPUs spell matrix products as convolutions.

    A batch of products is a spatial axis there, most of whose windows lie in the padding.
    """
    lhs, rhs = (sizes_of(within.instructions[name].shape) for name in convolution.operands)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", convolution.attributes)
    lhs, rhs, out = (
        dict(zip(label, sizes, strict=True))
        for label, sizes in zip(
            labels.groups(), (lhs, rhs, sizes_of(convolution.shape)), strict=True
        )
    )
    window = dict(re.findall(r"(\w+)=([\d_x\-]+)", _window(convolution.attributes)))
    products = out["b"] * out["f"] * rhs["i"]
    for axis in (label for label in out if label.isdigit()):

        def setting(key: str, default: str, axis: int = int(axis)) -> str:
            return window[key].split("x")[axis] if key in window else default

        dilation = int(setting("lhs_dilate", "1"))
        taps = np.arange(int(setting("size", "1"))) * int(setting("rhs_dilate", "1"))
        starts = np.arange(out[axis]) * int(setting("stride", "1"))
        at = starts[:, None] + taps - int(setting("pad", "0_0").split("_")[0])
        inside = (at >= 0) & (at <= (lhs[axis] - 1) * dilation) & (at % dilation == 0)
        products *= int(inside.sum())
    return 2 * products


def _window(attributes: str) -> str:
    found = re.search(r"window=\{([^}]*)\}", attributes)
    return found[1] if found else ""
