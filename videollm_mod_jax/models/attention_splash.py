"""Causal attention by Splash, the Pallas kernels for TPUs that come with JAX."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash

BLOCK = 512
"""Most rows of a block of queries."""

KEY_BLOCKS = 24
"""Most blocks of keys in the backward pass, which holds the queries' gradient once for each."""


def splash_attention(q_BTHE: jax.Array, k_BTGE: jax.Array, v_BTGE: jax.Array) -> jax.Array:
    """As `attention.causal_attention`, on one TPU.

    One head of keys after the other. The fused backward kernel, which computes the scores once
    where the split ones do twice, holds a gradient of the queries for every block of keys: so they
    are those of a few heads.
    """
    B, T, H, E = q_BTHE.shape
    G = k_BTGE.shape[2]
    size, query_blocks, key_blocks = block_sizes(T)
    length = size * query_blocks

    def heads_first(x: jax.Array, *heads: int) -> jax.Array:
        """[B, T, heads, E] -> [B * G, heads per G, T padded, E]."""
        x = jnp.pad(x, [(0, 0), (0, length - T), (0, 0), (0, 0)])
        return jnp.swapaxes(x, 1, 2).reshape(B * G, *heads, length, E)

    # Splash does not scale scores.
    q_BTHE = (E**-0.5 * q_BTHE.astype(jnp.float32)).astype(q_BTHE.dtype)
    arrays = heads_first(q_BTHE, H // G), heads_first(k_BTGE), heads_first(v_BTGE)
    kernel = _kernel(H // G, size, length, length // key_blocks)
    out = jax.lax.map(lambda group: kernel(*group), arrays)
    return jnp.swapaxes(out.reshape(B, H, length, E), 1, 2)[:, :T]


def block_sizes(T: int) -> tuple[int, int, int]:
    """(rows of a block of queries, blocks of queries, blocks of keys in the backward pass).

    Blocks of keys are a whole number of blocks of queries, whose rows are whole vector registers of
    128 lanes.

    ```
    tokens             7    513    6601    7680   13000   52808
    rows             128    384     512     512     512     512
    query blocks       1      2      13      15      26     105
    key blocks         1      2      13      15      13      21
    ```
    """
    blocks = -(-T // BLOCK)
    together = -(-blocks // KEY_BLOCKS)
    key_blocks = -(-blocks // together)
    query_blocks = key_blocks * together
    return -(-T // (128 * query_blocks)) * 128, query_blocks, key_blocks


def _kernel(
    heads: int, size: int, length: int, key_size: int
) -> splash.splash_attention_kernel.SplashAttentionKernel:
    mask = splash.MultiHeadMask([splash.CausalMask((length, length))] * heads)
    sizes = splash.BlockSizes(
        block_q=size,
        block_kv=size,
        block_q_dkv=size,
        block_kv_dkv=key_size,
        block_kv_dkv_compute=size,
        use_fused_bwd_kernel=True,
    )
    # Its tables belong to the trace they are made in: devices of the mesh need not be here.
    return splash.make_splash_mqa(mask=mask, block_sizes=sizes, head_shards=1, q_seq_shards=1)
