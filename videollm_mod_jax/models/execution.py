"""How a model is computed. What it computes does not depend on it."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from videollm_mod_jax.config_dict import COUNT_OR_NONE, Checked, require, require_choice

KERNELS = ("auto", "xla", "gpu", "tpu")
"""`auto` decides by the platform and the model; the others are described in `Execution`."""

_SERVED = {
    # Hopper serves 256, too; what JAX traces for must not depend on the kind of GPU.
    "gpu": (("bfloat16", "float16"), 8, 128),
    "tpu": (("bfloat16",), 64, 256),
}
"""By kernels: dtypes, what divides the width of heads, and how wide they may be."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Execution(Checked):
    """Choices that change time and memory, and no result but for rounding.

    Attributes:
      scan: stack the decoder's layers and scan over them (training); False unrolls them, with one
        cache each (decoding).
      remat: recompute decoder blocks in the backward pass.
      kernels: what computes attention: `gpu`: cuDNN's flash attention; `tpu`: Splash; `xla`: blocks
        in plain XLA, on every platform; `auto`: the first of them that can serve. See
        `choose_kernels`.
      row_chunk: most rows of a sequence that an MLP computes at a time; 0 takes all of them. Each
        chunk is recomputed in the backward pass, with `remat` (then nothing else of the MLP is) and
        without.
      vocab_chunk: logits of a position that the loss has in memory at a time; 0 takes all of them.
        The head is computed once more in the backward pass. For a head that is not split over the
        vocabulary: one that is (tensor parallelism) has a part of the logits per device as it is.
    """

    scan: bool = False
    remat: bool = False
    kernels: str = "auto"
    row_chunk: COUNT_OR_NONE = 0
    vocab_chunk: COUNT_OR_NONE = 0

    def __post_init__(self):
        super().__post_init__()
        require_choice("kernels", self.kernels, KERNELS)


def current_platform() -> str:
    """`cpu`, `gpu` or `tpu`: of the mesh that is set, wherever it is, else of this process."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def choose_kernels(kernels: str, platform: str, dtype: DTypeLike, head_dim: int) -> str:
    """Replaces `auto` by the best kernels that a platform has for a model, else by `xla`.

    Args:
      kernels: one of `KERNELS`.
      platform: see `current_platform`.
      dtype: of queries, keys and values.
      head_dim: their width, E.

    Raises:
      UserError: kernels that were asked for cannot serve.
    """
    if kernels == "xla" or (kernels == "auto" and platform not in _SERVED):
        return "xla"
    require(
        kernels in ("auto", platform),
        f"kernels is {kernels!r}, which needs a {kernels.upper()}; this runs on {platform}: choose "
        "'auto' or 'xla'",
    )
    dtypes, multiple, widest = _SERVED[platform]
    dtype = jnp.dtype(dtype).name
    serves = dtype in dtypes and head_dim % multiple == 0 and head_dim <= widest
    require(
        serves or kernels == "auto",
        f"kernels is {kernels!r}, which serves {' and '.join(dtypes)} with head_dim a multiple of "
        f"{multiple} up to {widest}; the model has dtype {dtype} and head_dim {head_dim}: choose "
        "'auto' or 'xla'",
    )
    return platform if serves else "xla"
