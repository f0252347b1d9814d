"""The variables of a model directory, read one by one: of models larger than memory."""

from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict

from videollm_mod_jax.errors import UserError
from videollm_mod_jax.models import VideoLLM
from videollm_mod_jax.training.checkpoint import (
    read_model_config,
    stored_parts,
    stored_tree,
    verify_part,
)
from videollm_mod_jax.training.checkpointer import reading
from videollm_mod_jax.training.sharding import abstract_variables


class StoredModel:
    """A converted model, or a training run with the variables of its newest checkpoint.

    Attributes:
      directory: of the model.
      config: what `model.json` says.
      shapes: by path, shape and dtype of every variable.
    """

    def __init__(self, directory: Path, *, verify: bool = False):
        """Opens a model; without `verify`, nothing but metadata is read.

        Args:
          directory: of the model.
          verify: whether to compare all files of its variables with their checksums.

        Raises:
          UserError: there is none, it is damaged, or its weights are not those that `model.json`
            describes.
        """
        self.directory = directory
        self.config = read_model_config(directory)
        self.shapes = flatten_dict(abstract_variables(VideoLLM(self.config), None), sep="/")
        self._places: dict[str, Path] = {}
        for part in stored_parts(directory):
            if verify:
                verify_part(part)
            for path, shape in _stored_shapes(part, len(self.shapes)).items():
                if path in self.shapes and shape == self.shapes[path].shape:
                    self._places[path] = part
        absent = [path for path in self.shapes if path not in self._places]
        if absent:
            raise UserError(
                f"{directory} holds no {absent[0]} {list(self.shapes[absent[0]].shape)}, which its "
                "model.json describes; the model is damaged: convert or train it again"
            )

    def read(self, path: str) -> np.ndarray:
        """A variable, in memory of its own, in the dtype that `shapes` gives.

        Raises:
          UserError: the files that hold it are damaged.
        """
        leaf = self.shapes[path]
        wanted = unflatten_dict({path: leaf}, sep="/")
        how = ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype)
        args = ocp.args.PyTreeRestore(
            wanted, restore_args=jax.tree.map(lambda _: how, wanted), partial_restore=True
        )
        part = self._places[path]
        with reading(part), ocp.PyTreeCheckpointer() as checkpointer:
            restored = checkpointer.restore(part.absolute(), args=args)
        return flatten_dict(restored, sep="/")[path]


def _stored_shapes(part: Path, arrays: int) -> dict[str, tuple[int, ...]]:
    tree = stored_tree(part, arrays)
    return {path: tuple(leaf.shape) for path, leaf in flatten_dict(tree, sep="/").items()}
