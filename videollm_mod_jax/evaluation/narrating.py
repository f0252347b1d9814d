"""Watching with its own words as history: what a model says when nobody corrects it.

Teacher-forced metrics judge every turn on the true history; live, the history is what the model
itself said. Here a batch of streams is watched live: the users' questions are put at their times,
and all that is said stays in the caches. Every stream equals a `StreamingSession` of its own.

Shape suffixes: B streams, F frames, N tokens per frame, W vision feature width, T text tokens.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from videollm_mod_jax.data import dialogue
from videollm_mod_jax.data.annotations import frame_range
from videollm_mod_jax.data.pipeline import Examples
from videollm_mod_jax.evaluation.placing import put_rows
from videollm_mod_jax.evaluation.prompts import frame_bucket, make_prompt
from videollm_mod_jax.evaluation.script import Question, Script, script_of
from videollm_mod_jax.evaluation.timing import Narration
from videollm_mod_jax.models import VideoLLM
from videollm_mod_jax.streaming import engine
from videollm_mod_jax.streaming.dialogues import Dialogues
from videollm_mod_jax.training.checkpoint import LoadedModel

ROOM = 4
"""The caches hold so many times the text of the true dialogue; who says more is cut short."""


@dataclasses.dataclass(frozen=True)
class Watched:
    """What a model said about a record, and what is true.

    Attributes:
      narrations: said unasked, at the times of frames, in seconds of the video.
      truth: the true narrations, at the times of the frames that they follow.
      answers: (question, answer, reference or None).
      start: seconds of the first frame.
      full_at: seconds at which the context was full and the rest went unsaid; None if it never was.
    """

    narrations: tuple[Narration, ...]
    truth: tuple[Narration, ...]
    answers: tuple[tuple[str, str, str | None], ...]
    start: float
    full_at: float | None


def watch_records(
    model: LoadedModel,
    examples: Examples,
    indices: Iterable[int],
    *,
    batch_size: int,
    max_new_tokens: int,
    silence_threshold: float | None,
) -> Iterator[tuple[int, Watched]]:
    """Watches records live, greedily.

    Args:
      model: weights, config and tokenizer.
      examples: of a split, undisturbed.
      indices: of records in it, in any order.
      batch_size: B, streams that advance together.
      max_new_tokens: longest answer with its eos; a longer one is cut.
      silence_threshold: see `breaks_silence`.

    Yields:
      Index and what was said, in the order in which batches of streams of one length become full.

    Raises:
      UserError: a record without features.
    """
    for group in _grouped(examples, indices, batch_size, max_new_tokens):
        batch = _Batch(model, examples, group, batch_size, max_new_tokens, silence_threshold)
        for stream in batch.watch():
            yield stream.index, stream.watched()


@dataclasses.dataclass
class _Stream:
    """One row: what it will be shown, and what was said."""

    index: int
    script: Script
    times_F: np.ndarray
    capacity: int
    full_at: float | None = None
    narrations: list[Narration] = dataclasses.field(default_factory=list)
    answers: list[tuple[str, str, str | None]] = dataclasses.field(default_factory=list)

    def watched(self) -> Watched:
        truth = (Narration(float(self.times_F[f]), text) for f, text in self.script.narrations)
        return Watched(
            tuple(self.narrations),
            tuple(truth),
            tuple(self.answers),
            float(self.times_F[0]),
            self.full_at,
        )


def _grouped(
    examples: Examples, indices: Iterable[int], batch_size: int, max_new_tokens: int
) -> Iterator[list[_Stream]]:
    """Streams of one padded shape, `batch_size` at a time, and at the end those left over."""
    waiting: dict[tuple[int, int], list[_Stream]] = {}
    for index in indices:
        record, conversation = examples.records[index], examples.conversation(index)
        script = script_of(conversation)
        prompt = make_prompt(conversation, examples.tokenizer, examples.tokens_per_frame)
        text = len(prompt.tokens) - script.frames * examples.tokens_per_frame
        capacity = ROOM * engine.bucket(text + max_new_tokens)
        times_F = np.array(frame_range(record, examples.features.meta.fps))
        times_F = times_F[: script.frames] / examples.features.meta.fps
        group = waiting.setdefault((frame_bucket(script.frames), capacity), [])
        group.append(_Stream(index, script, times_F, capacity))
        if len(group) == batch_size:
            yield waiting.pop((frame_bucket(script.frames), capacity))
    yield from waiting.values()


class _Batch:
    """Streams that advance together, frame by frame."""

    def __init__(
        self,
        model: LoadedModel,
        examples: Examples,
        streams: Sequence[_Stream],
        batch_size: int,
        max_new_tokens: int,
        silence_threshold: float | None,
    ):
        self._streams, self._size = streams, batch_size
        self._features = [
            examples.frames(examples.records[stream.index])[: stream.script.frames]
            for stream in streams
        ]
        opening = dialogue.opening(examples.system, model.tokenizer.bos)
        longest = max(
            len(model.tokenizer.encode(opening + dialogue.question_prompt(question.text, True)).ids)
            for stream in streams
            for question in (*stream.script.questions, Question(0, "?", None))
        )
        # Behind the text that a stream may use lies room for the padding of the longest chunk.
        state = engine.start(
            VideoLLM(model.config),
            batch_size,
            streams[0].capacity + engine.bucket(longest),
            frame_bucket(max(stream.script.frames for stream in streams)),
            seed=0,
        )
        self._dialogues = Dialogues(
            model,
            put_rows(state, batch_size, model.variables),
            system=examples.system,
            max_new_tokens=max_new_tokens,
            silence_threshold=silence_threshold,
        )

    def watch(self) -> Sequence[_Stream]:
        frames = max(stream.script.frames for stream in self._streams)
        for frame in range(frames + 1):
            self._ask(frame)
            if frame < frames:
                speaking = self._show(frame)
                self._speak(speaking, frame)
        return self._streams

    def _ask(self, frame: int) -> None:
        """Puts the questions that come before a frame, each stream's one after another."""
        asked = [
            [question for question in stream.script.questions if question.before == frame]
            for stream in self._streams
        ]
        for turn in range(max(map(len, asked))):
            rows = {
                b: questions[turn] for b, questions in enumerate(asked) if turn < len(questions)
            }
            prompts = {b: self._dialogues.question(b, asks.text) for b, asks in rows.items()}
            for b, said in self._answer(prompts, frame, padded=True).items():
                self._streams[b].answers.append((rows[b].text, said, rows[b].reference))

    def _show(self, frame: int) -> list[int]:
        """Shows a frame to the streams that have it; the rows that then speak."""
        watching = [b for b, stream in enumerate(self._streams) if frame < stream.script.frames]
        prefixes = {b: self._dialogues.frame_prefix(b) for b in watching}
        rows = list(self._with_room(prefixes, frame))
        if not rows:
            return []
        features_BNW = np.zeros((self._size, *self._features[0].shape[1:]), np.float32)
        for b in rows:
            features_BNW[b] = self._features[b][frame]
        return self._dialogues.show(rows, features_BNW)

    def _speak(self, rows: Sequence[int], frame: int) -> None:
        prompts = dict.fromkeys(rows, self._dialogues.answer_prompt)
        for b, said in self._answer(prompts, frame, padded=False).items():
            stream = self._streams[b]
            stream.narrations.append(Narration(float(stream.times_F[frame]), said))

    def _answer(self, prompts: dict[int, list[int]], frame: int, *, padded: bool) -> dict[int, str]:
        """What the model answers to prompts, in the rows that have room for it."""
        prompts = self._with_room(prompts, frame)
        return self._dialogues.answer(prompts, padded=padded) if prompts else {}

    def _with_room(self, chunks: dict[int, list[int]], frame: int) -> dict[int, list[int]]:
        """Of rows that are to be given text, those that may still be answered behind it."""
        fitting = {}
        for b, ids in chunks.items():
            stream = self._streams[b]
            if stream.full_at is None and self._dialogues.needs(b, ids) > stream.capacity:
                stream.full_at = float(stream.times_F[min(frame, len(stream.times_F) - 1)])
            if stream.full_at is None:
                fitting[b] = ids
        return fitting
