"""`digits_scenes` as a TFDS dataset (ArrayRecord, without TensorFlow)."""

import numpy as np
import tensorflow_datasets as tfds

from videollm_mod_jax.data import digit_scenes
from videollm_mod_jax.data.builders.digits_stream import (
    DigitsConfig,
    DigitsDataset,
    DigitsStream,
    stream_features,
)


class DigitsScenes(DigitsStream):
    """Narrated streams of small digits that no patch shows whole; see `data/digit_scenes.py`.

    Features: id; frames (F, 60, 60) uint8; fps; turns (role, time, text); objects (F, P) bool, the
    patches that show a digit, in reading order.
    """

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = (DigitsConfig(),)
    scenery = digit_scenes

    def _info(self) -> tfds.core.DatasetInfo:
        frames = self.builder_config.frames
        objects = tfds.features.Tensor(shape=(frames, digit_scenes.PATCHES), dtype=np.bool_)
        return tfds.core.DatasetInfo(
            builder=self,
            description="Small handwritten digits among turned scans, with timed narrations.",
            homepage="https://scikit-learn.org/stable/datasets/toy_dataset.html",
            disable_shuffling=True,
            features=stream_features(frames, digit_scenes.CANVAS, objects=objects),
        )


class ScenesDataset(DigitsDataset):
    """The streams of `digits_scenes`, as `DigitsDataset` offers those of `digits_stream`."""

    builder = DigitsScenes
