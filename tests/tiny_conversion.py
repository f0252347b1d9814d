"""A made-up checkpoint of a tiny model, with every kind of rule, that several test files share."""

import dataclasses
import json
import math
import string
from pathlib import Path

import ml_dtypes
import numpy as np
import tokenizers
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from tests.tiny import CONFIG
from videollm_mod_jax.conversion.plan import Conversion, Part
from videollm_mod_jax.conversion.source import open_source
from videollm_mod_jax.conversion.table import Rule, Table
from videollm_mod_jax.data.tokenizer import BOS, EOS, Tokenizer
from videollm_mod_jax.models import VideoLLM, VideoLLMConfig
from videollm_mod_jax.training.sharding import abstract_variables

LINES = ["User: How many?\nAssistant: 12, so far.", "(0.5 s) a cat on the mat"] * 4


def small_tokenizer() -> Tokenizer:
    """A tokenizer of letters that has fewer tokens than the tiny models have embeddings."""
    known = [BOS, EOS, "?", *" \n,.:[]", *string.ascii_lowercase]
    vocabulary = {token: i for i, token in enumerate(known)}
    letters = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
    letters.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    return Tokenizer(letters.to_str(), BOS, EOS)


def shapes(config: VideoLLMConfig) -> dict:
    """The variables of a model by path."""
    return flatten_dict(abstract_variables(VideoLLM(config), None), sep="/")


def random_variables(config: VideoLLMConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Values that bfloat16 holds exactly, by path."""
    rng = np.random.default_rng(seed)
    return {
        path: rng.normal(size=leaf.shape).astype(ml_dtypes.bfloat16).astype(leaf.dtype)
        for path, leaf in shapes(config).items()
    }


def checkpoint(
    variables: dict[str, np.ndarray], config: VideoLLMConfig
) -> tuple[tuple[Rule, ...], dict[str, np.ndarray]]:
    """Rules of every kind, and the tensors that they turn into `variables`, made another way."""
    rules, tensors = [], {}
    for path, value in variables.items():
        name = "model." + path.replace("/", ".")
        if "vision/blocks/" in path:
            axes = (1, 0) if value.ndim == 3 else None
            layers = tuple(range(config.vision.num_layers))
            rules.append(Rule(source=name + ".{i}", target=path, axes=axes, layers=layers))
            for i, row in enumerate(value):
                tensors[f"{name}.{i}"] = row.T.copy()
        elif path.startswith("params/vision/head/attention/") and path.split("/")[4] in "qkv":
            which, kind = path.split("/")[4:]
            name = f"model.head.{kind}"
            part = ("qkv".index(which), 3)
            axes = (1, 0) if value.ndim == 2 else None
            rules.append(Rule(source=name, target=path, axes=axes, part=part))
            rows = [variables[path.replace(f"/{which}/", f"/{w}/")].T for w in "qkv"]
            tensors[name] = np.ascontiguousarray(np.concatenate(rows))
        elif "router" in path:
            rules.append(Rule(source=name, target=path, squeeze=True))
            tensors[name] = value[None].copy()
        elif value.ndim == 2 and "kernel" in path:
            rules.append(Rule(source=name, target=path, axes=(1, 0)))
            tensors[name] = value.T.copy()
        else:
            rules.append(Rule(source=name, target=path))
            tensors[name] = value
    return tuple(rules), tensors


def write_sharded(directory: Path, tensors: dict[str, np.ndarray], shards: int = 3) -> None:
    """Writes tensors as the Hub has them: shards of safetensors and their index."""
    directory.mkdir(parents=True, exist_ok=True)
    names = list(tensors)
    step = math.ceil(len(names) / shards)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        group = names[i * step : (i + 1) * step]
        save_file({n: tensors[n] for n in group}, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(group, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def make_conversion(
    directory: Path,
    config: VideoLLMConfig = CONFIG,
    dtype: type = np.float32,
    **changes,
) -> tuple[Conversion, dict[str, np.ndarray]]:
    """Writes a checkpoint with a tokenizer; returns its conversion, and the variables to expect.

    Keyword arguments replace fields of the conversion; variables in `fresh` are left out of the
    checkpoint.
    """
    variables = random_variables(config)
    fresh = changes.get("fresh", ())
    rules, tensors = checkpoint({k: v for k, v in variables.items() if k not in fresh}, config)
    write_sharded(directory, {name: tensor.astype(dtype) for name, tensor in tensors.items()})
    small_tokenizer().save(directory)
    part = Part(
        role="model",
        family="made-up",
        layout="tests",
        source=open_source(directory),
        table=Table(rules=rules),
        config={"model_type": "made-up"},
    )
    conversion = Conversion(
        family="made-up",
        config=config,
        parts=(part,),
        fresh=(),
        merges={},
        tokenizer=directory,
        system="Watch.",
    )
    return dataclasses.replace(conversion, **changes), variables
