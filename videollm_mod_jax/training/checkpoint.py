"""The directory of a model: what a run writes, and what streaming and evaluation load.

    DIR/model.json                VideoLLMConfig
    DIR/tokenizer.json, tokenizer_config.json
    DIR/dialogue.json             the instruction that opens every conversation
    DIR/config.json               the run's configuration; a converted model has none
    DIR/conversion.json           what a converted model was made of, and
    DIR/conversion/               the small files beside its sources; a run that starts from a
                                  converted model has both too
    DIR/weights/                  variables that no update changes, written once
    DIR/checkpoints/<step>/       trained/ optimizer/ meta/ metrics/, the newest few and those of
                                  the lowest validation loss

Layers lie on disk one by one (`decoder/layer_0`, ...), whatever layer plan, mesh or number of
processes wrote them, and are stacked again on the way in. Everything but json goes through Orbax,
which writes aside and renames, so a killed process leaves no half-written checkpoint.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from videollm_mod_jax.data import files
from videollm_mod_jax.data.files import read_json, read_json_object
from videollm_mod_jax.data.tokenizer import Tokenizer
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.models import VideoLLM, VideoLLMConfig, full_computation
from videollm_mod_jax.training.checkpointer import CHECKPOINTS, Checkpointer, damaged
from videollm_mod_jax.training.optimizer import Variables, merge_variables
from videollm_mod_jax.training.sharding import Layout, abstract_variables

MODEL_FILE = "model.json"
DIALOGUE_FILE = "dialogue.json"
CONFIG_FILE = "config.json"
MANIFEST_FILE = "conversion.json"
COMPANIONS = "conversion"
WEIGHTS = "weights"


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to stream.

    Attributes:
      config: its architecture.
      variables: of `VideoLLM(config)`.
      tokenizer: the one that it was trained with; None for a vision tower alone.
      system: the instruction that opened every conversation it was trained on.
    """

    config: VideoLLMConfig
    variables: Variables
    tokenizer: Tokenizer | None
    system: str


def save_model(
    directory: str | os.PathLike[str],
    config: VideoLLMConfig,
    variables: Variables,
    tokenizer: Tokenizer | None,
    system: str,
) -> None:
    """Writes a model that has no training state; `load_model` is the inverse.

    Args:
      directory: made if missing.
      config: the architecture.
      variables: of `VideoLLM(config)`, all of them.
      tokenizer: saved beside the weights; None for a vision tower alone.
      system: the instruction that opens every conversation.

    Raises:
      UserError: the directory holds a training run.
    """
    directory = Path(directory)
    if (directory / CONFIG_FILE).exists():
        raise UserError(f"{directory} holds a training run; save the model to another directory")
    write_description(directory, config, tokenizer, system)
    write_weights(directory, variables)


def load_model(
    directory: str | os.PathLike[str], layout: Layout | None = None, *, step: int | None = None
) -> LoadedModel:
    """Loads a model from the directory of a training run or of `save_model`.

    Arrays have the dtype that `model.json` says.

    Args:
      directory: of the model.
      layout: how to lay the variables on a mesh; None puts them on the first device.
      step: the checkpoint of a run whose trained variables to take, such as `best_step(directory)`;
        None takes the newest.

    Raises:
      UserError: the directory is missing, holds no model or no such checkpoint, is damaged, or its
        weights are not those of the model that `model.json` describes.
    """
    directory = Path(directory)
    config = read_model_config(directory)
    tokenizer = Tokenizer.load(directory) if config.decoder else None
    system = read_json(directory / DIALOGUE_FILE)["system"]
    expected = abstract_variables(VideoLLM(config), layout)
    parts = stored_parts(directory, step)
    stored = [_stored_tree(part) for part in parts]
    _check_same(directory, expected, stored)
    loaded: Variables = {}
    for part, tree in zip(parts, stored, strict=True):
        loaded = merge_variables(loaded, _restore(part, _like(tree, expected)))
    return LoadedModel(config, loaded, tokenizer, system)


def stored_parts(directory: Path, step: int | None = None) -> list[Path]:
    """The Orbax directories that together hold the variables of a model, each some of them.

    ```
    of a run, the newest, 400    ->   DIR/weights, DIR/checkpoints/400/trained
    of `save_model`              ->   DIR/weights
    ```

    Args:
      directory: of the model.
      step: which checkpoint of a run; None takes the newest.

    Raises:
      UserError: there is no checkpoint `step`.
    """
    steps = checkpoint_steps(directory)
    if step is None:
        step = max(steps, default=None)
    elif step not in steps:
        there = f"it has {', '.join(map(str, steps))}" if steps else "it has none"
        raise UserError(f"{directory} has no checkpoint of update {step}; {there}")
    weights = directory / WEIGHTS
    return [weights] if step is None else [weights, directory / CHECKPOINTS / str(step) / "trained"]


def checkpoint_steps(directory: Path) -> list[int]:
    """The updates whose complete checkpoints a model's directory holds, in order."""
    if not (directory / CHECKPOINTS).exists():
        return []
    with Checkpointer(directory, keep=None) as checkpointer:
        return checkpointer.steps()


def best_step(directory: str | os.PathLike[str]) -> int:
    """The update of a run's kept checkpoint with the lowest validation loss; of equals, the newest.

    Raises:
      UserError: no checkpoint has a validation loss.
    """
    directory = Path(directory)
    if (directory / CHECKPOINTS).exists():
        with Checkpointer(directory, keep=None) as checkpointer:
            if (step := checkpointer.best_step()) is not None:
                return step
    raise UserError(
        f"{directory} has no checkpoint with a validation loss, so that none is the best; take the "
        "newest, or train with training.validate_every"
    )


