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
which writes aside and renames, so a killed process leaves no half-written checkpoint. What has its
name is on the disk and has checksums, which are compared before anything is read: `integrity.py`.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp

from videollm_mod_jax.config_dict import Checked, build
from videollm_mod_jax.data import files
from videollm_mod_jax.data.files import read_json, read_json_object
from videollm_mod_jax.data.tokenizer import Tokenizer
from videollm_mod_jax.errors import UserError, shown
from videollm_mod_jax.models import VideoLLM, VideoLLMConfig, full_computation
from videollm_mod_jax.training import integrity
from videollm_mod_jax.training.checkpointer import (
    CHECKPOINTS,
    Checkpointer,
    best_step,
    check_step,
    checkpoint_steps,
    reading,
    remedy,
)
from videollm_mod_jax.training.optimizer import Variables, merge_variables
from videollm_mod_jax.training.sharding import Layout, abstract_variables
from videollm_mod_jax.training.stored_sizes import check_sizes, most_arrays

MODEL_FILE = "model.json"
DIALOGUE_FILE = "dialogue.json"
CONFIG_FILE = "config.json"
MANIFEST_FILE = "conversion.json"
COMPANIONS = "conversion"
WEIGHTS = "weights"

__all__ = ["Checkpointer", "best_step", "checkpoint_steps"]

ROWS_REMEDY = (
    "bring back the tokenizer that it came with, or convert it again with convert from-hf "
    "--resize-embeddings"
)
"""What helps where a tokenizer has more tokens than a model has embeddings."""

_ENTRY_BYTES = 4096
"""More than Orbax's table of arrays has for one."""

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class Dialogue(Checked):
    """What `dialogue.json` says.

    Attributes:
      system: the instruction that opens every conversation.
    """

    system: str


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
    directory: str | os.PathLike[str],
    layout: Layout | None = None,
    *,
    step: int | None = None,
    verify: bool = True,
) -> LoadedModel:
    """Loads a model from the directory of a training run or of `save_model`.

    Arrays have the dtype that `model.json` says.

    Args:
      directory: of the model; a run may be going on in it.
      layout: how to lay the variables on a mesh; None puts them on the first device.
      step: the checkpoint of a run whose trained variables to take, such as `best_step(directory)`;
        None takes the newest.
      verify: whether to compare the files with their checksums before.

    Raises:
      UserError: the directory is missing, holds no model or no such checkpoint, is damaged, its
        weights are not those of the model that `model.json` describes, or its tokenizer has tokens
        that its embeddings lack.
    """
    directory = Path(directory)
    config = read_model_config(directory)
    tokenizer = None
    if config.decoder is not None:
        tokenizer = Tokenizer.load(directory)
        tokenizer.check_rows(config.decoder.vocab_size, str(directory), ROWS_REMEDY)
    dialogue_file = directory / DIALOGUE_FILE
    system = build(Dialogue, read_json(dialogue_file), str(dialogue_file)).system

    def read(parts: list[Path]) -> Variables:
        stored = [_stored_tree(part, most_arrays(config), verify) for part in parts]
        # Tracing a model of absurd sizes takes minutes or the memory.
        shapes = {name: shape for tree in stored for name, shape in _shapes(tree).items()}
        try:
            check_sizes(directory, config, shapes)
            expected = abstract_variables(VideoLLM(config), layout)
            _check_same(directory, expected, stored)
        except UserError as error:
            # What a run trains stands in its checkpoints alone.
            if len(parts) > 1 or not (directory / CONFIG_FILE).exists():
                raise
            raise UserError(
                f"{directory} is a training run that has saved no checkpoint yet; run the same "
                f"train command to go on ({error})"
            ) from error
        loaded: Variables = {}
        for part, tree in zip(parts, stored, strict=True):
            loaded = merge_variables(loaded, _restore(part, _like(tree, expected)))
        return loaded

    return LoadedModel(config, read_parts(directory, step, read), tokenizer, system)


def read_parts(directory: Path, step: int | None, read: Callable[[list[Path]], _T]) -> _T:
    """Reads from `stored_parts`, again if a run has deleted its checkpoint in the meantime.

    Args:
      directory: of the model.
      step: which checkpoint of a run; None takes the newest.
      read: is given the parts.

    Raises:
      UserError: see `stored_parts` and `read`; without a newer checkpoint, it is no accident.
    """
    while True:
        parts = stored_parts(directory, step)
        try:
            return read(parts)
        except UserError:
            # A run deletes no checkpoint before there is a newer one, so this comes to an end.
            if stored_parts(directory, step) == parts:
                raise


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


def verify_part(part: Path) -> None:
    """Compares one of `stored_parts` with its checksums, and a checkpoint with its number.

    Raises:
      UserError: it is missing or damaged; the file is named.
    """
    if not part.is_dir():
        raise UserError(f"{part} is missing; the model is incomplete: train or convert it again")
    if part.name != WEIGHTS:
        check_step(part.parent, verify=True)
    integrity.verify_together(part, remedy(part))


