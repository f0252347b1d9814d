"""A small folder of videos and images, and a model that can encode it."""

import jax
import numpy as np

from tests import tiny
from videollm_mod_jax.data.video import write_video
from videollm_mod_jax.models import VideoLLM, init_variables
from videollm_mod_jax.training.checkpoint import save_model

CONFIG = tiny.CONFIG
FRAMES = {"long/a": 23, "long/b": 9, "c": 1, "d": 5, "e": 12}
"""Frames of every video of `write_folder` at 2 frames per second."""


def write_model(directory, seed=0):
    """Writes a model with random weights."""
    init = jax.jit(init_variables, static_argnums=0)
    variables = init(VideoLLM(CONFIG), jax.random.key(seed))
    save_model(directory, CONFIG, variables, None, "Watch.")


def write_folder(directory, frames=FRAMES):
    """Writes videos of noise, each with its own shape."""
    for seed, (name, count) in enumerate(frames.items()):
        rng = np.random.default_rng(seed)
        images = rng.integers(0, 256, (count, 16 + 2 * (seed % 5), 24, 3), np.uint8)
        write_video(directory / f"{name}.mp4", images, 2.0)
