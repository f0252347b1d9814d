"""What an accelerator chip can do, as its maker says.

Sources: the pages "TPU v5e", "TPU v5p" and "TPU v6e" of the Cloud TPU documentation
(https://docs.cloud.google.com/tpu/docs/v5e, /v5p, /v6e). The links' bandwidth is half of what they
call bidirectional. Only `usable_bytes` is not from there: it is what the compiler named as its
limit when a program was too large (libtpu 0.0.42).
"""

import dataclasses
from collections.abc import Mapping

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One chip, all its cores together.

    Attributes:
      name: as in the name of a topology, `v5p`.
      usable_bytes: of its HBM, what a program may use.
      peak_flops: bfloat16 operations per second; a multiply-add is two.
      memory_bandwidth: bytes per second between HBM and the cores.
      network_bandwidth: bytes per second of its links to other chips of the slice, in one
        direction, all links together.
    """

    name: str
    usable_bytes: int
    peak_flops: float
    memory_bandwidth: float
    network_bandwidth: float


CHIPS: Mapping[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip(
            name="v5e",
            usable_bytes=int(15.75 * GIB),
            peak_flops=197e12,
            memory_bandwidth=819e9,
            network_bandwidth=200e9,
        ),
        Chip(
            name="v5p",
            usable_bytes=int(95.74 * GIB),
            peak_flops=459e12,
            memory_bandwidth=2765e9,
            network_bandwidth=600e9,
        ),
        Chip(
            name="v6e",
            usable_bytes=int(31.25 * GIB),
            peak_flops=918e12,
            memory_bandwidth=1640e9,
            network_bandwidth=400e9,
        ),
    )
}
"""By the name that a topology begins with."""
