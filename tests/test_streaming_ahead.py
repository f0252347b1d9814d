"""Frames taken and encoded ahead: in order, bounded, equal, and gone when nobody wants more."""

import itertools
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny_stream
from videollm_mod_jax.data.video import Frame
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.streaming import engine
from videollm_mod_jax.streaming.ahead import ahead
from videollm_mod_jax.streaming.session import EncodedFrame, StreamingSession


@pytest.fixture(scope="module")
def model():
    return tiny_stream.loaded_model(silence=0.2)


def make_session(model, **changes):
    limits = {"max_frames": 12, "max_text_tokens": 512, "max_new_tokens": 12}
    return StreamingSession(model, **(limits | changes))


def frames(count):
    rng = np.random.default_rng(3)
    for i in range(count):
        yield Frame(i / 2, rng.integers(0, 256, (20, 16, 3), dtype=np.uint8))


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    yield
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]


class Counted:
    """Counts up, and remembers how far, and in which threads."""

    def __init__(self):
        self.taken, self.threads = 0, set()

    def __iter__(self):
        for item in itertools.count():
            self.taken += 1
            self.threads.add(threading.current_thread().name)
            yield item


def wait_until(condition):
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.005)
    raise AssertionError("waited in vain")


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_items_keep_their_order_and_never_more_than_depth_of_them_wait(depth):
    source = Counted()
    coming = ahead(source, depth)
    assert source.taken == 0
    for given, item in enumerate(itertools.islice(coming, 20), start=1):
        assert item == given - 1
        # All that may be taken is taken while the caller works, and no more.
        wait_until(lambda given=given: source.taken == given + depth)
        time.sleep(0.002)
        assert source.taken == given + depth
    assert threading.current_thread().name not in source.threads
    assert len(source.threads) == 1
    coming.close()
    assert source.taken == 20 + depth


@pytest.mark.parametrize("depth", [1, 4, 100])
def test_all_items_come_and_then_no_more(depth):
    assert list(ahead(range(10), depth)) == list(range(10))
    assert list(ahead([], depth)) == []


@pytest.mark.parametrize("depth", [1, 3, 8])
def test_an_exception_comes_in_the_place_of_its_item(depth):
    def broken():
        yield 1
        yield 2
        raise UserError("the file ends here")

    coming, seen = ahead(broken(), depth), []
    with pytest.raises(UserError, match="the file ends here"):
        seen.extend(coming)
    assert seen == [1, 2]
    assert next(coming, None) is None


def test_nothing_is_started_for_items_that_nobody_asks_for():
    source = Counted()
    ahead(source, 3)
    assert source.taken == 0


@pytest.mark.parametrize("stop", ["close", "break", "exception"])
def test_who_stops_early_waits_for_the_thread(stop):
    coming = ahead(Counted(), 3)
    if stop == "close":
        next(coming)
        coming.close()
    elif stop == "break":
        for _ in coming:
            break
        del coming
    else:
        with pytest.raises(KeyboardInterrupt):
            coming.throw(KeyboardInterrupt)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]


def test_a_depth_that_holds_nothing_is_refused(model):
    with pytest.raises(UserError, match="depth is 0"):
        make_session(model).encode_ahead([], depth=0)


def history(live):
    """Everything that the caches of a session hold."""
    return [np.asarray(leaf) for leaf in jax.tree.leaves(live._state)]


def test_frames_encoded_ahead_give_the_same_answers_and_caches_bit_by_bit(model):
    plain, running = make_session(model), make_session(model)
    expected = [plain.see(frame) for frame in frames(8)]
    coming = running.encode_ahead(frames(8), depth=3)
    assert [running.see(frame) for frame in coming] == expected
    assert 0 < sum(answer is not None for answer in expected) < 8
    for a, b in zip(history(plain), history(running), strict=True):
        np.testing.assert_array_equal(a, b)
    assert plain.ask("And?") == running.ask("And?")


def test_a_frame_that_was_encoded_is_not_encoded_again(model, monkeypatch):
    live = make_session(model)
    encoded = live.encode(next(frames(1)))
    assert isinstance(encoded, EncodedFrame)
    monkeypatch.setattr(engine, "encode", None)
    live.see(encoded)
    assert len(live.timings) == 1


@pytest.mark.parametrize("fault", ["source", "frame"])
def test_a_bad_frame_is_an_error_at_its_place_and_the_session_goes_on(model, fault):
    def faulty():
        yield from frames(3)
        if fault == "source":
            raise UserError("expected uint8[height, width, 3]: cannot read the video")
        yield Frame(1.5, np.zeros((4, 4), np.uint8))

    live, seen = make_session(model), []

    def see_all():
        for frame in live.encode_ahead(faulty()):
            live.see(frame)
            seen.append(frame.time)

    with pytest.raises(UserError, match=r"expected uint8\[height, width, 3\]"):
        see_all()
    assert seen == [0.0, 0.5, 1.0]
    live.see(Frame(1.5, np.zeros((4, 4, 3), np.uint8)))
    assert len(live.timings) == 4


def test_one_boolean_is_read_for_a_silent_frame(monkeypatch):
    live = make_session(tiny_stream.loaded_model(silence=5.0))
    array, reads = type(jnp.zeros(1)), {}  # arrays by id: one read passes several of the functions
    waiting = list(live.encode_ahead(frames(4)))
    live.see(waiting[0])

    def count(owner, name):
        original = getattr(owner, name)

        def read(value, *arguments, **named):
            arrays = [leaf for leaf in jax.tree.leaves(value) if isinstance(leaf, jax.Array)]
            reads.update({id(leaf): leaf for leaf in arrays})
            return original(value, *arguments, **named)

        monkeypatch.setattr(owner, name, read)

    for name in ("__array__", "__bool__", "__int__", "__index__", "__float__", "item", "tolist"):
        count(array, name)
    for owner, name in ((np, "asarray"), (np, "array"), (jax, "device_get")):
        count(owner, name)
    assert [live.see(frame) for frame in waiting[1:]] == [None] * 3
    assert [(leaf.dtype.name, leaf.size) for leaf in reads.values()] == [("bool", 1)] * 3


def test_the_caches_of_a_session_never_exist_twice(model, monkeypatch):
    text = 777  # a capacity of no other test
    dense = text + 12 * model.config.tokens_per_frame
    alive, start = [], engine.start

    def counted(*arguments):
        alive.append(sum(array.shape == (1, 2, dense, 8) for array in jax.live_arrays()))
        return start(*arguments)

    monkeypatch.setattr(engine, "start", counted)
    live = make_session(model, max_text_tokens=text)
    assert live._state.caches[0].k_BGCE.shape == (1, 2, dense, 8)
    assert alive == [0, 0]
