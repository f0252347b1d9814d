"""Every attention kernel against plain attention in float64, forward and backward."""

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import attention_devices
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.models import Execution, attention_splash, attention_xla
from videollm_mod_jax.models.attention import causal_attention
from videollm_mod_jax.models.execution import choose_kernels
from videollm_mod_jax.training import hlo
from videollm_mod_jax.training.gpu import cudnn_taken_for_granted

# (T, H, G, E): one block and several, whole and not; heads alike, grouped, and all with one key.
SHAPES = (
    (1, 2, 2, 8),
    (2, 4, 1, 8),
    (7, 4, 2, 16),
    (127, 4, 1, 8),
    (128, 2, 2, 8),
    (129, 8, 2, 8),
    (300, 4, 1, 16),
    (771, 4, 2, 8),
)
SPLASH_SHAPES = ((1, 2, 2, 64), (129, 4, 1, 64), (700, 4, 2, 64))
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}


def inputs(T, H, G, E, dtype="float32", B=2):
    """Random q, k, v, and what the loss weighs the result with."""
    rng = np.random.default_rng(T)
    return tuple(jnp.asarray(rng.normal(size=(B, T, heads, E)), dtype) for heads in (H, G, G, H))


def reference(q_BTHE, k_BTGE, v_BTGE, d_out_BTHE):
    """Attention and the gradients of sum(d_out * out), head by head, in float64."""
    q, k, v, d_out = (np.asarray(x, np.float64) for x in (q_BTHE, k_BTGE, v_BTGE, d_out_BTHE))
    out, d_q, d_k, d_v = (np.zeros_like(x) for x in (q, q, k, v))
    B, T, H, E = q.shape
    for b, h in np.ndindex(B, H):
        g = h // (H // k.shape[2])
        scores = q[b, :, h] @ k[b, :, g].T / np.sqrt(E)
        scores[np.arange(T) > np.arange(T)[:, None]] = -np.inf
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
        out[b, :, h] = weights @ v[b, :, g]
        d_v[b, :, g] += weights.T @ d_out[b, :, h]
        d_weights = d_out[b, :, h] @ v[b, :, g].T
        d_scores = weights * (d_weights - (weights * d_weights).sum(axis=1, keepdims=True))
        d_q[b, :, h] = d_scores @ k[b, :, g] / np.sqrt(E)
        d_k[b, :, g] += d_scores.T @ q[b, :, h] / np.sqrt(E)
    return out, d_q, d_k, d_v


@functools.partial(jax.jit, static_argnums=0)
def with_gradients(attend, q, k, v, d_out):
    out, pullback = jax.vjp(attend, q, k, v)
    return out, *pullback(d_out)


def relative_error(found, expected):
    difference = np.linalg.norm(np.asarray(found, np.float64) - expected)
    return difference / max(np.linalg.norm(expected), 1e-30)


def xla(q, k, v):
    return causal_attention(q, k, v, "xla")


def check(attend, shape, dtype):
    arrays = inputs(*shape, dtype)
    found = with_gradients(attend, *arrays)
    for name, x, expected in zip(
        ("out", "d_q", "d_k", "d_v"), found, reference(*arrays), strict=True
    ):
        assert x.dtype == dtype
        if shape[0] == 1 and name in ("d_q", "d_k"):
            # One token sees itself alone, whatever its score: both gradients are zero.
            np.testing.assert_allclose(np.asarray(x, np.float64), expected, atol=TOLERANCE[dtype])
        else:
            assert relative_error(x, expected) < TOLERANCE[dtype], name


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_xla_is_attention_and_its_gradients(shape, dtype):
    check(xla, shape, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SPLASH_SHAPES, ids=str)
def test_splash_is_attention_and_its_gradients(shape, dtype):
    with attention_devices.interpreted():
        check(attention_splash.splash_attention, shape, dtype)


def test_splash_is_attention_where_blocks_of_keys_are_longer(monkeypatch):
    monkeypatch.setattr(attention_splash, "BLOCK", 128)
    monkeypatch.setattr(attention_splash, "KEY_BLOCKS", 2)
    assert attention_splash.block_sizes(700) == (128, 6, 2)
    with attention_devices.interpreted():
        check(attention_splash.splash_attention, (700, 4, 2, 64), "float32")


