"""A tiny model that reads and writes real text, for the streaming and evaluation tests."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from tests import tiny
from videollm_mod_jax.data.tokenizer import Tokenizer, train_bpe
from videollm_mod_jax.models import VideoLLM, init_variables
from videollm_mod_jax.training.checkpoint import LoadedModel

SYSTEM = "Watch."
ANSWERS = ("A cat sits.", "It leaves.", "Two.", "A dog comes.")
QUESTION = "How many?"


def tokenizer() -> Tokenizer:
    lines = [SYSTEM, "\nAssistant:", "\nUser:", QUESTION, *(f" {text}" for text in ANSWERS)]
    return train_bpe(lines * 3, 300)


def loaded_model(silence: float, seed: int = 0) -> LoadedModel:
    """A random model that stays silent after more frames, the larger `silence` is.

    Every vision token carries one constant direction, which the interval token's logit reads
    beside a direction of its own.
    """
    words = tokenizer()
    config = dataclasses.replace(
        tiny.CONFIG, decoder=dataclasses.replace(tiny.DECODER, vocab_size=words.vocab_size)
    )
    init = jax.jit(init_variables, static_argnums=0)
    variables = tiny.spread(init(VideoLLM(config), jax.random.key(seed)))
    params = variables["params"]
    rng = np.random.default_rng(seed)
    constant_D, varying_D = jnp.asarray(rng.normal(size=(2, tiny.DECODER.hidden_size)), jnp.float32)
    params["connector"]["fc2"]["bias"] = constant_D
    column_D = varying_D + silence * constant_D
    kernel_DV = params["lm_head"]["kernel"]
    params["lm_head"]["kernel"] = kernel_DV.at[:, words.interval_id].set(column_D)
    return LoadedModel(config, variables, words, SYSTEM)
