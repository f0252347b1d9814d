"""NVIDIA GPUs that are not here, as XLA's CUDA compiler can be told of them.

The plugin's two wheels are enough: no GPU, no driver, no CUDA toolkit. Without a GPU, kernels are
not tuned by timing them, and cuDNN is not asked for its workspace, which is missing from the memory
of a program.
"""

import contextlib
import importlib.util
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jaxlib
from jax.experimental import topologies

from videollm_mod_jax.errors import UserError
from videollm_mod_jax.training.chips import JAX_GPU_FRACTION, Chip

COMPILER_OPTIONS = {"xla_gpu_autotune_level": 0}
"""Nothing can be timed where there is no GPU."""

_CUDNN_VERSION = (9, 10, 1)
_HOPPER = (9, 0)


def describe_gpu(chip: Chip) -> str:
    """A Hopper GPU in the text form of XLA's `GpuTargetConfigProto`.

    Limits of compute capability 9.0 are those of the CUDA C++ Programming Guide (technical
    specifications per compute capability); 132 multiprocessors, 50 MiB of L2 cache and the clock
    are those of the SXM boards.
    """
    major, minor, patch = _CUDNN_VERSION
    return f"""
gpu_device_info {{
  cuda_compute_capability {{ major: {_HOPPER[0]} minor: {_HOPPER[1]} }}
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  device_memory_size: {int(chip.usable_bytes / JAX_GPU_FRACTION)}
  memory_bandwidth: {int(chip.memory_bandwidth)}
  l2_cache_size: {50 * 2**20}
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: {2**31 - 1}
  block_dim_limit_y: {2**16 - 1}
  block_dim_limit_z: {2**16 - 1}
  registers_per_core_limit: {2**16}
  registers_per_block_limit: {2**16}
  shared_memory_per_core: {228 * 2**10}
  shared_memory_per_block: {48 * 2**10}
  shared_memory_per_block_optin: {227 * 2**10}
  device_address_bits: 64
  dnn_version: "{major}.{minor}.{patch}"
  driver_version: "12.8.0"
  runtime_version: "12.8.0"
  compile_time_toolkit_version: "12.8.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: {major} minor: {minor} patch: {patch} }}
device_description_str: "NVIDIA {chip.name.upper()}"
"""


def find_gpus(chip: Chip, count: int) -> Sequence[Any]:
    """Devices of one host to compile for.

    Raises:
      UserError: the plugin is not installed.
    """
    names = [f"jax_plugins.xla_cuda{major}" for major in (12, 13)]
    if not importlib.util.find_spec("jax_plugins") or not any(map(importlib.util.find_spec, names)):
        version = jaxlib.__version__
        raise UserError(
            f"compiling for {chip.name} needs the CUDA compiler, not a GPU: "
            f"pip install jax-cuda12-plugin=={version} jax-cuda12-pjrt=={version}"
        )
    # Without them the plugin looks for the libraries of CUDA, which only running needs.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    found = topologies.get_topology_desc(
        platform="cuda",
        topology_name="",
        target_config=describe_gpu(chip),
        topology=f"1x1x{count}",
    )
    return found.devices


@contextlib.contextmanager
def cudnn_taken_for_granted() -> Iterator[None]:
    """Lets attention of cuDNN be traced for a Hopper GPU that is not here.

    JAX asks the GPU of this process three questions before it traces the call; inside, they are
    answered for the GPU that `describe_gpu` describes.
    """
    # Private, and needed nowhere else.
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    major, minor, patch = _CUDNN_VERSION
    answers = {
        "check_cudnn_version": lambda: 10_000 * major + 100 * minor + patch,
        "check_compute_capability": lambda least: _version(least) <= _HOPPER,
        "is_cuda_compute_capability_equal": lambda other: _version(other) == _HOPPER,
    }
    asked = {name: getattr(cudnn, name) for name in answers}
    try:
        for name, answer in answers.items():
            setattr(cudnn, name, answer)
        yield
    finally:
        for name, question in asked.items():
            setattr(cudnn, name, question)


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))
