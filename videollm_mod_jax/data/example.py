"""A conversation and its frame features as arrays of fixed shape.

One flat sequence in the order of time; S = T + F * N slots whatever the conversation:

    text and frames in order, `length` tokens | unused frames, N slots each | unused text slots

so there are always exactly F frames and T text slots, and `frame_starts` rises by N or more. What
is unused comes last, where causal attention hides it. Vision positions are known by `frame_starts`;
no id stands for them.

Shape suffixes: S tokens of the flat sequence, F frames, N tokens per frame, W width of the vision
features, J labelled positions, T text tokens.
"""

import bisect
import dataclasses
from dataclasses import dataclass

import numpy as np

from videollm_mod_jax.config_dict import COUNT_OR_NONE, Checked
from videollm_mod_jax.data import dialogue
from videollm_mod_jax.data.tokenizer import Tokenizer
from videollm_mod_jax.errors import UserError

PADDING, LANGUAGE, STREAM = 0, 1, 2


@dataclass(frozen=True)
class Turn:
    """What happens from one answer (exclusive) to the next (inclusive), for the evaluation.

    Slots are indices into the J axis of the example of the same conversation: the judged logits of
    the turn's silence are `logits_JV[stream_slots]`, their labels `labels_J[stream_slots]`, their
    places in the sequence `label_positions_J[stream_slots]`.

    Attributes:
      first_frame: index into the F axis of the first frame of the turn.
      num_frames: frames of the turn, 0 for a second turn within one frame.
      stream_slots: (learn_frames,) int32, one slot per learnt frame in order, at the frame's last
        vision position. Their label is the interval token but for the last one of a narrated turn,
        where it is the token that ends the stream.
      answer_slots: (n,) int32, the other labels of the turn: "Assistant: text<eos>" (and the line
        end after the stream where that is a token of its own). Empty when the answer is not learnt.
      asked: whether the answer replies to a question; otherwise it is a narration, whose timing is
        the model's own choice.
    """

    first_frame: int
    num_frames: int
    stream_slots: np.ndarray
    answer_slots: np.ndarray
    asked: bool

    @property
    def learn_frames(self) -> int:
        """Number of learnt frames of the turn."""
        return len(self.stream_slots)


@dataclass(frozen=True)
class Budget(Checked):
    """The static sizes of an example: F frames, T text tokens, J labelled positions."""

    frames: COUNT_OR_NONE
    text_tokens: COUNT_OR_NONE
    labels: COUNT_OR_NONE


def build_example(
    conversation: dialogue.Conversation,
    features_FNW: np.ndarray,
    tokenizer: Tokenizer,
    tokens_per_frame: int,
    budget: Budget,
    record: str = "example",
) -> dict[str, np.ndarray]:
    """Lays out one conversation.

    Labels are the tokens that overlap a learnt range of the text, moved to the position before
    them: with N = 2 and one token per character (/ is a line end, v a vision position),

        text       /  [  v  v  ,  v  v  ]  /  A  s ...
        learnt                 ^        ^  ^  ^  ^
        label               ,        ]  /  A  s
        kind                2        2  1  1  1

    Args:
      conversation: the messages.
      features_FNW: features of exactly the frames of the conversation, any float dtype.
      tokenizer: encodes the text.
      tokens_per_frame: N.
      budget: the sizes to pad to.
      record: what error messages call it.

    Returns:
      tokens (S,) int32, 0 in vision and unused slots; frame_starts (F,) int32; features (F, N, W)
      float32; length () int32; label_positions, labels (J,) int32; label_kinds (J,) int8: 0
      padding, 1 language, 2 stream (at the last vision position of a frame). Labels are sorted by
      position, padding last.

    Raises:
      UserError: the conversation does not fit the budget, or the features do not fit the
        conversation.
    """
    layout = _lay_out(conversation, tokenizer, tokens_per_frame)
    num_frames, num_tokens = len(layout.frame_starts), len(layout.ids)
    if features_FNW.shape[0] != num_frames:
        raise UserError(
            f"{record}: features: expected the {num_frames} frames of the conversation, found "
            f"{features_FNW.shape[0]}; encode the videos again"
        )
    for field, found in dataclasses.asdict(_needed(layout, tokens_per_frame)).items():
        limit = getattr(budget, field)
        if found > limit:
            raise UserError(
                f"{record}: {field}: expected at most {limit}, found {found}; raise the budget's "
                f"'{field}' or shorten the conversation"
            )
    tokens_S = np.zeros(budget.text_tokens + budget.frames * tokens_per_frame, np.int32)
    tokens_S[:num_tokens] = np.where(layout.is_vision, 0, layout.ids)
    unused = np.arange(budget.frames - num_frames, dtype=np.int32)
    features = np.zeros((budget.frames, *features_FNW.shape[1:]), np.float32)
    features[:num_frames] = features_FNW
    pad = (0, budget.labels - len(layout.label_positions))
    return {
        "tokens": tokens_S,
        "frame_starts": np.append(layout.frame_starts, num_tokens + unused * tokens_per_frame),
        "features": features,
        "length": np.array(num_tokens, np.int32),
        "label_positions": np.pad(layout.label_positions, pad),
        "labels": np.pad(layout.ids[layout.label_positions + 1], pad),
        "label_kinds": np.pad(layout.label_kinds, pad),
    }


