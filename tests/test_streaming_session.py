"""A session speaks the template of training, in order, within its limits, compiled once."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny_stream
from videollm_mod_jax.data import dialogue
from videollm_mod_jax.data.dialogue import Assistant, Stream, System, User
from videollm_mod_jax.data.video import Frame
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.streaming import engine, session
from videollm_mod_jax.streaming.session import Answer, StreamingSession, letterbox

A, B, C, D = tiny_stream.ANSWERS
LIMITS = {"max_frames": 6, "max_text_tokens": 256, "max_new_tokens": 12}


@pytest.fixture(scope="module")
def model():
    return tiny_stream.loaded_model(silence=0.2)


def make_session(model, **changes):
    return StreamingSession(model, **(LIMITS | changes))


def frame(time, seed=0):
    image = np.random.default_rng(seed).integers(0, 256, (20, 16, 3), dtype=np.uint8)
    return Frame(time, image)


class Script:
    """Stands in for the model's choices, and records the token ids that reach the engine."""

    def __init__(self, monkeypatch, words, speaks, answers):
        self.ids, self._words = [], words
        self._speaks, self._answers = iter(speaks), iter(answers)
        self._append_text, self._append_frame = engine.append_text, engine.append_frame
        monkeypatch.setattr(engine, "append_text", self.append_text)
        monkeypatch.setattr(engine, "append_frame", self.append_frame)
        monkeypatch.setattr(engine, "generate", self.generate)
        monkeypatch.setattr(session, "breaks_silence", lambda *_: jnp.array([next(self._speaks)]))

    def append_text(self, model, variables, state, tokens, length):
        self.ids += tokens[0, : length[0]].tolist()
        return self._append_text(model, variables, state, tokens, length)

    def append_frame(self, model, variables, state, prefix, features):
        self.ids += prefix[0].tolist()
        self.ids += [self._words.placeholder_id] * features.shape[1]
        return self._append_frame(model, variables, state, prefix, features)

    def generate(self, model, variables, state, **settings):
        ids = self._words.encode(f" {next(self._answers)}{self._words.eos}").ids.tolist()
        tokens, length = engine.pad_text(ids)
        return self.append_text(model, variables, state, tokens, length), tokens, length


def test_streamed_ids_equal_the_rendered_dialogue(model, monkeypatch):
    live = make_session(model)
    words, N = model.tokenizer, model.config.tokens_per_frame
    script = Script(monkeypatch, words, [0, 1, 0, 0, 1], [A, B, C, D])
    assert live.see(frame(0.0)) is None
    assert live.see(frame(0.5)) == Answer(0.5, A)
    assert live.see(frame(1.0)) is None
    assert live.ask(tiny_stream.QUESTION) == Answer(1.0, B)
    assert live.ask("And now?", time=1.25) == Answer(1.25, C)
    assert live.see(frame(1.5)) is None
    assert live.see(frame(2.0)) == Answer(2.0, D)
    conversation = (
        System(tiny_stream.SYSTEM),
        Stream(2),
        Assistant(A),
        Stream(1),
        User(tiny_stream.QUESTION),
        Assistant(B),
        User("And now?"),
        Assistant(C),
        Stream(2),
        Assistant(D),
    )
    rendered = dialogue.render(conversation, N, words.bos, words.eos)
    assert script.ids == words.encode(rendered.text).ids.tolist()


def test_a_question_before_the_first_frame_follows_the_system_text(model, monkeypatch):
    live = make_session(model)
    words, N = model.tokenizer, model.config.tokens_per_frame
    script = Script(monkeypatch, words, [1], [C, A])
    assert live.ask(tiny_stream.QUESTION) == Answer(0.0, C)
    assert live.see(frame(0.0)) == Answer(0.0, A)
    conversation = (
        System(tiny_stream.SYSTEM),
        User(tiny_stream.QUESTION),
        Assistant(C),
        Stream(1),
        Assistant(A),
    )
    rendered = dialogue.render(conversation, N, words.bos, words.eos)
    assert script.ids == words.encode(rendered.text).ids.tolist()


def test_a_request_is_put_after_the_first_frame_and_answered_with_it(model, monkeypatch):
    watching = make_session(model, request=f" {tiny_stream.QUESTION} ")
    # Whether it speaks at the first frame is not asked.
    script = Script(monkeypatch, model.tokenizer, speaks=[False, True], answers=[A, B])
    assert watching.see(frame(0.0)) == Answer(0.0, A)
    assert watching.see(frame(0.5)) is None
    assert watching.see(frame(1.0)) == Answer(1.0, B)
    conversation = (
        System(tiny_stream.SYSTEM),
        Stream(1),
        User(tiny_stream.QUESTION),
        Assistant(A),
        Stream(2),
        Assistant(B),
    )
    N, words = model.config.tokens_per_frame, model.tokenizer
    rendered = dialogue.render(conversation, N, words.bos, words.eos)
    assert script.ids == words.encode(rendered.text).ids.tolist()
    with pytest.raises(UserError, match="request: the text contains the reserved"):
        make_session(model, request="what is <v>")
    with pytest.raises(UserError, match="question: expected a text"):
        make_session(model, request=" ")


