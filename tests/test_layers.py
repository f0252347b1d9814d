"""Dropout of adapters: which of a row's numbers it leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from videollm_mod_jax.models.layers import LinearWeights


def dropped(width, rate, key=0, rows=4000):
    """What dropout makes of ones: the adapter is the identity, the kernel nothing."""
    weights = LinearWeights(
        kernel=jnp.zeros((width, width)),
        bias=None,
        a=jnp.eye(width),
        b=jnp.eye(width),
        scale=1.0,
        dropout=rate,
        dtype=jnp.float32,
        out_dtype=jnp.float32,
    )
    return np.asarray(weights.apply(jnp.ones((1, rows, width)), jax.random.key(key)))[0]


@pytest.mark.parametrize("width", [1, 2, 7, 16])
@pytest.mark.parametrize("rate", [0.05, 0.5])
def test_every_number_is_dropped_with_the_same_chance(width, rate):
    out = dropped(width, rate)
    assert set(np.unique(out)) == {np.float32(0), np.float32(1 / (1 - rate))}
    spread = np.sqrt(rate * (1 - rate) / len(out))
    np.testing.assert_allclose(np.mean(out == 0, axis=0), rate, atol=5 * spread)


def test_neighbours_rows_and_keys_are_dropped_independently():
    """Two numbers share the bits of one draw: none says anything of another."""
    out = dropped(8, 0.5) == 0
    correlation = np.corrcoef(np.concatenate([out, np.roll(out, 1, axis=0)], axis=1).T)
    assert np.abs(correlation - np.eye(16)).max() < 5 / np.sqrt(len(out))
    assert 0.45 < np.mean(out == (dropped(8, 0.5, key=1) == 0)) < 0.55
