"""The model in float64: what is equal but for rounding differs by 1e-10 there, on any processor."""

import contextlib
import copy
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import pytest

from videollm_mod_jax.models import VideoLLMConfig


@contextlib.contextmanager
def double_precision() -> Iterator[None]:
    """Computes in float64 what the package computes in float32, in the block.

    The order in which float32 numbers are summed is the compiler's and the processor's; properties
    that hold in exact arithmetic are proved here, where the order is far below what a mistake is.
    """
    with jax.enable_x64(True), pytest.MonkeyPatch.context() as patch:
        # Where the package names a dtype itself (scores, norms, logits), it writes jnp.float32.
        patch.setattr(jnp, "float32", jnp.float64)
        yield


def widened(config: VideoLLMConfig) -> VideoLLMConfig:
    """Return a config whose parameters and activations are float64, which users cannot choose."""
    config = copy.copy(config)
    for field in ("dtype", "param_dtype"):
        object.__setattr__(config, field, "float64")
    return config
