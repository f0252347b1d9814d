"""How a model is computed. What it computes does not depend on it."""

import dataclasses

import jax

from videollm_mod_jax.models.building import require, require_choice

KERNELS = ("auto", "xla")
"""`auto` decides by the platform; the others are named in `Execution`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Execution:
    """Choices that change time and memory, and no result but for rounding.

    Attributes:
      scan: stack the decoder's layers and scan over them (training); False unrolls them, with one
        cache each (decoding).
      remat: recompute decoder blocks in the backward pass.
      kernels: what computes attention: `xla` is portable; `auto` takes the best that the platform
        has.
      mlp_rows: rows of a sequence that an MLP computes at a time; 0 takes all of them.
    """

    scan: bool = False
    remat: bool = False
    kernels: str = "auto"
    mlp_rows: int = 0

    def __post_init__(self):
        require_choice("kernels", self.kernels, KERNELS)
        require(self.mlp_rows >= 0, f"mlp_rows is {self.mlp_rows}; expected 0 or more")


def choose_kernels(kernels: str, platform: str | None = None) -> str:
    """Replaces `auto` by the kernels of a platform.

    Args:
      kernels: one of `KERNELS`.
      platform: `cpu`, `gpu` or `tpu`; None is the one of this process.
    """
    platform = jax.default_backend() if platform is None else platform
    del platform  # one kind so far
    return "xla" if kernels == "auto" else kernels
