"""Rotary position embedding and causal attention by stored positions, as pure functions.

Letters: B batch, T query tokens, U key tokens, H query heads, G key/value heads, Q = H / G query
heads per key/value head, E head width.
"""

import jax
import jax.numpy as jnp
import numpy as np

from videollm_mod_jax.models.config import RopeScaling

QUERY_CHUNK = 512
"""Longest run of queries whose scores against all keys are in memory at once."""


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


def attend(
    q_BTHE: jax.Array,
    k_BUGE: jax.Array,
    v_BUGE: jax.Array,
    query_position_BT: jax.Array,
    key_position_BU: jax.Array,
) -> jax.Array:
    """Causal grouped-query attention: a query sees the keys at positions up to its own.

    ```
    key positions      0 1 4 5 EMPTY        a routed layer keeps tokens 0 1 4 5 of a stream;
    query position 4   x x x . .            a free cache slot holds EMPTY, later than any query
    query position 5   x x x x .
    ```

    Positions decide, never indices, so the same function serves a training sequence, the compact
    rows of a routed layer and a cache that has been trimmed. Long query runs go in chunks of
    `QUERY_CHUNK`, each recomputed in the backward pass, so that memory grows with U and not T * U.

    Args:
      q_BTHE: rotated queries.
      k_BUGE: rotated keys; G divides H.
      v_BUGE: values.
      query_position_BT: int32.
      key_position_BU: int32.

    Returns:
      [B, T, H, E] in q's dtype; scores and softmax are float32.
    """
    B, T = query_position_BT.shape
    if T <= QUERY_CHUNK:
        return _attend_chunk(q_BTHE, k_BUGE, v_BUGE, query_position_BT, key_position_BU)
    chunks = -(-T // QUERY_CHUNK)
    pad = chunks * QUERY_CHUNK - T

    def to_chunks(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2), mode="edge")
        return jnp.moveaxis(x.reshape(B, chunks, QUERY_CHUNK, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def one(chunk: tuple[jax.Array, jax.Array]) -> jax.Array:
        return _attend_chunk(chunk[0], k_BUGE, v_BUGE, chunk[1], key_position_BU)

    out = jax.lax.map(one, (to_chunks(q_BTHE), to_chunks(query_position_BT)))
    return jnp.moveaxis(out, 0, 1).reshape(B, -1, *q_BTHE.shape[2:])[:, :T]


def _attend_chunk(q_BTHE, k_BUGE, v_BUGE, query_position_BT, key_position_BU):
    B, T, H, E = q_BTHE.shape
    G = k_BUGE.shape[2]
    q_BTGQE = (q_BTHE * E**-0.5).reshape(B, T, G, H // G, E)
    scores_BGQTU = jnp.einsum(
        "BTGQE,BUGE->BGQTU", q_BTGQE, k_BUGE, preferred_element_type=jnp.float32
    )
    visible_BTU = key_position_BU[:, None, :] <= query_position_BT[:, :, None]
    scores_BGQTU = jnp.where(visible_BTU[:, None, None], scores_BGQTU, -jnp.inf)
    weights_BGQTU = jax.nn.softmax(scores_BGQTU, axis=-1).astype(v_BUGE.dtype)
    return jnp.einsum("BGQTU,BUGE->BTGQE", weights_BGQTU, v_BUGE).reshape(B, T, H, E)
