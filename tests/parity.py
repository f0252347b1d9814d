"""Comparing stages with those of transformers, for several test files; needs torch."""

import numpy as np
import torch
import transformers

from videollm_mod_jax.conversion.reference import Reference

TOKENS = 32


def reference(model, tower=None, vision=None) -> Reference:
    """A model of transformers that shows its stages."""
    return Reference(torch, transformers, model, tower, vision)


def assert_same(expected, found) -> None:
    """Each module to 1e-5, logits to 1e-4, and every greedy token."""
    stages, ids = expected
    assert stages.keys() == found[0].keys()
    for name, value in stages.items():
        tolerance = 1e-4 if name == "logits" else 1e-5
        np.testing.assert_allclose(found[0][name], value, atol=tolerance, rtol=0, err_msg=name)
    assert len(ids) == TOKENS
    assert found[1] == ids
    # Flat logits would hide a difference.
    assert np.std(stages["logits"]) > 0.3
