"""Attention on a GPU that is here: `JAX_PLATFORMS=cuda pytest -n 0 tests/test_on_gpu.py`.

All other tests run on the CPU, the kernels of GPUs in interpret mode.

Letters: B streams, T queries, S keys, H heads, G groups of heads, E width of a head, C capacity.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from videollm_mod_jax.models import EMPTY, LayerCache
from videollm_mod_jax.models.attention import causal_attention
from videollm_mod_jax.models.cached_attention import cached_attention

pytestmark = pytest.mark.skipif(
    jax.default_backend() != "gpu",
    reason="cuDNN and compiled Triton kernels run on NVIDIA GPUs only; interpret mode and lowering "
    "are tested everywhere, in test_attention.py and test_cached_attention.py",
)

TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}
CAPACITY = 5000


def draw(seed: int, shape: tuple[int, ...], dtype: str) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def assert_near(found: jax.Array, expected: jax.Array, tolerance: float) -> None:
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    gap = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert gap <= tolerance, gap


@jax.jit
def attend(q_BTHE: jax.Array, k_BSGE: jax.Array, v_BSGE: jax.Array, start_B: jax.Array):
    """The definition in float32, of queries that stand at `start` and behind it."""
    B, T, H, E = q_BTHE.shape
    S, G = k_BSGE.shape[1:3]
    q, k, v = (x.astype(jnp.float32) for x in (q_BTHE, k_BSGE, v_BSGE))
    with jax.default_matmul_precision("highest"):
        scores = jnp.einsum("BTGME,BSGE->BGMTS", q.reshape(B, T, G, H // G, E), k) * E**-0.5
        seen_BTS = jnp.arange(S) <= (start_B[:, None] + jnp.arange(T))[..., None]
        weights = jax.nn.softmax(jnp.where(seen_BTS[:, None, None], scores, -jnp.inf))
        return jnp.einsum("BGMTS,BSGE->BTGME", weights, v).reshape(q.shape)


@pytest.mark.parametrize("heads", [(32, 8), (4, 4), (8, 1)], ids=str)
@pytest.mark.parametrize("T", [1, 7, 128, 1023, 1801])
@pytest.mark.parametrize("E", [64, 128])
def test_cudnn_is_attention_and_its_gradients(T, heads, E):
    shapes = [(2, T, count, E) for count in (heads[0], heads[1], heads[1])]
    inputs = [draw(i, shape, "bfloat16") for i, shape in enumerate(shapes)]
    cotangent = draw(3, shapes[0], "bfloat16")

    def both(function, inputs, cotangent):
        out, pull_back = jax.vjp(function, *inputs)
        return out, *pull_back(cotangent)

    found = jax.jit(lambda *a: both(lambda *qkv: causal_attention(*qkv, "gpu"), *a))
    plain = jax.jit(lambda *a: both(lambda *qkv: attend(*qkv, jnp.zeros(2, jnp.int32)), *a))
    wanted = plain(
        [x.astype(jnp.float32) for x in inputs],
        cotangent.astype(jnp.float32),
    )
    # The only key of a first query has weight 1, whatever the query.
    for index, (ours, theirs) in enumerate(zip(found(inputs, cotangent), wanted, strict=True)):
        if T > 1 or index in (0, 3):
            assert_near(ours, theirs, TOLERANCE["bfloat16"])


# Those of the GPU do not serve float32: see `choose_kernels`.
@pytest.mark.parametrize(
    ("kernels", "dtype"), [("gpu", "bfloat16"), ("xla", "bfloat16"), ("xla", "float32")]
)
@pytest.mark.parametrize("heads", [(32, 8), (4, 4), (8, 1)], ids=str)
@pytest.mark.parametrize("T", [1, 3, 11, 257])
@pytest.mark.parametrize("start_B", [(0,), (1, 511, 4743), (4096, 0)], ids=str)
def test_attention_to_a_cache_is_attention_to_what_it_holds(start_B, T, heads, dtype, kernels):
    B, (H, G), E = len(start_B), heads, 128
    q_BTHE = draw(0, (B, T, H, E), dtype)
    k_BGCE, v_BGCE = draw(1, (2, B, G, CAPACITY, E), dtype)
    start_B = jnp.array(start_B, jnp.int32)
    index_C, length_B = jnp.arange(CAPACITY), start_B + T
    free_BC = index_C >= length_B[:, None]
    k_BGCE, v_BGCE = (jnp.where(free_BC[:, None, :, None], jnp.nan, x) for x in (k_BGCE, v_BGCE))
    cache = LayerCache(k_BGCE, v_BGCE, jnp.where(free_BC, EMPTY, index_C), length_B)
    with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
        found = jax.jit(cached_attention, static_argnums=3)(q_BTHE, cache, start_B, kernels)
    k_BSGE, v_BSGE = (jnp.nan_to_num(x).swapaxes(1, 2) for x in (k_BGCE, v_BGCE))
    assert_near(found, attend(q_BTHE, k_BSGE, v_BSGE, start_B), TOLERANCE[dtype])
