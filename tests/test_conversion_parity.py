"""Converted language models and towers compute what transformers' own classes compute."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests import parity, tiny_hf
from videollm_mod_jax.conversion import stages
from videollm_mod_jax.conversion.cases import Case
from videollm_mod_jax.conversion.verify import divergence

DECODERS = {
    "grouped queries": (tiny_hf.llama, {}),
    "no groups": (tiny_hf.llama, {"num_key_value_heads": 4, "head_dim": 12}),
    "llama 3.1, tied": (
        tiny_hf.llama,
        {"rope_parameters": tiny_hf.LLAMA3_ROPE, "tie_word_embeddings": True},
    ),
    "qwen2": (tiny_hf.qwen2, {"rope_theta": 1_000_000.0}),
    "qwen2, tied": (tiny_hf.qwen2, {"tie_word_embeddings": True}),
}
# The last id of the vocabulary is next to the one that stands for a newline.
TEXT = (*np.random.default_rng(0).integers(2, 280, size=40).tolist(), 319)


@pytest.mark.parametrize("name", DECODERS)
def test_decoder_equals_transformers(name, tmp_path):
    make, changes = DECODERS[name]
    model = make(**changes)
    ours = tiny_hf.convert(tiny_hf.save(model, tmp_path))
    inputs = {"input_ids": torch.tensor([TEXT])}
    expected = parity.reference(model).run_on(inputs, len(TEXT), parity.TOKENS)
    parity.assert_same(expected, stages.run(ours, Case(name="text", after=TEXT), parity.TOKENS))


@pytest.mark.parametrize("name", ["siglip", "clip"])
def test_tower_equals_transformers(name, tmp_path):
    model = getattr(tiny_hf, name)()
    ours = tiny_hf.convert(tiny_hf.save(model, tmp_path))
    size = model.config.image_size
    pixels = np.random.default_rng(0).normal(size=(2, size, size, 3)).astype(np.float32)
    found = stages.run_tower(ours, Case(name="tower", pixels_XCCA=pixels))
    with torch.no_grad():
        expected = model(torch.from_numpy(pixels.transpose(0, 3, 1, 2)))
    np.testing.assert_allclose(found["tower"], expected.last_hidden_state, atol=1e-5)
    np.testing.assert_allclose(found["pooled"], expected.pooler_output, atol=1e-5)


@pytest.mark.parametrize("theirs", ["float32", "bfloat16"])
def test_bfloat16_is_near(theirs, tmp_path):
    model = tiny_hf.llama()
    ours = tiny_hf.convert(tiny_hf.save(model, tmp_path), dtype="bfloat16")
    found, _ = stages.run(ours, Case(name="text", after=TEXT), 1)
    model.to(getattr(torch, theirs))
    with torch.no_grad():
        expected = model(torch.tensor([TEXT])).logits[0].float().numpy()
    assert ours.variables["params"]["embedding"].dtype == "bfloat16"
    assert 0 < divergence(expected, found["logits"]) < 1e-3
