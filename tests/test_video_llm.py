"""The whole model and its parts: what text, newlines and frames embed as, and what parts lack."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny import CONFIG, VISION, batch
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.models import VideoLLM, full_computation, init_variables

PATCHES = dataclasses.replace(
    VISION, summary="none", pooling_head=False, final_norm=False, pool=(4, 4)
)
V = CONFIG.decoder.vocab_size
NO_FRAMES = jnp.zeros((1, 0), jnp.int32)


def made(**changes):
    config = dataclasses.replace(CONFIG, routing=full_computation(), **changes)
    model = VideoLLM(config)
    return model, init_variables(model, jax.random.key(0))


def test_a_newline_embeds_as_its_own_vector_and_text_as_without_it():
    model, variables = made(vision=PATCHES, newline=True)
    tokens = jnp.array([[0, V, V - 1, V]])
    found = model.apply(variables, tokens, None, NO_FRAMES, method="embed")[0]
    params = variables["params"]
    expected = [params["embedding"][0], params["newline"], params["embedding"][V - 1]]
    np.testing.assert_array_equal(found, np.stack([*expected, params["newline"]]))


def test_bilinear_pooling_averages_squares_behind_the_connector():
    pooled = dataclasses.replace(PATCHES, pool=(2, 2), pooling="bilinear")
    model, variables = made(vision=pooled)
    images = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))
    features = model.apply(variables, images, method="encode")
    assert features.shape == (2, 16, VISION.width)
    embeddings = model.apply(variables, images, method="embed_patches")
    squares = embeddings.reshape(2, 2, 2, 2, 2, -1).mean(axis=(2, 4)).reshape(2, 4, -1)
    found = model.apply(variables, features[None], method="connect")[0]
    np.testing.assert_allclose(found, squares, atol=1e-6)
    # Not the same as pooling in front: the connector is not linear.
    front, _ = made(vision=dataclasses.replace(pooled, pooling="average"))
    before = front.apply(variables, images, method="encode")
    other = front.apply(variables, before[None], method="connect")[0]
    assert np.abs(other - squares).max() > 1e-3


def test_embed_patches_are_the_frame_tokens_of_a_model_that_pools_nothing():
    model, variables = made(vision=PATCHES)
    images = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))
    features = model.apply(variables, images, method="encode")
    np.testing.assert_allclose(
        model.apply(variables, images, method="embed_patches"),
        model.apply(variables, features[None], method="connect")[0],
        atol=1e-6,
    )


def test_a_language_model_alone_answers_text_as_the_whole_does():
    whole, variables = made()
    alone, own = made(vision=None)
    assert set(own["params"]) == {"embedding", "decoder", "lm_head"}
    text = batch(0, text=7, frames=0)
    expected = whole.apply(variables, **text).logits_BJV
    kept = {"params": {name: variables["params"][name] for name in own["params"]}}
    text["features_BFNW"] = None
    np.testing.assert_array_equal(alone.apply(kept, **text).logits_BJV, expected)
    with pytest.raises(UserError, match="has no vision: it is a part"):
        alone.config.require("decoder", "vision")


def test_a_tower_alone_sees_what_the_whole_sees():
    whole, variables = made()
    alone, own = made(decoder=None)
    assert set(own["params"]) == {"vision"}
    images = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))
    kept = {"params": {"vision": variables["params"]["vision"]}}
    found = alone.apply(kept, images, method="encode")
    np.testing.assert_array_equal(found, whole.apply(variables, images, method="encode"))
    with pytest.raises(UserError, match="has no decoder: it is a part"):
        alone.config.require("decoder")
    with pytest.raises(UserError, match="neither a decoder nor a vision tower"):
        made(decoder=None, vision=None)
