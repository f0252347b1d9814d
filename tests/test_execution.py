"""How a model is computed changes time and memory, and neither values nor gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.models import Execution, LoraConfig, VideoLLM, init_variables

LORA = LoraConfig(rank=3, alpha=6.0, dropout=0.0, targets=("q", "v", "gate", "down", "lm_head"))
BATCH = tiny.batch(1, text=7, frames=3)


@functools.cache
def adapted(scan):
    """A routed model with adapters, and its variables."""
    config = dataclasses.replace(tiny.routed(weighting="tanh1"), lora=LORA)
    model = VideoLLM(config, Execution(scan=scan))
    return config, tiny.spread(init_variables(model, jax.random.key(0)))


def value_and_gradient(config, variables, rngs=None, **execution):
    """A scalar of the logits that no symmetry flattens, and its gradient in every variable."""
    model = VideoLLM(config, Execution(**execution))

    def loss(variables):
        logits_BJV = model.apply(variables, **BATCH, rngs=rngs or {}).logits_BJV
        return jnp.mean(jnp.sin(3 * logits_BJV))

    return jax.jit(jax.value_and_grad(loss))(variables)


def assert_same(found, expected):
    def close(a, b):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * max(1.0, np.abs(b).max()))

    jax.tree.map(close, found, expected)


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("scan", [False, True])
def test_rows_in_chunks_give_the_values_and_gradients_of_all_rows(scan, remat):
    config, variables = adapted(scan)
    S = BATCH["tokens_BS"].shape[1]
    assert S == 22, "5 rows leave a shorter last chunk, 11 divide"
    expected = value_and_gradient(config, variables, scan=scan, remat=remat)
    for rows in (5, 11):
        assert_same(
            value_and_gradient(config, variables, scan=scan, remat=remat, mlp_rows=rows), expected
        )


def test_dropout_in_chunks_draws_for_every_chunk_and_layer():
    config, variables = adapted(False)
    config = dataclasses.replace(config, lora=dataclasses.replace(LORA, dropout=0.5))

    def value(key, **execution):
        rngs = {"dropout": jax.random.key(key)}
        return value_and_gradient(config, variables, rngs, **execution)[0]

    assert value(0, mlp_rows=5) == value(0, mlp_rows=5)
    assert value(0, mlp_rows=5) != value(1, mlp_rows=5)
    # The recomputation draws what the forward pass drew.
    assert_same(
        value_and_gradient(config, variables, {"dropout": jax.random.key(0)}, mlp_rows=5),
        value_and_gradient(
            config, variables, {"dropout": jax.random.key(0)}, mlp_rows=5, remat=True
        ),
    )


def test_negative_chunks_are_refused():
    with pytest.raises(UserError, match="mlp_rows is -1; expected 0 or more"):
        Execution(mlp_rows=-1)
