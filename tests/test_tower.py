"""Pretraining of the digits tower, and features stored by `encode`."""

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from videollm_mod_jax.data import digits
from videollm_mod_jax.data.features import FeatureSource
from videollm_mod_jax.encode import encode_split, fingerprint
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.models import NO_LORA, VideoLLMConfig, full_computation
from videollm_mod_jax.models.presets import decoder_preset, vision_preset
from videollm_mod_jax.models.vision import VisionTower, preprocess
from videollm_mod_jax.training.tower import CANVASES, UNKNOWN, TowerConfig, overlay, pretrain_tower

CANVAS = CANVASES["digits_stream"]
CONFIG = VideoLLMConfig(
    decoder=decoder_preset("tiny"),
    routing=full_computation(),
    lora=NO_LORA,
    vision=vision_preset("digits-vit"),
    newline=False,
    dtype="float32",
    param_dtype="float32",
)


@pytest.fixture(scope="module")
def pretrained():
    config = TowerConfig(steps=160, batch_size=64, learning_rate=3e-3, summary_weight=0.3, seed=0)
    return pretrain_tower(CONFIG.vision, config, CANVAS)


def direct(params, images):
    """Frame tokens of grey images, one frame at a time."""
    tower = VisionTower(CONFIG.vision, jnp.float32, jnp.float32)
    rgb = np.repeat(images[..., None], 3, axis=-1)

    @jax.jit
    def encode(image):
        return tower.apply({"params": params}, preprocess(image, CONFIG.vision))[0]

    return np.stack([encode(image[None]) for image in rgb])


def test_overlay_is_the_drawn_one():
    none = digits.BACKGROUND
    labels = jnp.array([[[7, none, none]], [[3, none, 5]]])
    images = jnp.array([[[[9.0, 1.0]]], [[[2.0, 4.0]]]])
    image, label = overlay(images, labels, none)
    assert label.tolist() == [[UNKNOWN, none, 5]]
    assert image.tolist() == [[[9.0, 4.0]]]


def test_places_are_linearly_readable_on_unseen_scans(pretrained):
    """A least-squares readout of the frame tokens alone, fitted and judged apart from training."""
    rng = np.random.default_rng(5)

    def tokens_and_labels(split, count):
        images, labels = digits.random_frames(split, count, rng)
        tokens = direct(pretrained.params, images)[:, 1:].reshape(-1, CONFIG.vision.width)
        return np.concatenate([tokens, np.ones((len(tokens), 1))], axis=1), labels.ravel()

    x, y = tokens_and_labels("train", 600)
    readout = np.linalg.lstsq(x, np.eye(11)[y], rcond=None)[0]
    x, y = tokens_and_labels("test", 200)
    right, is_digit = (x @ readout).argmax(axis=1) == y, y != digits.BACKGROUND
    assert right[is_digit].mean() > 0.5  # 0.1 by chance; the whole run reaches 0.98
    assert right[~is_digit].mean() > 0.98
    assert pretrained.digit_accuracy > 0.5
    assert pretrained.empty_accuracy > 0.98
    assert 0.3 < pretrained.feature_rms < 3


def test_pretraining_twice_gives_the_same_tower():
    vision = dataclasses.replace(CONFIG.vision, width=8, mlp_width=8, num_layers=1, num_heads=1)
    config = TowerConfig(steps=2, batch_size=2, learning_rate=1e-3, summary_weight=0.3, seed=3)
    first, second = (pretrain_tower(vision, config, CANVAS).params for _ in range(2))
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, first, second)))


def test_the_cls_token_is_trained_by_its_weight():
    vision = dataclasses.replace(CONFIG.vision, width=8, mlp_width=8, num_layers=1, num_heads=1)
    config = TowerConfig(steps=2, batch_size=2, learning_rate=1e-3, summary_weight=0.0, seed=3)
    weighted = dataclasses.replace(config, summary_weight=0.3)
    without, with_it = (pretrain_tower(vision, c, CANVAS).params for c in (config, weighted))
    assert not all(jax.tree.leaves(jax.tree.map(np.array_equal, without, with_it)))


def test_pretraining_refuses_what_it_cannot_label():
    config = TowerConfig(steps=2, batch_size=2, learning_rate=1e-3, summary_weight=0.3, seed=0)
    with pytest.raises(UserError, match=r"pool is \(2, 2\)"):
        pretrain_tower(dataclasses.replace(CONFIG.vision, pool=(2, 2)), config, CANVAS)
    with pytest.raises(UserError, match=r"TowerConfig\.steps is 0"):
        dataclasses.replace(config, steps=0)
    with pytest.raises(UserError, match=r"summary_weight is -1.0; expected a number in "):
        dataclasses.replace(config, summary_weight=-1.0)


def record(name, frames, fps=2.0):
    return {"id": name.encode(), "frames": frames, "fps": fps}


def test_stored_features_are_the_towers(pretrained, tmp_path):
    rng = np.random.default_rng(0)
    videos = {"a": 3, "b": 7, "c": 1}
    frames = {n: digits.random_frames("test", count, rng)[0] for n, count in videos.items()}
    records = [record(name, images) for name, images in frames.items()]
    encode_split(CONFIG, pretrained.params, records, tmp_path / "features", batch_size=4)
    source = FeatureSource(tmp_path / "features", features_per_frame=10, width=64, fps=2.0)
    assert source.meta.tower == fingerprint(CONFIG, pretrained.params)
    for name, images in frames.items():
        expected = direct(pretrained.params, images)
        np.testing.assert_allclose(source.read(name), expected, atol=1e-2)


def test_fingerprint_tells_towers_apart(pretrained):
    moved = jax.tree.map(lambda leaf: leaf + 1e-3, pretrained.params)
    other = dataclasses.replace(CONFIG, dtype="bfloat16")
    prints = {
        fingerprint(CONFIG, pretrained.params),
        fingerprint(CONFIG, moved),
        fingerprint(other, pretrained.params),
    }
    assert len(prints) == 3
    assert fingerprint(CONFIG, jax.tree.map(np.array, pretrained.params)) in prints


@pytest.mark.parametrize(
    ("second", "complaint"),
    [
        (record("v", np.zeros((0, 48, 48), np.uint8)), "v: expected at least one frame"),
        (record("v", np.zeros((2, 48, 48), np.uint8), fps=4.0), "v: expected 2.0 frames per"),
        (record("v", np.zeros((2, 40, 40), np.uint8)), r"v: .* found 2.0 of \(40, 40\)"),
    ],
)
def test_bad_video_is_named_and_leaves_nothing(pretrained, tmp_path, second, complaint):
    records = [record("u", np.zeros((2, 48, 48), np.uint8)), second]
    with pytest.raises(UserError, match=complaint):
        encode_split(CONFIG, pretrained.params, records, tmp_path / "features", batch_size=4)
    assert list(tmp_path.iterdir()) == []


def test_command_line_names_a_missing_model(tmp_path):
    command = [sys.executable, "-m", "videollm_mod_jax.encode", "--checkpoint", tmp_path / "none"]
    flags = ["--dataset", "digits_stream", "--split", "test", "--out", tmp_path / "out"]
    result = subprocess.run([*command, *flags], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert "none does not exist" in result.stderr
    assert result.stderr.count("\n") == 1
