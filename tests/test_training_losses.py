"""The training objective against the paper's formula, and how its sums add up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from videollm_mod_jax.models.layers import LinearWeights
from videollm_mod_jax.training import losses
from videollm_mod_jax.training.losses import judge_in_chunks, judge_logits

B, J, V = 3, 7, 11
SIGMA = 0.7


def example(seed=0):
    rng = np.random.default_rng(seed)
    kinds_BJ = rng.integers(0, 3, (B, J)).astype(np.int8)
    kinds_BJ[0] = [1, 2, 2, 0, 0, 0, 0]  # unequal counts, padding at the tail
    kinds_BJ[1] = [1, 1, 1, 1, 2, 2, 2]
    logits_BJV = 3 * rng.normal(size=(B, J, V)).astype(np.float32)
    return logits_BJV, rng.integers(0, V, (B, J)).astype(np.int32), kinds_BJ


def streaming_loss(logits_BJV, labels_BJ, kinds_BJ, sigma):
    judged = judge_logits(logits_BJV, labels_BJ)
    return losses.streaming_loss(judged, labels_BJ, kinds_BJ, sigma)


def reference(logits_BJV, labels_BJ, kinds_BJ):
    """Equation of section 3.4, label by label, in float64."""
    total, language, stream, right_language, right_stream = [], [], [], [], []
    for b in range(B):
        for j in range(J):
            z = logits_BJV[b, j].astype(np.float64)
            probability = np.exp(z) / np.exp(z).sum()
            term, right = -np.log(probability[labels_BJ[b, j]]), z.argmax() == labels_BJ[b, j]
            if kinds_BJ[b, j] == 1:
                total.append(term)
                language.append(term)
                right_language.append(right)
            elif kinds_BJ[b, j] == 2:
                total.append(SIGMA * term)
                stream.append(term)
                right_stream.append(right)
    return {
        "loss": np.mean(total),
        "language_loss": np.mean(language),
        "stream_loss": np.mean(stream),
        "language_accuracy": np.mean(right_language),
        "stream_accuracy": np.mean(right_stream),
    }


def test_equals_the_formula_with_padding():
    logits_BJV, labels_BJ, kinds_BJ = example()
    labels_BJ[1, :4] = logits_BJV[1, :4].argmax(-1)  # so that accuracies are not 0
    sums = streaming_loss(logits_BJV, labels_BJ, kinds_BJ, SIGMA)
    expected = reference(logits_BJV, labels_BJ, kinds_BJ)
    assert sums.keys() == expected.keys()
    assert expected["language_accuracy"] > 0
    for name, (total, weight) in sums.items():
        assert float(total / weight) == pytest.approx(expected[name], abs=1e-6), name


def test_padding_takes_no_part_even_when_its_logits_are_infinite():
    logits_BJV, labels_BJ, kinds_BJ = example()
    expected = streaming_loss(logits_BJV, labels_BJ, kinds_BJ, SIGMA)["loss"]
    logits_BJV[kinds_BJ == 0] = -np.inf

    def loss(logits_BJV):
        return streaming_loss(logits_BJV, labels_BJ, kinds_BJ, SIGMA)["loss"][0]

    np.testing.assert_array_equal(loss(logits_BJV), expected[0])
    gradient_BJV = jax.grad(loss)(example()[0])
    assert not gradient_BJV[kinds_BJ == 0].any()


def test_half_precision_logits_are_judged_in_float32():
    logits_BJV, labels_BJ, kinds_BJ = example()
    half_BJV = logits_BJV.astype("bfloat16")
    low = streaming_loss(half_BJV, labels_BJ, kinds_BJ, SIGMA)
    full = streaming_loss(half_BJV.astype(np.float32), labels_BJ, kinds_BJ, SIGMA)
    np.testing.assert_array_equal(low["loss"][0], full["loss"][0])


D, R = 5, 2


def head_weights(rng):
    a, b = rng.normal(size=(D, R)), rng.normal(size=(R, V))
    return LinearWeights(
        kernel=jnp.asarray(rng.normal(size=(D, V)), jnp.float32),
        bias=None,
        a=jnp.asarray(a, jnp.float32),
        b=jnp.asarray(b, jnp.float32),
        scale=2.0,
        dropout=0.0,
        dtype=jnp.float32,
        out_dtype=jnp.float32,
    )


# 11 divides none of them but 1.
@pytest.mark.parametrize("vocab_chunk", [1, 3, 4, 10, 11, 20])
def test_a_vocabulary_in_chunks_gives_the_loss_and_gradients_of_all_logits(vocab_chunk):
    rng = np.random.default_rng(2)
    head = head_weights(rng)
    hidden_BJD = rng.normal(size=(B, J, D)).astype(np.float32)
    _, labels_BJ, kinds_BJ = example()

    logits_BJV = hidden_BJD @ head.kernel + 2.0 * hidden_BJD @ head.a @ head.b
    labels_BJ[:] = np.where(rng.random((B, J)) < 0.5, np.asarray(logits_BJV).argmax(-1), labels_BJ)
    by_formula = reference(np.asarray(logits_BJV), labels_BJ, kinds_BJ)

    def loss(hidden_BJD, head, vocab_chunk):
        low_rank_BJR = head.to_rank(hidden_BJD, None)
        judged = judge_in_chunks(hidden_BJD, low_rank_BJR, head, labels_BJ, vocab_chunk)
        sums = losses.streaming_loss(judged, labels_BJ, kinds_BJ, SIGMA)
        return sums["loss"][0], sums

    run = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    (_, found), found_gradients = run(hidden_BJD, head, vocab_chunk)
    (_, expected), expected_gradients = run(hidden_BJD, head, 0)
    for name, (total, weight) in found.items():
        assert float(total / weight) == pytest.approx(by_formula[name], abs=1e-6), name
        np.testing.assert_allclose(total, expected[name][0], rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6),
        found_gradients,
        expected_gradients,
    )


@pytest.mark.parametrize("vocab_chunk", [2, 3, 4])
def test_of_equal_logits_the_lowest_token_is_greedy(vocab_chunk):
    head = head_weights(np.random.default_rng(3))
    kernel_DV = jnp.zeros((D, V)).at[:, jnp.array([1, 4, 5, 10])].set(1.0)
    head = head.replace(kernel=kernel_DV, a=None, b=None)
    labels_BJ = jnp.zeros((1, 2), jnp.int32)
    # The first position has four equal maxima, the second seven.
    hidden_BJD = jnp.stack([jnp.ones(D), -jnp.ones(D)])[None]
    judged = judge_in_chunks(hidden_BJD, None, head, labels_BJ, vocab_chunk)
    assert judged.greedy_BJ.tolist() == [[1, 0]]
    assert judge_logits(hidden_BJD @ kernel_DV, labels_BJ).greedy_BJ.tolist() == [[1, 0]]
