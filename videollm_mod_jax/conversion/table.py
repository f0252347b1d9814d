"""Where every tensor of a checkpoint goes, as data that reads in both directions.

A family's table is a list of `Rule`s. Reading forward it fills our variables, whole or any slice of
them; reading backward it restores the source tensors, bit by bit. Nothing moves but axes: no rule
computes.
"""

import collections
import dataclasses
import difflib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np

from videollm_mod_jax.errors import UserError, shown

Index = tuple[slice, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """A tensor of the source, or one per layer, and the variable that it becomes.

    ```
    source      layers.{i}.self_attn.q_proj.weight             [out, in]
    target      decoder/layer_{i}/block/attention/q/kernel     [in, out]       axes (1, 0)

    source      encoder.layers.{i}.mlp.fc1.weight              [out, in]
    target      vision/blocks/mlp/fc1/kernel                   [L, in, out]    axes (1, 0), stacked

    source      head.attention.in_proj_weight                  [3 W, W]
    target      vision/head/attention/k/kernel                 [W, W]       axes (1, 0), part (1, 3)
    ```

    Attributes:
      source: name of the tensor; `{i}` stands for each of `layers`.
      target: path of the variable; without `{i}`, the layers are stacked along its leading axis.
      axes: axis `a` of the variable (of one layer of it) is axis `axes[a]` of the tensor; None
        leaves them in place.
      part: (p, n): the p-th of n equal parts of the tensor along its first axis.
      squeeze: the tensor has a leading axis of size one that the variable lacks.
      layers: the values of `{i}`.
    """

    source: str
    target: str
    axes: tuple[int, ...] | None = None
    part: tuple[int, int] = (0, 1)
    squeeze: bool = False
    layers: tuple[int, ...] = ()

    def entries(self) -> Iterator["Entry"]:
        """The rule for every layer, or itself."""
        if "{i}" not in self.source:
            yield Entry(self.source, self.target, self.axes, self.part, self.squeeze, None)
            return
        stacked = "{i}" not in self.target
        for row, layer in enumerate(self.layers):
            yield Entry(
                self.source.replace("{i}", str(layer)),
                self.target.replace("{i}", str(layer)),
                self.axes,
                self.part,
                self.squeeze,
                row if stacked else None,
            )


@dataclasses.dataclass(frozen=True)
class Entry:
    """A rule for one tensor.

    Attributes:
      source, target, axes, part, squeeze: as in `Rule`, with `{i}` filled in.
      row: place along the leading axis of a stacked variable, or None.
    """

    source: str
    target: str
    axes: tuple[int, ...] | None
    part: tuple[int, int]
    squeeze: bool
    row: int | None

    def source_shape(self, target_shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the whole source tensor, given the whole variable's."""
        block = tuple(target_shape[1:] if self.row is not None else target_shape)
        shape = block if self.axes is None else tuple(block[a] for a in np.argsort(self.axes))
        if self.part[1] > 1:
            shape = (shape[0] * self.part[1], *shape[1:])
        return (1, *shape) if self.squeeze else shape

    def to_target(self, tensor: np.ndarray) -> np.ndarray:
        """The whole source tensor as the variable (as one layer of it): a view."""
        if self.squeeze:
            tensor = tensor[0]
        p, n = self.part
        if n > 1:
            size = tensor.shape[0] // n
            tensor = tensor[p * size : (p + 1) * size]
        return tensor if self.axes is None else tensor.transpose(self.axes)

    def from_target(self, block: np.ndarray) -> np.ndarray:
        """The inverse of `to_target`, for one part: a view."""
        tensor = block if self.axes is None else block.transpose(np.argsort(self.axes))
        return tensor[None] if self.squeeze else tensor

    def source_index(self, target_index: Index, target_shape: Sequence[int]) -> Index:
        """Which slice of the source tensor holds a slice of the variable (of one layer of it).

        ```
        axes (1, 0), part (1, 3), variable [4, 4]
        variable[0:2, 1:3]  is made of  tensor[5:7, 0:2]
        ```
        """
        block = target_shape[1:] if self.row is not None else target_shape
        index = [slice(*s.indices(n)[:2]) for s, n in zip(target_index, block, strict=True)]
        if self.axes is not None:
            index = [index[a] for a in np.argsort(self.axes)]
        if self.part[1] > 1:
            shape = self.source_shape(target_shape)[1 if self.squeeze else 0 :]
            first = self.part[0] * (shape[0] // self.part[1])
            index[0] = slice(first + index[0].start, first + index[0].stop)
        return (slice(0, 1), *index) if self.squeeze else tuple(index)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """All that may be in a checkpoint, and what becomes of it.

    Attributes:
      rules: the tensors that become variables.
      same: tensors that repeat another one (`lm_head.weight` of a model with tied embeddings),
        each with the name of that other one; they may be absent, and must be equal to it.
      buffers: tensors that transformers computes from the config (`position_ids`, `inv_freq`), with
        a function that computes them too; they may be absent, and must agree with it.
      left_out: regular expressions of whole names, with the reason, of tensors that have no place
        in our model (the text tower of CLIP); they are listed in the manifest.
    """

    rules: tuple[Rule, ...]
    same: Mapping[str, str] = dataclasses.field(default_factory=dict)
    buffers: Mapping[str, Callable[[], np.ndarray]] = dataclasses.field(default_factory=dict)
    left_out: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        used = collections.Counter((entry.source, entry.part) for entry in self.entries())
        filled = collections.Counter((entry.target, entry.row) for entry in self.entries())
        for key, count in [*used.items(), *filled.items()]:
            if count > 1:
                raise ValueError(f"the table uses {key[0]} {count} times")

    def entries(self) -> list[Entry]:
        """The entries of all rules, in the order of the rules."""
        return [entry for rule in self.rules for entry in rule.entries()]

    def by_source(self) -> dict[str, list[Entry]]:
        """The entries of every source tensor; more than one where it is split, in order of part."""
        return _grouped(self.entries(), lambda entry: entry.source, lambda entry: entry.part)

    def by_target(self) -> dict[str, list[Entry]]:
        """The entries of every variable; more than one where it is stacked, in order of layer."""
        return _grouped(self.entries(), lambda entry: entry.target, lambda entry: entry.row or 0)


def join(*tables: Table) -> Table:
    """One table for a checkpoint that holds several models."""
    return Table(
        rules=tuple(rule for table in tables for rule in table.rules),
        same={name: other for table in tables for name, other in table.same.items()},
        buffers={name: make for table in tables for name, make in table.buffers.items()},
        left_out={name: reason for table in tables for name, reason in table.left_out.items()},
    )


@dataclasses.dataclass(frozen=True)
class Match:
    """What a checkpoint's names are to a table.

    Attributes:
      used: names that become variables.
      same, buffers: names that are present and must be checked.
      left_out: names without a place in our model.
    """

    used: tuple[str, ...]
    same: tuple[str, ...]
    buffers: tuple[str, ...]
    left_out: tuple[str, ...]


def match(table: Table, names: Iterable[str], where: str) -> Match:
    """Checks that every name of a checkpoint is in its table, and every rule finds its tensor.

    Args:
      table: of the family and architecture.
      names: all names in the checkpoint.
      where: the checkpoint, for messages.

    Raises:
      UserError: a tensor is missing, or one is not in the table; the first is named, with the
        nearest name on the other side.
    """
    names = list(names)
    wanted, present = table.by_source(), set(names)
    missing = [name for name in wanted if name not in present]
    groups: dict[str, list[str]] = {"used": [], "same": [], "buffers": [], "left_out": []}
    unknown = []
    for name in names:
        if name in wanted:
            groups["used"].append(name)
        elif name in table.same:
            groups["same"].append(name)
        elif name in table.buffers:
            groups["buffers"].append(name)
        elif any(re.fullmatch(pattern, name) for pattern in table.left_out):
            groups["left_out"].append(name)
        else:
            unknown.append(name)
    if missing:
        raise UserError(
            f"{where} has no tensor {missing[0]!r}{_others(missing)}, which its config.json calls "
            f"for{_nearest(missing[0], unknown)}"
        )
    if unknown:
        raise UserError(
            f"{where} holds the tensor {shown(unknown[0])}{_others(unknown)}, which no rule of its "
            f"family uses{_nearest(unknown[0], wanted)}; nothing is skipped silently, so check "
            "that config.json belongs to these weights"
        )
    return Match(**{key: tuple(value) for key, value in groups.items()})


def check_shape(
    entry: Entry, target_shape: Sequence[int], found: Sequence[int], where: str
) -> None:
    """Compares the shape of a source tensor with the one that its variable asks for.

    Raises:
      UserError: they differ; the tensor and both shapes are named.
    """
    expected = entry.source_shape(target_shape)
    if tuple(found) != expected:
        raise UserError(
            f"{where}: {entry.source} has the shape {shown(list(found))}; config.json calls "
            f"for {list(expected)}; check that it belongs to these weights"
        )


def _grouped(entries, key, order) -> dict[str, list[Entry]]:
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(key(entry), []).append(entry)
    return {name: sorted(group, key=order) for name, group in groups.items()}


def _others(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _nearest(name: str, candidates: Iterable[str]) -> str:
    # A comparison takes microseconds, and a stranger's file may have a hundred thousand names.
    some = [other for other in itertools.islice(candidates, 2000) if len(other) <= 200]
    close = difflib.get_close_matches(name, some, n=1, cutoff=0.8)
    return f"; the nearest is {close[0]!r}" if close else ""
