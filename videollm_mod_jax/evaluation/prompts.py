"""What the model sees before it answers: a conversation up to the last answer.

That answer is the reference; a conversation without any is a prompt as a whole. Prompts are padded
to one of a few shapes.
"""

from dataclasses import dataclass

import numpy as np

from videollm_mod_jax.data import dialogue
from videollm_mod_jax.data.tokenizer import Tokenizer
from videollm_mod_jax.streaming import engine


@dataclass(frozen=True)
class Prompt:
    """What the model sees before it answers.

    Attributes:
      text: of the prompt, without frames: each stream is shown as its number of frames.
      tokens: int32 (length,), 0 at vision positions.
      frame_starts: int32 (frames,), index of the first token of every frame.
    """

    text: str
    tokens: np.ndarray
    frame_starts: np.ndarray


def split_reference(
    conversation: dialogue.Conversation,
) -> tuple[dialogue.Conversation, str | None]:
    """The messages before the last answer, and its text.

    ```
    System User Stream Assistant Stream     ->     System User Stream, the answer's text
    System User Stream                      ->     System User Stream, None
    ```
    """
    for index in range(len(conversation) - 1, -1, -1):
        if isinstance(conversation[index], dialogue.Assistant):
            return conversation[:index], conversation[index].text
    return conversation, None


def make_prompt(
    conversation: dialogue.Conversation, tokenizer: Tokenizer, tokens_per_frame: int
) -> Prompt:
    """Renders messages as a prompt that asks for an answer.

    With N = 2 and one token per character (/ is a line end, v a vision position):

    ```
    System("Hi"), Stream(2), User("How?")
    b Hi//[vv,vv]/User: How?/Assistant:        tokens
          ^  ^                                 frame_starts
    b Hi//[2 frames]/User: How?/Assistant:     text
    ```

    Args:
      conversation: the messages, none of which is the answer.
      tokenizer: encodes the text.
      tokens_per_frame: N.
    """
    rendered = dialogue.render(conversation, tokens_per_frame, tokenizer.bos, tokenizer.eos)
    ids = tokenizer.encode(rendered.text + dialogue.ASSISTANT).ids
    is_vision = ids == tokenizer.placeholder_id
    starts = np.flatnonzero(is_vision)[::tokens_per_frame].astype(np.int32)
    return Prompt(
        _shown(conversation, tokenizer), np.where(is_vision, 0, ids).astype(np.int32), starts
    )


def _shown(conversation: dialogue.Conversation, tokenizer: Tokenizer) -> str:
    pieces = []
    for message in conversation:
        if isinstance(message, dialogue.Stream):
            frames = f"{message.num_frames} frame{'s' if message.num_frames > 1 else ''}"
            pieces.append(dialogue.STREAM_OPEN + frames + dialogue.STREAM_CLOSE)
        else:
            bos = "" if pieces else tokenizer.bos
            pieces.append(dialogue.render((message,), 1, bos, tokenizer.eos).text)
    return "".join(pieces) + dialogue.ASSISTANT


def frame_bucket(frames: int) -> int:
    """The number of frames that a sequence is padded to: one of four steps per power of two.

    So few shapes are compiled, and at most a fifth of the frames are padding:

    ```
    frames  0 1 2 3 4 5 6 7 8 9 10 11 12 13 .. 16 17 .. 20
    padded  1 1 2 3 4 5 6 7 8 10   12    14    16       20
    ```
    """
    step = max(1, 1 << max(0, (frames - 1).bit_length() - 3))
    return max(1, -(-frames // step) * step)


def padded_shape(prompt: Prompt, tokens_per_frame: int) -> tuple[int, int]:
    """The frames and text tokens that a prompt is padded to; it depends on the prompt alone."""
    frames = len(prompt.frame_starts)
    text = len(prompt.tokens) - frames * tokens_per_frame
    return frame_bucket(frames), engine.bucket(text)
