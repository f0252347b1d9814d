"""Rotary position embedding, as pure functions."""

import jax
import jax.numpy as jnp
import numpy as np

from videollm_mod_jax.models.config import RopeScaling


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Rotary frequencies in radians per token.

    Args:
      head_dim: E, even.
      theta: base; frequency i is theta ** (-2 i / E).
      scaling: see `RopeScaling`. Source: `_compute_linear_scaling_rope_parameters` and
        `_compute_llama3_parameters` of transformers' `modeling_rope_utils.py`.

    Returns:
      float32 [E / 2].
    """
    frequencies = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is not None and scaling.kind == "linear":
        frequencies = frequencies / scaling.factor
    elif scaling is not None:
        wavelengths = 2 * np.pi / frequencies
        # 0 where the wavelength is long (stretch), 1 where it is short (keep), linear between.
        smooth = (scaling.original_max_positions / wavelengths - scaling.low_freq_factor) / (
            scaling.high_freq_factor - scaling.low_freq_factor
        )
        smooth = np.clip(smooth, 0.0, 1.0)
        frequencies = (1 - smooth) * frequencies / scaling.factor + smooth * frequencies
    return frequencies.astype(np.float32)


def apply_rope(x_BTHE: jax.Array, position_BT: jax.Array, frequencies: np.ndarray) -> jax.Array:
    """Rotates pairs (i, i + E / 2) of every head by position * frequency i.

    The half-split pairing of Hugging Face Llama, whose q and k kernels are permuted for it.

    Args:
      x_BTHE: queries or keys.
      position_BT: int32 positions in the stream.
      frequencies: float32 [E / 2], from `rope_frequencies`.

    Returns:
      The rotated array, in x's dtype; angles are computed in float32.
    """
    angle_BT1E = (position_BT.astype(jnp.float32)[..., None] * frequencies)[:, :, None, :]
    cos, sin = jnp.cos(angle_BT1E), jnp.sin(angle_BT1E)
    first, second = jnp.split(x_BTHE.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTHE.dtype)
