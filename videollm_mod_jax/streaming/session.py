"""A live dialogue about a video: frames and questions in, answers out.

The session speaks the dialogue template piece by piece (`data/dialogue.py`), so that its caches
hold exactly what one forward pass over the finished dialogue would.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from time import perf_counter

import jax
import jax.numpy as jnp
import numpy as np

from videollm_mod_jax.data import dialogue
from videollm_mod_jax.data.video import Frame
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.models import VideoLLM
from videollm_mod_jax.models.flops import kv_cache_bytes
from videollm_mod_jax.streaming import engine
from videollm_mod_jax.streaming.ahead import DEPTH, ahead
from videollm_mod_jax.streaming.frames import EncodedFrame, check_image, letterbox
from videollm_mod_jax.streaming.triggers import breaks_silence, check_threshold
from videollm_mod_jax.training.checkpoint import LoadedModel


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the model said.

    Attributes:
      time: seconds in the video at which it was said.
      text: without the template around it.
    """

    time: float
    text: str


@dataclasses.dataclass(frozen=True)
class FrameTiming:
    """Where the time of `see` went for one frame, in seconds; the parts add up to all of it.

    Attributes:
      encode: letterbox, and waiting for the vision tower once all else was given to the device;
        next to nothing for a frame that was encoded ahead of the language model.
      prefill: appending the frame, and the decision to answer.
      generate: the answer; 0 where the model stayed silent.
    """

    encode: float
    prefill: float
    generate: float


