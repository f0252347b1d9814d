"""What the devices of this process are, and what they reach in practice."""

import dataclasses
import importlib.metadata
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from videollm_mod_jax.benchmarking.timing import measure

_PACKAGES = ("jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin", "flax", "optax")
_CPUINFO = Path("/proc/cpuinfo")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peaks:
    """What one device reaches where nothing holds it up, measured.

    Attributes:
      flops: of large matrix products, per second; a multiply-add is two.
      bandwidth: of device memory, in bytes per second that a sum over a large matrix reads, or its
        product with a vector.
    """

    flops: float
    bandwidth: float


def describe() -> dict[str, Any]:
    """The devices of this process, the host, and the versions that numbers depend on, for JSON."""
    device = jax.local_devices()[0]
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "platform": device.platform,
        "kind": _processor() if device.platform == "cpu" else device.device_kind,
        "count": jax.device_count(),
        "memory_bytes": (device.memory_stats() or {}).get("bytes_limit"),
        "host_cores": _cores(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "versions": versions,
    }


def name(description: dict[str, Any]) -> str:
    """One line for titles, of what `describe` gave.

    ```
    NVIDIA H200      2 x TPU v5p      AMD EPYC, 2 cores
    ```
    """
    kind, count = description["kind"], description["count"]
    if description["platform"] == "cpu":
        kind = f"{kind}, {description['host_cores']} cores"
    return kind if count == 1 else f"{count} x {kind}"


def measured_peaks(dtype: str) -> Peaks:
    """Times matrix products and reads of memory on the first device; the best round counts.

    Many in one program, so that launching it takes no part. The operands are random: a GPU that
    multiplies zeros draws less power and clocks higher.

    Args:
      dtype: of the matrices: `bfloat16` or `float32`.
    """
    on_cpu = jax.local_devices()[0].platform == "cpu"
    side, long_side, repeats = (1536, 6144, 4) if on_cpu else (8192, 16_384, 32)

    def random_matrix(side: int) -> jax.Array:
        # Scaled so that a product is as large as its other operand.
        return jax.random.normal(jax.random.key(0), (side, side), dtype) * side**-0.5

    small, large = random_matrix(side), random_matrix(long_side)

    def repeated(function: Callable[[jax.Array, jax.Array], jax.Array]) -> Callable:
        # Each result is the next operand, or the compiler would take the work out of the loop. The
        # matrix is an argument: as a constant, it would become a part of the program.
        return jax.jit(
            lambda x, matrix: jax.lax.fori_loop(0, repeats, lambda _, y: function(y, matrix), x)
        )

    product = repeated(lambda x, matrix: x @ matrix)
    total = repeated(lambda least, matrix: jnp.sum(jnp.where(matrix > least, matrix, 0)))
    row, least = large[0], jnp.zeros((), dtype)
    variants = {
        "matrix products": lambda: product(small, small),
        "vector products": lambda: product(row, large),
        "sums": lambda: total(least, large),
    }
    timings = measure(variants, rounds=5, warmup=2)
    best = {name: min(timing.seconds) for name, timing in timings.items()}
    return Peaks(
        flops=2 * side**3 * repeats / best["matrix products"],
        bandwidth=large.nbytes * repeats / min(best["vector products"], best["sums"]),
    )


def memory_in_use() -> tuple[int, int] | None:
    """Bytes in use on the fullest device now, and the most so far; None where nobody counts."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    if not all(stats):
        return None
    return max((s["bytes_in_use"], s["peak_bytes_in_use"]) for s in stats)


def peak_memory_bytes() -> int | None:
    """The most bytes in use on any device since the process began; None where nobody counts."""
    in_use = memory_in_use()
    return in_use and in_use[1]


def _cores() -> int:
    """Of the host, that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _processor() -> str:
    """The name of the host's processor, as Linux gives it; else that of its architecture."""
    if _CPUINFO.exists():
        for line in _CPUINFO.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()
