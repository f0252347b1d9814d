"""The datasets that can be prepared, by name."""

import importlib
import importlib.util
from collections.abc import Mapping

from videollm_mod_jax.data.annotations import Dataset
from videollm_mod_jax.errors import UserError

_NAMES = (
    "ego4d_narration",
    "ego4d_goalstep",
    "ego4d_lta",
    "coin",
    "egoexo4d",
    "llava_instruct",
    "video_qa",
    "videomme",
    "image_qa",
    "own",
)


def _load(name):
    try:
        return importlib.import_module(f"videollm_mod_jax.data.builders.{name}").DATASETS
    except (ImportError, AttributeError, SyntaxError, NameError):
        return ()


DATASETS: Mapping[str, Dataset] = {d.name: d for name in _NAMES for d in _load(name)}
"""Every dataset, by name."""


def find_dataset(name: str) -> Dataset:
    """The dataset of a name.

    Raises:
      UserError: there is none.
    """
    if name not in DATASETS:
        raise UserError(f"there is no dataset {name!r}; known: {', '.join(DATASETS)}")
    return DATASETS[name]
