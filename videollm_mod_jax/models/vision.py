"""One Vision Transformer that is SigLIP or CLIP by its configuration, and its frame tokens.

Follows `SiglipVisionModel` and `CLIPVisionModel` of huggingface/transformers, and
`vision_live.py` of showlab/videollm-online for the tokens of a frame.

Axes: B batch, P tokens of the tower (patches, with CLIP's class token in front), W width,
Q pooled spatial tokens, N = 1 + Q tokens per frame.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from videollm_mod_jax.errors import UserError
from videollm_mod_jax.models.config import VisionConfig
from videollm_mod_jax.models.layers import Linear


def _quick_gelu(x: jax.Array) -> jax.Array:
    return x * jax.nn.sigmoid(1.702 * x)


_ACTIVATIONS = {
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "quick_gelu": _quick_gelu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
}


@struct.dataclass
class VisionOutput:
    """What the tower gives for a batch of images.

    Attributes:
      hidden_BPW: tokens behind the blocks that run, row-major over the image; CLIP's class token is
        in front. After the final layer norm if `config.final_norm`.
      pooled_BW: SigLIP: output of the attention-pooling head. CLIP: the layer-normed class token.
        None where the tower has no such head or does not run to its end.
    """

    hidden_BPW: jax.Array
    pooled_BW: jax.Array | None


def preprocess(images_BHWC: np.ndarray | jax.Array, config: VisionConfig) -> jax.Array:
    """Turns uint8 RGB images into the tower's input.

    Resizing runs on the device, so that one byte per channel crosses to it, and agrees with
    pillow's antialiased bicubic filter to one grey level.

    Args:
      images_BHWC: uint8 [B, H, W, 3], square (`read_video(size=...)` letterboxes).
      config: gives the image size, mean and standard deviation.

    Returns:
      float32 [B, image_size, image_size, 3], normalised.

    Raises:
      UserError: the images are not uint8 RGB, or not square.
    """
    shape, size = images_BHWC.shape, config.image_size
    if images_BHWC.dtype != jnp.uint8 or len(shape) != 4 or shape[-1] != 3:
        raise UserError(
            f"images are {images_BHWC.dtype}{list(shape)}; expected uint8[batch, height, width, 3]"
        )
    if shape[1] != shape[2]:
        raise UserError(
            f"images are {shape[2]}x{shape[1]} pixels; the vision tower takes square ones: "
            f"letterbox them, as read_video(..., size={size}) does"
        )
    pixels_BHWC = jnp.asarray(images_BHWC, jnp.float32)
    if shape[1] != size:
        pixels_BHWC = jax.image.resize(pixels_BHWC, (shape[0], size, size, 3), "cubic")
        pixels_BHWC = jnp.clip(pixels_BHWC, 0, 255)
    return (pixels_BHWC / 255 - jnp.array(config.mean)) / jnp.array(config.std)


def pooling_matrix(side: int, pool: tuple[int, int]) -> np.ndarray:
    """Adaptive average pooling of a square grid as a matrix, with PyTorch's bins.

    Output cell i of n covers rows floor(i * side / n) up to ceil((i + 1) * side / n), so that
    neighbouring cells share a row where n does not divide the side. Columns likewise.

    ```
    side 3, pool (1, 2)        patch  0   1   2   3   4   5   6   7   8
    0 1 2    left:  0 1 3 4 6 7     [1/6 1/6  0  1/6 1/6  0  1/6 1/6  0 ]
    3 4 5    right: 1 2 4 5 7 8     [ 0  1/6 1/6  0  1/6 1/6  0  1/6 1/6]
    6 7 8
    ```

    Returns:
      float32 [h * w, side * side]; the rows, row-major over the cells, sum to one.
    """

    def bins(count: int) -> np.ndarray:
        edges = np.arange(count)
        first, last = edges * side // count, -(-(edges + 1) * side // count)
        inside = (np.arange(side) >= first[:, None]) & (np.arange(side) < last[:, None])
        return inside / inside.sum(axis=1, keepdims=True)

    return np.kron(bins(pool[0]), bins(pool[1])).astype(np.float32)


def interpolation_matrix(side: int, pool: tuple[int, int]) -> np.ndarray:
    """Bilinear resizing of a square grid as a matrix, with PyTorch's sampling points.

    Output cell i of n samples row (i + 0.5) * side / n - 0.5, between its two neighbours, as
    `interpolate(mode="bilinear", align_corners=False)` does. Columns likewise.

    ```
    side 3, pool (1, 2)        patch  0   1   2   3   4   5   6   7   8
    0 1 2    left:  column 0.25     [ 0   0   0  3/4 1/4  0   0   0   0 ]
    3 4 5    right: column 1.75     [ 0   0   0   0  1/4 3/4  0   0   0 ]
    6 7 8    both:  row 1
    ```

    Returns:
      float32 [h * w, side * side]; the rows, row-major over the cells, sum to one.
    """

    def samples(count: int) -> np.ndarray:
        at = np.clip((np.arange(count) + 0.5) * side / count - 0.5, 0, side - 1)
        return np.maximum(1 - np.abs(at[:, None] - np.arange(side)), 0)

    return np.kron(samples(pool[0]), samples(pool[1])).astype(np.float32)


def pool_patches(matrix_QP: np.ndarray, patches: jax.Array) -> jax.Array:
    """Applies a pooling matrix to [..., P, W], in float32, and returns [..., Q, W] in its dtype."""
    pooled = jnp.einsum("QP,...PW->...QW", matrix_QP, patches, preferred_element_type=jnp.float32)
    return pooled.astype(patches.dtype)


def spatial_tokens(output: VisionOutput, config: VisionConfig) -> jax.Array:
    """All patches [B, P, W], without a class token."""
    return output.hidden_BPW[:, 1:] if config.architecture == "clip" else output.hidden_BPW


def frame_tokens(output: VisionOutput, config: VisionConfig) -> jax.Array:
    """The tokens that stand for a frame: `[cls, spatial...]`, spatial ones row-major.

    SigLIP's CLS is its pooled output; CLIP's is its class token as the last block that runs
    leaves it. With bilinear pooling the patches come whole, for the connector.

    Returns:
      [B, `config.features_per_frame`, W], in the tower's dtype.
    """
    side, tokens = config.patches_per_side, []
    if config.summary == "class_token":
        tokens.append(output.hidden_BPW[:, :1])
    elif config.summary == "attention_pool":
        tokens.append(output.pooled_BW[:, None])
    if config.pool != (0, 0):
        patches_BPW = spatial_tokens(output, config)
        if config.pooling == "average" and config.pool != (side, side):
            patches_BPW = pool_patches(pooling_matrix(side, config.pool), patches_BPW)
        tokens.append(patches_BPW)
    return jnp.concatenate(tokens, axis=1)


class VisionTower(nn.Module):
    """The ViT: images to frame tokens.

    Its blocks are scanned: with 24 of them that compiles an order of magnitude faster than a loop,
    and runs as fast.

    Attributes:
      config: the architecture.
      dtype: of activations and matrix products.
      param_dtype: of parameters.
    """

    config: VisionConfig
    dtype: Any
    param_dtype: Any

    def __call__(self, images_BHWC: jax.Array) -> jax.Array:
        """The `frame_tokens`, in `dtype`, of images normalised by `preprocess`."""
        return frame_tokens(self.outputs(images_BHWC), self.config)

    def patches(self, images_BHWC: jax.Array) -> jax.Array:
        """All patches [B, P, W] of such images, behind the blocks that run."""
        return spatial_tokens(self.outputs(images_BHWC), self.config)

    @nn.compact
    def outputs(self, images_BHWC: jax.Array) -> VisionOutput:
        """All tokens of images [B, image_size, image_size, 3] normalised by `preprocess`."""
        config, kinds = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        is_clip = config.architecture == "clip"
        x_BPW = _PatchEmbedding(config, **kinds, name="patch_embedding")(images_BHWC)
        if is_clip:
            class_W = _parameter(self, "class_embedding", (config.width,), ("embed",))
            class_B1W = jnp.broadcast_to(class_W, (x_BPW.shape[0], 1, config.width))
            x_BPW = jnp.concatenate([class_B1W, x_BPW], axis=1)
        x_BPW += _parameter(self, "position_embedding", x_BPW.shape[1:], (None, "embed"))
        if is_clip:
            x_BPW = _norm(self, "pre_norm")(x_BPW)

        def blocks(name: str, length: int, x_BPW: jax.Array) -> jax.Array:
            scanned = nn.scan(
                _Block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=length,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            return scanned(config, **kinds, name=name)(x_BPW)[0]

        unused = config.unused_blocks
        if config.num_layers > unused:
            x_BPW = blocks("blocks", config.num_layers - unused, x_BPW)
        if unused and self.is_initializing():
            # Checkpoints hold them, so they are kept for the way back, and never run.
            blocks("unused_blocks", unused, x_BPW)
        normed_BPW, pooled_BW = _norm(self, "post_norm")(x_BPW), None
        if config.pooling_head:
            pooled_BW = _AttentionPool(config, **kinds, name="head")(normed_BPW)
        elif is_clip:
            pooled_BW = normed_BPW[:, 0]
        hidden_BPW = normed_BPW if config.final_norm else x_BPW
        return VisionOutput(hidden_BPW, None if unused else pooled_BW)


class _PatchEmbedding(nn.Module):
    """Non-overlapping convolution, as a matrix product over flattened patches."""

    config: VisionConfig
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, images_BHWC: jax.Array) -> jax.Array:
        side, size, width = self.config.patches_per_side, self.config.patch_size, self.config.width
        kernel = _parameter(self, "kernel", (size, size, 3, width), (None, None, None, "embed"))
        # A convolution without padding leaves the remainder out: SigLIP so400m sees 27 * 14 = 378
        # of its 384 pixels.
        images_BHWC = images_BHWC[:, : side * size, : side * size]
        patches = images_BHWC.reshape(-1, side, size, side, size, 3).swapaxes(2, 3)
        patches = patches.reshape(-1, side * side, size * size * 3).astype(self.dtype)
        x_BPW = patches @ kernel.reshape(-1, width)
        if self.config.architecture == "siglip":
            x_BPW += _parameter(self, "bias", (width,), ("embed",), nn.initializers.zeros)
        return x_BPW


class _Block(nn.Module):
    config: VisionConfig
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x_BPW: jax.Array) -> tuple[jax.Array, None]:
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        y_BPW = _norm(self, "norm1")(x_BPW)
        x_BPW += _Attention(self.config, **kinds, name="attention")(y_BPW, y_BPW)
        y_BPW = _norm(self, "norm2")(x_BPW)
        return x_BPW + _Mlp(self.config, **kinds, name="mlp")(y_BPW), None


class _AttentionPool(nn.Module):
    """SigLIP's head: a learned probe attends to all patches, then an MLP."""

    config: VisionConfig
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x_BPW: jax.Array) -> jax.Array:
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        width = self.config.width
        probe = _parameter(self, "probe", (1, 1, width), (None, None, "embed"))
        probe_B1W = jnp.broadcast_to(probe, (x_BPW.shape[0], 1, width))
        x_B1W = _Attention(self.config, **kinds, name="attention")(probe_B1W, x_BPW)
        x_B1W += _Mlp(self.config, **kinds, name="mlp")(_norm(self, "norm")(x_B1W))
        return x_B1W[:, 0]


