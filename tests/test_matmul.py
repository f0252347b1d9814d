"""The product of rows with a kernel: JAX's own, but for the order in which a gradient is summed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from videollm_mod_jax.models.matmul import matmul

ROWS = (2, 7)


def gradients(product, inputs, outputs, dtype, out_dtype):
    """Of a loss that weighs every output: (d_x, d_kernel)."""
    rng = np.random.default_rng(inputs)
    x, kernel = (
        jnp.asarray(rng.normal(size=shape), dtype) for shape in ((*ROWS, inputs), (inputs, outputs))
    )
    weights = jnp.asarray(rng.normal(size=(*ROWS, outputs)), jnp.float32)

    def loss(x, kernel):
        return jnp.sum(weights * jnp.sin(product(x, kernel, out_dtype).astype(jnp.float32)))

    return jax.jit(jax.grad(loss, argnums=(0, 1)))(x, kernel)


def plain(x, kernel, out_dtype):
    return jnp.matmul(x, kernel, preferred_element_type=out_dtype)


@pytest.mark.parametrize(("inputs", "outputs"), [(5, 3), (3, 5), (4, 4), (1, 6)])
@pytest.mark.parametrize(
    ("dtype", "out_dtype", "tolerance"),
    [("float32", "float32", 1e-6), ("bfloat16", "bfloat16", 1e-2), ("bfloat16", "float32", 1e-2)],
)
def test_gradients_are_those_of_jax(inputs, outputs, dtype, out_dtype, tolerance):
    ours = gradients(matmul, inputs, outputs, dtype, out_dtype)
    theirs = gradients(plain, inputs, outputs, dtype, out_dtype)
    for a, b in zip(ours, theirs, strict=True):
        assert (a.shape, a.dtype) == (b.shape, jnp.dtype(dtype))
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


@pytest.mark.parametrize(("inputs", "outputs"), [(2, 4), (4, 2)])
def test_the_narrower_operand_is_transposed_as_the_drawn_example_draws(inputs, outputs):
    x, kernel = jnp.zeros((3, inputs)), jnp.zeros((inputs, outputs))
    gradient = jax.make_jaxpr(jax.grad(lambda k: jnp.sum(matmul(x, k, "float32") ** 2)))(kernel)
    (over_rows,) = [
        [operand.aval.shape for operand in equation.invars]
        for equation in gradient.eqns
        if equation.primitive.name == "dot_general"
        and equation.params["dimension_numbers"][0] == ((0,), (0,))
    ]
    assert over_rows == [(3, 2), (3, 4)]
