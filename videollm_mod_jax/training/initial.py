"""Where a run starts from: the weights of a model that exists, and fresh ones for what it lacks."""

import functools
import json
import shutil
from collections.abc import Collection
from pathlib import Path

import flax.linen as nn
import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from videollm_mod_jax.errors import UserError
from videollm_mod_jax.models import VideoLLM, VideoLLMConfig
from videollm_mod_jax.training.checkpoint import (
    COMPANIONS,
    MANIFEST_FILE,
    load_model,
    read_model_config,
)
from videollm_mod_jax.training.optimizer import Variables
from videollm_mod_jax.training.sharding import Layout, abstract_variables

_MUST_AGREE = ("decoder", "vision", "newline")


def variables_from(
    directory: Path,
    config: VideoLLMConfig,
    key: jax.Array,
    layout: Layout | None,
    *,
    verify: bool = True,
) -> Variables:
    """The variables of a model directory for a model that may route or adapt differently.

    Routers and adapters that the directory has not are initialised; routers that `config` has not
    are left behind.

    Args:
      directory: of a converted or trained model.
      config: of the model to start.
      key: of what is initialised.
      layout: on a mesh, or None.
      verify: whether to compare the stored variables with their checksums.

    Returns:
      The variables of `VideoLLM(config)`, in its dtypes.

    Raises:
      UserError: the directory holds another decoder or tower than `config`, or adapters of
        another kind.
    """
    check_start(directory, config)
    loaded = flatten_dict(load_model(directory, layout, verify=verify).variables, sep="/")
    wanted = flatten_dict(abstract_variables(VideoLLM(config), layout), sep="/")
    missing = [path for path in wanted if path not in loaded]
    fresh = init_part(VideoLLM(config), key, wanted, missing)
    present = {
        path: loaded[path].astype(leaf.dtype) for path, leaf in wanted.items() if path in loaded
    }
    return unflatten_dict(fresh | present, sep="/")


def check_start(directory: Path, config: VideoLLMConfig) -> None:
    """Checks that training `config` can start from the model in `directory`; reads no weights.

    Raises:
      UserError: it holds another decoder or tower, adapters of another kind, or a part of a model.
    """
    found = read_model_config(directory)
    found.require("decoder", "vision")
    for part in _MUST_AGREE:
        have, want = (json.loads(json.dumps(c.to_dict()[part])) for c in (found, config))
        have, want = (x if isinstance(x, dict) else {"": x} for x in (have, want))
        for field in want:
            if have[field] != want[field]:
                name = f"{part}.{field}".rstrip(".")
                raise UserError(
                    f"the config's model.{name} is {want[field]}, and the model in {directory} has "
                    f"{have[field]}; take config.model from there: experiment.model_of({directory})"
                )
    if found.lora.rank and found.lora != config.lora:
        raise UserError(
            f"the model in {directory} has adapters {found.lora}, and the config asks for "
            f"{config.lora}; merge them when you convert it (--merge), or take these"
        )


def init_part(
    model: VideoLLM,
    key: jax.Array,
    abstract: dict[str, jax.ShapeDtypeStruct],
    paths: Collection[str],
) -> dict[str, jax.Array]:
    """Initialises some variables of a model, without making the others.

    Args:
      model: whose initialisers are used.
      key: random.
      abstract: by path, the model's variables with their shardings.
      paths: which of them.

    Returns:
      By path, arrays laid out as `abstract` says.
    """
    if not paths:
        return {}

    # XLA drops all that these few do not need, so that the rest of the model is never made.
    @functools.partial(jax.jit, out_shardings={path: abstract[path].sharding for path in paths})
    def initialise(key: jax.Array) -> dict[str, jax.Array]:
        variables = flatten_dict(nn.meta.unbox(model.init(key, method="init_all")), sep="/")
        return {path: variables[path] for path in paths}

    return initialise(key)


def carry_manifest(directory: Path, workdir: Path) -> None:
    """Copies what a converted model was made of to a run that starts from it, for the way back."""
    if (directory / MANIFEST_FILE).exists():
        shutil.copyfile(directory / MANIFEST_FILE, workdir / MANIFEST_FILE)
    if (directory / COMPANIONS).exists():
        shutil.copytree(directory / COMPANIONS, workdir / COMPANIONS, dirs_exist_ok=True)
