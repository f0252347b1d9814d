"""Rows a few at a time are the rows all at once, and so are all gradients that are asked for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from videollm_mod_jax.models.row_loop import Chunks, row_loop

B, T, D = 2, 7, 4
ROWS = {
    "x": jax.random.normal(jax.random.key(0), (B, T, D)),
    "position": jnp.broadcast_to(jnp.arange(T), (B, T)),
    "gate": jax.random.normal(jax.random.key(1), (B, T)),
}
WEIGHTS = {name: jax.random.normal(jax.random.key(i), (D, D)) for i, name in enumerate("ab")}


def function(rows, weights, keys):
    """Two arrays of rows: one as large as x, one with heads; integers and gates take part."""
    del keys
    hidden = jnp.tanh(rows["x"] @ weights["a"]) * rows["gate"][..., None]
    turned = jnp.sin(rows["position"])[..., None, None] * (hidden @ weights["b"]).reshape(
        *hidden.shape[:2], 2, D // 2
    )
    return hidden + rows["x"], turned


def value_and_gradients(call, wanted):
    """A scalar that no symmetry flattens, and its gradients in the `wanted` arguments."""

    def loss(chosen):
        rows, weights = ({**given, **chosen} for given in (ROWS, WEIGHTS))
        first, second = call(
            {name: rows[name] for name in ROWS}, {name: weights[name] for name in WEIGHTS}
        )
        return jnp.sum(jnp.sin(first)) + jnp.sum(jnp.cos(2 * second))

    return jax.jit(jax.value_and_grad(loss))({n: (ROWS | WEIGHTS)[n] for n in wanted})


@pytest.mark.parametrize("wanted", [("x", "gate", "a", "b"), ("b",), ("x",), ("gate", "a")])
@pytest.mark.parametrize("rows_at_once", [1, 3, 4, 7])
def test_the_loop_gives_values_and_gradients_of_all_rows_at_once(rows_at_once, wanted):
    found = value_and_gradients(
        lambda rows, weights: row_loop(function, rows, weights, {}, rows_at_once), wanted
    )
    expected = value_and_gradients(lambda rows, weights: function(rows, weights, {}), wanted)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected
    )


def test_chunks_cover_all_rows_and_the_first_repeats_what_the_last_has():
    chunks = Chunks.of(7, 3)
    rows = jnp.arange(7)[None]
    assert (chunks.count, chunks.size, chunks.repeated) == (3, 3, 2)
    assert [chunks.cut(rows, jnp.int32(c))[0].tolist() for c in range(3)] == [
        [4, 5, 6],
        [0, 1, 2],
        [3, 4, 5],
    ]
    assert [chunks.is_new(jnp.int32(c), 2)[0].tolist() for c in range(2)] == [
        [False, False, True],
        [True, True, True],
    ]
    assert Chunks.of(8, 4).repeated == 0
    assert Chunks.of(5, 4).size == 3


def test_every_chunk_draws_its_own_dropout():
    def drop(rows, weights, keys):
        return rows * jax.random.bernoulli(keys["q"], 0.5, rows.shape)

    dropped = row_loop(drop, jnp.ones((1, 64, 8)), (), {"q": jax.random.key(0)}, 32)
    assert 0.3 < dropped.mean() < 0.7
    assert np.abs(dropped[:, :32] - dropped[:, 32:]).max() == 1


def test_gradients_that_nobody_wants_are_not_computed():
    def loss(b):
        first, second = row_loop(function, ROWS, {**WEIGHTS, "b": b}, {}, 3)
        return jnp.sum(first) + jnp.sum(second)

    text = str(jax.make_jaxpr(jax.grad(loss))(WEIGHTS["b"]))
    # x @ a and hidden @ b going forward and recomputed, and the one gradient.
    assert text.count("dot_general[") <= 2 + 2 + 1


def test_memory_of_a_chunk_is_all_that_the_loop_adds():
    rows, width, inner = 4096, 64, 2048

    def wide(x, weights, keys):
        return jnp.tanh(x @ weights[0]) @ weights[1]

    def temporaries(rows_at_once):
        def loss(weights, x):
            return jnp.sum(row_loop(wide, x, weights, {}, rows_at_once) ** 2)

        weights = [jnp.zeros((width, inner)), jnp.zeros((inner, width))]
        x = jnp.zeros((1, rows, width))
        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(weights, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # [4096, 2048] floats are 33.6 MB; the results, whose gradients become those of x, are 1 MB.
    assert temporaries(rows) > 33e6
    assert temporaries(256) < 4 * 256 * inner * 4 + 4 * rows * width * 4
