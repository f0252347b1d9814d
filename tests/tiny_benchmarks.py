"""Tiny records with features in memory, for the tests of what the model is asked."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from tests import tiny, tiny_stream, tiny_training
from videollm_mod_jax.data.annotations import Record, Turn
from videollm_mod_jax.data.example import Budget
from videollm_mod_jax.data.features import FeatureMeta
from videollm_mod_jax.data.pipeline import Examples
from videollm_mod_jax.training.checkpoint import LoadedModel

FPS = 2.0
N, W = tiny.CONFIG.tokens_per_frame, tiny.VISION.width
BUDGET = Budget(frames=24, text_tokens=128, labels=96)


class Features:
    """A feature store in memory, `FeatureSource` for the reader of records."""

    path = "features"
    meta = FeatureMeta(features_per_frame=N, width=W, fps=FPS, resolution=16, tower="tiny")

    def __init__(self, videos):
        self._videos = videos

    def __contains__(self, name):
        return name in self._videos

    def read(self, name, start=0, stop=None, stride=1):
        return self._videos[name][start:stop:stride]


def drawn(names_and_frames, seed=0):
    """Features of videos of so many frames."""
    rng = np.random.default_rng(seed)
    return Features({n: rng.normal(size=(f, N, W)) for n, f in names_and_frames.items()})


def examples(records, features, budget=BUDGET):
    return Examples(records, features, tiny_stream.tokenizer(), N, tiny_stream.SYSTEM, budget)


def asked(name, frames, question=tiny_stream.QUESTION, answer="Two.", **more):
    """A record "clip, question, answer" about a whole video."""
    stop = frames / FPS
    turns = (Turn("user", stop, question), Turn("assistant", stop, answer))
    return Record(id=name, video=name, start=0.0, stop=stop, turns=turns, **more)


CONFIG = dataclasses.replace(
    tiny.CONFIG,
    decoder=dataclasses.replace(
        tiny.DECODER, num_layers=2, vocab_size=tiny_stream.tokenizer().vocab_size
    ),
)


def loaded_model(seed=0, silence=0.0, end=4.0):
    """A random model of a dense and a routed layer.

    It is silent after more frames the larger `silence` is, and its answers differ more in length
    the larger `end` is.
    """
    words = tiny_stream.tokenizer()
    variables = tiny_training.variables(CONFIG)
    params, rng = variables["params"], np.random.default_rng(seed)
    vision_D, silence_D, end_D = rng.normal(size=(3, CONFIG.decoder.hidden_size))
    params["connector"]["fc2"]["bias"] = vision_D.astype(np.float32)
    scale, kernel_DV = CONFIG.decoder.hidden_size**-0.5, params["lm_head"]["kernel"]
    kernel_DV[:, words.interval_id] = scale * (4 * silence_D + silence * vision_D)
    kernel_DV[:, words.eos_id] = scale * end * end_D
    return LoadedModel(CONFIG, jax.tree.map(jnp.asarray, variables), words, tiny_stream.SYSTEM)
