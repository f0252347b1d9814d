"""A batch to train on that needs no data."""

import numpy as np

from videollm_mod_jax.data.config import DataConfig
from videollm_mod_jax.data.example import LANGUAGE, PADDING, STREAM
from videollm_mod_jax.models import VideoLLMConfig
from videollm_mod_jax.training.step import HostBatch


def random_batch(model: VideoLLMConfig, data: DataConfig) -> HostBatch:
    """A conversation as the data give it, with random features and words.

    Text is spread evenly before, between and behind the frames. A frame's last token learns what
    comes next, as a text token before another one does.

    ```
    F 2, T 4, N 2, J 5      a v v b v v c d        frame_starts 1 4
                                b     c d          label_positions 2 5 6
                                2     2 1          label_kinds (and two of padding)
    ```

    Returns:
      The arrays of `step.BATCH_KEYS`, all B of the same layout; of the labels, the first J.
    """
    rng = np.random.default_rng(0)
    B, F, N, J = data.batch_size, data.frames, model.tokens_per_frame, data.labels
    T, S = data.text_tokens, data.text_tokens + data.frames * model.tokens_per_frame
    starts_F = (np.arange(1, F + 1) * T // (F + 1) + np.arange(F) * N).astype(np.int32)
    is_vision_S = np.zeros(S, bool)
    is_vision_S[(starts_F[:, None] + np.arange(N)).ravel()] = True
    tokens_BS = rng.integers(0, model.decoder.vocab_size, (B, S), np.int32)
    tokens_BS[:, is_vision_S] = 0
    learns_S = np.append(~is_vision_S[1:], False)
    positions = np.flatnonzero(learns_S)[:J].astype(np.int32)
    kinds = np.where(is_vision_S[positions], STREAM, LANGUAGE).astype(np.int8)
    pad = (0, J - len(positions))
    positions_J = np.pad(positions, pad)
    shape = (B, F, model.vision.features_per_frame, model.vision.width)
    return {
        "tokens": tokens_BS,
        "frame_starts": np.tile(starts_F, (B, 1)),
        "features": rng.standard_normal(shape, np.float32),
        "label_positions": np.tile(positions_J, (B, 1)),
        "labels": np.pad(tokens_BS[:, positions + 1], ((0, 0), pad)),
        "label_kinds": np.tile(np.pad(kinds, pad, constant_values=PADDING), (B, 1)),
    }
