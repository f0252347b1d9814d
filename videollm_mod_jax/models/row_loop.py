"""A loop over chunks of rows, recomputed in the backward pass, that keeps no copies of all rows.

`jax.lax.map` would do, were it not for memory: it wants rows that divide and chunks in front, and
holds results, gradients and the zeros that they start from side by side.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

Keys = Mapping[str, jax.Array | None]
"""Of the dropout of adapters, by the name of the linear; None where nothing is dropped."""

RowFunction = Callable[[Any, Any, Keys], Any]
"""(rows, weights, keys) -> rows, each from that of the arguments alone; rows are trees of arrays
[B, T, ...], weights a tree of arrays without rows."""

_Leaves = Sequence[jax.Array]
_Call = Callable[[_Leaves, _Leaves, Keys], _Leaves]


def row_loop(function: RowFunction, rows: Any, weights: Any, keys: Keys, rows_at_once: int) -> Any:
    """`function` of at most `rows_at_once` rows at a time, each with dropout of its own.

    ```
    T = 7, rows_at_once = 3        0 1 2 | 3 4 5 | (4 5) 6
                                   2nd     3rd     1st: 4 and 5 are overwritten by the 3rd
    ```

    The rows' gradients take the place of those of the results, where they are as large.

    Args:
      function: see `RowFunction`.
      rows, weights, keys: its arguments, T rows.
      rows_at_once: 1 to T; chunks are as equal as they can be.

    Returns:
      A tree of arrays [B, T, ...].
    """
    row_leaves, row_tree = jax.tree.flatten(rows)
    weight_leaves, weight_tree = jax.tree.flatten(weights)
    out_tree = jax.tree.structure(jax.eval_shape(function, rows, weights, keys))

    def call(rows: _Leaves, weights: _Leaves, keys: Keys) -> _Leaves:
        return jax.tree.leaves(
            function(row_tree.unflatten(rows), weight_tree.unflatten(weights), keys)
        )

    chunks = Chunks.of(row_leaves[0].shape[1], rows_at_once)
    return out_tree.unflatten(_loop(call, chunks, row_leaves, weight_leaves, keys))


@flax.struct.dataclass
class Chunks:
    """`count` chunks of `size` rows, of which the first repeats `repeated` rows of the last."""

    count: int = flax.struct.field(pytree_node=False)
    size: int = flax.struct.field(pytree_node=False)
    repeated: int = flax.struct.field(pytree_node=False)

    @classmethod
    def of(cls, T: int, rows_at_once: int) -> "Chunks":
        """Of T rows: (7, 3) -> 3 chunks of 3, of which the first repeats 2."""
        count = -(-T // rows_at_once)
        size = -(-T // count)
        return cls(count, size, count * size - T)

    def start(self, c: jax.Array) -> jax.Array:
        """First row of chunk `c`."""
        return jnp.where(
            c == 0, self.count * self.size - self.repeated - self.size, (c - 1) * self.size
        )

    def is_new(self, c: jax.Array, ndim: int) -> jax.Array:
        """Which rows of chunk `c` no later one repeats: bool [1, size, 1, ...]."""
        row = jnp.arange(self.size).reshape(1, -1, *[1] * (ndim - 2))
        return (c > 0) | (row >= self.repeated)

    def cut(self, x_BT: jax.Array, c: jax.Array) -> jax.Array:
        """The rows of chunk `c`."""
        return jax.lax.dynamic_slice_in_dim(x_BT, self.start(c), self.size, axis=1)

    def put(self, x_BT: jax.Array, c: jax.Array, part: jax.Array) -> jax.Array:
        """`x_BT` with the rows of chunk `c` replaced."""
        return jax.lax.dynamic_update_slice_in_dim(x_BT, part, self.start(c), axis=1)


@flax.struct.dataclass
class _Saved:
    """Arguments of the loop, and which of them want gradients."""

    rows: _Leaves
    weights: _Leaves
    keys: Keys
    wanted_rows: tuple[bool, ...] = flax.struct.field(pytree_node=False)
    wanted_weights: tuple[bool, ...] = flax.struct.field(pytree_node=False)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _loop(call: _Call, chunks: Chunks, rows: _Leaves, weights: _Leaves, keys: Keys) -> _Leaves:
    def step(c: jax.Array, outs: _Leaves) -> _Leaves:
        found = call([chunks.cut(x, c) for x in rows], weights, _fold(keys, c))
        return [chunks.put(out, c, part) for out, part in zip(outs, found, strict=True)]

    shapes = jax.eval_shape(call, rows, weights, keys)
    outs = [_unwritten(shape.shape, shape.dtype, rows[0]) for shape in shapes]
    return jax.lax.fori_loop(0, chunks.count, step, outs)


def _forward(
    call: _Call, chunks: Chunks, rows: Any, weights: Any, keys: Any
) -> tuple[_Leaves, _Saved]:
    def values(primals: Any) -> Any:
        return jax.tree.map(lambda primal: primal.value, primals, is_leaf=_is_primal)

    saved = _Saved(
        rows=values(rows),
        weights=values(weights),
        keys=values(keys),
        wanted_rows=tuple(primal.perturbed for primal in rows),
        wanted_weights=tuple(primal.perturbed for primal in weights),
    )
    return _loop(call, chunks, saved.rows, saved.weights, saved.keys), saved


def _is_primal(x: Any) -> bool:
    return hasattr(x, "perturbed")


def _backward(
    call: _Call, chunks: Chunks, saved: _Saved, d_outs: _Leaves
) -> tuple[_Leaves, _Leaves, None]:
    d_outs = [jnp.zeros(d.shape, d.dtype) if isinstance(d, SymbolicZero) else d for d in d_outs]
    wanted_rows = [x for x, wanted in zip(saved.rows, saved.wanted_rows, strict=True) if wanted]
    wanted_weights = [
        x for x, wanted in zip(saved.weights, saved.wanted_weights, strict=True) if wanted
    ]
    # By gradient of rows: the gradient of results whose place it takes, if any.
    places = _places(wanted_rows, d_outs)
    buffers = [
        _unwritten(x.shape, x.dtype, d_outs[0])
        for x, place in zip(wanted_rows, places, strict=True)
        if place is None
    ]

    def step(c: jax.Array, carry: tuple[_Leaves, _Leaves, _Leaves]):
        d_outs, buffers, sums = carry
        parts = [chunks.cut(x, c) for x in saved.rows]
        keys = _fold(saved.keys, c)

        def of_wanted(rows: _Leaves, weights: _Leaves) -> _Leaves:
            return call(
                _merge(parts, saved.wanted_rows, rows),
                _merge(saved.weights, saved.wanted_weights, weights),
                keys,
            )

        given = [chunks.cut(d_out, c) for d_out in d_outs]
        _, pull = jax.vjp(of_wanted, _choose(parts, saved.wanted_rows), wanted_weights)
        d_rows, d_weights = pull([jnp.where(chunks.is_new(c, d.ndim), d, 0) for d in given])

        d_outs, buffers, fresh = list(d_outs), list(buffers), iter(range(len(buffers)))
        for d_row, place in zip(d_rows, places, strict=True):
            if place is None:
                buffer = next(fresh)
                buffers[buffer] = chunks.put(buffers[buffer], c, d_row)
            else:
                # What a later chunk has yet to read stays.
                part = given[place]
                part = jnp.where(chunks.is_new(c, part.ndim), d_row.reshape(part.shape), part)
                d_outs[place] = chunks.put(d_outs[place], c, part)
        sums = [total + d.astype(jnp.float32) for total, d in zip(sums, d_weights, strict=True)]
        return d_outs, buffers, sums

    sums = [_zeros(x) for x in wanted_weights]
    d_outs, buffers, sums = jax.lax.fori_loop(0, chunks.count, step, (d_outs, buffers, sums))
    fresh = iter(buffers)
    d_rows = [
        next(fresh) if place is None else d_outs[place].reshape(x.shape)
        for x, place in zip(wanted_rows, places, strict=True)
    ]
    d_weights = [d.astype(x.dtype) for d, x in zip(sums, wanted_weights, strict=True)]
    nothing = [None] * len(saved.rows), [None] * len(saved.weights)
    return (
        _merge(nothing[0], saved.wanted_rows, d_rows),
        _merge(nothing[1], saved.wanted_weights, d_weights),
        None,
    )


_loop.defvjp(_forward, _backward, symbolic_zeros=True)


def _choose(leaves: Sequence[Any], wanted: Sequence[bool]) -> list[Any]:
    return [leaf for leaf, is_wanted in zip(leaves, wanted, strict=True) if is_wanted]


def _merge(leaves: Sequence[Any], wanted: Sequence[bool], chosen: Sequence[Any]) -> list[Any]:
    """`leaves` with the wanted ones replaced, in order."""
    left = iter(chosen)
    return [
        next(left) if is_wanted else leaf for leaf, is_wanted in zip(leaves, wanted, strict=True)
    ]


def _places(rows: _Leaves, d_outs: _Leaves) -> list[int | None]:
    """For each array of rows, an array of `d_outs` of the same bytes, each of those once."""
    places: list[int | None] = []
    for x in rows:
        fits = (
            i
            for i, d_out in enumerate(d_outs)
            if i not in places and (d_out.dtype, d_out.size) == (x.dtype, x.size)
        )
        places.append(next(fits, None))
    return places


def _fold(keys: Keys, c: jax.Array) -> Keys:
    return jax.tree.map(lambda key: jax.random.fold_in(key, c), keys)


def _unwritten(shape: Sequence[int], dtype: Any, like: jax.Array) -> jax.Array:
    """An array that will be overwritten as a whole.

    Its number comes out of `like`, so that XLA does not make it before that is there.
    """
    return jnp.full(shape, like[(0,) * like.ndim].astype(dtype), dtype)


def _zeros(x: jax.Array) -> jax.Array:
    """float32 zeros as large as `x`, which vary over the devices that `x` varies over."""
    return jnp.where(x > 0, jnp.float32(0), jnp.float32(0))