def test_threshold_one_always_answers_and_nothing_is_compiled_during_a_stream(model):
    live = make_session(model, silence_threshold=1.0)
    functions = (engine.encode, engine.append_text, engine.append_frame, engine.generate)
    compiled = [function._cache_size() for function in functions]
    answers = [live.see(frame(i / 2, seed=i)) for i in range(4)]
    assert [answer.time for answer in answers] == [0.0, 0.5, 1.0, 1.5]
    silent = make_session(model, silence_threshold=None)
    silent.see(frame(0.0))
    silent.see(frame(0.5))
    assert [function._cache_size() for function in functions] == compiled
    assert len(live.timings) == 4
    assert all(t.encode > 0 and t.prefill > 0 and t.generate > 0 for t in live.timings)


def fill_frames(live):
    for i in range(20):
        live.see(frame(live._time + 0.5, seed=i))


def fill_text(live):
    for _ in range(20):
        live.ask("And?")


@pytest.mark.parametrize(
    ("fill", "limit"), [(fill_frames, "max_frames = 6"), (fill_text, "max_text_tokens = 256")]
)
def test_a_full_context_is_an_error_that_leaves_the_session_usable(model, monkeypatch, fill, limit):
    live = make_session(model)
    texts, frames = [], []
    monkeypatch.setattr(engine, "append_text", counted(engine.append_text, texts))
    monkeypatch.setattr(engine, "append_frame", counted(engine.append_frame, frames))
    live.see(frame(0.0))
    with pytest.raises(UserError, match=limit):
        fill(live)
    # Nothing had reached the model when the error came: the caches hold what was accepted.
    position = int(live._state.position_B[0])
    assert position == live._text + live._frames * model.config.tokens_per_frame
    assert int(live._state.entries_LB[0, 0]) == position  # layer 0 is dense: nothing overwritten
    assert live._text <= LIMITS["max_text_tokens"]
    calls = len(texts), len(frames)
    for _ in range(2):
        with pytest.raises(UserError, match=limit):
            fill(live)
    assert (len(texts), len(frames)) == calls
    assert int(live._state.position_B[0]) == position
    if fill is fill_frames:
        assert live.ask("And?").time == live._time  # there is room for text still
        assert int(live._state.position_B[0]) > position


def counted(function, calls):
    def call(*arguments):
        calls.append(arguments)
        return function(*arguments)

    return call


def test_no_room_for_the_system_text_is_refused_at_once(model):
    with pytest.raises(UserError, match="max_text_tokens is 20; expected at least"):
        make_session(model, max_text_tokens=20)


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_frames", 0), ("max_new_tokens", 1), ("temperature", -1.0), ("silence_threshold", 7.0)],
)
def test_settings_out_of_range_are_named(model, name, value):
    with pytest.raises(UserError, match=f"{name} is {value}"):
        make_session(model, **{name: value})


def test_frames_and_questions_must_come_in_order(model):
    live = make_session(model)
    live.see(frame(1.0))
    with pytest.raises(UserError, match="the frame at 1 s comes after 1 s was reached"):
        live.see(frame(1.0))
    with pytest.raises(UserError, match=r"the question at 0\.5 s comes after 1 s"):
        live.ask("Really?", time=0.5)
    live.ask("Really?", time=1.5)
    with pytest.raises(UserError, match=r"the frame at 1\.25 s comes after 1\.5 s"):
        live.see(frame(1.25))
    live.see(frame(1.5))  # a question at the time of a frame is answered before it


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((16, 16), np.uint8),
        np.zeros((16, 16, 4), np.uint8),
        np.zeros((0, 16, 3), np.uint8),
        np.zeros((16, 16, 3), np.float32),
    ],
)
def test_frames_of_another_kind_are_refused(model, image):
    with pytest.raises(UserError, match=r"expected uint8\[height, width, 3\]"):
        make_session(model).see(Frame(0.0, image))


@pytest.mark.parametrize("question", ["", " ", "a <v> b", "a <|eot_id|> b", "<|begin_of_text|>"])
def test_questions_cannot_be_empty_or_break_the_template(model, question):
    with pytest.raises(UserError, match="question"):
        make_session(model).ask(question)


def test_letterbox_keeps_the_aspect_ratio():
    image = np.full((20, 40, 3), 200, np.uint8)
    square = letterbox(image, 16)
    assert square.shape == (16, 16, 3)
    assert (square[4:12] == 200).all()
    assert not square[:4].any()
    assert not square[12:].any()
    assert letterbox(square, 16) is square
    assert letterbox(image.transpose(1, 0, 2), 16)[:, 4:12].min() == 200