def fit(
    conversation: dialogue.Conversation,
    tokenizer: Tokenizer,
    tokens_per_frame: int,
    budget: Budget,
) -> dialogue.Conversation:
    """The longest beginning of a conversation that fits a budget and ends with an answer.

    ```
    System Stream(9) User Assistant Stream(9) Assistant Stream(9)       frames 20
    System Stream(9) User Assistant Stream(9) Assistant
    ```

    A conversation that fits, or of which not even the first answer does, comes back unchanged.

    Args:
      conversation: the messages.
      tokenizer: encodes the text.
      tokens_per_frame: N.
      budget: what it must fit.
    """

    def fits(messages: dialogue.Conversation) -> bool:
        needed = _needed(_lay_out(messages, tokenizer, tokens_per_frame), tokens_per_frame)
        sizes = zip(dataclasses.astuple(needed), dataclasses.astuple(budget), strict=True)
        return all(size <= limit for size, limit in sizes)

    if fits(conversation):
        return conversation
    ends = [i + 1 for i, said in enumerate(conversation) if isinstance(said, dialogue.Assistant)]
    # A longer beginning needs more of everything.
    fitting = bisect.bisect_left(ends, True, key=lambda end: not fits(conversation[:end]))
    return conversation[: ends[fitting - 1]] if fitting else conversation


def turns_of(
    conversation: dialogue.Conversation, tokenizer: Tokenizer, tokens_per_frame: int
) -> tuple[Turn, ...]:
    """The turns of a conversation, one per answer; frames after the last answer are in none."""
    layout = _lay_out(conversation, tokenizer, tokens_per_frame)
    answers = sum(isinstance(message, dialogue.Assistant) for message in conversation)
    # The last ones, because bos and eos may be the same token.
    ends = iter(np.flatnonzero(layout.ids == tokenizer.eos_id)[-answers:].tolist())
    turns, start, first_frame, num_frames = [], 0, 0, 0
    for i, message in enumerate(conversation):
        if isinstance(message, dialogue.Stream):
            num_frames += message.num_frames
        if not isinstance(message, dialogue.Assistant):
            continue
        end = next(ends)
        # The label of a token sits one before it: eos, the last of a turn, is judged at end - 1.
        inside = (layout.label_positions >= start - 1) & (layout.label_positions < end)
        silent = layout.label_kinds == STREAM
        turns.append(
            Turn(
                first_frame,
                num_frames,
                np.flatnonzero(inside & silent).astype(np.int32),
                np.flatnonzero(inside & ~silent).astype(np.int32),
                i > 0 and isinstance(conversation[i - 1], dialogue.User),
            )
        )
        start, first_frame, num_frames = end + 1, first_frame + num_frames, 0
    return tuple(turns)


@dataclass(frozen=True)
class _Layout:
    ids: np.ndarray  # (length,) int32, the placeholder's at vision positions
    is_vision: np.ndarray  # (length,) bool
    frame_starts: np.ndarray  # (frames,) int32
    label_positions: np.ndarray  # (labels,) int32
    label_kinds: np.ndarray  # (labels,) int8


def _lay_out(
    conversation: dialogue.Conversation, tokenizer: Tokenizer, tokens_per_frame: int
) -> _Layout:
    rendered = dialogue.render(conversation, tokens_per_frame, tokenizer.bos, tokenizer.eos)
    ids, offsets = tokenizer.encode(rendered.text)
    is_vision = ids == tokenizer.placeholder_id
    vision = np.flatnonzero(is_vision).astype(np.int32)
    ends_frame = np.zeros(len(ids), bool)
    ends_frame[vision[tokens_per_frame - 1 :: tokens_per_frame]] = True
    learnt = _overlapping(offsets, rendered.learn_ranges)
    positions = np.flatnonzero(learnt[1:]).astype(np.int32)
    kinds = np.where(ends_frame[positions], STREAM, LANGUAGE).astype(np.int8)
    return _Layout(ids, is_vision, vision[::tokens_per_frame], positions, kinds)


def _needed(layout: _Layout, tokens_per_frame: int) -> Budget:
    """The least budget that a conversation fits."""
    num_frames = len(layout.frame_starts)
    text_tokens = len(layout.ids) - num_frames * tokens_per_frame
    return Budget(num_frames, text_tokens, len(layout.label_positions))


def _overlapping(offsets: np.ndarray, ranges: tuple[tuple[int, int], ...]) -> np.ndarray:
    """Which tokens share a character with a range: overlap, as a character may be several tokens.

    offsets (0,2) (2,3) (2,3) (3,5), ranges (2,4)  ->  False True True True
    """
    learnt = np.zeros(offsets.max(initial=0), np.int64)
    for start, stop in ranges:
        learnt[start:stop] = 1
    before = np.append(0, np.cumsum(learnt))
    return before[offsets[:, 1]] > before[offsets[:, 0]]
