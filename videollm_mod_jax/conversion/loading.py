"""The variables of a conversion, whole or any slice, read from its sources when they are wanted.

`import_model` writes them to disk one by one; `load_hf` puts them straight onto a mesh, where each
process reads only the slices that its devices hold.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from videollm_mod_jax.conversion.plan import Conversion, Merge, Part
from videollm_mod_jax.conversion.source import Source
from videollm_mod_jax.conversion.table import Entry, Index
from videollm_mod_jax.data.tokenizer import Tokenizer
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.models import VideoLLM
from videollm_mod_jax.training.checkpoint import LoadedModel
from videollm_mod_jax.training.initial import init_part
from videollm_mod_jax.training.optimizer import Variables
from videollm_mod_jax.training.sharding import Layout, abstract_variables

SLAB_BYTES = 64 * 2**20
"""About how much of a source tensor is in memory at a time."""

CACHED_BYTES = 2 * 2**20
"""A transposing copy of so many bytes stays in the cache, and runs three times as fast for it."""

VOCABULARY_AXES = {"params/embedding": 0, "params/lm_head/kernel": 1, "lora/lm_head/b": 1}
"""By path, the axis of the variables that has an entry per token."""

_SEED = 0


def load_hf(conversion: Conversion, layout: Layout | None = None) -> LoadedModel:
    """Loads a model from its sources without writing it to disk first.

    Args:
      conversion: from `plan_conversion`.
      layout: how to lay the variables on a mesh; None puts them on the first device. Each process
        reads the slices of its own devices only.

    Raises:
      UserError: a tensor is not finite, or a repeated one or a buffer is not what it should be.
    """
    check_repeats(conversion)
    reader = VariableReader(conversion)
    abstract = flatten_dict(abstract_variables(VideoLLM(conversion.config), layout), sep="/")
    fresh = fresh_variables(conversion, abstract)

    def load(path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if path in fresh:
            return fresh[path]
        return jax.make_array_from_callback(
            leaf.shape, leaf.sharding, functools.partial(reader.read, path)
        )

    leaves = {path: load(path, leaf) for path, leaf in abstract.items()}
    tokenizer = None if conversion.tokenizer is None else Tokenizer.load(conversion.tokenizer)
    return LoadedModel(
        conversion.config, unflatten_dict(leaves, sep="/"), tokenizer, conversion.system
    )


class VariableReader:
    """Reads our variables out of the tensors that they are made of.

    Attributes:
      shapes: by path, shape and dtype of every variable, in the order of the model.
    """

    def __init__(self, conversion: Conversion):
        """Takes a checked plan; nothing is read yet."""
        abstract = abstract_variables(VideoLLM(conversion.config), None)
        self.shapes = flatten_dict(abstract, sep="/")
        self._merges = conversion.merges
        self._added_rows = conversion.added_rows
        self._adapter = next((p.source for p in conversion.parts if p.role == "adapter"), None)
        self._origins: dict[str, list[tuple[Part, Entry]]] = {}
        for part in conversion.parts:
            for target, entries in part.table.by_target().items():
                self._origins.setdefault(target, []).extend((part, entry) for entry in entries)
        filled = {*self._origins, *conversion.fresh}
        if filled != set(self.shapes):
            raise ValueError(f"not filled once: {sorted(filled ^ set(self.shapes))[:3]}")

    def origins(self, path: str) -> list[tuple[Part, Entry]]:
        """The tensors that a variable is made of; none for one that starts afresh."""
        return self._origins.get(path, [])

    def read(self, path: str, index: Index | None = None) -> np.ndarray:
        """A variable, or the slice `index` of it, in the variable's dtype.

        Beside the result only a part of one source tensor is in memory (`SLAB_BYTES`).

        Raises:
          UserError: a value is not finite, or is too large for the variable's dtype.
        """
        leaf = self.shapes[path]
        index = (slice(None),) * len(leaf.shape) if index is None else index
        bounds = [slice(*s.indices(size)[:2]) for s, size in zip(index, leaf.shape, strict=True)]
        result = np.empty([s.stop - s.start for s in bounds], leaf.dtype)
        if not self._added_rows or path not in VOCABULARY_AXES:
            self._read(result, path, bounds)
            return result
        # Rows that no source has are the mean of those that one has.
        axis = VOCABULARY_AXES[path]
        count, wanted = leaf.shape[axis] - self._added_rows, bounds[axis]
        known = slice(min(wanted.start, count), min(wanted.stop, count))
        rows = np.moveaxis(result, axis, 0)
        there = known.stop - known.start
        block = np.moveaxis(rows[:there], 0, axis)
        self._read(block, path, _replaced(bounds, axis, known))
        if there < len(rows):
            rows[there:] = self._mean(path, bounds, axis, count)
        return result

    def _mean(self, path: str, bounds: list[slice], axis: int, count: int) -> np.ndarray:
        """The mean of the first `count` rows along an axis, of a slice of a variable."""
        leaf, total = self.shapes[path], 0.0
        for rows in slabs((count,), 0, math.prod(leaf.shape) // leaf.shape[axis] * 4, SLAB_BYTES):
            part = _replaced(bounds, axis, rows)
            block = np.empty([s.stop - s.start for s in part], leaf.dtype)
            self._read(block, path, part)
            total = total + block.sum(axis, np.float64)
        return total / count

    def _read(self, result: np.ndarray, path: str, bounds: list[slice]) -> None:
        """Fills an array with a slice of a variable, of what the sources have."""
        for part, entry in self._origins[path]:
            if entry.row is None:
                self._fill(result, part, entry, tuple(bounds))
            elif bounds[0].start <= entry.row < bounds[0].stop:
                block = result[entry.row - bounds[0].start]
                self._fill(block, part, entry, tuple(bounds[1:]))

    def _fill(self, block: np.ndarray, part: Part, entry: Entry, index: Index) -> None:
        shape = self.shapes[entry.target].shape
        # The axis along which consecutive slices lie one behind the other in the source.
        axis = 0 if entry.axes is None else entry.axes.index(0)
        itemsize = part.source.info(entry.source).dtype.itemsize
        for rows in slabs(block.shape, axis, itemsize, SLAB_BYTES):
            start = index[axis].start if index else 0
            moved = slice(start + rows.start, start + rows.stop)
            wanted = (*index[:axis], moved, *index[axis + 1 :]) if index else ()
            slab = part.source.read_slice(entry.source, entry.source_index(wanted, shape))
            slab = dataclasses.replace(entry, part=(0, 1)).to_target(slab)
            if entry.target in self._merges:
                slab = self._merged(slab, self._merges[entry.target], wanted)
            cast = _cast(slab, block.dtype, entry.source, part.source)
            _copy(block, cast, axis, rows)

    def _merged(self, kernel: np.ndarray, merge: Merge, index: Index) -> np.ndarray:
        """A slice of a kernel [in, out] with the adapter's update added, in float32."""
        rows, columns = index
        a = self._adapter.read_slice(merge.a, (slice(None), rows)).astype(np.float32)
        b = self._adapter.read_slice(merge.b, (columns, slice(None))).astype(np.float32)
        return kernel.astype(np.float32) + np.float32(merge.scale) * (a.T @ b.T)


