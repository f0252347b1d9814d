"""How a model is computed changes time and memory, and neither values nor gradients."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests import tiny, tiny_training
from tests.double import double_precision, widened
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.models import Execution, LoraConfig, VideoLLM, init_variables, row_wise
from videollm_mod_jax.models.decoder import Linears
from videollm_mod_jax.training import compiled, hlo, sharding
from videollm_mod_jax.training.optimizer import learning_rate_schedule, split_variables
from videollm_mod_jax.training.run import Run
from videollm_mod_jax.training.state import create_state
from videollm_mod_jax.training.step import make_train_step

LORA = LoraConfig(rank=3, alpha=6.0, dropout=0.0, targets=("q", "v", "gate", "down", "lm_head"))
BATCH = tiny.batch(1, text=7, frames=3)


@functools.cache
def adapted(scan, double=False):
    """A routed model with adapters, and its variables."""
    decoder = dataclasses.replace(tiny.DECODER, num_layers=2)
    config = dataclasses.replace(tiny.routed(weighting="tanh1"), lora=LORA, decoder=decoder)
    config = widened(config) if double else config
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
    """In float64, where all that is the same but for the order of its sums differs by less."""

    def close(a, b):
        assert b.dtype != np.float32
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10 * max(1.0, np.abs(b).max()))

    jax.tree.map(close, found, expected)


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("scan", [False, True])
def test_rows_in_chunks_give_the_values_and_gradients_of_all_rows(scan, remat):
    S = BATCH["tokens_BS"].shape[1]
    assert S == 22, "5 rows leave a shorter last chunk, 11 divide"
    with double_precision():
        config, variables = adapted(scan, double=True)
        how = {"scan": scan, "remat": remat}
        expected = value_and_gradient(config, variables, **how)
        for rows in (5, 11):
            found = value_and_gradient(config, variables, **how, row_chunk=rows)
            assert_same(found, expected)


def test_dropout_in_chunks_is_recomputed_as_it_was_drawn():
    config, variables = adapted(False)
    config = dataclasses.replace(config, lora=dataclasses.replace(LORA, dropout=0.5))

    # The recomputation draws what the forward pass drew: another draw is another gradient.
    stored, recomputed, other = (
        value_and_gradient(config, variables, {"dropout": jax.random.key(key)}, row_chunk=5, **how)
        for key, how in ((0, {}), (0, {"remat": True}), (1, {}))
    )
    assert distance(recomputed, stored) < 1e-4 < 0.1 < distance(other, stored)


def distance(found, expected):
    """Of two trees, relative to the length of the second."""
    gap = jax.tree.map(jnp.subtract, found, expected)
    return float(optax.global_norm(gap) / optax.global_norm(expected))


@pytest.mark.parametrize("rows_at_once", [0, 3])
def test_adapters_that_read_the_same_rows_drop_the_same_of_them(rows_at_once):
    lora = LoraConfig(rank=3, alpha=6.0, dropout=0.5, targets=("q", "k", "v"))
    linears = Linears.of_attention(dataclasses.replace(tiny.CONFIG, lora=lora))
    variables = tiny.spread(nn.meta.unbox(linears.init(jax.random.key(0))))
    for tree in (variables["params"], variables["lora"]):
        tree["v"] = tree["k"]
    x_BTD = jax.random.normal(jax.random.key(1), (1, 5, tiny.DECODER.hidden_size))

    def keys_and_values(**rngs):
        weights, keys = linears.apply(variables, rngs=rngs)
        return row_wise.in_row_chunks(
            lambda x_BTD, weights, keys: [weights[n].apply(x_BTD, keys[n]) for n in ("k", "v")],
            x_BTD,
            weights,
            keys,
            rows_at_once,
        )

    k, v = keys_and_values(dropout=jax.random.key(0))
    np.testing.assert_array_equal(k, v)
    assert np.abs(k - keys_and_values()[0]).max() > 0.1


def gradient_and_metrics(trainable, tied, **execution):
    """Of one training step: the gradient of every trained variable, and the sums."""
    config = tiny_training.model_config(2 if trainable == "lora" else 0)
    config = dataclasses.replace(
        config,
        decoder=dataclasses.replace(config.decoder, tie_embeddings=tied, num_layers=2),
        # Rows in chunks draw another dropout.
        lora=dataclasses.replace(config.lora, dropout=0.0),
    )
    config = widened(config)
    model = VideoLLM(config, Execution(scan=True, remat=True, **execution))
    descent = optax.sgd(1.0, momentum=0.9)
    schedule = learning_rate_schedule(tiny_training.OPTIMIZER, 10)
    step = make_train_step(model, descent, schedule, stream_weight=0.7, microbatches=1)
    variables = tiny.spread(tiny_training.variables(config, scan=True))
    trained, frozen = split_variables(variables, trainable)
    state = create_state(trained, descent, seed=0)
    state, sums = jax.jit(step)(state, frozen, tiny_training.batch(0))
    return state.opt_state[0].trace, sums


@pytest.mark.parametrize(("trainable", "tied"), [("lora", False), ("full", True)])
def test_a_step_in_chunks_has_the_gradient_and_metrics_of_one_without(trainable, tied):
    assert tiny_training.TOKENIZER.vocab_size == 297, "128 leave a shorter last chunk, 99 divide"
    with double_precision():
        expected = gradient_and_metrics(trainable, tied)
        for chunks in ({"vocab_chunk": 128, "row_chunk": 20}, {"vocab_chunk": 99}):
            assert_same(gradient_and_metrics(trainable, tied, **chunks), expected)


WIDE = dataclasses.replace(
    tiny_training.model_config(),
    decoder=dataclasses.replace(
        tiny.DECODER, hidden_size=32, mlp_size=1024, vocab_size=4096, num_layers=2
    ),
    lora=LoraConfig(rank=2, alpha=4.0, dropout=0.0, targets=("q", "gate", "up", "down", "lm_head")),
)


@functools.cache
def program(remat, trainable="lora", **chunks):
    """(floating point operations, temporary bytes) of a compiled step."""
    training = tiny_training.training_config(
        trainable=trainable, microbatches=1, remat=remat, **chunks
    )
    run = Run.build(training, WIDE, sharding.make_layout("replicate", (-1, 1, 1)))
    # 128 + 5 * 64 rows of the dense layer and 128 + 2 * 64 of the routed one; both are whole chunks
    # of 64.
    batch = compiled.abstract_batch(WIDE, 1, frames=64, text_tokens=128, labels=1024)
    step = run.lower(batch).compile()
    cost = hlo.cost(step.as_text())
    assert cost.unknown_loops == 0
    return cost.flops, step.memory_analysis().temp_size_in_bytes


def test_rows_in_chunks_save_memory_and_cost_nothing_where_blocks_are_recomputed():
    # With all logits at once, those would be the peak of both.
    flops, temp = program(remat=True, vocab_chunk=512)
    flops_in_chunks, temp_in_chunks = program(remat=True, vocab_chunk=512, row_chunk=64)
    assert flops_in_chunks == pytest.approx(flops, rel=0.01)
    # Of [448, 1024] floats, gate, up and their product alone are 5.5 MB.
    assert temp_in_chunks < temp - 4e6


def test_rows_in_chunks_recompute_gate_and_up_where_blocks_are_not():
    flops, temp = program(remat=False, vocab_chunk=512)
    flops_in_chunks, temp_in_chunks = program(remat=False, vocab_chunk=512, row_chunk=64)
    rows, width, mlp_size, rank = 448 + 256, 32, 1024, 2
    # And what the gradient of down's B is made of.
    again = 2 * rows * (2 * (width * mlp_size + rank * (width + mlp_size)) + mlp_size * rank)
    assert flops_in_chunks - flops == pytest.approx(again, rel=0.02)
    assert temp_in_chunks < temp - 4e6


def test_a_vocabulary_in_chunks_saves_memory_and_costs_one_more_head():
    flops, temp = program(remat=True)
    flops_in_chunks, temp_in_chunks = program(remat=True, vocab_chunk=512)
    labels, width, vocab, rank = 1024, 32, 4096, 2
    # The head with its adapter's b once more, and no gradient of its frozen kernel.
    again = 2 * labels * (width + rank) * vocab
    assert flops_in_chunks - flops == pytest.approx(again, rel=0.02)
    # [1024, 4096] float32 logits are 16.8 MB.
    assert temp_in_chunks < temp - 16e6


@pytest.mark.parametrize("field", ["row_chunk", "vocab_chunk"])
def test_negative_chunks_are_refused(field):
    with pytest.raises(UserError, match=f"{field} is -1; expected a number in "):
        Execution(**{field: -1})
