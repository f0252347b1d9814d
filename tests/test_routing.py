"""Routing arithmetic against brute force."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import tiny
from videollm_mod_jax.models import routing

select = jax.jit(routing.select_tokens, static_argnums=1)


def test_vision_rows_drawn_example():
    assert routing.vision_rows(jnp.array([[1, 5]]), 3).tolist() == [[1, 2, 3, 5, 6, 7]]


def test_select_tokens_drawn_examples():
    scores = jnp.array([[[0.1, 0.9, 0.3, 0.9], [0.5, 0.5, 0.5, 0.5]]])
    assert routing.select_tokens(scores, 2).tolist() == [[[1, 3], [0, 1]]]


@settings(deadline=None, max_examples=40)
@given(st.data(), st.integers(0, 6))
def test_select_tokens_equals_a_stable_sort(data, keep):
    values = st.sampled_from([-1.0, 0.0, 0.25, 2.0, float("inf")])
    scores = np.array(data.draw(st.lists(values, min_size=6, max_size=6)), np.float32)
    best = np.argsort(-scores, kind="stable")[:keep]
    assert select(scores[None, None], keep)[0, 0].tolist() == sorted(best.tolist())


def test_compact_rows_drawn_example():
    starts, offsets = jnp.array([[1, 5]]), jnp.array([[[2], [0]]])
    rows, is_vision = routing.compact_rows(starts, offsets, 8, 3)
    assert rows.tolist() == [[0, 3, 4, 5]]
    assert is_vision.tolist() == [[False, True, False, True]]


def test_explored_scores_drawn_example():
    scores = jnp.array([[[0.1, 0.9, 0.3], [0.2, 0.8, 0.4]]])
    draws = [routing.explored_scores(scores, 0.5, jax.random.key(i))[0] for i in range(20)]
    changed = [np.any(explored != scores[0], axis=-1).tolist() for explored in draws]
    explored = draws[changed.index([False, True])]
    np.testing.assert_array_equal(explored[0], scores[0, 0])
    assert np.all((explored[1] >= 0) & (explored[1] < 1) & (explored[1] != scores[0, 1]))


def test_exploring_frames_keep_every_token_alike_and_the_others_what_the_router_likes():
    N, keep, share, frames = 5, 2, 0.25, 4000
    scores = jnp.broadcast_to(-jnp.arange(N, dtype=jnp.float32), (1, frames, N))
    explored = routing.explored_scores(scores, share, jax.random.key(0))
    explores = np.any(explored != scores, axis=-1)[0]
    assert np.mean(explores) == pytest.approx(share, abs=0.03)
    kept = np.asarray(select(explored, keep))[0]
    np.testing.assert_array_equal(kept[~explores], np.broadcast_to([0, 1], (sum(~explores), 2)))
    counts = np.bincount(kept[explores].ravel(), minlength=N) / sum(explores)
    np.testing.assert_allclose(counts, keep / N, atol=0.06)


def test_no_share_explores_nothing_and_all_of_it_everything():
    scores = jax.random.normal(jax.random.key(1), (2, 3, 4))
    np.testing.assert_array_equal(routing.explored_scores(scores, 0.0, jax.random.key(0)), scores)
    assert np.all(routing.explored_scores(scores, 1.0, jax.random.key(0)) != scores)


@pytest.mark.parametrize("keep", [0, 1, 2, 4])
@pytest.mark.parametrize("seed", range(5))
def test_compact_rows_are_text_and_kept_tokens_in_order(keep, seed):
    rng = np.random.default_rng(seed)
    N, F, text = 4, 5, 7
    S, starts = tiny.layout(rng, text, F, N)
    offsets = np.stack([np.sort(rng.permutation(N)[:keep]) for _ in range(F)]).astype(np.int32)
    kept = {starts[f] + o for f in range(F) for o in offsets[f]}
    vision = {starts[f] + n for f in range(F) for n in range(N)}
    expected = [s for s in range(S) if s in kept or s not in vision]
    rows, is_vision = routing.compact_rows(starts[None], offsets[None], S, N)
    assert rows[0].tolist() == expected
    assert is_vision[0].tolist() == [s in vision for s in expected]


def test_uniform_selection_is_evenly_spaced():
    scores = routing.selection_scores("uniform", jnp.zeros((1, 1, 10)), None, 0, 2, False)
    assert routing.select_tokens(scores, 2).tolist() == [[[0, 5]]]
    forced = routing.selection_scores("uniform", jnp.zeros((1, 1, 10)), None, 0, 2, True)
    assert routing.select_tokens(forced, 2).tolist() == [[[0, 9]]]


def test_random_selection_depends_on_frame_and_layer_and_on_nothing_else():
    def draw(positions, layer):
        positions = jnp.asarray(positions)
        noise = jnp.asarray(np.random.default_rng(0).normal(size=(*positions.shape, 10)))
        scores = routing.selection_scores("random", noise, positions, layer, 2, False)
        return np.asarray(routing.select_tokens(scores, 2))

    many = draw([np.arange(200), np.arange(200)], 3)
    np.testing.assert_array_equal(many[0], many[1])
    np.testing.assert_array_equal(draw([[17]], 3)[0, 0], many[0, 17])
    assert (many[0] != draw([np.arange(200)], 4)[0]).any()
    share = np.bincount(many[0].ravel(), minlength=10) / 400
    np.testing.assert_allclose(share, 0.1, atol=0.05)


def test_force_keep_last_always_keeps_the_last_token():
    scores = jnp.asarray(np.random.default_rng(0).normal(size=(1, 50, 10)))
    ranked = routing.selection_scores("learned", scores, None, 0, 2, True)
    assert (np.asarray(routing.select_tokens(ranked, 2))[..., -1] == 9).all()


def test_frame_means_drawn_example():
    scores = jnp.array([[[1.0, 3.0], [4.0, 6.0]]])
    means = routing.frame_means(scores, jnp.array([[1, 2, 4, 5]]), 7)
    np.testing.assert_array_equal(means, [[0, 2, 2, 0, 5, 5, 0]])


def test_token_gates_drawn_example():
    score, is_vision = jnp.full((1, 2), 0.5), jnp.array([[True, False]])
    expected = {"paper": 0.5, "official": 0.62, "tanh1": 1.09, "relative": 0.62, "none": 1}
    for weighting, gate in expected.items():
        gates = routing.token_gates(weighting, score, is_vision)
        np.testing.assert_allclose(gates, [[gate, 1]], atol=0.005)
