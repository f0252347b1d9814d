"""Compiles programs for devices that need not be here, and reads what the compiler says of them.

TPU compilers run without a TPU: `libtpu` alone is enough. CUDA's runs without a GPU (`gpu`).
"""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from videollm_mod_jax.errors import UserError
from videollm_mod_jax.models import VideoLLMConfig
from videollm_mod_jax.training import gpu, hlo
from videollm_mod_jax.training.chips import CHIPS, GIB, Chip


@dataclasses.dataclass(frozen=True)
class Target:
    """What to compile for.

    Attributes:
      topology: its name, `v5p:2x2x2`.
      devices: of the topology; one per chip of `CHIPS`.
      chip: None for simulated CPU devices, about which nothing is known.
    """

    topology: str
    devices: Sequence[Any]
    chip: Chip | None

    @property
    def platform(self) -> str:
        """`cpu`, `gpu` or `tpu`."""
        return self.chip.platform if self.chip else "cpu"

    def tracing(self) -> contextlib.AbstractContextManager[None]:
        """What programs for the target are lowered in, beside the mesh."""
        return gpu.cudnn_taken_for_granted() if self.platform == "gpu" else contextlib.nullcontext()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """What the compiler says of a program, per device.

    Attributes:
      fits: in the memory of the device, as the compiler sees it; where False, all but `refusal` and
        `needed_bytes` is None.
      refusal: the first line of what the compiler said; empty where it fits.
      needed_bytes: what a refused program would need, where the compiler says it; else None.
      peak_bytes: most memory in use at any time, arguments included. The CPU compiler does not say;
        there it is the sum of arguments, results and temporaries, which is never less.
      argument_bytes: of all inputs.
      cost: read from the program's text, loops multiplied out.
      flops_loops_once: of XLA's own analysis, which counts the body of a loop once; None on GPUs,
        for which there is none.
    """

    fits: bool
    refusal: str = ""
    needed_bytes: int | None = None
    peak_bytes: int | None = None
    argument_bytes: int | None = None
    cost: hlo.Cost | None = None
    flops_loops_once: float | None = None


def claim_no_device(topology: str) -> None:
    """Keeps this process off the devices of its machine; to be called before JAX looks for any.

    Args:
      topology: as for `find_target`; of `cpu:8`, the devices are simulated.
    """
    jax.config.update("jax_platforms", "cpu")
    kind, _, count = topology.partition(":")
    if kind == "cpu" and count.isdigit():
        jax.config.update("jax_num_cpu_devices", int(count))


def find_target(topology: str) -> Target:
    """The devices of a topology: chips that need not exist, or simulated CPU devices.

    Args:
      topology: `v5p:2x2x2`: generation and chips along each axis; `h200:8`: GPUs of one host; or
        `cpu:8`, which needs as many CPU devices in this process (`jax_num_cpu_devices`).

    Raises:
      UserError: an unknown topology, or the compiler for it is not installed.
    """
    kind, _, shape = topology.partition(":")
    if kind == "cpu" and shape.isdigit() and int(shape) > 0:
        devices = jax.devices("cpu")[: int(shape)]
        if len(devices) < int(shape):
            raise UserError(f"topology {topology}: this process has {len(devices)} CPU devices")
        return Target(topology, devices, None)
    chip = CHIPS.get(kind)
    shapes = {"tpu": r"\d+(x\d+)+", "gpu": "[1-8]"}
    if chip is None or not re.fullmatch(shapes[chip.platform], shape):
        raise UserError(
            f"topology is {topology!r}; expected chips along each axis, such as v5e:4x4 or "
            f"v5p:2x2x2, up to 8 GPUs of a host, such as h200:8, or cpu:8; known chips: "
            f"{', '.join(CHIPS)}"
        )
    if chip.platform == "gpu":
        return Target(topology, gpu.find_gpus(chip, int(shape)), chip)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f'compiling for {topology} needs the TPU compiler, not a TPU: pip install -e ".[tpu]", '
            "which takes the libtpu that fits the installed jax"
        )
    # No metadata server need be asked for a TPU, and another process may hold libtpu.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except jax.errors.JaxRuntimeError as error:
        line = str(error).splitlines()[0]
        raise UserError(f"libtpu knows no topology {topology}: {line}") from error
    return Target(topology, found.devices, chip)


