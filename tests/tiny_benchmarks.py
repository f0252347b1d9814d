"""Tiny records with features in memory, for the tests of what the model is asked."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from configs import digits
from tests import tiny, tiny_stream, tiny_training
from videollm_mod_jax.data.annotations import (
    Dataset,
    Parsed,
    Record,
    Report,
    Source,
    Turn,
    Videos,
)
from videollm_mod_jax.data.builders.stored import write_dataset
from videollm_mod_jax.data.example import Budget
from videollm_mod_jax.data.features import FeatureMeta, FeatureWriter
from videollm_mod_jax.data.pipeline import Examples
from videollm_mod_jax.encode import fingerprint
from videollm_mod_jax.experiment import plain
from videollm_mod_jax.training.checkpoint import CONFIG_FILE, LoadedModel, save_model, write_json

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


DATASETS = {
    "coin_step": ("labels", ("Cut potato.", "Peel potato.", "Serve.")),
    "ego4d_lta": ("anticipation", ("verb: take", "verb: put", "noun: dough", "noun: onion")),
    "ego4d_narration": ("stream", ()),
}
"""Kind and labels of the datasets of `write_run`, small ones with the names of public ones."""


def records_of(name):
    """Five records of a dataset, about videos of three frames."""
    frames = 3
    for i in range(5):
        if name == "coin_step":
            yield asked(f"v{i}", frames, "What?", "Serve.", target={"labels": ["Serve."]})
        elif name == "ego4d_lta":
            target = {"verbs": [i % 2] * 20, "nouns": [0] * 20}
            yield asked(f"v{i}", frames, "And?", "1. Take dough.", target=target)
        else:
            turns = (Turn("assistant", 0.5, "A cat sits."), Turn("assistant", 1.0, "Two."))
            yield Record(id=f"v{i}", video=f"v{i}", start=0.0, stop=frames / FPS, turns=turns)


def write_run(directory):
    """A run whose config evaluates the datasets above; returns its directory."""
    model = loaded_model(silence=1.0)
    run, features = directory / "run", directory / "features"
    tower = fingerprint(model.config, model.variables["params"]["vision"])
    frames = {f"v{i}": 3 for i in range(5)}
    with FeatureWriter(features, dataclasses.replace(Features.meta, tower=tower)) as writer:
        rng = np.random.default_rng(0)
        for name, count in frames.items():
            writer.add(name, rng.normal(size=(count, N, W)))
    sources = {}
    for name, (kind, labels) in DATASETS.items():
        split = {"test": list(records_of(name))}
        parsed = Parsed(splits=split, labels=labels)
        dataset = Dataset(name=name, page="", read=lambda _, p=parsed: p, benchmark=kind)
        source = Source(directory, Videos(FPS, frames), 24, Report())
        records = write_dataset(dataset, source, directory / "datasets")
        sources[name] = {"weight": 1.0, "records": str(records), "features": str(features)}
    table = plain(digits.get_config())
    table["data"] |= {
        "sources": sources,
        "draw": None,
        "frames": BUDGET.frames,
        "system": tiny_stream.SYSTEM,
        "text_tokens": BUDGET.text_tokens,
        "labels": BUDGET.labels,
    }
    table["evaluation"] = {
        "benchmarks": dict.fromkeys(DATASETS, "test"),
        "around_training": "",
        "batch_size": 4,
        "answer_tokens": 6,
    }
    save_model(run, model.config, model.variables, model.tokenizer, model.system)
    write_json(run / CONFIG_FILE, table)
    return run