class StreamingSession:
    """Shows a model frames in the order of time, and lets a user ask in between.

    ```
    session = StreamingSession(load_model("runs/digits"), silence_threshold=0.725)
    for frame in session.encode_ahead(read_video("clip.mp4", fps=2)):
        if answer := session.see(frame):
            print(answer.time, answer.text)
    print(session.ask("How many digits so far?").text)
    ```

    Everything that a stream needs is compiled when the session is made; during the stream, only a
    question longer than those before may compile once more.

    Attributes:
      timings: one `FrameTiming` per frame seen.
    """

    def __init__(
        self,
        model: LoadedModel,
        *,
        silence_threshold: float | None = None,
        max_frames: int = 1200,
        max_text_tokens: int = 4096,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        system: str | None = None,
        request: str | None = None,
        seed: int = 0,
    ):
        """Compiles the model and allocates its caches, which never grow.

        Args:
          model: weights, config and tokenizer.
          silence_threshold: the model answers where the probability of silence falls below it;
            None answers where silence is not the most likely token. See `triggers.py`.
          max_frames: frames that the caches have room for.
          max_text_tokens: text tokens that they have room for: one per frame, and the dialogue.
          max_new_tokens: longest answer, with its eos; a longer one is cut.
          temperature: 0 is greedy, more samples.
          system: the instruction that opens the dialogue; None is the one of the training.
          request: what the user asks after the first frame, whose answer that frame brings. Models
            that learnt narration from Ego4D expect to be asked for it so.
          seed: of sampling.

        Raises:
          UserError: a number out of range.
        """
        model.config.require("decoder", "vision")
        check_threshold(silence_threshold)
        if not 0 <= temperature <= 1000:
            raise UserError(
                f"temperature is {temperature}; expected 0 (greedy) or more, at most 1000"
            )
        for name, value, least in (
            ("max_frames", max_frames, 1),
            ("max_new_tokens", max_new_tokens, 2),
        ):
            if value < least:
                raise UserError(f"{name} is {value}; expected at least {least}")
        self.timings: list[FrameTiming] = []
        self._model = VideoLLM(model.config)
        self._variables = model.variables
        self._tokenizer = model.tokenizer
        self._threshold = silence_threshold
        self._max_frames, self._max_text = max_frames, max_text_tokens
        self._max_new_tokens, self._temperature = max_new_tokens, temperature
        self._answer_prompt = self._encode_text(dialogue.ANSWER_PROMPT)
        system = model.system if system is None else system
        self._check_text("system", system)
        self._request = [] if request is None else self._request_ids(request)
        # One piece with what follows it; empty once it was said.
        self._opening = dialogue.opening(system, self._tokenizer.bos)
        self._stream_open = False
        self._frames = self._text = 0
        # Of every frame seen, the stream position of its first token.
        self._frame_positions: list[int] = []
        # The latest time reached, by a frame or a question, and by a frame.
        self._time, self._frame_time = 0.0, -math.inf
        first = self._encode_text(self._opening + dialogue.STREAM_OPEN)
        if (needed := self._room_for_frame(first)) > max_text_tokens:
            raise UserError(
                f"max_text_tokens is {max_text_tokens}; expected at least {needed}, the room that "
                f"a system text of {len(first)} tokens and an answer of {max_new_tokens} may take"
            )
        self._state = engine.start(self._model, 1, max_text_tokens, max_frames, seed)
        self._compile()
        # Freed before the next are allocated: the caches of a long stream do not fit twice.
        del self._state
        self._state = engine.start(self._model, 1, max_text_tokens, max_frames, seed)

    @property
    def cache_bytes_per_frame(self) -> int:
        """Bytes that a silent frame adds to the caches: its kept tokens and the interval token."""
        config = self._model.config
        return kv_cache_bytes(config, 1, 1, config.dtype)

    def kept_tokens(self, first: int = 0) -> np.ndarray:
        """Which tokens of the frames seen every layer computed; it waits for the device.

        A routed layer computed, and caches, its K best; a dense one all of them.

        Args:
          first: the first frame that is asked about; -1 is the last one seen.

        Returns:
          bool [L, F, N], a frame's tokens in their order: the CLS token, if the model has one, then
          the patches row by row.
        """
        return np.asarray(
            engine.kept_tokens(
                self._state.caches,
                np.array(self._frame_positions[first:], np.int32),
                self._model.config.tokens_per_frame,
            )
        )

    def encode(self, frame: Frame) -> EncodedFrame:
        """Gives a frame to the vision tower, without waiting for it. Changes nothing here.

        Args:
          frame: uint8 RGB of any size, letterboxed to the vision tower's.

        Raises:
          UserError: a frame of another kind.
        """
        check_image(frame)
        square = letterbox(frame.image, self._model.config.vision.image_size)
        features_BNW = engine.encode(self._model, self._variables, square[None])
        return EncodedFrame(frame.time, frame.image, features_BNW)

    def encode_ahead(self, frames: Iterable[Frame], depth: int = DEPTH) -> Iterator[EncodedFrame]:
        """Frames for `see`, decoded and encoded while the language model is at work.

        ```
        thread    decode, letterbox, encode   4        5        6
        see       append, decide, answer           1        2        3
        ```

        Args:
          frames: such as those of `read_video`; taken one after another, in a thread of its own.
          depth: how many frames may wait.

        Yields:
          The frames in order, and in its place whatever exception they raise. The thread ends
          with the iterator; see `ahead`.

        Raises:
          UserError: depth below 1.
        """
        return ahead(map(self.encode, frames), depth)

    def see(self, frame: Frame) -> Answer | None:
        """Shows the next frame; the model answers or stays silent.

        Args:
          frame: uint8 RGB of any size, or one that this session has encoded; later than the frame
            before, and not earlier than the last question.

        Returns:
          The answer, or None: the model chose silence.

        Raises:
          UserError: a frame of another kind or out of order, or a full context. The session is
            left as it was.
        """
        self._check_order(frame)
        if self._stream_open:
            prefix = [self._tokenizer.interval_id]
        else:
            prefix = self._encode_text(self._opening + dialogue.STREAM_OPEN)
        self._check_room(frames=1, text=self._room_for_frame(prefix))

        began = perf_counter()
        encoded = frame if isinstance(frame, EncodedFrame) else self.encode(frame)
        given = perf_counter()
        if self._opening:
            # So that a first frame is the same compiled call as any other.
            self._append_text(prefix[:-1])
            prefix = prefix[-1:]
        self._append_frame(prefix, encoded.features_BNW)
        self._opening, self._stream_open = "", True
        self._time = self._frame_time = frame.time
        request, self._request = self._request, []
        breaks_1 = None if request else self._breaks_silence()
        # The device has all of its work before anything waits for it. The wait for the tower only
        # tells its time from the decoder's, for which the next line waits anyway.
        appended = perf_counter()
        encoded.features_BNW.block_until_ready()
        ready = perf_counter()
        speaks = breaks_1 is None or breaks_1.item()
        decided = perf_counter()
        prompt = request or self._answer_prompt
        answer = self._answer(prompt, padded=bool(request)) if speaks else None
        generated = perf_counter() if speaks else decided
        encode = given - began + ready - appended
        self.timings.append(FrameTiming(encode, decided - began - encode, generated - decided))
        return answer

    def ask(self, question: str, time: float | None = None) -> Answer:
        """Puts a user's question, which the model answers at once.

        A question at or before the time of a frame belongs before that frame, as in training.

        Args:
          question: text without the tokens of the template.
          time: seconds in the video; None is the time of the last frame.

        Raises:
          UserError: an empty question or one with reserved tokens, a time before the last frame,
            or a full context. The session is left as it was.
        """
        question = question.strip()
        self._check_text("question", question)
        time = self._time if time is None else time
        if not time >= self._time:
            raise UserError(
                f"the question at {time:g} s comes after {self._time:g} s was reached; ask before "
                "showing a later frame"
            )
        prompt = self._opening + dialogue.question_prompt(question, self._stream_open)
        ids = self._encode_text(prompt)
        self._check_room(frames=0, text=engine.bucket(len(ids)) + self._max_new_tokens)
        self._opening, self._time = "", time
        return self._answer(ids, padded=True)

    def _request_ids(self, request: str) -> list[int]:
        self._check_text("request", request)
        return self._encode_text(dialogue.question_prompt(request.strip(), stream_open=True))

    def _check_order(self, frame: Frame) -> None:
        if not (frame.time > self._frame_time and frame.time >= self._time):
            raise UserError(
                f"the frame at {frame.time:g} s comes after {self._time:g} s was reached; show "
                "frames in the order of time, each once, and ask a question before the frames that "
                "follow it"
            )

    def _check_text(self, name: str, text: str) -> None:
        for token in (dialogue.PLACEHOLDER, self._tokenizer.bos, self._tokenizer.eos):
            if token and token in text:
                raise UserError(f"{name}: the text contains the reserved {token!r}; remove it")

    def _encode_text(self, text: str) -> list[int]:
        return self._tokenizer.encode(text).ids.tolist()

    def _room_for_frame(self, prefix: Sequence[int]) -> int:
        """Text tokens that a frame may take: any frame may be answered, and no answer is cut."""
        padded = engine.bucket(len(prefix)) if self._opening else len(prefix)
        prompt = engine.bucket(len(self._request)) if self._request else len(self._answer_prompt)
        return padded + prompt + self._max_new_tokens

    def _check_room(self, *, frames: int, text: int) -> None:
        if self._frames + frames > self._max_frames:
            raise UserError(
                f"the context is full: it holds {self._frames} of max_frames = {self._max_frames} "
                "frames; start again with a larger max_frames"
            )
        if self._text + text > self._max_text:
            raise UserError(
                f"the context is full: it holds {self._text} of max_text_tokens = {self._max_text} "
                f"text tokens, and what comes next may take {text} with its answer; start again "
                "with a larger max_text_tokens"
            )

    def _append_text(self, ids: Sequence[int], *, padded: bool = True) -> None:
        tokens_1T, length_1 = engine.pad_text(ids)
        if not padded:
            tokens_1T = tokens_1T[:, : len(ids)]
        self._state = engine.append_text(
            self._model, self._variables, self._state, tokens_1T, length_1
        )
        self._text += len(ids)

    def _append_frame(self, prefix: Sequence[int], features_BNW: jnp.ndarray) -> None:
        prefix_1T = np.array([prefix], np.int32)
        self._state = engine.append_frame(
            self._model, self._variables, self._state, prefix_1T, features_BNW
        )
        self._text += len(prefix)
        tokens = self._frames * self._model.config.tokens_per_frame
        self._frame_positions.append(self._text + tokens)
        self._frames += 1

    def _breaks_silence(self) -> jax.Array:
        """bool [1], which nothing has waited for."""
        return breaks_silence(self._state.logits_BV, self._tokenizer.interval_id, self._threshold)

    def _answer(self, prompt: Sequence[int], *, padded: bool) -> Answer:
        self._append_text(prompt, padded=padded)
        ids = self._generate()
        self._text += len(ids)
        self._stream_open = False
        return Answer(self._time, self._tokenizer.decode(ids[:-1]).strip())

    def _generate(self) -> list[int]:
        self._state, tokens_1T, length_1 = engine.generate(
            self._model,
            self._variables,
            self._state,
            eos_id=self._tokenizer.eos_id,
            max_new_tokens=self._max_new_tokens,
            temperature=self._temperature,
        )
        (tokens_T,), (length,) = jax.device_get((tokens_1T, length_1))
        return tokens_T[:length].tolist()

    def _compile(self) -> None:
        """Runs every call once on a state that is thrown away."""
        config, interval = self._model.config, [self._tokenizer.interval_id]
        size = config.vision.image_size
        black = np.zeros((1, size, size, 3), np.uint8)
        features_BNW = engine.encode(self._model, self._variables, black)
        self._append_text(self._encode_text(self._opening + dialogue.STREAM_OPEN)[:-1])
        self._append_frame(interval, features_BNW)
        self._append_frame(self._encode_text(dialogue.STREAM_OPEN), features_BNW)
        self._breaks_silence()
        self._append_text(self._answer_prompt, padded=False)
        if self._request:
            self._append_text(self._request)
        # The answer is eos at once: one step of the loop is enough.
        logits_1V = jnp.full_like(self._state.logits_BV, -jnp.inf)
        logits_1V = logits_1V.at[:, self._tokenizer.eos_id].set(0.0)
        self._state = self._state.replace(logits_BV=logits_1V)
        self._generate()
        self._frames = self._text = 0
        self._frame_positions = []