def abstract_batch(
    config: VideoLLMConfig, batch_size: int, frames: int, text_tokens: int, labels: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of a training batch, as `data.pipeline` stacks it.

    Args:
      config: of the model.
      batch_size: B, over all processes.
      frames: F.
      text_tokens: of the budget; S = text_tokens + F * N.
      labels: J.
    """
    length = text_tokens + frames * config.tokens_per_frame
    features = (frames, config.vision.features_per_frame, config.vision.width)
    shapes = {
        "tokens": ((length,), np.int32),
        "frame_starts": ((frames,), np.int32),
        "features": (features, np.float32),
        "label_positions": ((labels,), np.int32),
        "labels": ((labels,), np.int32),
        "label_kinds": ((labels,), np.int8),
    }
    return {
        name: jax.ShapeDtypeStruct((batch_size, *shape), dtype)
        for name, (shape, dtype) in shapes.items()
    }


def compile_program(lowered: jax.stages.Lowered, target: Target) -> Program:
    """Compiles for a target, and reads memory and cost; too large is an answer, too.

    Raises:
      UserError: the compiler is so much newer than JAX that JAX cannot read what it made.
    """
    try:
        compiled = lowered.compile(*([gpu.COMPILER_OPTIONS] if target.platform == "gpu" else []))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return refused(str(error))
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"jaxlib cannot read the program that the compiler for {target.topology} made "
            f"({'; '.join(f'{name} {version}' for name, version in versions().items())}); install "
            f'the compiler that fits: pip install "jax[tpu]=={jax.__version__}"'
        ) from error
    memory = compiled.memory_analysis()
    peak = memory.peak_memory_in_bytes
    if target.chip is None:
        results = memory.output_size_in_bytes - memory.alias_size_in_bytes
        peak = memory.argument_size_in_bytes + results + memory.temp_size_in_bytes
    return Program(
        fits=True,
        peak_bytes=peak,
        argument_bytes=memory.argument_size_in_bytes,
        cost=hlo.cost(text),
        flops_loops_once=(compiled.cost_analysis() or {}).get("flops"),
    )


def refused(message: str) -> Program:
    """Reads what a compiler says when a program does not fit.

    ```
    RESOURCE_EXHAUSTED: ... Used 17.51G of 15.75G hbm ...            needs 17.51 GiB
    RESOURCE_EXHAUSTED: ... (20.00G) exceeds available HBM (15.75G)   needs 20 GiB
    ```
    """
    sizes = re.search(r"Used ([\d.]+)([KMG]) of", message) or re.search(
        r"\(([\d.]+)([KMG])\) exceeds", message
    )
    unit = {"K": 2**10, "M": 2**20, "G": GIB}
    needed = int(float(sizes[1]) * unit[sizes[2]]) if sizes else None
    return Program(fits=False, refusal=message.splitlines()[0], needed_bytes=needed)


def bytes_per_device(tree: Any) -> int:
    """Bytes of one device's part of abstract arrays, by their shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def roofline_seconds(cost: hlo.Cost, chip: Chip) -> Mapping[str, float]:
    """Time that each resource of a chip takes at its peak; the slowest of them is the step's.

    An estimate: no program reaches a peak, and `memory_bytes` is itself one.
    """
    return {
        "compute": cost.flops / chip.peak_flops,
        "memory": cost.memory_bytes / chip.memory_bandwidth,
        "network": sum(c.sent_bytes for c in cost.collectives) / chip.network_bandwidth,
    }


def versions() -> dict[str, str]:
    """Of the packages that the numbers depend on; those that are absent are left out."""
    out = {}
    for name in ("jax", "jaxlib", "libtpu", "jax-cuda12-pjrt", "jax-cuda13-pjrt"):
        try:
            out[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return out
