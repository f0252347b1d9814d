r"""What the GPU kernel over caches computes on four simulated devices: as a script, a report.

    XLA_FLAGS=--xla_force_host_platform_device_count=4 \
        python -m tests.cached_attention_devices REPORT

For every mesh, REPORT (JSON) says how the result lies, how many collectives the compiled program
holds, and how far the result is from that of one device.
"""

import functools
import json
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from videollm_mod_jax.models.cached_attention_gpu import split_attention

MESHES = {"streams": (4, 1), "streams_heads": (2, 2), "few_keys": (1, 4)}
"""By name: devices along streams and heads. With `few_keys` there are too few key/value heads."""

B, T, H, G, C, E = 4, 11, 8, 2, 200, 16
STARTS = (0, 64, 189, 5)


def arrays() -> tuple[jax.Array, ...]:
    """Random queries, keys and values."""
    rng = np.random.default_rng(0)
    shapes = ((B, T, H, E), (B, G, C, E), (B, G, C, E))
    return tuple(jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes)


def compare(mesh_shape: tuple[int, int]) -> dict:
    """One device, and four with arguments that lie as a mesh of this shape has them."""
    inputs = (*arrays(), jnp.array(STARTS, jnp.int32))
    function = jax.jit(functools.partial(split_attention, interpret=True))
    one = function(*inputs)
    mesh = jax.make_mesh(mesh_shape, ("data", "tensor"), (jax.sharding.AxisType.Auto,) * 2)
    keys = jax.P("data", "tensor" if G % mesh_shape[1] == 0 else None)
    specs = (jax.P("data", None, "tensor"), keys, keys, jax.P("data"))
    placed = [
        jax.device_put(x, jax.NamedSharding(mesh, spec))
        for x, spec in zip(inputs, specs, strict=True)
    ]
    text = function.lower(*placed).compile().as_text()
    four = function(*placed)
    return {
        "error": float(np.abs(np.asarray(four, np.float32) - np.asarray(one, np.float32)).max()),
        "split": str(four.sharding.spec),
        "collectives": len(re.findall(r"\b(?:all-|reduce-scatter|collective-p)", text)),
    }


if __name__ == "__main__":
    found = {name: compare(shape) for name, shape in MESHES.items()}
    Path(sys.argv[1]).write_text(json.dumps(found))
