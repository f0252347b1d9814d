"""Dialogues about several videos that advance together: one engine state, a template for each.

Letters: B dialogues, S tokens of a chunk, T text tokens, N tokens per frame, W vision width.
"""

import functools
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from videollm_mod_jax.data import dialogue
from videollm_mod_jax.data.tokenizer import Tokenizer
from videollm_mod_jax.models import VideoLLM
from videollm_mod_jax.streaming import engine
from videollm_mod_jax.streaming.triggers import breaks_silence
from videollm_mod_jax.training.checkpoint import LoadedModel

_append = functools.partial(jax.jit, static_argnames="model", donate_argnames="state")(
    engine.append
)


class Dialogues:
    """One dialogue per row of a state, each as if it were alone, greedily answered.

    ```
    row 0   system [ v v v , v v v ] Assistant: It falls. \\n [ v v v
    row 1   system [ v v v , v v v , v v v                                  has seen as much
    ```

    Attributes:
      used: text tokens that every dialogue holds.
      answer_prompt: ids of what is put before an answer that nobody asked for.
    """

    def __init__(
        self,
        model: LoadedModel,
        state: engine.StreamState,
        *,
        system: str,
        max_new_tokens: int,
        silence_threshold: float | None,
    ):
        """Begins the dialogues.

        Args:
          model: weights, config and tokenizer.
          state: a fresh one; B is its number of rows. Behind the text that a dialogue may use it
            has room for the padding of the longest chunk that any row is given.
          system: the instruction that opens them.
          max_new_tokens: longest answer with its eos; a longer one is cut.
          silence_threshold: see `breaks_silence`.
        """
        self._model, self._video_llm, self._state = model, VideoLLM(model.config), state
        self._max_new_tokens, self._threshold = max_new_tokens, silence_threshold
        self._size = state.position_B.shape[0]
        opening = dialogue.opening(system, model.tokenizer.bos)
        # Of each row: what is said with whatever comes first, and whether a frame came last.
        self._openings, self._open = [opening] * self._size, [False] * self._size
        self.used = [0] * self._size
        self.answer_prompt = self._encode(dialogue.ANSWER_PROMPT)
        self._interval = self._encode(dialogue.INTERVAL)

    def frame_prefix(self, row: int) -> list[int]:
        """Ids of the text before the next frame."""
        if self._open[row]:
            return self._interval
        return self._encode(self._openings[row] + dialogue.STREAM_OPEN)

    def question(self, row: int, text: str) -> list[int]:
        """Ids of a user's question, up to the answer."""
        return self._encode(self._openings[row] + dialogue.question_prompt(text, self._open[row]))

    def needs(self, row: int, ids: Sequence[int]) -> int:
        """Text tokens that a dialogue may hold once it was given `ids` and has answered."""
        return self.used[row] + len(ids) + len(self.answer_prompt) + self._max_new_tokens

    def show(self, rows: Sequence[int], features_BNW: jax.Array | np.ndarray) -> list[int]:
        """Shows the next frame to some rows; those of them that want to speak.

        Args:
          rows: one or more.
          features_BNW: of the tower, with anything in the other rows.
        """
        N = self._model.config.tokens_per_frame
        prefixes = {row: self.frame_prefix(row) for row in rows}
        S = max(map(len, prefixes.values())) + N
        tokens_BS = np.zeros((self._size, S), np.int32)
        starts_B1, length_B = np.zeros((self._size, 1), np.int32), np.zeros(self._size, np.int32)
        for row, ids in prefixes.items():
            tokens_BS[row, : len(ids)] = ids
            starts_B1[row], length_B[row] = len(ids), len(ids) + N
            self.used[row] += len(ids)
            self._openings[row], self._open[row] = "", True
        self._state = _append(
            self._video_llm,
            self._model.variables,
            self._state,
            tokens_BS,
            length_B,
            features_BNW[:, None],
            starts_B1,
        )
        interval = self._model.tokenizer.interval_id
        breaks_B = np.asarray(breaks_silence(self._state.logits_BV, interval, self._threshold))
        return [row for row in rows if breaks_B[row]]

    def answer(self, prompts: Mapping[int, Sequence[int]], *, padded: bool) -> dict[int, str]:
        """Appends prompts to some rows, and what the model answers.

        Args:
          prompts: ids by row; one or more.
          padded: to the bucket of the longest, for prompts of many lengths.
        """
        longest = max(map(len, prompts.values()))
        T = engine.bucket(longest) if padded else longest
        tokens_BT, length_B = np.zeros((self._size, T), np.int32), np.zeros(self._size, np.int32)
        for row, ids in prompts.items():
            tokens_BT[row, : len(ids)], length_B[row] = ids, len(ids)
        model = self._model
        state = engine.append_text(
            self._video_llm, model.variables, self._state, tokens_BT, length_B
        )
        self._state, said_BT, said_B = engine.generate_rows(
            self._video_llm,
            model.variables,
            state,
            length_B > 0,
            None,
            eos_id=model.tokenizer.eos_id,
            max_new_tokens=self._max_new_tokens,
            temperature=0.0,
        )
        said_BT, said_B = jax.device_get((said_BT, said_B))
        for row, ids in prompts.items():
            self.used[row] += len(ids) + int(said_B[row])
            self._openings[row], self._open[row] = "", False
        return {row: read_answer(said_BT[row], model.tokenizer) for row in prompts}

    def _encode(self, text: str) -> list[int]:
        return self._model.tokenizer.encode(text).ids.tolist()


def read_answer(tokens_T: np.ndarray, tokenizer: Tokenizer) -> str:
    """The text of one row of `engine.generate_rows` that answered."""
    length = int(np.argmax(tokens_T == tokenizer.eos_id))
    return tokenizer.decode(tokens_T[:length]).strip()