def fresh_variables(conversion: Conversion, abstract: Variables) -> dict[str, jax.Array]:
    """By path, the variables that no source has, as the model initialises them.

    Args:
      conversion: the plan.
      abstract: the model's variables by path, with their shardings.
    """
    model = VideoLLM(conversion.config)
    return init_part(model, jax.random.key(_SEED), abstract, conversion.fresh)


def check_repeats(conversion: Conversion) -> None:
    """Compares tensors that repeat another, and buffers, with what they should be.

    Raises:
      UserError: one differs; it is named.
    """
    for part in conversion.parts:
        present = set(part.source.names)
        for name, other in part.table.same.items():
            if name in present:
                _check_same(part.source, name, other)
        for name, compute in part.table.buffers.items():
            if name in present:
                _check_buffer(part.source, name, compute())


def _check_same(source: Source, name: str, other: str) -> None:
    info, info_of_other = source.info(name), source.info(other)
    same = info.shape == info_of_other.shape and info.dtype == info_of_other.dtype
    for rows in slabs(info.shape, 0, info.dtype.itemsize, SLAB_BYTES) if same else ():
        index = (rows, *[slice(None)] * (len(info.shape) - 1))
        one, two = source.read_slice(name, index), source.read_slice(other, index)
        same = same and one.tobytes() == two.tobytes()
    if not same:
        raise UserError(
            f"{source.directory}: {name} differs from {other}, but config.json ties them "
            "(tie_word_embeddings); set it to false there if the weights are right"
        )


def _check_buffer(source: Source, name: str, expected: np.ndarray) -> None:
    found = source.read(name)
    same = found.shape == expected.shape
    if same and np.issubdtype(expected.dtype, np.integer):
        same = np.array_equal(found, expected)
    elif same:
        # Old checkpoints hold them in half precision.
        same = np.allclose(found.astype(np.float32), expected, rtol=5e-3, atol=0)
    if not same:
        raise UserError(
            f"{source.directory}: the buffer {name} is not what config.json gives "
            f"(found {_ends(found)}, expected {_ends(expected)}); check that config.json belongs "
            "to these weights"
        )


def _cast(slab: np.ndarray, dtype: np.dtype, name: str, source: Source) -> np.ndarray:
    # Overflow is looked for below.
    with np.errstate(over="ignore"):
        cast = slab.astype(dtype, copy=False)
    if np.isfinite(cast).all():
        return cast
    file = source.info(name).file
    if np.isfinite(slab).all():
        largest = np.abs(slab).max()
        remedy = "convert with --dtype float32"
        if largest > np.finfo(np.float32).max:
            remedy = (
                "no dtype of ours holds it (the largest is float32): look at what training did to "
                "the weights, and save them in float32"
            )
        raise UserError(f"{file}: {name} holds {largest:g}, too large for {dtype.name}; {remedy}")
    raise UserError(
        f"{file}: {name} holds a value that is not finite; the weights are damaged: download or "
        "save them again"
    )


def _copy(block: np.ndarray, slab: np.ndarray, axis: int, rows: slice) -> None:
    """Writes a slab into `rows` of an axis of `block`, in parts that fit into the cache."""
    if not block.ndim:
        block[()] = slab
        return
    target = np.moveaxis(block, axis, 0)[rows]
    slab = np.moveaxis(slab, axis, 0)
    for part in slabs(slab.shape, 0, slab.itemsize, CACHED_BYTES):
        target[part] = slab[part]


def slabs(shape: Sequence[int], axis: int, itemsize: int, size: int) -> Iterator[slice]:
    """Cuts an axis into slices of about `size` bytes; a scalar is one.

    ```
    shape (10, 4), axis 0, 2 bytes each, 24 bytes a slab:  rows 0:3  3:6  6:9  9:10
    ```
    """
    length = shape[axis] if shape else 1
    step = max(1, size * length // max(1, math.prod(shape) * itemsize))
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def _replaced(bounds: list[slice], axis: int, other: slice) -> list[slice]:
    return [*bounds[:axis], other, *bounds[axis + 1 :]]


def _ends(values: np.ndarray) -> str:
    return f"{values.ravel()[0]:g} to {values.ravel()[-1]:g}, {values.size} values"
