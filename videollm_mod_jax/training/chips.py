"""What an accelerator chip can do, as its maker says.

TPUs: the pages "TPU v5e", "TPU v5p" and "TPU v6e" of the Cloud TPU documentation
(https://docs.cloud.google.com/tpu/docs/v5e, /v5p, /v6e). The links' bandwidth is half of what they
call bidirectional. Only `usable_bytes` is not from there: it is what the compiler named as its
limit when a program was too large (libtpu 0.0.42).

GPUs: the data sheets "NVIDIA H100" and "NVIDIA H200", SXM boards (https://www.nvidia.com/h100,
/h200). bfloat16 is given there with 2:4 sparsity, here without: half. The network is NVLink inside
a host, 900 GB/s for both directions together. `usable_bytes` is the share that JAX takes of what
CUDA reports for the board.
"""

import dataclasses
from collections.abc import Mapping

GIB = 2**30

JAX_GPU_FRACTION = 0.75
"""Of a GPU's memory, what JAX takes unless XLA_CLIENT_MEM_FRACTION says otherwise
(https://docs.jax.dev/en/latest/gpu_memory_allocation.html)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One chip, all its cores together.

    Attributes:
      name: as in the name of a topology, `v5p`.
      platform: `tpu` or `gpu`.
      usable_bytes: of its HBM, what a program may use.
      peak_flops: bfloat16 operations per second; a multiply-add is two.
      memory_bandwidth: bytes per second between HBM and the cores.
      network_bandwidth: bytes per second of its links to other chips of the slice, in one
        direction, all links together.
    """

    name: str
    platform: str
    usable_bytes: int
    peak_flops: float
    memory_bandwidth: float
    network_bandwidth: float


CHIPS: Mapping[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip(
            name="v5e",
            platform="tpu",
            usable_bytes=int(15.75 * GIB),
            peak_flops=197e12,
            memory_bandwidth=819e9,
            network_bandwidth=200e9,
        ),
        Chip(
            name="v5p",
            platform="tpu",
            usable_bytes=int(95.74 * GIB),
            peak_flops=459e12,
            memory_bandwidth=2765e9,
            network_bandwidth=600e9,
        ),
        Chip(
            name="v6e",
            platform="tpu",
            usable_bytes=int(31.25 * GIB),
            peak_flops=918e12,
            memory_bandwidth=1640e9,
            network_bandwidth=400e9,
        ),
        Chip(
            name="h100",
            platform="gpu",
            usable_bytes=int(JAX_GPU_FRACTION * 84_942_979_072),
            peak_flops=989.5e12,
            memory_bandwidth=3350e9,
            network_bandwidth=450e9,
        ),
        Chip(
            name="h200",
            platform="gpu",
            usable_bytes=int(JAX_GPU_FRACTION * 151_397_597_184),
            peak_flops=989.5e12,
            memory_bandwidth=4800e9,
            network_bandwidth=450e9,
        ),
    )
}
"""By the name that a topology begins with."""
