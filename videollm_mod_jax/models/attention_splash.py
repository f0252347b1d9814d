"""Causal attention by Splash, the Pallas kernels for TPUs that come with JAX."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash

BLOCK = 512
"""Most rows of a block of queries, and of keys."""


def splash_attention(q_BTHE: jax.Array, k_BTGE: jax.Array, v_BTGE: jax.Array) -> jax.Array:
    """As `attention.causal_attention`, on one TPU."""
    B, T, H, E = q_BTHE.shape
    blocks = -(-T // BLOCK)
    # Whole rows of a vector register's 128 lanes.
    size = -(-T // (128 * blocks)) * 128

    def heads_first(x: jax.Array) -> jax.Array:
        """[B, T, heads, E] -> [B * heads, T padded, E]: the heads of all sequences in one row."""
        x = jnp.pad(x, [(0, 0), (0, blocks * size - T), (0, 0), (0, 0)])
        return jnp.swapaxes(x, 1, 2).reshape(-1, blocks * size, E)

    # Splash does not scale scores.
    q_BTHE = (E**-0.5 * q_BTHE.astype(jnp.float32)).astype(q_BTHE.dtype)
    out = _kernel(blocks, size)(*map(heads_first, (q_BTHE, k_BTGE, v_BTGE)))
    return jnp.swapaxes(out.reshape(B, H, blocks * size, E), 1, 2)[:, :T]


def _kernel(blocks: int, size: int) -> splash.splash_attention_kernel.SplashAttentionKernel:
    # The mask of one head serves any number of them.
    mask = splash.MultiHeadMask([splash.CausalMask((blocks * size, blocks * size))])
    block_sizes = splash.BlockSizes(
        block_q=size,
        block_kv=size,
        block_q_dkv=size,
        block_kv_dkv=size,
        # The fused backward kernel would save a pass over the scores; it holds the gradient of all
        # queries once per block of keys.
        block_q_dq=size,
        block_kv_dq=size,
    )
    # Its tables belong to the trace they are made in: devices of the mesh need not be here.
    return splash.make_splash_mha(mask=mask, block_sizes=block_sizes, head_shards=1, q_seq_shards=1)
