"""The cost model against the paper's tables and against counts by hand."""

import dataclasses

import jax.numpy as jnp
import pytest

from videollm_mod_jax.models.config import (
    LINEAR_NAMES,
    LoraConfig,
    RoutingConfig,
    VideoLLMConfig,
    early_exit,
    full_computation,
    layer_skip,
)
from videollm_mod_jax.models.flops import flops, kv_cache_bytes, training_flops
from videollm_mod_jax.models.presets import decoder_preset, vision_preset

FRAMES, OTHER_TOKENS = 600, 601


def routed(insertion, keep_ratio):
    return RoutingConfig(
        insertion=insertion,
        keep_ratio=keep_ratio,
        selection="learned",
        weighting="paper",
        force_keep_last=False,
        exploration=0.0,
    )


def paper_model(routing):
    return VideoLLMConfig(
        decoder=decoder_preset("llama3-8b"),
        routing=routing,
        lora=LoraConfig(rank=128, alpha=256.0, dropout=0.05, targets=(*LINEAR_NAMES, "lm_head")),
        vision=vision_preset("siglip-l16-384"),
        newline=False,
        dtype="bfloat16",
        param_dtype="bfloat16",
    )


@pytest.mark.parametrize(
    ("routing", "tera"),
    [
        # Table 1 of arXiv 2408.16730.
        pytest.param(full_computation(), 48.29, id="full"),
        pytest.param(early_exit(2, 32), 7.14, id="early-exit-2"),
        pytest.param(layer_skip(), 26.35, id="layer-skip"),
        pytest.param(routed("interleaved", 0.2), 30.74, id="mod"),
        # Insertion strategies.
        pytest.param(routed("all", 0.2), 13.18, id="all"),
        pytest.param(routed("all-deep", 0.2), 15.37, id="all-deep"),
        pytest.param(routed(tuple(range(1, 32, 2)), 0.2), 30.74, id="explicit-interleaved"),
        pytest.param(routed("interleaved-deep", 0.2), 31.83, id="interleaved-deep"),
        # Keep ratios.
        pytest.param(routed("interleaved", 0.1), 28.54, id="keep-0.1"),
        pytest.param(routed("interleaved", 0.3), 32.92, id="keep-0.3"),
    ],
)
def test_paper_flops_column(routing, tera):
    count = flops(paper_model(routing), FRAMES, OTHER_TOKENS, labelled_tokens=FRAMES)
    assert count.paper_macs / 1e12 == pytest.approx(tera, abs=0.02)


# Layer 0 computes 5 + 3 * 4 = 17 rows, layer 1 computes 5 + 3 * 2 = 11.
SMALL = VideoLLMConfig(
    decoder=dataclasses.replace(
        decoder_preset("tiny"),
        vocab_size=11,
        hidden_size=8,
        mlp_size=12,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
    ),
    routing=routed((1,), 0.5),
    lora=LoraConfig(rank=3, alpha=1.0, dropout=0.0, targets=("k", "down", "lm_head")),
    vision=dataclasses.replace(vision_preset("digits-vit"), width=16, pool=(1, 3)),
    newline=False,
    dtype="float32",
    param_dtype="float32",
)
BASE = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 12
ADAPTERS = 3 * (8 + 4) + 3 * (12 + 8)
PAIRS = 17 * 18 // 2 + 11 * 12 // 2


def test_parts_of_a_small_model_counted_by_hand():
    count = flops(SMALL, frames=3, text_tokens=5, labelled_tokens=2)
    assert count.linears == 2 * (BASE + ADAPTERS) * (17 + 11)
    assert count.attention == 2 * (2 * 8) * PAIRS
    assert count.lm_head == 2 * (8 * 11 + 3 * 19) * 2
    assert count.connector == 2 * (16 * 8 + 8 * 8) * 12
    assert count.total == count.linears + count.attention + count.lm_head + count.connector


def test_a_training_step_of_a_small_model_counted_by_hand():
    def step(trainable, remat):
        return training_flops(SMALL, 3, 5, 2, trainable=trainable, remat=remat)

    lora = step("lora", True)
    attention = 2 * (2 * 8) * PAIRS
    # Without down, but with the first half of its adapter.
    assert lora.recomputed == 2 * (BASE + ADAPTERS - 12 * 8 - 3 * 8) * 28 + attention
    assert lora.input_gradients == (
        2 * (BASE + ADAPTERS) * 28
        + attention * 5 // 2
        + 2 * (8 * 11 + 3 * 19) * 2
        + 2 * 8 * 8 * 12  # The connector's second linear.
    )
    assert lora.weight_gradients == (2 * ADAPTERS * 28 + 2 * 3 * 19 * 2 + 2 * (16 * 8 + 8 * 8) * 12)
    parts = (lora.forward, lora.recomputed, lora.input_gradients, lora.weight_gradients)
    assert lora.total == sum(parts)

    full = step("full", False)
    assert full.recomputed == 0
    assert full.weight_gradients - lora.weight_gradients == 2 * (BASE * 28 + 8 * 11 * 2)
    assert full.input_gradients == lora.input_gradients


@pytest.mark.parametrize(
    ("frames", "text", "dense", "mod"),
    [
        (600, 0, 286.4, 170.8),
        (600, 600, 319.7, 201.9),
        (600, 1680, 381.8, 259.9),
        (1200, 3360, 902.7, 599.3),
    ],
)
def test_llama3_lora_steps_in_numbers_that_were_worked_out_before(frames, text, dense, mod):
    # Teraflops of decoder layers alone, in which routed layers recompute `down`, as they must where
    # rows are weighted behind it. Per row of a layer: 218.1 M multiply-adds, 10.5 M in adapters.
    def layers(routing):
        model = paper_model(routing)
        step = training_flops(model, frames, text, 0, trainable="lora", remat=True)
        return step.total - (2 * (1024 + 4096) + 2 * 4096 + 2 * (1024 + 4096)) * 4096 * frames * 10

    assert layers(full_computation()) / 1e12 == pytest.approx(dense, rel=0.003)
    down = 2 * 4096 * 14336 * 16 * (text + 2 * frames)
    assert (layers(routed("interleaved", 0.2)) + down) / 1e12 == pytest.approx(mod, rel=0.003)


def test_cache_bytes_per_frame_of_llama3():
    mebibyte = 2**20
    full, mod = paper_model(full_computation()), paper_model(routed("interleaved", 0.2))
    # A frame of ten vision tokens and the interval token after it.
    assert kv_cache_bytes(full, 1, 1, jnp.bfloat16) == 1.375 * mebibyte
    assert kv_cache_bytes(mod, 1, 1, jnp.bfloat16) == 0.875 * mebibyte
    assert kv_cache_bytes(mod, 1, 1, jnp.float32) == 1.75 * mebibyte
    frames = 24 * 2**30 // kv_cache_bytes(mod, 1, 1, jnp.bfloat16)
    assert frames == 28_086
