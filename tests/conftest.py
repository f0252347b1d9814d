"""Shared by all tests: everything runs on the CPU, whatever the machine has."""

import os
import sys

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile many tiny programs and run each once: optimising them costs more than it saves.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
    ]
).strip()


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """Lets go of a file's compiled programs, whose memory maps a process may have only so many of.

    Linux gives 65,530 (vm.max_map_count); a worker that compiles thousands of programs would crash.
    """
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
