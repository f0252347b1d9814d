"""The connector: frame tokens of the vision tower into the decoder's embedding space."""

from typing import Any

import flax.linen as nn
import jax

from videollm_mod_jax.models.layers import Linear


class Connector(nn.Module):
    """Linear(W -> D) -> GELU -> Linear(D -> D), both with bias (`mlp2x_gelu` of LLaVA).

    The GELU is the exact one (erf), as PyTorch's default is.

    Attributes:
      hidden_size: D.
      dtype: of activations and matrix products.
      param_dtype: of parameters.
    """

    hidden_size: int
    dtype: Any
    param_dtype: Any

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
            param_dtype=self.param_dtype,
            name=name,
        )
