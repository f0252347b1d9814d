"""The datasets that can be prepared, by name."""

from collections.abc import Mapping

from videollm_mod_jax.data.annotations import Dataset
from videollm_mod_jax.data.builders import (
    coin,
    ego4d_goalstep,
    ego4d_lta,
    ego4d_narration,
    egoexo4d,
    image_qa,
    llava_instruct,
    own,
    video_qa,
    videomme,
)
from videollm_mod_jax.errors import UserError

_MODULES = (
    own,
    ego4d_narration,
    ego4d_goalstep,
    ego4d_lta,
    coin,
    egoexo4d,
    llava_instruct,
    videomme,
    video_qa,
    image_qa,
)

DATASETS: Mapping[str, Dataset] = {
    dataset.name: dataset for module in _MODULES for dataset in module.DATASETS
}
"""Every dataset, by name."""


def find_dataset(name: str) -> Dataset:
    """The dataset of a name.

    Raises:
      UserError: there is none.
    """
    if name not in DATASETS:
        raise UserError(f"there is no dataset {name!r}; known: {', '.join(DATASETS)}")
    return DATASETS[name]
