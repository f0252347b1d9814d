"""A tiny training run that several test files share; as a script, one that may kill itself.

    python -m tests.tiny_training WORKDIR KILL_AT

KILL_AT: the process is killed when it asks for this batch, after its checkpoint 4 is complete; -1
for never.
"""

import dataclasses
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from tests import tiny
from videollm_mod_jax.data import dialogue
from videollm_mod_jax.data.example import Budget, build_example
from videollm_mod_jax.data.tokenizer import train_bpe
from videollm_mod_jax.models import (
    LoraConfig,
    VideoLLM,
    VideoLLMConfig,
    config_plan,
    init_variables,
    stack_layers,
)
from videollm_mod_jax.training import loop
from videollm_mod_jax.training.optimizer import OptimizerConfig

WORDS = ("seven", "three", "top left", "centre", "how many?", "one", "gone")
TOKENIZER = train_bpe(["\nUser: Assistant: [ , ]", *WORDS] * 4, vocab_size=300)
BUDGET = Budget(frames=6, text_tokens=64, labels=24)
LORA = LoraConfig(rank=2, alpha=4.0, dropout=0.1, targets=("q", "v", "down", "lm_head"))

OPTIMIZER = OptimizerConfig(
    learning_rate=3e-3,
    warmup_fraction=0.1,
    beta1=0.9,
    beta2=0.99,
    epsilon=1e-8,
    weight_decay=0.1,
    clip_norm=1.0,
    moment_dtype="float32",
)


def model_config(rank: int = 0) -> VideoLLMConfig:
    """The tiny model with the tokenizer's vocabulary."""
    decoder = dataclasses.replace(tiny.DECODER, vocab_size=TOKENIZER.vocab_size)
    lora = dataclasses.replace(LORA, rank=rank)
    return dataclasses.replace(tiny.CONFIG, decoder=decoder, lora=lora)


def training_config(**changes) -> loop.TrainingConfig:
    """A run of ten updates."""
    values = {
        "steps": 10,
        "seed": 3,
        "trainable": "full",
        "stream_weight": 1.0,
        "microbatches": 2,
        "scan": True,
        "remat": True,
        "kernels": "auto",
        "row_chunk": 0,
        "vocab_chunk": 0,
        "sharding": "replicate",
        "mesh": (-1, 1, 1),
        "log_every": 1,
        "checkpoint_every": 4,
        "validate_every": 2,
        "keep_checkpoints": 2,
        "keep_best": 1,
        "optimizer": OPTIMIZER,
    }
    return loop.TrainingConfig(**(values | changes))


def example(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A random dialogue; the number of labels differs from one to the next."""
    first, second = (int(n) for n in rng.integers(1, 4, size=2))
    answers = [WORDS[i] for i in rng.integers(0, len(WORDS), size=2)]
    conversation = (
        dialogue.System("watch"),
        dialogue.Stream(first, learn=True),
        dialogue.Assistant(answers[0]),
        dialogue.Stream(second, learn=second - 1),
        dialogue.User("how many?"),
        dialogue.Assistant(answers[1], learn=bool(rng.integers(2))),
    )
    N, W = tiny.CONFIG.tokens_per_frame, tiny.VISION.width
    features_FNW = rng.normal(size=(first + second, N, W)).astype(np.float32)
    return build_example(conversation, features_FNW, TOKENIZER, N, BUDGET)


def batch(index: int, batch_size: int = 4) -> dict[str, np.ndarray]:
    """The batch of update `index + 1`."""
    rng = np.random.default_rng(index)
    examples = [example(rng) for _ in range(batch_size)]
    return {key: np.stack([e[key] for e in examples]) for key in examples[0]}


def batches_from(start: int, kill_at: int = -1, after: Path = Path()) -> Iterator[dict]:
    """Endless batches; the process dies when it asks for batch `kill_at` and `after` exists."""
    index = start
    while True:
        if index == kill_at:
            while not after.exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        yield batch(index)
        index += 1


def validation_batches() -> Iterator[dict]:
    """Two batches that no update sees; of the second, one row is filling."""
    whole, filled = batch(1000), batch(1001)
    filled["label_kinds"][-1] = 0
    yield from (whole, filled)


def variables(config: VideoLLMConfig, scan: bool = False):
    """Random weights: all of them matter, and nothing is compiled."""
    model = VideoLLM(config)
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        if path[-1].key == "scale":
            return np.ones(leaf.shape, leaf.dtype)
        fan_in = leaf.shape[-2] if leaf.ndim > 1 else leaf.size
        return (0.5 * rng.normal(size=leaf.shape) * fan_in**-0.5).astype(leaf.dtype)

    abstract = jax.eval_shape(lambda: init_variables(model, jax.random.key(0)))
    tree = jax.tree.map_with_path(draw, abstract)
    return stack_layers(tree, config_plan(config)) if scan else tree


def train(workdir, kill_at: int = -1, rank: int = 2, profile_steps: int = 0, **changes):
    """Trains the tiny model in `workdir`."""
    config, model = training_config(**({"trainable": "lora"} | changes)), model_config(rank)
    return loop.train(
        config,
        workdir,
        run_config={"model": model.to_dict(), "training": dataclasses.asdict(config)},
        model_config=model,
        initial_variables=lambda layout: variables(model),
        tokenizer=TOKENIZER,
        system="watch",
        batches_from=lambda start: batches_from(start, kill_at, Path(workdir) / "checkpoints/4"),
        validation_batches=validation_batches,
        profile_steps=profile_steps,
    )


if __name__ == "__main__":
    train(sys.argv[1], int(sys.argv[2]))
