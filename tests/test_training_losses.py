"""The training objective against the paper's formula, and how its sums add up."""

import jax
import numpy as np
import pytest

from videollm_mod_jax.training.losses import streaming_loss

B, J, V = 3, 7, 11
SIGMA = 0.7


def example(seed=0):
    rng = np.random.default_rng(seed)
    kinds_BJ = rng.integers(0, 3, (B, J)).astype(np.int8)
    kinds_BJ[0] = [1, 2, 2, 0, 0, 0, 0]  # unequal counts, padding at the tail
    kinds_BJ[1] = [1, 1, 1, 1, 2, 2, 2]
    logits_BJV = 3 * rng.normal(size=(B, J, V)).astype(np.float32)
    return logits_BJV, rng.integers(0, V, (B, J)).astype(np.int32), kinds_BJ


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
