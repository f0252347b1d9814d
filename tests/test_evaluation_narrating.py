"""A batch of streams watched live equals sessions of their own, whatever is in the batch."""

import dataclasses

import numpy as np
import pytest

from tests import tiny_benchmarks
from tests.tiny_benchmarks import FPS
from videollm_mod_jax.data.annotations import Record, Turn
from videollm_mod_jax.data.dialogue import Assistant, Stream, System, User
from videollm_mod_jax.data.video import Frame
from videollm_mod_jax.evaluation import narrating
from videollm_mod_jax.evaluation.narrating import watch_records
from videollm_mod_jax.evaluation.script import Question, Script, script_of
from videollm_mod_jax.evaluation.timing import Narration
from videollm_mod_jax.models import VideoLLM
from videollm_mod_jax.streaming import engine
from videollm_mod_jax.streaming.session import StreamingSession

T = 6
# Frames, questions (time, text), start: one is asked at first, one twice at once, one at the end.
STREAMS = {
    "a": (6, [(0.0, "And?"), (1.5, "How many?")], 0),
    "b": (6, [(1.0, "How many?"), (1.0, "And?")], 2),
    "c": (5, [(2.5, "How many?")], 0),
    "d": (6, [], 0),
}


@pytest.fixture(scope="module")
def model():
    return tiny_benchmarks.loaded_model(silence=2.0)


def record(name, frames, asked, first):
    turns = [Turn("assistant", (first + 1) / FPS, "A cat sits.")]
    for time, question in asked:
        turns.append(Turn("user", time + first / FPS, question))
    turns.sort(key=lambda turn: turn.time)
    start, stop = first / FPS, (first + frames) / FPS
    return Record(id=name, video=name, start=start, stop=stop, turns=tuple(turns))


@pytest.fixture(scope="module")
def images(model):
    size, rng = model.config.vision.image_size, np.random.default_rng(2)
    return {
        name: rng.integers(0, 256, (frames + first, size, size, 3), dtype=np.uint8)
        for name, (frames, _, first) in STREAMS.items()
    }


@pytest.fixture(scope="module")
def examples(model, images):
    def encode(image):
        return engine.encode(VideoLLM(model.config), model.variables, image[None])[0]

    videos = {
        name: np.stack([np.asarray(encode(image)) for image in video])
        for name, video in images.items()
    }
    records = [record(name, *stream) for name, stream in STREAMS.items()]
    return tiny_benchmarks.examples(records, tiny_benchmarks.Features(videos))


def watched(model, examples, batch_size, threshold, indices=(0, 1, 2, 3)):
    return dict(
        watch_records(
            model,
            examples,
            indices,
            batch_size=batch_size,
            max_new_tokens=T,
            silence_threshold=threshold,
        )
    )


def watch_alone(model, images, threshold, frames, asked, first):
    """(narrations, answers) of a session that sees the record's frames."""
    session = StreamingSession(
        model,
        silence_threshold=threshold,
        max_frames=8,
        max_text_tokens=256,
        max_new_tokens=T,
    )
    narrations, answers = [], []
    waiting = [(time + first / FPS, question) for time, question in asked]
    for i in range(first, first + frames):
        while waiting and waiting[0][0] <= i / FPS:
            time, question = waiting.pop(0)
            answers.append((question, session.ask(question, time).text))
        if said := session.see(Frame(i / FPS, images[i])):
            narrations.append(Narration(said.time, said.text))
    answers += [(question, session.ask(question, time).text) for time, question in waiting]
    return narrations, answers


@pytest.mark.parametrize(("silence", "threshold"), [(1.0, None), (2.0, 0.3)])
def test_a_batch_says_what_sessions_say(examples, images, silence, threshold):
    model = tiny_benchmarks.loaded_model(silence=silence)
    live = watched(model, examples, 3, threshold)
    spoken = []
    for index, (name, stream) in enumerate(STREAMS.items()):
        narrations, answers = watch_alone(model, images[name], threshold, *stream)
        assert list(live[index].narrations) == narrations
        assert [(question, said) for question, said, _ in live[index].answers] == answers
        assert live[index].start == stream[2] / FPS
        assert live[index].full_at is None
        spoken.append(len(narrations))
    assert 0 < sum(spoken) < sum(frames for frames, _, _ in STREAMS.values())
    # As of a run that continues, or of one of several processes.
    assert watched(model, examples, 3, threshold, [3, 1]) == {i: live[i] for i in (1, 3)}


def test_who_speaks_when_is_read_off_the_conversation():
    conversation = (
        System("Watch."),
        Stream(2),
        Assistant("a"),
        Stream(3),
        User("q"),
        Assistant("A"),
        Stream(1),
        User("unanswered"),
    )
    assert script_of(conversation) == Script(
        6, (Question(5, "q", "A"), Question(6, "unanswered", None)), ((1, "a"),)
    )


def test_the_truth_comes_at_the_times_of_frames(model, examples):
    live = watched(model, examples, 3, None, [1])[1]
    # The record begins at frame 2, and its narration comes after frame 3.
    assert live.truth == (Narration(1.5, "A cat sits."),)


def test_who_says_too_much_is_cut_short(model, examples, monkeypatch):
    whole = watched(model, examples, 3, 1.0, [3])[3]
    assert len(whole.narrations) == 6
    monkeypatch.setattr(narrating, "ROOM", 1)
    cut = watched(model, examples, 3, 1.0, [3])[3]
    assert 0 < len(cut.narrations) < 6
    assert cut.narrations == whole.narrations[: len(cut.narrations)]
    assert cut.full_at == cut.narrations[-1].time + 1 / FPS
    assert dataclasses.replace(whole, narrations=cut.narrations, full_at=cut.full_at) == cut