class _Attention(nn.Module):
    config: VisionConfig
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, query_BTW: jax.Array, context_BPW: jax.Array) -> jax.Array:
        width, heads = self.config.width, self.config.num_heads

        def project(name: str, x_BTW: jax.Array) -> jax.Array:
            y_BTW = _linear(self, name, width, ("embed", "heads"))(x_BTW)
            return y_BTW.reshape(*y_BTW.shape[:2], heads, width // heads)

        q, k, v = project("q", query_BTW), project("k", context_BPW), project("v", context_BPW)
        y_BTW = jax.nn.dot_product_attention(q, k, v).reshape(query_BTW.shape)
        return _linear(self, "o", width, ("heads", "embed"))(y_BTW)


class _Mlp(nn.Module):
    config: VisionConfig
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x_BTW: jax.Array) -> jax.Array:
        hidden = _linear(self, "fc1", self.config.mlp_width, ("embed", "mlp"))(x_BTW)
        hidden = _ACTIVATIONS[self.config.activation](hidden)
        return _linear(self, "fc2", self.config.width, ("mlp", "embed"))(hidden)


_NORMAL = nn.initializers.normal(0.02)


def _parameter(
    module: nn.Module,
    name: str,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    init: nn.initializers.Initializer = _NORMAL,
) -> jax.Array:
    init = nn.with_logical_partitioning(init, axes)
    return module.param(name, init, shape, module.param_dtype).astype(module.dtype)


def _linear(module: nn.Module, name: str, features: int, axes: tuple[str, str]) -> Linear:
    return Linear(
        features,
        axes,
        use_bias=True,
        lora=None,
        dtype=module.dtype,
        param_dtype=module.param_dtype,
        name=name,
    )


def _norm(module: nn.Module, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(
        epsilon=module.config.norm_eps,
        dtype=module.dtype,
        param_dtype=module.param_dtype,
        # E[x^2] - E[x]^2 cancels where the mean is large, as in CLIP's massive activations.
        use_fast_variance=False,
        scale_init=nn.with_logical_partitioning(nn.initializers.ones, ("embed",)),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ("embed",)),
        name=name,
    )
