"""Linear, RMSNorm and the low-rank adapters that a Linear may carry.

Parameters declare logical axis names (`embed`, `heads`, `kv_heads`, `mlp`, `inner`, `embed_out`,
`vocab`, `lora_rank`, `layers`); what they mean on a mesh is said once, in `training/sharding.py`.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import qwix

from videollm_mod_jax.errors import UserError
from videollm_mod_jax.models.config import LoraConfig
from videollm_mod_jax.models.matmul import matmul

kernel_init = nn.initializers.variance_scaling(1.0, "fan_in", "normal")


def rms_norm(x: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
    """x / sqrt(mean(x²) + eps) * scale over the last axis, computed in float32, in x's dtype."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (normed * scale_D.astype(jnp.float32)).astype(x.dtype)


class RMSNorm(nn.Module):
    """`rms_norm` with a learnt scale, one at the start."""

    eps: float
    param_dtype: Any

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., D]."""
        return rms_norm(x, self.scale(x.shape[-1]), self.eps)

    @nn.compact
    def scale(self, width: int) -> jax.Array:
        """The scale [width], made where it is missing."""
        init = nn.with_logical_partitioning(nn.initializers.ones_init(), ("embed",))
        return self.param("scale", init, (width,), self.param_dtype)


@flax.struct.dataclass
class LinearWeights:
    """What a linear computes with, apart from the module that owns it.

    So a loop over rows, or over columns of the output, is a plain `jax.lax` loop whose weights
    stand outside.

    Attributes:
      kernel: [in, out].
      bias: [out], or None.
      a, b: [in, R] and [R, out] of the adapter, float32; None without one.
      scale: alpha / R of the adapter.
      dropout: chance that an input of the adapter is dropped where a key is given.
      dtype: of the product.
      out_dtype: of the output.
    """

    kernel: jax.Array | qwix.QArray
    bias: jax.Array | None
    a: jax.Array | None
    b: jax.Array | None
    scale: float = flax.struct.field(pytree_node=False)
    dropout: float = flax.struct.field(pytree_node=False)
    dtype: Any = flax.struct.field(pytree_node=False)
    out_dtype: Any = flax.struct.field(pytree_node=False)

    def apply(self, x: jax.Array, dropout_key: jax.Array | None) -> jax.Array:
        """x W (+ bias) (+ scale * drop(x) A B): [..., in] -> [..., out]."""
        return self.from_rank(x, self.to_rank(x, dropout_key))

    def to_rank(self, x: jax.Array, dropout_key: jax.Array | None) -> jax.Array | None:
        """drop(x) A: [..., in] -> [..., R], or None without an adapter."""
        if self.a is None:
            return None
        x = x.astype(self.dtype)
        if self.dropout > 0 and dropout_key is not None:
            stays = _bernoulli(dropout_key, 1 - self.dropout, x.shape)
            x = jnp.where(stays, x / (1 - self.dropout), 0).astype(self.dtype)
        return _product(x, self.a, self.dtype, self.dtype)

    def from_rank(self, x: jax.Array, low_rank: jax.Array | None) -> jax.Array:
        """`apply`, given what `to_rank` gave."""
        y = _product(x.astype(self.dtype), self.kernel, self.dtype, self.out_dtype)
        if self.bias is not None:
            y = y + self.bias.astype(self.out_dtype)
        if low_rank is not None:
            low_rank = low_rank.astype(self.dtype)
            y = y + self.scale * _product(low_rank, self.b, self.dtype, self.out_dtype)
        return y

    def columns(self, start: jax.Array, size: int) -> "LinearWeights":
        """The weights of `size` neighbouring outputs."""

        def cut(leaf: jax.Array | None) -> jax.Array | None:
            if leaf is None:
                return None
            return jax.lax.dynamic_slice_in_dim(leaf, start, size, axis=leaf.ndim - 1)

        return self.replace(kernel=cut(self.kernel), bias=cut(self.bias), b=cut(self.b))


class Linear(nn.Module):
    """y = x W (+ b) (+ the low-rank update of LoRA).

    The adapter lives in its own variable collection, `lora`, so that its gradients, optimizer state
    and checkpoints are just that tree. Dropout acts on the adapter's input when the caller of
    `apply` gives a `dropout` rng, which is what training does.

    Attributes:
      features: width of the output.
      axes: logical names of the kernel's (input, output) axes.
      use_bias: whether b exists.
      lora: the adapter's configuration, or None for a linear without one.
      dtype: of the product.
      param_dtype: of kernel and bias; the adapter is float32, because small updates to bfloat16
        numbers are lost to rounding.
      out_dtype: of the output; None means `dtype`.
    """

    features: int
    axes: tuple[str, str]
    use_bias: bool
    lora: LoraConfig | None
    dtype: Any
    param_dtype: Any
    out_dtype: Any = None

    def __call__(
        self,
        x: jax.Array,
        kernel: jax.Array | None = None,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """[..., in] -> [..., features].

        Args:
          x: rows.
          kernel: [in, features] of a tied head; None for its own.
          dropout_key: from `dropout_key` of a linear on the same rows, whose mask is taken then;
            None draws another.
        """
        if dropout_key is None:
            dropout_key = self.dropout_key()
        return self.weights(x.shape[-1], kernel).apply(x, dropout_key)

    def dropout_key(self) -> jax.Array | None:
        """The key of this call's dropout, or None where nothing is dropped."""
        drops = self.lora is not None and self.lora.dropout > 0 and self.has_rng("dropout")
        return self.make_rng("dropout") if drops else None

    @nn.compact
    def weights(self, inputs: int, kernel: jax.Array | None = None) -> LinearWeights:
        """The weights, made where they are missing; `kernel` as in `__call__`."""
        (axis_in, axis_out), features = self.axes, self.features
        if kernel is None:
            init = nn.with_logical_partitioning(kernel_init, self.axes)
            kernel = self.param("kernel", init, (inputs, features), self.param_dtype)
        bias = a = b = None
        if self.use_bias:
            init = nn.with_logical_partitioning(nn.initializers.zeros_init(), (axis_out,))
            bias = self.param("bias", init, (features,), self.param_dtype)
        if self.lora is not None:
            rank = self.lora.rank
            zeros = nn.initializers.zeros_init()
            a = self._adapter("a", kernel_init, (axis_in, "lora_rank"), (inputs, rank))
            b = self._adapter("b", zeros, ("lora_rank", axis_out), (rank, features))
        return LinearWeights(
            kernel=kernel,
            bias=bias,
            a=a,
            b=b,
            scale=self.lora.alpha / self.lora.rank if self.lora else 1.0,
            dropout=self.lora.dropout if self.lora else 0.0,
            dtype=self.dtype,
            out_dtype=self.out_dtype or self.dtype,
        )

    def _adapter(self, name: str, init: Any, axes: tuple[str, str], shape: tuple[int, int]):
        def make():
            boxed = nn.with_logical_partitioning(init, axes)
            return boxed(self.make_rng("params"), shape, jnp.float32)

        return self.variable("lora", name, make).value


