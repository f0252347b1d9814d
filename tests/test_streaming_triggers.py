"""The threshold rule decides as its drawn example says."""

import jax.numpy as jnp
import numpy as np
import pytest

from videollm_mod_jax.errors import UserError
from videollm_mod_jax.streaming.triggers import breaks_silence, check_threshold

INTERVAL = 1


@pytest.mark.parametrize(
    ("interval", "other", "threshold", "answers"),
    [
        (0.9, 0.1, 0.725, False),
        (0.6, 0.4, 0.725, True),
        (0.6, 0.4, None, False),
        (0.3, 0.7, None, True),
        (0.3, 0.7, 0.0, True),
    ],
)
def test_drawn_example(interval, other, threshold, answers):
    # The other mass sits on one token; logits carry an offset that softmax must remove.
    logits = jnp.log(jnp.array([other, interval, 1e-9])) + 5.0
    assert bool(breaks_silence(logits, INTERVAL, threshold)) is answers


def test_a_threshold_never_silences():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(200, 7)) * 3, jnp.float32)
    plain = np.asarray(breaks_silence(logits, INTERVAL, None))
    with_threshold = np.asarray(breaks_silence(logits, INTERVAL, 0.725))
    assert with_threshold[plain].all()
    assert with_threshold.sum() > plain.sum()
    assert np.asarray(breaks_silence(logits, INTERVAL, 1.0)).all()
    np.testing.assert_array_equal(breaks_silence(logits, INTERVAL, 0.0), plain)


@pytest.mark.parametrize("threshold", [-0.1, 1.5, float("nan")])
def test_a_threshold_is_a_probability(threshold):
    with pytest.raises(UserError, match="silence_threshold"):
        check_threshold(threshold)
