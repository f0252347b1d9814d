"""Disturbs what the model has said before, so that it looks at the video and not at its own words.

Training gives the model the true history of its answers; live it only has its own. Following
VideoLLM-online (data/stream.py) and VideoLLM-MoD (arXiv 2408.16730, section 4), now and then one
narration of a training example is moved in time, or its text is replaced by that of another
narration, and nothing is learnt beside it.
"""

import dataclasses

import numpy as np

from videollm_mod_jax.config_dict import COUNT_OR_NONE, SHARE, Checked
from videollm_mod_jax.data.dialogue import Assistant, Conversation, Stream


@dataclasses.dataclass(frozen=True)
class Disturbance(Checked):
    """How often and how far.

    Attributes:
      probability: that a conversation is disturbed.
      window: frames by which a narration may be moved, earlier or later.
    """

    probability: SHARE
    window: COUNT_OR_NONE


def disturb(conversation: Conversation, how: Disturbance, rng: np.random.Generator) -> Conversation:
    """Moves one narration by up to `window` frames and/or gives it another narration's text.

    A narration is an answer between two streams. Both keep one frame or more, and their frames in
    all stay the same. Learning stops before the earlier of the true and the new time; neither the
    disturbed text nor the silence after it is learnt; the next answer is learnt again. A moved one
    frame earlier, or said in the words of C (`A'` and `C'` are not learnt):

        before           Stream(4) A Stream(5) C
        moved            Stream(3, learn=2) A' Stream(6, learn=0) C
        in other words   Stream(4, learn=3) C' Stream(5, learn=0) C

    Conversations without a narration that can be disturbed come back unchanged.
    """
    places = [
        i
        for i in range(1, len(conversation) - 1)
        if isinstance(conversation[i], Assistant)
        and isinstance(conversation[i - 1], Stream)
        and isinstance(conversation[i + 1], Stream)
    ]
    if not places or rng.random() >= how.probability:
        return conversation
    i = int(rng.choice(places))
    before, said, after = conversation[i - 1 : i + 2]
    texts = sorted({conversation[j].text for j in places} - {said.text})
    shifts = [
        shift
        for shift in range(-how.window, how.window + 1)
        if shift and before.num_frames + shift >= 1 and after.num_frames - shift >= 1
    ]
    kinds = [
        (move, replace)
        for move, replace in ((True, False), (False, True), (True, True))
        if (shifts or not move) and (texts or not replace)
    ]
    if not kinds:
        return conversation
    move, replace = kinds[rng.integers(len(kinds))]
    shift = int(rng.choice(shifts)) if move else 0
    text = str(rng.choice(texts)) if replace else said.text
    untouched = before.num_frames + min(shift, 0) - 1
    return (
        *conversation[: i - 1],
        Stream(before.num_frames + shift, learn=min(before.learn_frames, untouched)),
        Assistant(text, learn=False),
        Stream(after.num_frames - shift, learn=0),
        *conversation[i + 2 :],
    )
