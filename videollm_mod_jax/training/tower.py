"""Pretrains the small vision tower of `digits_stream`, the part that SigLIP plays in the paper.

Every spatial token learns to say which digit stands at its place, or that none does, and the CLS
token which digits are in the frame, so that both can be read linearly from the frame tokens that
the language model gets. With `summary_weight` 0 the CLS token is trained for nothing, and what a
frame shows has to be read from its spatial tokens. Only scans of the training split are drawn.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich import progress

from videollm_mod_jax.config_dict import COUNT, SEED, Checked, Interval
from videollm_mod_jax.data import digit_scenes, digits
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.models.config import VisionConfig
from videollm_mod_jax.models.vision import VisionTower, preprocess
from videollm_mod_jax.training import distributed

UNKNOWN = -1

# Frames drawn for training; the updates overlay and disturb them anew.
_DRAWN, _VALIDATED = 8192, 1024
# A frame holds 1.5 digits in 9 places. The brightest pixels of three hold three times as many,
# which learns identity in half the updates.
_OVERLAID = 3
_NOISE, _SHADE, _CONTRAST = 25.0, 20.0, 0.2  # grey levels, grey levels, share
_WEIGHT_DECAY = 0.3


@dataclasses.dataclass(frozen=True, kw_only=True)
class TowerConfig(Checked):
    """How to pretrain the tower.

    Attributes:
      steps: updates.
      batch_size: frames per update.
      learning_rate: peak of the cosine, after a warm-up over a fifteenth of the steps.
      summary_weight: of the loss at the CLS token, next to that of the spatial tokens; 0 leaves it
        untrained.
      seed: of the initial weights, the frames and their disturbance.
    """

    steps: COUNT
    batch_size: Annotated[int, Interval("[1, 2**20]")]
    learning_rate: Annotated[float, Interval("(0, 100]")]
    summary_weight: Annotated[float, Interval("[0, 1e6]")]
    seed: SEED


@dataclasses.dataclass(frozen=True)
class PretrainedTower:
    """A tower and what linear readouts of its frame tokens get right on unseen scans.

    Attributes:
      params: of `VisionTower`, float32.
      digit_accuracy: share of the places with a digit whose spatial token names it.
      empty_accuracy: share of the empty places whose spatial token says so.
      summary_accuracy: share of (frame, digit) whose presence the CLS token tells; means
        nothing with a `summary_weight` of 0.
      feature_rms: root mean square of the frame tokens.
    """

    params: Mapping[str, Any]
    digit_accuracy: float
    empty_accuracy: float
    summary_accuracy: float
    feature_rms: float


def overlay(
    images_MBYX: jax.Array, labels_MBP: jax.Array, background: int
) -> tuple[jax.Array, jax.Array]:
    """Lays M frames over each other, the brightest pixel winning, as digits do on their clutter.

    ```
    labels, M = 2     7 . .   3 . 5     7 is the digit, . background
    overlaid          ? . 5             ? UNKNOWN: two digits in one place
    ```

    Args:
      images_MBYX: grey levels, B stacks of M.
      labels_MBP: int32 class at each of P places, the background where none.
      background: its label, above all others.

    Returns:
      images [B, Y, X] and labels [B, P].
    """
    digits_BP = jnp.sum(labels_MBP != background, axis=0)
    labels_BP = jnp.where(digits_BP > 1, UNKNOWN, labels_MBP.min(axis=0))
    return images_MBYX.max(axis=0), labels_BP


@dataclasses.dataclass(frozen=True)
class Canvas:
    """What a tower is pretrained on.

    Attributes:
      grid: (h, w), places of a frame that have labels; the tower pools to as many.
      background: the label of a place without a digit, above all others.
      random_frames: as `digits.random_frames`, with h * w labels per frame.
    """

    grid: tuple[int, int]
    background: int
    random_frames: Callable[[str, int, np.random.Generator], tuple[np.ndarray, np.ndarray]]


CANVASES: Mapping[str, Canvas] = {
    "digits_stream": Canvas((3, 3), digits.BACKGROUND, digits.random_frames),
    "digits_scenes": Canvas(
        (digit_scenes.GRID,) * 2, digit_scenes.NONE, digit_scenes.random_frames
    ),
}
"""By name of the dataset that is drawn."""


def check_vision(vision: VisionConfig, canvas: Canvas) -> None:
    """Refuses a tower that cannot be pretrained here.

    Raises:
      UserError: it pools to another grid than that of the canvas.
    """
    if vision.pool != canvas.grid:
        height, width = canvas.grid
        raise UserError(
            f"model.vision.pool is {vision.pool}; pretraining on digits labels the {height} x "
            f"{width} places of the canvas, so it must be {canvas.grid}"
        )


def pretrain_tower(vision: VisionConfig, config: TowerConfig, canvas: Canvas) -> PretrainedTower:
    """Trains a tower on frames of the training scans, with a progress bar; deterministic.

    Args:
      vision: the architecture; pools to the grid of the canvas.
      config: how.
      canvas: one of `CANVASES`.

    Returns:
      The tower, judged on frames of the validation scans.

    Raises:
      UserError: the tower pools to another grid.
    """
    check_vision(vision, canvas)
    rng = np.random.default_rng(config.seed)
    used = config.batch_size * _OVERLAID
    images, labels = canvas.random_frames("train", min(_DRAWN, config.steps * used), rng)
    model = _Readout(vision, canvas.background)
    # Compiles in half the time of threefry, whose streams would be the same on every back end.
    key = jax.random.key(config.seed, impl="rbg")
    variables = nn.meta.unbox(jax.jit(model.init)(key, images[:1]))
    optimizer = _optimizer(config)
    opt_state = optimizer.init(variables)

    @jax.jit
    def update(variables, opt_state, images_NYX, labels_NP, key):
        images_BYX, labels_BP = _disturb(images_NYX, labels_NP, canvas.background, key)
        gradients = jax.grad(_loss)(variables, model, images_BYX, labels_BP, config.summary_weight)
        changes, opt_state = optimizer.update(gradients, opt_state, variables)
        return optax.apply_updates(variables, changes), opt_state

    hidden = not distributed.is_lead()
    for step in progress.track(range(config.steps), "Pretraining the vision tower", disable=hidden):
        chosen = rng.integers(0, len(images), used)
        step_key = jax.random.fold_in(key, step)
        variables, opt_state = update(
            variables, opt_state, images[chosen], labels[chosen], step_key
        )
        if step % 32 == 0:
            # Dispatch runs ahead of the device; without this the bar would end before the work.
            jax.block_until_ready(variables)
    return _judge(model, variables, canvas, rng)


class _Readout(nn.Module):
    """The tower with a linear classifier on its spatial tokens and one on its CLS token."""

    config: VisionConfig
    background: int

    @nn.compact
    def __call__(self, images_BYX: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """uint8 grey images to logits_BPC of the places, logits_BC of the frame, tokens_BNW."""
        images_BYXC = jnp.repeat(images_BYX[..., None], 3, axis=-1)
        tower = VisionTower(self.config, jnp.float32, jnp.float32, name="tower")
        tokens_BNW = tower(preprocess(images_BYXC, self.config))
        places_BPC = nn.Dense(self.background + 1, name="places")(tokens_BNW[:, 1:])
        frame_BC = nn.Dense(self.background, name="frame")(tokens_BNW[:, 0])
        return places_BPC, frame_BC, tokens_BNW


def _optimizer(config: TowerConfig) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, config.steps // 15, config.steps
    )
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, b2=0.99, weight_decay=_WEIGHT_DECAY),
    )


def _disturb(
    images_NYX: jax.Array, labels_NP: jax.Array, background: int, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Overlays frames and changes contrast, brightness and noise, as cameras and codecs do."""
    stack = (_OVERLAID, -1)
    images_BYX, labels_BP = overlay(
        images_NYX.reshape(*stack, *images_NYX.shape[1:]),
        labels_NP.reshape(*stack, labels_NP.shape[-1]),
        background,
    )
    contrast, shade, noise = jax.random.split(key, 3)
    each = (images_BYX.shape[0], 1, 1)
    pixels = images_BYX * jax.random.uniform(contrast, each, minval=1 - _CONTRAST, maxval=1)
    pixels += jax.random.uniform(shade, each, minval=-_SHADE, maxval=_SHADE)
    pixels += _NOISE * jax.random.normal(noise, images_BYX.shape)
    return jnp.clip(jnp.round(pixels), 0, 255).astype(jnp.uint8), labels_BP