def _bernoulli(key: jax.Array, chance: float, shape: tuple[int, ...]) -> jax.Array:
    """Independent booleans, each true with `chance`, to a 65536th: half the bits of `bernoulli`."""
    *rows, width = shape
    bits = jax.random.bits(key, (*rows, -(-width // 2)), jnp.uint32)
    halves = jnp.concatenate([bits >> 16, bits & 0xFFFF], axis=-1)
    return halves[..., :width] < round(chance * 2**16)


def _product(
    x: jax.Array, kernel: jax.Array | qwix.QArray, dtype: Any, out_dtype: Any
) -> jax.Array:
    if isinstance(kernel, qwix.QArray):
        # Integers up to 127 are exact in every dtype; their scale, one per output, is applied to
        # the product, where it need not be rounded to `dtype`.
        product = jnp.matmul(x, kernel.qvalue.astype(dtype), preferred_element_type=jnp.float32)
        return (product * kernel.scale[0]).astype(out_dtype)
    return matmul(x, kernel.astype(dtype), out_dtype)


def merge_lora(variables: Mapping[str, Any], lora: LoraConfig) -> dict[str, Any]:
    """Adds every adapter to its kernel: W + (alpha / rank) A B.

    Args:
      variables: `{'params': ..., 'lora': ...}`, layers stacked or not.
      lora: the adapters' configuration.

    Returns:
      `{'params': ...}`, which computes the same without adapters.

    Raises:
      UserError: an adapter on a tied output head, which has no kernel of its own.
    """

    def merge(params: Mapping[str, Any], adapters: Mapping[str, Any], path: str) -> dict[str, Any]:
        merged = dict(params)
        if "a" in adapters and "b" in adapters:
            if "kernel" not in params:
                raise UserError(
                    f"the adapter at {path} sits on a tied output head and cannot be merged; "
                    "untie the embeddings or leave lm_head out of lora.targets"
                )
            update = jnp.matmul(adapters["a"], adapters["b"], precision="highest")
            kernel = params["kernel"]
            merged["kernel"] = (kernel + lora.alpha / lora.rank * update).astype(kernel.dtype)
            return merged
        for name, child in adapters.items():
            merged[name] = merge(params.get(name, {}), child, f"{path}/{name}")
        return merged

    return {"params": merge(variables["params"], variables.get("lora", {}), "")}
