"""The vision tower against PyTorch's SigLIP and CLIP, and frame tokens against hand-made ones."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from videollm_mod_jax.errors import UserError
from videollm_mod_jax.models.config import VisionConfig
from videollm_mod_jax.models.vision import (
    VisionOutput,
    VisionTower,
    frame_tokens,
    interpolation_matrix,
    pooling_matrix,
    preprocess,
)

SIGLIP = VisionConfig(
    architecture="siglip",
    image_size=34,  # two pixels more than four patches
    patch_size=8,
    width=16,
    mlp_width=40,
    num_layers=3,
    unused_blocks=0,
    num_heads=2,
    norm_eps=1e-6,
    activation="gelu_tanh",
    final_norm=True,
    pooling_head=True,
    summary="attention_pool",
    pool=(3, 3),
    pooling="average",
    mean=(0.5, 0.4, 0.3),
    std=(0.5, 0.6, 0.7),
)
CLIP = dataclasses.replace(
    SIGLIP,
    architecture="clip",
    norm_eps=1e-5,
    activation="quick_gelu",
    final_norm=False,
    pooling_head=False,
    summary="class_token",
    pool=(2, 2),
)


def tower(config):
    return VisionTower(config, dtype=jnp.float32, param_dtype=jnp.float32)


def test_pooling_matrix_is_the_drawn_one():
    left, right = [1, 1, 0, 1, 1, 0, 1, 1, 0], [0, 1, 1, 0, 1, 1, 0, 1, 1]
    np.testing.assert_allclose(pooling_matrix(3, (1, 2)), np.array([left, right]) / 6)


@pytest.mark.parametrize(("side", "pool"), [(6, (3, 3)), (7, (3, 2)), (27, (3, 3)), (4, (4, 1))])
def test_pooling_matrix_averages_bins_as_defined(side, pool):
    grid = np.random.default_rng(0).normal(size=(side, side))
    expected = [
        grid[
            int(np.floor(i * side / pool[0])) : int(np.ceil((i + 1) * side / pool[0])),
            int(np.floor(j * side / pool[1])) : int(np.ceil((j + 1) * side / pool[1])),
        ].mean()
        for i in range(pool[0])
        for j in range(pool[1])
    ]
    np.testing.assert_allclose(pooling_matrix(side, pool) @ grid.ravel(), expected, rtol=1e-5)


def test_interpolation_matrix_is_the_drawn_one():
    left, right = [0, 0, 0, 3, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 3, 0, 0, 0]
    np.testing.assert_allclose(interpolation_matrix(3, (1, 2)), np.array([left, right]) / 4)


def test_frame_tokens_put_the_summary_first_and_skip_the_class_token_when_pooling():
    patches = jnp.arange(16.0).reshape(1, 16, 1)
    summary, pooled = jnp.full((1, 1, 1), 100.0), jnp.full((1, 1), 200.0)
    quarters = [2.5, 4.5, 10.5, 12.5]
    clip = VisionOutput(jnp.concatenate([summary, patches], axis=1), pooled)
    assert frame_tokens(clip, CLIP)[0, :, 0].tolist() == [100.0, *quarters]
    siglip = dataclasses.replace(SIGLIP, pool=(2, 2))
    assert frame_tokens(VisionOutput(patches, pooled), siglip)[0, :, 0].tolist() == [
        200.0,
        *quarters,
    ]
    alone = dataclasses.replace(SIGLIP, pool=(0, 0))
    assert frame_tokens(VisionOutput(patches, pooled), alone)[0, :, 0].tolist() == [200.0]


def test_preprocess_normalises_and_resizes_as_pillow_does():
    rng = np.random.default_rng(0)
    frames = rng.integers(64, 192, (2, 34, 34, 3), np.uint8)
    expected = (frames / 255 - np.array(SIGLIP.mean)) / np.array(SIGLIP.std)
    np.testing.assert_allclose(preprocess(frames, SIGLIP), expected, atol=1e-5)
    large = np.asarray(Image.fromarray(frames[0]).resize((80, 80), Image.Resampling.BILINEAR))
    pillow = Image.fromarray(large).resize((34, 34), Image.Resampling.BICUBIC)
    ours = np.array(preprocess(large[None], SIGLIP)[0]) * SIGLIP.std + SIGLIP.mean
    # Pillow rounds to whole grey levels after each of its two passes.
    np.testing.assert_allclose(ours * 255, np.asarray(pillow, np.float32), atol=1.0)


@pytest.mark.parametrize(
    ("images", "complaint"),
    [
        (np.zeros((1, 34, 34, 3), np.float32), "expected uint8"),
        (np.zeros((34, 34, 3), np.uint8), "expected uint8"),
        (np.zeros((1, 20, 34, 3), np.uint8), "34x20 pixels"),
    ],
)
def test_preprocess_refuses_what_it_would_misread(images, complaint):
    with pytest.raises(UserError, match=complaint):
        preprocess(images, SIGLIP)


@pytest.mark.parametrize("config", [SIGLIP, CLIP], ids=["siglip", "clip"])
def test_images_of_a_batch_do_not_mix(config):
    images = jax.random.normal(jax.random.key(1), (3, 34, 34, 3))
    key = jax.random.key(0, impl="rbg")  # compiles faster
    variables = jax.jit(tower(config).init)(key, images)

    @jax.jit
    def encode(images):
        return tower(config).apply(variables, images)

    together, alone = encode(images), encode(images[1:2])
    assert together.shape == (3, config.tokens_per_frame, config.width)
    np.testing.assert_allclose(together[1:2], alone, atol=1e-5)


# PyTorch parity. The table maps our parameter to the torch one and how its axes move.
_LINEARS = {"kernel": ("weight", (1, 0)), "bias": ("bias", (0,))}
_NORM = {"scale": ("weight", (0,)), "bias": ("bias", (0,))}


def _take(state, rows):
    return {ours: np.transpose(state[torch_name], axes) for ours, (torch_name, axes) in rows}


def _rows(prefix, leaves):
    return [(ours, (f"{prefix}.{name}", axes)) for ours, (name, axes) in leaves.items()]


def _block(state, prefix):
    attention = {
        ours: _take(state, _rows(f"{prefix}.self_attn.{theirs}_proj", _LINEARS))
        for ours, theirs in [("q", "q"), ("k", "k"), ("v", "v"), ("o", "out")]
    }
    mlp = {n: _take(state, _rows(f"{prefix}.mlp.{n}", _LINEARS)) for n in ("fc1", "fc2")}
    norms = {f"norm{i}": _take(state, _rows(f"{prefix}.layer_norm{i}", _NORM)) for i in (1, 2)}
    return {"attention": attention, "mlp": mlp, **norms}


def _head(state):
    weights = np.split(state["head.attention.in_proj_weight"], 3)
    biases = np.split(state["head.attention.in_proj_bias"], 3)
    attention = {
        name: {"kernel": weight.T, "bias": bias}
        for name, weight, bias in zip("qkv", weights, biases, strict=True)
    }
    attention["o"] = _take(state, _rows("head.attention.out_proj", _LINEARS))
    mlp = {n: _take(state, _rows(f"head.mlp.{n}", _LINEARS)) for n in ("fc1", "fc2")}
    norm = _take(state, _rows("head.layernorm", _NORM))
    return {"probe": state["head.probe"], "attention": attention, "mlp": mlp, "norm": norm}


def _from_torch(model, config):
    state = {name.removeprefix("vision_model."): t.numpy() for name, t in model.items()}
    blocks = [_block(state, f"encoder.layers.{i}") for i in range(config.num_layers)]
    used = config.num_layers - config.unused_blocks
    conv = np.transpose(state["embeddings.patch_embedding.weight"], (2, 3, 1, 0))
    params = {
        "patch_embedding": {"kernel": conv},
        "position_embedding": state["embeddings.position_embedding.weight"],
        "post_norm": _take(state, _rows("post_layernorm", _NORM)),
        "blocks": _stack(blocks[:used]),
    }
    if config.unused_blocks:
        params["unused_blocks"] = _stack(blocks[used:])
    if config.architecture == "clip":
        params["class_embedding"] = state["embeddings.class_embedding"]
        params["pre_norm"] = _take(state, _rows("pre_layrnorm", _NORM))
    else:
        params["patch_embedding"]["bias"] = state["embeddings.patch_embedding.bias"]
    if config.pooling_head:
        params["head"] = _head(state)
    return {"params": params}


def _stack(blocks):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *blocks)


def _torch_output(config, images):
    """Our variables of a random tower of transformers, and what it makes of images."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    kinds = {
        "siglip": (transformers.SiglipVisionConfig, transformers.SiglipVisionModel),
        "clip": (transformers.CLIPVisionConfig, transformers.CLIPVisionModel),
    }
    config_class, model_class = kinds[config.architecture]
    torch.manual_seed(0)
    model = model_class(
        config_class(
            image_size=config.image_size,
            patch_size=config.patch_size,
            hidden_size=config.width,
            intermediate_size=config.mlp_width,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
        )
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        pixels = torch.from_numpy(images.transpose(0, 3, 1, 2))
        return _from_torch(model.state_dict(), config), model(pixels, output_hidden_states=True)


IMAGES = np.random.default_rng(0).normal(size=(2, 34, 34, 3)).astype(np.float32)


@pytest.mark.parametrize("config", [SIGLIP, CLIP], ids=["siglip", "clip"])
def test_equals_transformers(config):
    variables, expected = _torch_output(config, IMAGES)
    shapes = jax.eval_shape(tower(config).init, jax.random.key(0), IMAGES)
    assert jax.tree.map(np.shape, variables) == jax.tree.map(
        lambda leaf: leaf.shape, nn.meta.unbox(shapes)
    )
    output = tower(config).apply(variables, IMAGES, method="outputs")
    hidden = expected.last_hidden_state
    np.testing.assert_allclose(output.hidden_BPW, hidden, atol=1e-5)
    np.testing.assert_allclose(output.pooled_BW, expected.pooler_output, atol=1e-5)


@pytest.mark.parametrize("unused", [0, 1, 2])
@pytest.mark.parametrize("config", [SIGLIP, CLIP], ids=["siglip", "clip"])
def test_patches_are_read_before_unused_blocks_and_the_last_norm(config, unused):
    side = config.patches_per_side
    changes = {"final_norm": False, "summary": "none", "pool": (side, side)}
    config = dataclasses.replace(config, unused_blocks=unused, **changes)
    variables, expected = _torch_output(config, IMAGES)
    shapes = jax.eval_shape(tower(config).init, jax.random.key(0), IMAGES)
    assert jax.tree.map(np.shape, variables) == jax.tree.map(
        lambda leaf: leaf.shape, nn.meta.unbox(shapes)
    )
    output = tower(config).apply(variables, IMAGES, method="outputs")
    hidden = expected.hidden_states[-1 - unused].numpy()
    np.testing.assert_allclose(output.hidden_BPW, hidden, atol=1e-5)
    assert (output.pooled_BW is None) == (unused > 0)
    patches = hidden[:, -(side**2) :]
    for method in ("patches", "__call__"):
        found = tower(config).apply(variables, IMAGES, method=method)
        np.testing.assert_allclose(found, patches, atol=1e-5)


@pytest.mark.parametrize(("side", "pool"), [(27, (14, 14)), (24, (3, 5)), (3, (2, 2)), (4, (7, 4))])
def test_interpolation_equals_torch(side, pool):
    torch = pytest.importorskip("torch")
    grid = np.random.default_rng(0).normal(size=(1, 1, side, side)).astype(np.float32)
    expected = torch.nn.functional.interpolate(torch.from_numpy(grid), pool, mode="bilinear")
    ours = interpolation_matrix(side, pool) @ grid.ravel()
    np.testing.assert_allclose(ours, expected.numpy().ravel(), atol=1e-5)


def test_adaptive_pooling_equals_torch():
    torch = pytest.importorskip("torch")
    for side, pool in [(24, (3, 3)), (27, (3, 3)), (7, (2, 5)), (6, (4, 4))]:
        grid = np.random.default_rng(0).normal(size=(1, 1, side, side)).astype(np.float32)
        expected = torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(grid), pool)
        ours = pooling_matrix(side, pool) @ grid.ravel()
        np.testing.assert_allclose(ours, expected.numpy().ravel(), atol=1e-6)