def load_trained(
    directory: str | os.PathLike[str], layout: Layout | None = None, *, step: int | None = None
) -> Variables:
    """Loads what a run trains, and reads nothing else of it: its frozen weights may be missing.

    Args:
      directory: of the run.
      layout: how to lay the variables on a mesh; None puts them on the first device.
      step: of the checkpoint; None takes the newest.

    Returns:
      The part of the variables of `VideoLLM(config)` that `split_variables` calls
      trained: adapters, connector and routers, or all but the vision tower.

    Raises:
      UserError: the directory holds no such checkpoint, or one that is damaged or of another model
        than `model.json` describes.
    """
    directory = Path(directory)
    expected = abstract_variables(VideoLLM(read_model_config(directory)), layout)
    _, *trained = stored_parts(directory, step)
    if not trained:
        raise UserError(
            f"{directory} holds no checkpoint; expected the directory of a training run that has "
            "saved one"
        )
    tree = _stored_tree(trained[0])
    target = _like(tree, expected)
    _check_same(directory, target, [tree])
    return _restore(trained[0], target)


def load_tower(directory: str | os.PathLike[str]) -> Variables:
    """Loads the vision tower of a model onto the first device, and nothing else of it.

    Args:
      directory: of the model.

    Returns:
      Parameters of `VisionTower(config.vision)`.

    Raises:
      UserError: there is no model, it has no tower, or it is damaged.
    """
    directory = Path(directory)
    config = read_model_config(directory)
    config.require("vision")
    alone = dataclasses.replace(config, decoder=None, routing=full_computation(), newline=False)
    target = abstract_variables(VideoLLM(alone), None)
    path = directory / WEIGHTS
    stored = {"params": {"vision": _stored_tree(path)["params"].get("vision", {})}}
    _check_same(directory, target, [stored])
    args = ocp.args.PyTreeRestore(
        target,
        restore_args=ocp.checkpoint_utils.construct_restore_args(target),
        partial_restore=True,
    )
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            return checkpointer.restore(path.absolute(), args=args)["params"]["vision"]
    except (ValueError, KeyError, OSError) as error:
        raise damaged(path, error) from error


def write_description(
    directory: Path, config: VideoLLMConfig, tokenizer: Tokenizer | None, system: str
) -> None:
    """Writes all that a model is, save its weights."""
    write_json(directory / MODEL_FILE, config.to_dict())
    write_json(directory / DIALOGUE_FILE, {"system": system})
    if tokenizer is not None:
        tokenizer.save(directory)


def read_model_config(directory: Path) -> VideoLLMConfig:
    """Reads `model.json`.

    Raises:
      UserError: there is none, or it is not one.
    """
    if not directory.is_dir():
        raise UserError(
            f"{directory} does not exist; expected the directory of a trained or converted model "
            "(what --workdir named when it was trained)"
        )
    if not (directory / MODEL_FILE).exists():
        raise UserError(
            f"{directory} holds no {MODEL_FILE}; expected the directory of a trained or converted "
            "model (what --workdir named when it was trained)"
        )
    return VideoLLMConfig.from_dict(read_json_object(directory / MODEL_FILE))


def write_weights(directory: Path, variables: Variables) -> None:
    """Writes `weights/`, layers unstacked, replacing what is there."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((directory / WEIGHTS).absolute(), variables, force=True)


def read_weights(directory: Path, target: Variables) -> Variables:
    """Reads `weights/` into the shapes, dtypes and shardings of `target`, layers unstacked.

    Raises:
      UserError: missing or damaged, or not the tree of `target`.
    """
    path = directory / WEIGHTS
    _check_same(directory, target, [_stored_tree(path)])
    return _restore(path, target)


def write_json(path: Path, value: Any) -> None:
    """Writes a json file; the directory is made if missing."""
    with files.written_aside(path) as aside:
        aside.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _stored_tree(path: Path) -> Variables:
    """Names and shapes of what an Orbax directory holds, as a nested dict."""
    if not path.is_dir():
        raise UserError(f"{path} is missing; the model is incomplete: train or convert it again")
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            metadata = checkpointer.metadata(path.absolute()).item_metadata
    except (ValueError, KeyError, OSError) as error:
        raise damaged(path, error) from error
    if metadata is None:
        raise damaged(path, ValueError("no metadata"))
    return metadata.tree


def _restore(path: Path, target: Variables) -> Variables:
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(path.absolute(), target)
    except (ValueError, KeyError, OSError) as error:
        raise damaged(path, error) from error


def _check_same(directory: Path, expected: Variables, stored: list[Variables]) -> None:
    """Compares names and shapes of an expected tree with those of stored parts."""
    want = _shapes(expected)
    have = {name: shape for part in stored for name, shape in _shapes(part).items()}
    different = [name for name in {**want, **have} if want.get(name) != have.get(name)]
    if different:
        name = different[0]
        raise UserError(
            f"{directory} holds the weights of another model than its {MODEL_FILE} describes: "
            f"{name} should be {want.get(name, 'absent')} and is {have.get(name, 'absent')} "
            f"({len(different)} differences in all); bring back the {MODEL_FILE} that belongs to "
            "the weights"
        )


def _shapes(tree: Variables) -> dict[str, tuple[int, ...]]:
    paths = jax.tree.leaves_with_path(tree, is_leaf=lambda n: hasattr(n, "shape"))
    return {jax.tree_util.keystr(p, simple=True, separator="/"): tuple(n.shape) for p, n in paths}


def _like(names: Variables, tree: Variables) -> Variables:
    """The part of `tree` that has the names of `names`, as far as it has them."""
    return {
        key: _like(value, tree[key]) if isinstance(value, Mapping) else tree[key]
        for key, value in names.items()
        if key in tree
    }