def _present(labels_BP: jax.Array, background: int) -> jax.Array:
    """Which labels but the background are in the frame, bool [B, C]."""
    return jax.nn.one_hot(labels_BP, background, dtype=bool).any(axis=1)


def _loss(
    variables: Mapping[str, Any],
    model: _Readout,
    images_BYX: jax.Array,
    labels_BP: jax.Array,
    summary_weight: float,
) -> jax.Array:
    places_BPC, frame_BC, _ = model.apply(variables, images_BYX)
    known_BP = labels_BP != UNKNOWN
    each_BP = optax.softmax_cross_entropy_with_integer_labels(places_BPC, jnp.maximum(labels_BP, 0))
    summary = optax.sigmoid_binary_cross_entropy(frame_BC, _present(labels_BP, model.background))
    return jnp.sum(each_BP * known_BP) / jnp.sum(known_BP) + summary_weight * summary.mean()


def _judge(
    model: _Readout, variables: Mapping[str, Any], canvas: Canvas, rng: np.random.Generator
) -> PretrainedTower:
    images, labels = canvas.random_frames("validation", _VALIDATED, rng)
    places_BPC, frame_BC, tokens_BNW = jax.jit(model.apply)(variables, images)
    right = np.asarray(places_BPC.argmax(axis=-1)) == labels
    is_digit = labels != canvas.background
    return PretrainedTower(
        params=variables["params"]["tower"],
        digit_accuracy=float(right[is_digit].mean()),
        empty_accuracy=float(right[~is_digit].mean()),
        summary_accuracy=float(((frame_BC > 0) == _present(labels, canvas.background)).mean()),
        feature_rms=float(jnp.sqrt(jnp.mean(jnp.square(tokens_BNW)))),
    )
