"""The connector: frame tokens of the vision tower into the decoder's embedding space."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from videollm_mod_jax.models.layers import Linear


class Connector(nn.Module):
    """Linear(W -> D) -> GELU -> Linear(D -> D), both with bias (`mlp2x_gelu` of LLaVA).

    The GELU is the exact one (erf), as PyTorch's default is. Parameters are float32, because LoRA
    training updates them.

    Attributes:
      hidden_size: D.
      dtype: of activations and matrix products.
    """

    hidden_size: int
    dtype: Any

    @nn.compact
    def __call__(self, features_BFNW: jax.Array) -> jax.Array:
        """Maps features [..., W] to embeddings [..., D] in `dtype`."""
        hidden = self._linear("fc1", ("embed", "mlp"))(features_BFNW)
        return self._linear("fc2", ("mlp", "embed"))(jax.nn.gelu(hidden, approximate=False))

    def _linear(self, name: str, axes: tuple[str, str]) -> Linear:
        return Linear(
            self.hidden_size,
            axes,
            use_bias=True,
            lora=None,
            dtype=self.dtype,
            param_dtype=jnp.float32,
            name=name,
        )