@pytest.mark.parametrize("T", [1024, 1023])
def test_cudnn_is_called_forward_and_backward_and_repeats_no_keys(T):
    shapes = [jax.ShapeDtypeStruct((2, T, heads, 128), jnp.bfloat16) for heads in (8, 2, 2, 8)]
    attend = functools.partial(causal_attention, kernels="gpu")
    # Nothing is compiled or run: that takes a GPU.
    with cudnn_taken_for_granted():
        traced = jax.jit(functools.partial(with_gradients, attend)).trace(*shapes)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in text.splitlines() if "@__cudnn$" in line]
    names = [re.search(r"@(__cudnn\$\w+)", line)[1] for line in calls]
    assert names == ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]
    for line in calls:
        assert "CAUSAL" in line
        assert f"tensor<2x{T + T % 2}x2x128xbf16>" in line
    assert not re.search(rf"{T}x{T}", text)


def test_several_blocks_equal_one_forward_and_backward(monkeypatch):
    arrays = inputs(50, 4, 2, 8)
    whole = with_gradients(lambda *a: xla(*a), *arrays)
    monkeypatch.setattr(attention_xla, "BLOCK", 16)
    blocks = with_gradients(lambda *a: xla(*a), *arrays)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), whole, blocks)


def test_a_token_sees_what_the_drawn_example_draws():
    q_BTHE, k_BTGE = jnp.zeros((1, 3, 1, 3)), jnp.zeros((1, 3, 1, 3))
    seen = xla(q_BTHE, k_BTGE, jnp.eye(3)[None, :, None]) > 0
    drawn = ["x . .", "x x .", "x x x"]
    assert [" ".join(".x"[int(s)] for s in row) for row in seen[0, :, 0]] == drawn


@pytest.mark.parametrize("changed", [1, 40, 299])
def test_later_tokens_change_nothing_to_the_bit(changed):
    q, k, v, _ = inputs(300, 4, 2, 8)
    before = xla(q, k, v)
    after = xla(*(x.at[:, changed:].set(1e4) for x in (q, k, v)))
    np.testing.assert_array_equal(before[:, :changed], after[:, :changed])


