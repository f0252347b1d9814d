"""Weights of 8 bits compute what their rounded values say, in half the memory of bfloat16."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny, tiny_stream
from videollm_mod_jax.data.video import Frame
from videollm_mod_jax.models import LoraConfig, VideoLLM, init_variables, merge_lora
from videollm_mod_jax.streaming.int8 import quantize
from videollm_mod_jax.streaming.session import StreamingSession
from videollm_mod_jax.training.checkpoint import LoadedModel

LORA = LoraConfig(rank=2, alpha=4.0, dropout=0.0, targets=("q", "down", "lm_head"))


def model(**changes) -> LoadedModel:
    config = dataclasses.replace(tiny.CONFIG, **changes)
    variables = tiny.spread(init_variables(VideoLLM(config), jax.random.key(0)))
    return LoadedModel(config, variables, None, "")


def quantized(params) -> set[str]:
    names = set()

    def visit(tree, path):
        for name, value in tree.items():
            if isinstance(value, dict):
                visit(value, (*path, name))
            elif not isinstance(value, jax.Array):
                names.add("/".join((*path, name)))

    visit(params, ())
    return names


def test_a_column_is_rounded_as_drawn():
    params = {"lm_head": {"kernel": jnp.array([[0.5], [-1.0], [0.25]])}}
    bare = dataclasses.replace(model(), variables={"params": params})
    kernel = quantize(bare).variables["params"]["lm_head"]["kernel"]
    assert kernel.qvalue.dtype == jnp.int8
    assert kernel.qvalue.ravel().tolist() == [64, -127, 32]
    np.testing.assert_allclose(kernel.scale, [[1 / 127.5]], rtol=1e-6)


@pytest.mark.parametrize("lora", [False, True])
def test_computes_what_its_stored_kernels_say_and_these_are_half_a_step_off_at_most(lora):
    given = model(**({"lora": LORA} if lora else {}))
    small = quantize(given)
    plain = merge_lora(given.variables, LORA) if lora else given.variables
    assert len(quantized(small.variables["params"])) == 7 * tiny.DECODER.num_layers + 1

    def worth(stored, kernel):
        if isinstance(stored, jax.Array):
            return stored
        scale = np.asarray(stored.scale, np.float64)
        value = np.asarray(stored.qvalue, np.float64) * scale
        np.testing.assert_allclose(scale[0], np.abs(kernel).max(axis=0) / 127.5, rtol=1e-6)
        assert (np.abs(value - np.asarray(kernel, np.float64)) <= 0.5001 * scale).all()
        return jnp.asarray(value, jnp.float32)

    params = jax.tree.map(
        worth,
        small.variables["params"],
        plain["params"],
        is_leaf=lambda leaf: not isinstance(leaf, dict),
    )
    batch = tiny.batch(0, text=6, frames=3)
    apply = jax.jit(VideoLLM(small.config).apply)
    np.testing.assert_allclose(
        apply(small.variables, **batch).logits_BJV,
        apply({"params": params}, **batch).logits_BJV,
        atol=2e-5,
        rtol=1e-5,
    )


def test_only_large_kernels_of_the_decoder_shrink_and_the_model_given_stays():
    given = model()
    before = jax.tree.map(np.asarray, given.variables)
    params = quantize(given).variables["params"]
    kernels = quantized(params)
    assert all(name.startswith(("decoder/layer_", "lm_head/")) for name in kernels)
    assert not any("router" in name or "norm" in name for name in kernels)
    kernel, found = given.variables["params"]["lm_head"]["kernel"], params["lm_head"]["kernel"]
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(found)) == kernel.size + 4 * kernel.shape[1]
    jax.tree.map(np.testing.assert_array_equal, before, given.variables)


def test_a_tied_head_stays_the_embedding():
    decoder = dataclasses.replace(tiny.DECODER, tie_embeddings=True)
    small = quantize(model(decoder=decoder))
    assert isinstance(small.variables["params"]["embedding"], jax.Array)
    batch = tiny.batch(0, text=6, frames=3)
    assert VideoLLM(small.config).apply(small.variables, **batch).logits_BJV.shape[-1] == 48


def test_narrates_a_clip():
    small = quantize(tiny_stream.loaded_model(silence=0.2))
    session = StreamingSession(small, max_frames=8, max_text_tokens=512, max_new_tokens=6)
    rng = np.random.default_rng(0)
    for i in range(4):
        session.see(Frame(i / 2, rng.integers(0, 256, (16, 16, 3), np.uint8)))
    assert session.ask(tiny_stream.QUESTION) is not None
