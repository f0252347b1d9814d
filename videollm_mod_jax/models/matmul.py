"""The product of rows with a kernel, and a gradient of the kernel that moves little memory."""

import functools
from typing import Any

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(x: jax.Array, kernel: jax.Array, out_dtype: Any) -> jax.Array:
    """x @ kernel, differentiable in reverse mode.

    The kernel's gradient sums over rows, for which one of its two operands has to be transposed
    wherever a matmul reads its left one by rows, as XLA's on CPUs do. JAX always has the gradient
    of the result there. Here it is the narrower of the two:

    ```
    d_y [rows, 4], x [rows, 2]      (x  transposed: [2, rows]) @ d_y      -> d_kernel [2, 4]
    d_y [rows, 2], x [rows, 4]      (d_y transposed: [2, rows]) @ x = [2, 4]  -> transposed
    ```

    Args:
      x: [..., in].
      kernel: [in, out].
      out_dtype: of the product, and of its gradients before they are rounded to their arguments'.

    Returns:
      [..., out] in `out_dtype`.
    """
    return jnp.matmul(x, kernel, preferred_element_type=out_dtype)


def _forward(x: jax.Array, kernel: jax.Array, out_dtype: Any):
    return matmul(x, kernel, out_dtype), (x, kernel)


def _backward(out_dtype: Any, saved: tuple[jax.Array, jax.Array], d_y: jax.Array):
    x, kernel = saved
    d_x = jnp.matmul(d_y, kernel.T, preferred_element_type=out_dtype)

    def over_rows(a: jax.Array, b: jax.Array) -> jax.Array:
        rows = tuple(range(x.ndim - 1))
        summed = ((rows, rows), ((), ()))
        return jax.lax.dot_general(a, b, summed, preferred_element_type=out_dtype)

    d_kernel = over_rows(x, d_y) if x.shape[-1] < d_y.shape[-1] else over_rows(d_y, x).T
    return d_x.astype(x.dtype), d_kernel.astype(kernel.dtype)


matmul.defvjp(_forward, _backward)
