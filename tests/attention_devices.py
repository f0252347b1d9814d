"""What attention on eight simulated devices computes, beside one: as a script, a report.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m tests.attention_devices REPORT

For every mesh and kernel, REPORT (JSON) says how far result and gradients are from those of one
device, and which collectives the compiled program holds.
"""

import contextlib
import functools
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from videollm_mod_jax.models import attention_splash
from videollm_mod_jax.models.attention import causal_attention
from videollm_mod_jax.training import hlo, sharding

MESHES = {"fsdp_tensor": (2, 2, 2), "few_keys": (1, 2, 4), "uneven": (4, 2, 1)}
"""By name: devices along data, fsdp and tensor. With `few_keys`, tensor does not divide the
key/value heads; with `uneven`, the devices do not divide the batch."""

KERNELS = ("xla", "tpu")
T, H, G, E = 300, 8, 2, 64


def arrays(batch_size: int) -> tuple[np.ndarray, ...]:
    """Random q, k, v and weights of the result."""
    rng = np.random.default_rng(0)
    return tuple(
        rng.normal(size=(batch_size, T, heads, E)).astype(np.float32) for heads in (H, G, G, H)
    )


def with_gradients(kernels: str, q, k, v, d_out):
    """Result and gradients of q, k, v."""
    out, pullback = jax.vjp(functools.partial(causal_attention, kernels=kernels), q, k, v)
    return out, *pullback(d_out)


def compare(kernels: str, name: str) -> dict:
    """One device without a mesh, and eight as the mesh has them."""
    inputs = arrays(4 if name == "uneven" else 8)
    function = functools.partial(with_gradients, kernels)
    one = jax.jit(function)(*inputs)
    layout = sharding.make_layout("fsdp_tensor", MESHES[name])
    batch = None if name == "uneven" else sharding.BATCH_AXES
    tensor = layout.mesh.shape["tensor"]
    placed = [
        jax.device_put(
            x,
            jax.NamedSharding(
                layout.mesh,
                jax.P(batch, None, "tensor" if x.shape[2] % tensor == 0 else None),
            ),
        )
        for x in inputs
    ]
    with layout.active():
        compiled = jax.jit(function).lower(*placed).compile()
    eight = compiled(*placed)
    return {
        "error": max(
            float(jnp.linalg.norm(a - np.asarray(b)) / jnp.linalg.norm(a))
            for a, b in zip(one, eight, strict=True)
        ),
        "collectives": [c.kind for c in hlo.cost(compiled.as_text()).collectives],
    }


@contextlib.contextmanager
def interpreted():
    """Splash as XLA computes it step by step, without a TPU."""
    make = attention_splash.splash.make_splash_mqa
    attention_splash.splash.make_splash_mqa = functools.partial(make, interpret=True)
    try:
        yield
    finally:
        attention_splash.splash.make_splash_mqa = make


if __name__ == "__main__":
    with interpreted():
        found = {k: {name: compare(k, name) for name in MESHES} for k in KERNELS}
    Path(sys.argv[1]).write_text(json.dumps(found))