def load_trained(
    directory: str | os.PathLike[str],
    layout: Layout | None = None,
    *,
    step: int | None = None,
    verify: bool = True,
) -> Variables:
    """Loads what a run trains, and reads nothing else of it: its frozen weights may be missing.

    Args:
      directory: of the run.
      layout: how to lay the variables on a mesh; None puts them on the first device.
      step: of the checkpoint; None takes the newest.
      verify: whether to compare the files with their checksums before.

    Returns:
      The part of the variables of `VideoLLM(config)` that `split_variables` calls
      trained: adapters, connector and routers, or all but the vision tower.

    Raises:
      UserError: the directory holds no such checkpoint, or one that is damaged or of another model
        than `model.json` describes.
    """
    directory = Path(directory)
    config = read_model_config(directory)
    expected = abstract_variables(VideoLLM(config), layout)

    def read(parts: list[Path]) -> Variables:
        _, *trained = parts
        if not trained:
            raise UserError(
                f"{directory} holds no checkpoint; expected the directory of a training run that "
                "has saved one: run the same train command to go on"
            )
        tree = _stored_tree(trained[0], most_arrays(config), verify)
        target = _like(tree, expected)
        _check_same(directory, target, [tree])
        return _restore(trained[0], target)

    return read_parts(directory, step, read)


def load_tower(directory: str | os.PathLike[str], *, verify: bool = True) -> Variables:
    """Loads the vision tower of a model onto the first device, and nothing else of it.

    Args:
      directory: of the model.
      verify: whether to compare the files with their checksums before: all of `weights/`, since
        what it is stored in is shared with the decoder.

    Returns:
      Parameters of `VisionTower(config.vision)`.

    Raises:
      UserError: there is no model, it has no tower, or it is damaged.
    """
    directory = Path(directory)
    config = read_model_config(directory)
    config.require("vision")
    alone = dataclasses.replace(config, decoder=None, routing=full_computation(), newline=False)
    path = directory / WEIGHTS
    whole = _stored_tree(path, most_arrays(config), verify)
    tower = whole["params"].get("vision") if isinstance(whole.get("params"), Mapping) else None
    stored = {"params": {"vision": {} if tower is None else tower}}
    check_sizes(directory, alone, _shapes(stored))
    target = abstract_variables(VideoLLM(alone), None)
    _check_same(directory, target, [stored])
    args = ocp.args.PyTreeRestore(
        target,
        restore_args=ocp.checkpoint_utils.construct_restore_args(target),
        partial_restore=True,
    )
    with reading(path), ocp.PyTreeCheckpointer() as checkpointer:
        return checkpointer.restore(path.absolute(), args=args)["params"]["vision"]


def write_description(
    directory: Path, config: VideoLLMConfig, tokenizer: Tokenizer | None, system: str
) -> None:
    """Writes all that a model is, save its weights."""
    write_json(directory / MODEL_FILE, config.to_dict())
    write_json(directory / DIALOGUE_FILE, dataclasses.asdict(Dialogue(system)))
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
        if (directory / CONFIG_FILE).exists():
            raise UserError(
                f"{directory} is a training run that has saved no {MODEL_FILE} yet; run the same "
                "train command to go on"
            )
        raise UserError(
            f"{directory} holds no {MODEL_FILE}; expected the directory of a trained or converted "
            "model (what --workdir named when it was trained)"
        )
    return VideoLLMConfig.from_dict(read_json_object(directory / MODEL_FILE))


def write_weights(directory: Path, variables: Variables) -> None:
    """Writes `weights/`, layers unstacked, replacing what is there."""
    with ocp.StandardCheckpointer(temporary_path_class=integrity.CheckedPath) as checkpointer:
        checkpointer.save((directory / WEIGHTS).absolute(), variables, force=True)


def read_weights(directory: Path, target: Variables, *, verify: bool = True) -> Variables:
    """Reads `weights/` into the shapes, dtypes and shardings of `target`, layers unstacked.

    Args:
      directory: that holds it.
      target: the tree to read.
      verify: whether to compare the files with their checksums before.

    Raises:
      UserError: missing or damaged, or not the tree of `target`.
    """
    path = directory / WEIGHTS
    _check_same(directory, target, [_stored_tree(path, len(jax.tree.leaves(target)), verify)])
    return _restore(path, target)


def write_json(path: Path, value: Any) -> None:
    """Writes a json file; the directory is made if missing."""
    with files.written_aside(path) as aside:
        aside.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def stored_tree(part: Path, arrays: int) -> Variables:
    """Names and shapes of what an Orbax directory holds, as a nested dict.

    Args:
      part: the directory.
      arrays: how many the whole model has at most.

    Raises:
      UserError: it cannot be read, or names many more arrays.
    """
    _check_table(part, arrays)
    with reading(part), ocp.StandardCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(part.absolute()).item_metadata
    if metadata is None:
        # Orbax says why in its log only.
        raise integrity.damaged(part, "its tables of arrays cannot be read", remedy(part))
    return metadata.tree


def _stored_tree(part: Path, arrays: int, verify: bool) -> Variables:
    if verify:
        verify_part(part)
    return stored_tree(part, arrays)


def _check_table(part: Path, arrays: int) -> None:
    """Looks at Orbax's table of arrays, for each of which Orbax takes a millisecond to open it."""
    if not part.is_dir():
        raise UserError(f"{part} is missing; the model is incomplete: train or convert it again")
    path, most = part / "_METADATA", 2 * arrays + 16
    try:
        table = read_json_object(path, largest=_ENTRY_BYTES * most).get("tree_metadata")
    except UserError as error:
        raise integrity.damaged(path, f"it cannot be read ({error})", remedy(part)) from error
    if not isinstance(table, Mapping):
        what = f"its arrays cannot be read: tree_metadata is {shown(table)}"
        raise integrity.damaged(path, what, remedy(part))
    if len(table) > most:
        what = f"it has {len(table)} arrays; expected the table of a model of at most {arrays}"
        raise integrity.damaged(path, f"{what} ({MODEL_FILE})", remedy(part))


def _restore(path: Path, target: Variables) -> Variables:
    with reading(path), ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path.absolute(), target)


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
