"""Several videos narrated together: one call of the model per frame, whatever their number.

A small batch costs a decoder little more than one stream: its weights are read once for all.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence

import jax
import numpy as np

from videollm_mod_jax.data.video import Frame
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.models import VideoLLM
from videollm_mod_jax.streaming import engine
from videollm_mod_jax.streaming.ahead import DEPTH, ahead
from videollm_mod_jax.streaming.dialogues import Dialogues
from videollm_mod_jax.streaming.frames import check_image, letterbox
from videollm_mod_jax.streaming.session import Answer
from videollm_mod_jax.streaming.triggers import check_threshold
from videollm_mod_jax.training.checkpoint import LoadedModel


def narrate_together(
    model: LoadedModel,
    videos: Sequence[Iterable[Frame]],
    *,
    silence_threshold: float | None = None,
    max_frames: int = 1200,
    max_text_tokens: int = 4096,
    max_new_tokens: int = 64,
    system: str | None = None,
) -> Iterator[tuple[tuple[Frame, Answer | None] | None, ...]]:
    """Shows the k-th frames of all videos together; each video is narrated as if it were alone.

    ```
    a   a0   a1   a2             ->   (a0, None)   (a1, "It falls.")   (a2, None)   None
    b   b0   b1   b2   b3             (b0, None)   (b1, None)          (b2, "Two.") (b3, None)
    ```

    Frames are decoded, and the B of a step encoded in one batch, ahead of the language model.

    Args:
      model: weights, config and tokenizer.
      videos: frames of each, such as those of `read_video` at one rate.
      silence_threshold: see `breaks_silence`.
      max_frames: frames of a video that the caches have room for.
      max_text_tokens: text tokens of a video that they have room for.
      max_new_tokens: longest answer with its eos; a longer one is cut.
      system: the instruction that opens every dialogue; None is the one of the training.

    Yields:
      For every step what each video showed and what was said about it; None for one that is over.

    Raises:
      UserError: no videos, a setting out of range, a frame of another kind, what reading a video
        raises, or a full context.
    """
    model.config.require("decoder", "vision")
    check_threshold(silence_threshold)
    for name, value, least in (
        ("videos", len(videos), 1),
        ("max_frames", max_frames, 1),
        ("max_new_tokens", max_new_tokens, 2),
    ):
        if value < least:
            raise UserError(f"{name}: found {value}; expected at least {least}")
    dialogues = Dialogues(
        model,
        engine.start(VideoLLM(model.config), len(videos), max_text_tokens, max_frames, seed=0),
        system=model.system if system is None else system,
        max_new_tokens=max_new_tokens,
        silence_threshold=silence_threshold,
    )
    return _narrate(dialogues, _encode_ahead(model, videos), max_frames, max_text_tokens)


def _narrate(
    dialogues: Dialogues,
    steps: Iterator[tuple[tuple[Frame | None, ...], jax.Array]],
    max_frames: int,
    max_text_tokens: int,
) -> Iterator[tuple[tuple[Frame, Answer | None] | None, ...]]:
    for step, (frames, features_BNW) in enumerate(steps):
        rows = [row for row, frame in enumerate(frames) if frame is not None]
        if step == max_frames:
            raise UserError(
                f"the context is full: it holds max_frames = {max_frames} frames of every video; "
                "start again with a larger max_frames"
            )
        for row in rows:
            needed = dialogues.needs(row, dialogues.frame_prefix(row))
            if needed > max_text_tokens:
                raise UserError(
                    f"the context of video {row} is full: with an answer at "
                    f"{frames[row].time:g} s it may take {needed} text tokens, and max_text_tokens "
                    f"is {max_text_tokens}; start again with a larger one"
                )
        prompts = dict.fromkeys(dialogues.show(rows, features_BNW), dialogues.answer_prompt)
        said = dialogues.answer(prompts, padded=False) if prompts else {}
        yield tuple(
            None
            if frame is None
            else (frame, Answer(frame.time, said[row]) if row in said else None)
            for row, frame in enumerate(frames)
        )


def _encode_ahead(
    model: LoadedModel, videos: Sequence[Iterable[Frame]]
) -> Iterator[tuple[tuple[Frame | None, ...], jax.Array]]:
    """The frames of every step and their features, black where a video is over."""
    video_llm, side = VideoLLM(model.config), model.config.vision.image_size

    def encode(frames: tuple[Frame | None, ...]) -> tuple[tuple[Frame | None, ...], jax.Array]:
        squares_BAAC = np.zeros((len(frames), side, side, 3), np.uint8)
        for square, frame in zip(squares_BAAC, frames, strict=True):
            if frame is not None:
                check_image(frame)
                square[:] = letterbox(frame.image, side)
        return frames, engine.encode(video_llm, model.variables, squares_BAAC)

    return ahead(map(encode, itertools.zip_longest(*videos)), DEPTH)
