"""Videos that are narrated together are narrated as each would be alone."""

import threading

import numpy as np
import pytest

from tests import tiny_stream
from videollm_mod_jax.data.video import Frame
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.streaming import engine
from videollm_mod_jax.streaming.session import StreamingSession
from videollm_mod_jax.streaming.together import narrate_together

LIMITS = {"max_frames": 9, "max_text_tokens": 320, "max_new_tokens": 12}
LENGTHS = (9, 4, 7)


@pytest.fixture(scope="module")
def model():
    return tiny_stream.loaded_model(silence=0.2)


def video(seed, count):
    rng = np.random.default_rng(seed)
    for i in range(count):
        yield Frame(i / 2, rng.integers(0, 256, (20, 16, 3), dtype=np.uint8))


def videos():
    return [video(seed, count) for seed, count in enumerate(LENGTHS)]


def test_videos_together_say_what_each_says_alone(model):
    expected = []
    for frames in videos():
        session = StreamingSession(model, **LIMITS)
        expected.append([(frame.time, session.see(frame)) for frame in frames])
    steps = list(narrate_together(model, videos(), **LIMITS))
    assert len(steps) == max(LENGTHS)
    found = [[seen for seen in shown if seen is not None] for shown in zip(*steps, strict=True)]
    assert [[(frame.time, said) for frame, said in shown] for shown in found] == expected
    # Rows speak at different frames, so that they stand at different places of the template.
    speaks = {tuple(said is not None for _, said in shown[:4]) for shown in expected}
    assert len(speaks) > 1


def test_all_videos_take_one_encoding_and_one_chunk_per_step(model, monkeypatch):
    encoded, original = [], engine.encode
    monkeypatch.setattr(
        engine, "encode", lambda *given: (encoded.append(given[-1].shape[0]), original(*given))[1]
    )
    list(narrate_together(model, videos(), **LIMITS))
    assert encoded == [len(LENGTHS)] * max(LENGTHS)


def test_who_stops_early_leaves_no_thread(model):
    steps = narrate_together(model, videos(), **LIMITS)
    next(steps)
    steps.close()
    del steps
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_frames": 0}, "max_frames: found 0"),
        ({"max_new_tokens": 1}, "max_new_tokens: found 1"),
        ({"silence_threshold": 7.0}, "silence_threshold is 7"),
        ({"max_frames": 5}, "max_frames = 5"),
        ({"max_text_tokens": 60, "silence_threshold": 1.0}, "the context of video 0 is full"),
    ],
)
def test_what_does_not_fit_is_named(model, changes, message):
    with pytest.raises(UserError, match=message):
        list(narrate_together(model, videos(), **(LIMITS | changes)))


def test_nothing_to_narrate_is_refused(model):
    with pytest.raises(UserError, match="videos: found 0"):
        narrate_together(model, [])