def test_padding_rows_get_and_give_no_gradient():
    q, k, v, d_out = inputs(300, 4, 2, 8)
    real = 277
    found = with_gradients(xla, q, k, v, d_out.at[:, real:].set(0))
    expected = with_gradients(xla, *(x[:, :real] for x in (q, k, v, d_out)))
    for whole, part in zip(found[1:], expected[1:], strict=True):
        assert not np.any(whole[:, real:])
        np.testing.assert_allclose(whole[:, :real], part, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """What `tests.attention_devices` found out."""
    path = tmp_path_factory.mktemp("devices") / "report.json"
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-m", "tests.attention_devices", str(path)],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(path.read_text())


@pytest.mark.parametrize("mesh", attention_devices.MESHES)
@pytest.mark.parametrize("kernels", attention_devices.KERNELS)
def test_eight_devices_attend_as_one_does(report, kernels, mesh):
    assert report[kernels][mesh]["error"] < 1e-5


@pytest.mark.parametrize("kernels", attention_devices.KERNELS)
def test_devices_with_their_own_sequences_and_heads_exchange_nothing(report, kernels):
    assert report[kernels]["fsdp_tensor"]["collectives"] == []


def compiled(T, backward, H=2, G=1, E=16):
    arrays = [jax.ShapeDtypeStruct((1, T, heads, E), jnp.float32) for heads in (H, G, G, H)]
    function = (
        functools.partial(with_gradients, xla) if backward else lambda q, k, v, _: xla(q, k, v)
    )
    return jax.jit(function).lower(*arrays).compile()


@pytest.mark.parametrize(("backward", "passes"), [(False, 1), (True, 3.5)])
def test_operations_are_those_of_the_causal_half(backward, passes):
    T, H, E = 7680, 2, 16
    causal = 2 * 2 * H * E * T * (T + 1) // 2
    cost = hlo.cost(compiled(T, backward).as_text())
    assert cost.unknown_loops == 0
    assert passes * causal <= cost.flops <= 1.04 * passes * causal


@pytest.mark.parametrize("backward", [False, True])
def test_memory_grows_with_the_sequence_and_the_program_does_not_grow(backward):
    short, long = compiled(2048, backward), compiled(8192, backward)
    temporary = [c.memory_analysis().temp_size_in_bytes for c in (short, long)]
    assert temporary[1] <= 4 * temporary[0]
    lines = [len(c.as_text().splitlines()) for c in (short, long)]
    assert lines[0] == lines[1]


def test_rematerialised_layers_keep_no_masks():
    """Under a loop over layers JAX would hold what no layer changes: the mask of every block."""
    T, E = 4096, 16

    def layer(x, _):
        heads = x.reshape(1, T, 1, E)
        return jax.checkpoint(lambda h: xla(h, h, h))(heads).reshape(x.shape), None

    def loss(x):
        return jnp.sum(jax.lax.scan(layer, x, None, length=3)[0] ** 2)

    compiled = jax.jit(jax.grad(loss)).lower(jax.ShapeDtypeStruct((T, E), jnp.float32)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < T * T // 2


def test_blocks_are_those_of_the_drawn_examples():
    tokens = (7, 256, 257, 368, 600, 6601, 7680)
    rows = [attention_xla.block_length(T) for T in tokens]
    assert rows == [16, 256, 144, 192, 208, 256, 256]
    assert [-(-T // r) for T, r in zip(tokens, rows, strict=True)] == [1, 1, 2, 2, 3, 26, 30]
    pairs = [(0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2)]
    assert [tuple(pair) for pair in attention_xla.block_pairs(3).tolist()] == pairs


def test_blocks_of_splash_are_those_of_the_drawn_example():
    tokens = (7, 513, 6601, 7680, 13000, 52808)
    drawn = [(128, 1, 1), (384, 2, 2), (512, 13, 13), (512, 15, 15), (512, 26, 13), (512, 105, 21)]
    assert [attention_splash.block_sizes(T) for T in tokens] == drawn


@pytest.mark.parametrize(
    ("kernels", "platform", "dtype", "head_dim", "chosen"),
    [
        ("auto", "cpu", "bfloat16", 128, "xla"),
        ("auto", "gpu", "bfloat16", 128, "gpu"),
        ("auto", "gpu", "float16", 64, "gpu"),
        ("auto", "gpu", "float32", 128, "xla"),
        ("auto", "gpu", "bfloat16", 256, "xla"),
        ("auto", "gpu", "bfloat16", 12, "xla"),
        ("auto", "tpu", "bfloat16", 128, "tpu"),
        ("auto", "tpu", "bfloat16", 64, "tpu"),
        ("auto", "tpu", "float32", 128, "xla"),
        ("auto", "tpu", "bfloat16", 8, "xla"),
        ("xla", "gpu", "bfloat16", 128, "xla"),
        ("xla", "tpu", "bfloat16", 128, "xla"),
        ("gpu", "gpu", "bfloat16", 128, "gpu"),
        ("tpu", "tpu", "bfloat16", 128, "tpu"),
    ],
)
def test_kernels_are_chosen_by_platform_dtype_and_head_width(
    kernels, platform, dtype, head_dim, chosen
):
    assert choose_kernels(kernels, platform, jnp.dtype(dtype), head_dim) == chosen


@pytest.mark.parametrize(
    ("kernels", "platform", "dtype", "head_dim", "message"),
    [
        ("tpu", "tpu", "bfloat16", 8, "kernels is 'tpu'.* head_dim 8: choose 'auto' or 'xla'"),
        ("gpu", "gpu", "float32", 128, "kernels is 'gpu'.* dtype float32 .*choose 'auto' or 'xla'"),
        ("tpu", "cpu", "bfloat16", 128, "kernels is 'tpu', which needs a TPU; this runs on cpu"),
        ("gpu", "tpu", "bfloat16", 128, "kernels is 'gpu', which needs a GPU; this runs on tpu"),
    ],
)
def test_kernels_that_cannot_serve_are_refused(kernels, platform, dtype, head_dim, message):
    with pytest.raises(UserError, match=message):
        choose_kernels(kernels, platform, dtype, head_dim)


def test_unknown_kernels_are_refused():
    with pytest.raises(UserError, match="kernels is 'cuda'; choose one of auto, xla, gpu, tpu"):
        Execution(kernels="cuda")
