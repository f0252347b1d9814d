"""GPUs that are not here, described to XLA's CUDA compiler."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from videollm_mod_jax.errors import UserError
from videollm_mod_jax.training import compiled, gpu
from videollm_mod_jax.training.chips import CHIPS

ROOT = Path(__file__).parents[1]
HAS_COMPILER = importlib.util.find_spec("jax_plugins") and importlib.util.find_spec(
    "jax_plugins.xla_cuda12"
)


def test_the_description_holds_the_whole_memory_of_the_board():
    assert "device_memory_size: 151397597184\n" in gpu.describe_gpu(CHIPS["h200"])
    assert 'device_description_str: "NVIDIA H100"' in gpu.describe_gpu(CHIPS["h100"])


@pytest.mark.parametrize("topology", ["h200", "h200:0", "h200:9", "h200:2x4", "h100:16"])
def test_more_than_one_host_of_gpus_is_refused(topology):
    with pytest.raises(UserError, match=r"such as h200:8"):
        compiled.find_target(topology)


def test_without_the_compiler_there_is_a_plain_line(monkeypatch):
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install jax-cuda12-plugin==\S+ jax-cuda12-pjrt=="):
        compiled.find_target("h200:8")


def fail_with_cudnn_taken_for_granted():
    with gpu.cudnn_taken_for_granted():
        raise KeyError


def test_cudnn_is_taken_for_granted_inside_only():
    names = ("check_cudnn_version", "check_compute_capability", "is_cuda_compute_capability_equal")
    before = [getattr(cudnn, name) for name in names]
    with gpu.cudnn_taken_for_granted():
        assert cudnn.check_cudnn_version() == 91001
        assert cudnn.check_compute_capability("9.0")
        assert not cudnn.check_compute_capability("10.0")
        assert cudnn.is_cuda_compute_capability_equal("9.0")
    with pytest.raises(KeyError):
        fail_with_cudnn_taken_for_granted()
    assert [getattr(cudnn, name) for name in names] == before


FOR_TWO_GPUS = """
import json, jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from videollm_mod_jax.training import compiled

target = compiled.find_target("h200:2")
mesh = Mesh(np.array(target.devices), ("x",))

def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.bfloat16, sharding=NamedSharding(mesh, P("x")))

@jax.jit
def attend(q, k, w):
    out = jax.nn.dot_product_attention(q, k, k, is_causal=True, implementation="cudnn")
    return out.reshape(2, 256, 512) @ w

with target.tracing():
    lowered = attend.lower(shape(2, 256, 8, 64), shape(2, 256, 2, 64), shape(512, 128))
program = compiled.compile_program(lowered, target)
print(json.dumps([program.cost.flops, program.peak_bytes, program.cost.unknown_kernels]))
"""


@pytest.mark.skipif(not HAS_COMPILER, reason="needs jax-cuda12-plugin and jax-cuda12-pjrt")
def test_attention_of_cudnn_is_compiled_and_counted_without_a_gpu():
    done = subprocess.run(
        [sys.executable, "-c", FOR_TWO_GPUS],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    flops, peak, unknown = json.loads(done.stdout.splitlines()[-1])
    # One sequence per device; the weights are gathered.
    attention = 2 * 2 * 8 * (256 * 257 // 2) * 64
    assert flops == attention + 2 * 256 * 512 * 128
    assert peak > 2 * (256 * 8 * 64 + 256 * 2 * 64 + 256 * 128)
    assert unknown == []
