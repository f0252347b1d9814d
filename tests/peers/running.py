"""What the peer's commands share: flags, and the same cores for both frameworks."""

import argparse
import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from videollm_mod_jax.errors import UserError


def parser(name: str, description: str) -> argparse.ArgumentParser:
    """The flags of every command; keys of the config are overridden beside them."""
    out = argparse.ArgumentParser(
        prog=f"python -m tests.peers.{name}",
        description=f"{description} Keys of the config are overridden: "
        "--config.model.decoder.num_layers=2.",
        allow_abbrev=False,
    )
    add = out.add_argument
    add("--config", required=True, metavar="FILE", help="configs/benchmark.py:tiny, say")
    add("--out", required=True, type=Path, metavar="DIR", help="for the JSON file")
    add("--rounds", type=positive, default=10, help="timed calls of each variant (10)")
    add("--warmup", type=positive, default=2, help="calls before them, not timed (2)")
    add("--threads", type=positive, help="cores that each framework may use; default: all")
    add("--compile", action="store_true", help="add the peer through torch.compile")
    return out


def prepare(threads: int | None) -> int:
    """Lets both frameworks share the process; to be called before either of them starts.

    Args:
      threads: cores for each; None takes all that this process has.

    Returns:
      the number of cores.

    Raises:
      UserError: torch, transformers or peft is not installed, or there are fewer cores.
    """
    for package in ("torch", "transformers", "peft"):
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"the peer needs {package}, which is not installed: "
                "pip install 'videollm_mod_jax[parity]'"
            )
    # JAX would take three quarters of a GPU's memory for itself.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    cores = sorted(os.sched_getaffinity(0))
    threads = threads or len(cores)
    if threads > len(cores):
        raise UserError(f"--threads is {threads}; this process may use {len(cores)} cores")
    # XLA has no other setting for the number of its threads.
    os.sched_setaffinity(0, cores[:threads])

    import torch

    torch.set_num_threads(threads)
    # What XLA does with float32 on GPUs, too: products in TF32.
    torch.set_float32_matmul_precision("high")
    return threads


def torch_device():
    """Where torch finds what JAX computes on.

    Raises:
      UserError: JAX has a GPU and torch has none, or the other way round, it is a TPU, or there are
        several devices.
    """
    import torch

    if jax.device_count() > 1:
        raise UserError(
            f"JAX has {jax.device_count()} devices; the peer runs on one: CUDA_VISIBLE_DEVICES=0"
        )
    platform = jax.default_backend()
    if (platform == "gpu") != torch.cuda.is_available() or platform not in ("cpu", "gpu"):
        theirs = "cuda" if torch.cuda.is_available() else "cpu"
        raise UserError(
            f"JAX computes on {platform} and torch on {theirs}; install both for the same device, "
            "or set JAX_PLATFORMS=cpu and CUDA_VISIBLE_DEVICES="
        )
    return torch.device("cuda" if platform == "gpu" else "cpu")


def wait(device) -> None:
    """Returns when torch has done what it was told; a CPU has, when its call returns."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def versions() -> dict[str, str]:
    """Of the peer's packages."""
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "peft")}


def ratios(medians: dict[str, float], peers: Sequence[str]) -> dict[str, float]:
    """Time of ours over that of the fastest peer, and of MoD over Full.

    ```
    ours_full 3   ours_mod 2   peer 4   peer_compiled 5
    full_to_peer 3/4     mod_to_peer 2/4     mod_to_full 2/3
    ```
    """
    peer = min(medians[name] for name in peers)
    full, mod = medians["ours_full"], medians["ours_mod"]
    return {"full_to_peer": full / peer, "mod_to_peer": mod / peer, "mod_to_full": mod / full}


def rows(result: Mapping[str, Any]) -> dict[str, list[str]]:
    """What a table says of the `seconds` of some variants, and of their `ratios`."""
    seconds = result["seconds"]
    fastest = min(s["median"] for name, s in seconds.items() if name.startswith("peer"))
    return {
        "median [ms]": [f"{1e3 * s['median']:.4g}" for s in seconds.values()],
        "interquartile range [ms]": [f"{1e3 * s['spread']:.2g}" for s in seconds.values()],
        "over the fastest peer": [f"{s['median'] / fastest:.3f}" for s in seconds.values()],
    }


def positive(text: str) -> int:
    """A flag's number, at least 1."""
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value
