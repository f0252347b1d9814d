"""Attention to a cache: equal to NumPy's, at the cost of what is filled, blind to the rest."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from videollm_mod_jax.models import EMPTY, LayerCache, cached_attention_gpu, trim_caches
from videollm_mod_jax.models import cached_attention as cached_attention_module
from videollm_mod_jax.models.cached_attention import cached_attention

BLOCK, CAPACITY = 8, 45  # five blocks and a part of one
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(cached_attention_module, "BLOCK", BLOCK)
    monkeypatch.setattr(cached_attention_module, "QUERY_CHUNK", 16)


def draw(seed, start_B, T, heads, groups, dtype="float32", capacity=CAPACITY, E=8):
    """Queries, and a cache whose entries behind `start + T` are NaN."""
    rng = np.random.default_rng(seed)
    B = len(start_B)
    q_BTHE = rng.normal(size=(B, T, heads, E))
    k_BGCE, v_BGCE = rng.normal(size=(2, B, groups, capacity, E))
    position_BC = np.full((B, capacity), EMPTY, np.int32)
    for b, start in enumerate(start_B):
        k_BGCE[b, :, start + T :] = np.nan
        v_BGCE[b, :, start + T :] = np.nan
        position_BC[b, : start + T] = np.arange(start + T)
    q, k, v = (jnp.asarray(x, dtype) for x in (q_BTHE, k_BGCE, v_BGCE))
    length_B = jnp.asarray(start_B, jnp.int32) + T
    return q, LayerCache(k, v, jnp.asarray(position_BC), length_B)


def expected(q_BTHE, cache, start_B):
    """The definition, in float64, one query and head at a time."""
    q_BTHE, k_BGCE, v_BGCE = (np.asarray(x, np.float64) for x in (q_BTHE, *_keys_values(cache)))
    B, T, H, E = q_BTHE.shape
    out_BTHE = np.zeros(q_BTHE.shape)
    for b, t, h in np.ndindex(B, T, H):
        g, seen = h // (H // k_BGCE.shape[1]), int(start_B[b]) + t + 1
        scores = k_BGCE[b, g, :seen] @ q_BTHE[b, t, h] / np.sqrt(E)
        weights = np.exp(scores - scores.max())
        out_BTHE[b, t, h] = weights @ v_BGCE[b, g, :seen] / weights.sum()
    return out_BTHE


def _keys_values(cache):
    return cache.k_BGCE, cache.v_BGCE


def assert_parity(q_BTHE, cache, start_B, kernels="xla"):
    start_B = jnp.asarray(start_B, jnp.int32)
    out_BTHE = jax.jit(cached_attention, static_argnums=3)(q_BTHE, cache, start_B, kernels)
    assert out_BTHE.dtype == q_BTHE.dtype
    wanted = expected(q_BTHE, cache, start_B)
    error = np.abs(np.asarray(out_BTHE, np.float64) - wanted).max()
    assert error <= TOLERANCE[q_BTHE.dtype.name] * np.abs(wanted).max()


STARTS = (0, 1, BLOCK - 2, BLOCK - 1, BLOCK, 3 * BLOCK + 1)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("T", [1, 2, 11])
def test_it_is_attention_to_all_entries_before(start, T, dtype):
    q, cache = draw(0, [start], T, 4, 2, dtype)
    assert_parity(q, cache, [start])


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2), (4, 1)])
@pytest.mark.parametrize("T", [1, 11])
def test_heads_share_keys_and_streams_have_their_own_length(heads, groups, T):
    starts = [0, CAPACITY - T, BLOCK - 1]
    q, cache = draw(1, starts, T, heads, groups)
    assert_parity(q, cache, starts)


def test_a_full_cache_that_is_no_multiple_of_a_block():
    q, cache = draw(2, [CAPACITY - 2], 2, 4, 2)
    assert_parity(q, cache, [CAPACITY - 2])


@pytest.mark.parametrize("capacity", [1, BLOCK - 1, BLOCK, BLOCK + 1])
def test_caches_of_about_a_block(capacity):
    q, cache = draw(3, [0, 0], capacity, 4, 2, capacity=capacity)
    assert_parity(q, cache, [0, 0])


def test_a_long_prefill_goes_in_chunks():
    q, cache = draw(4, [5, 0, 17], 300, 4, 2, capacity=331)
    assert_parity(q, cache, [5, 0, 17])


def test_what_is_read_ends_with_the_longest_stream(monkeypatch):
    firsts = []
    read = jax.lax.dynamic_slice_in_dim

    def recorded(x, first, *rest):
        firsts.append(int(first))
        return read(x, first, *rest)

    monkeypatch.setattr(jax.lax, "dynamic_slice_in_dim", recorded)
    starts = [3, 2 * BLOCK - 1]
    q, cache = draw(5, starts, 2, 4, 2)
    with jax.disable_jit():
        cached_attention(q, cache, jnp.array(starts), "xla")
    # Entry 16 is the last one. Keys and values of blocks 0, 1, 2 of the cache's 6.
    assert firsts == [0, 0, 8, 8, 16, 16]


def fill(cache, seed, T, start_B, padding_B):
    """Appends T random entries, the last `padding_B` of which are padding."""
    rng = np.random.default_rng(seed)
    G, E = cache.k_BGCE.shape[1], cache.k_BGCE.shape[3]
    k_BTGE, v_BTGE = rng.normal(size=(2, len(start_B), T, G, E)).astype(np.float32)
    index_T = np.arange(T)
    position_BT = np.array(start_B)[:, None] + index_T
    position_BT = np.where(index_T < T - np.array(padding_B)[:, None], position_BT, EMPTY)
    return cache.append(k_BTGE, v_BTGE, jnp.asarray(position_BT, jnp.int32)), k_BTGE


def empty(B, capacity=12):
    return LayerCache(
        jnp.full((B, 2, capacity, 4), jnp.nan),
        jnp.full((B, 2, capacity, 4), jnp.nan),
        jnp.full((B, capacity), EMPTY, jnp.int32),
        jnp.zeros((B,), jnp.int32),
    )


@pytest.mark.parametrize("B", [1, 3])
def test_append_writes_behind_every_streams_own_entries(B):
    append = jax.jit(fill, static_argnums=(1, 2, 3, 4))
    cache, first = append(empty(B), 6, 5, (0, 0, 0)[:B], (0, 3, 5)[:B])
    assert cache.length_B.tolist() == [5, 2, 0][:B]
    cache, second = append(cache, 7, 3, (5, 2, 0)[:B], (1, 0, 0)[:B])
    assert cache.length_B.tolist() == [7, 5, 3][:B]
    position_BC = np.full((3, 12), EMPTY)
    k_BGCE = np.full((3, 2, 12, 4), np.nan, np.float32)
    for b, (start, length) in enumerate([(5, 7), (2, 5), (0, 3)][:B]):
        position_BC[b, :length] = np.arange(length)
        k_BGCE[b, :, :5] = first[b].swapaxes(0, 1)
        k_BGCE[b, :, start : start + 3] = second[b].swapaxes(0, 1)
    np.testing.assert_array_equal(cache.position_BC, position_BC[:B])
    np.testing.assert_array_equal(cache.k_BGCE, k_BGCE[:B])


def test_padding_and_forgotten_entries_are_never_attended():
    cache, _ = fill(empty(2), 8, 6, (0, 0), (0, 2))
    (cache,) = trim_caches((cache,), jnp.array([3, 100]))
    assert cache.length_B.tolist() == [3, 4]
    start_B = cache.length_B
    cache, _ = fill(cache, 9, 2, (3, 4), (0, 0))
    free_BC = np.asarray(cache.position_BC) == EMPTY
    assert (~free_BC).sum(axis=1).tolist() == [5, 6]
    poisoned = [jnp.where(free_BC[:, None, :, None], jnp.nan, x) for x in _keys_values(cache)]
    cache = cache.replace(k_BGCE=poisoned[0], v_BGCE=poisoned[1])
    q_BTHE = jnp.asarray(np.random.default_rng(10).normal(size=(2, 2, 4, 4)), jnp.float32)
    assert_parity(q_BTHE, cache, start_B)


@pytest.mark.parametrize("programs", [1, 3, 132])
@pytest.mark.parametrize(
    ("starts", "T", "heads", "groups"),
    [
        ([0], 1, 4, 2),
        ([63], 2, 4, 4),
        ([0, 64, 189], 11, 8, 2),
        ([5], 150, 4, 1),
    ],
)
def test_the_gpu_kernel_is_the_same_attention(starts, T, heads, groups, programs, monkeypatch):
    monkeypatch.setattr(cached_attention_gpu, "PROGRAMS", programs)
    q, cache = draw(12, starts, T, heads, groups, "bfloat16", 200, 16)
    start_B = jnp.array(starts, jnp.int32)
    out = cached_attention_gpu.split_attention(q, *_keys_values(cache), start_B, interpret=True)
    wanted = expected(q, cache, starts)
    error = np.abs(np.asarray(out, np.float64) - wanted).max()
    assert error <= TOLERANCE["bfloat16"] * np.abs(wanted).max()


def test_the_gpu_kernel_lowers_for_cuda_and_keeps_caches_where_they_are():
    q_BGME = jnp.zeros((1, 2, 44, 16), jnp.bfloat16)
    _, cache = draw(13, [100], 11, 8, 2, "bfloat16", 200, 16)
    gpu = jax.sharding.AbstractDevice(device_kind="NVIDIA H100", num_cores=None, platform="gpu")
    hopper = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=gpu)
    # The kernel alone: what splits it over devices asks for devices.
    kernel = jax.jit(cached_attention_gpu._split_attention.fun, static_argnums=(4, 5))
    arguments = (q_BGME, *_keys_values(cache), jnp.full((1, 2, 1, 1), 100), 11, False)
    with jax.sharding.use_abstract_mesh(hopper):
        text = kernel.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert "__gpu$xla.gpu.triton" in text
    assert "-> tensor<1x2x200x16xbf16>" not in text


@pytest.mark.parametrize(("E", "kernel"), [(16, True), (24, False)])
def test_gpus_take_widths_that_are_powers_of_two_by_the_kernel_and_others_by_blocks(E, kernel):
    q, cache = draw(14, [100], 11, 8, 2, "bfloat16", 200, E)
    program = jax.make_jaxpr(cached_attention, static_argnums=3)(q, cache, jnp.array([100]), "gpu")
    assert ("pallas_call" in str(program)) is kernel


def test_devices_attend_with_their_own_streams_and_heads(tmp_path):
    report = tmp_path / "report.json"
    subprocess.run(
        [sys.executable, "-m", "tests.cached_attention_devices", str(report)],
        env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"},
        check=True,
        timeout=300,
    )
    found = json.loads(report.read_text())
    assert [found[name]["error"] for name in found] == [0, 0, 0]
    assert found["streams"]["split"] == "P('data',)"
    assert found["streams_heads"]["split"] == "P('data', None, 'tensor')"
    # Where heads are too few, queries go to every device.
    assert [found[name]["collectives"] > 0 for name in found] == [False, False, True]


@pytest.mark.parametrize(("kernels", "message"), [("xla", "Reverse-mode"), ("gpu", "custom_part")])
def test_reverse_differentiation_is_refused(kernels, message):
    q, cache = draw(11, [20], 2, 4, 2)

    def loss(q_BTHE, start_B):
        return cached_attention(q_BTHE, cache, start_B, kernels).sum()

    with pytest.raises((ValueError, NotImplementedError), match=message):
        jax.jit(jax.grad(loss))(q, jnp.array([20]))
