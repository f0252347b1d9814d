"""The template, its learnt ranges, and timed turns laid along frames."""

import math

import numpy as np
import pytest

from videollm_mod_jax.data.annotations import Record, Turn
from videollm_mod_jax.data.dialogue import (
    Assistant,
    Stream,
    System,
    User,
    conversation_from_turns,
    conversation_of,
    question_prompt,
    render,
)
from videollm_mod_jax.errors import UserError

BOS, EOS = "<|begin_of_text|>", "<|eot_id|>"


def test_golden_example_of_the_template():
    conversation = (
        System("cool."),
        Stream(2, learn=1),
        User("cool?"),
        Assistant("cool."),
        Stream(3, learn=3),
        Assistant("so cool."),
    )
    rendered = render(conversation, 10, BOS, EOS)
    frame = "<v>" * 10
    assert rendered.text == (
        f"<|begin_of_text|>cool.\n\n[{frame},{frame}]\nUser: cool?\nAssistant: cool.<|eot_id|>"
        f"\n[{frame},{frame},{frame}]\nAssistant: so cool.<|eot_id|>"
    )
    assert len(rendered.text) == 251
    assert rendered.learn_ranges == (
        (55, 56), (100, 126), (158, 159), (189, 190), (220, 222), (222, 251),
    )  # fmt: skip


def test_drawn_example_of_render():
    conversation = (
        System("Hi"),
        Stream(2, learn=1),
        User("How many?"),
        Assistant("One."),
        Stream(1),
        Assistant("So.", learn=False),
    )
    drawn = (
        "<s>Hi//[<v><v>,<v><v>]/User: How many?/Assistant: One.</s>/[<v><v>]/Assistant: So.</s>",
        "              ^                        ^^^^^^^^^^^^^^^^^^^        ^^",
    )
    for line in drawn:
        assert line in render.__doc__
    rendered = render(conversation, 2, "<s>", "</s>")
    assert rendered.text.replace("\n", "/") == drawn[0]
    marks = [" "] * len(rendered.text)
    for start, stop in rendered.learn_ranges:
        marks[start:stop] = "^" * (stop - start)
    assert "".join(marks).rstrip() == drawn[1]


def test_learnt_range_ends_with_the_text():
    rendered = render((System("a"), Stream(1)), 1, "", EOS)
    assert rendered.text.endswith("<v>]")
    assert rendered.learn_ranges == ((len(rendered.text) - 1, len(rendered.text)),)


@pytest.mark.parametrize("text", ["a <v>", f"a{EOS}", f"{BOS}a"])
def test_reserved_text_is_refused(text):
    with pytest.raises(UserError, match=r"message 1: the text contains the reserved"):
        render((System("a"), User(text)), 1, BOS, EOS)


def test_question_prompt_closes_an_open_stream_and_needs_a_question():
    assert question_prompt("How?", stream_open=True) == "]\nUser: How?\nAssistant:"
    assert question_prompt("How?", stream_open=False) == "\nUser: How?\nAssistant:"
    for bad in ("  ", "what is <v>"):
        with pytest.raises(UserError, match="question"):
            question_prompt(bad, stream_open=True)


def turn(role, time, text="t"):
    return Turn(role, time, text)


def test_drawn_example_of_turns():
    turns = [turn("assistant", 0.5, "N"), turn("user", 1.2, "Q"), turn("assistant", 1.2, "A")]
    assert conversation_from_turns(turns, 5, 2.0, "s") == (
        System("s"),
        Stream(2, learn=2),
        Assistant("N"),
        Stream(1, learn=0),
        User("Q"),
        Assistant("A"),
        Stream(2, learn=1),
    )


def test_time_of_a_frame_is_not_lost_to_rounding():
    # 7 / 25 * 25 > 7, and the float32 of 0.1 is more than 0.1: frames 7 and 3 are meant.
    for time, fps, frame in ((7 / 25, 25.0, 7), (float(np.float32(0.1)), 30.0, 3)):
        assert math.ceil(time * fps) == frame + 1
        conversation = conversation_from_turns([turn("assistant", time)], 10, fps, "s")
        assert conversation[1] == Stream(frame + 1, learn=frame + 1)


def test_turns_equal_a_walk_over_the_frames():
    """Against a walk that shows the frames one by one and looks at the clock at each."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        fps, num_frames = float(rng.choice([1, 2, 5])), int(rng.integers(4, 12))
        turns, last = [], -1
        for f in range(num_frames - 1):
            at = f / fps
            if rng.random() < 0.3:
                q = at - (rng.random() * 0.9 / fps if f else 0)
                if not turns or q >= turns[-1].time:
                    turns += [turn("user", q, f"q{f}"), turn("assistant", q, f"a{f}")]
            if rng.random() < 0.3 and f > last:
                turns.append(turn("assistant", at, f"n{f}"))
                last = f
        events, todo = [], list(turns)
        for f in range(num_frames):
            while todo and todo[0].role == "user" and todo[0].time <= f / fps:
                events += [todo.pop(0).text, todo.pop(0).text]
            events.append(f)
            if todo and todo[0].role == "assistant" and todo[0].time <= f / fps:
                events.append(todo.pop(0).text)
        assert not todo

        conversation = conversation_from_turns(turns, num_frames, fps, "s")
        found, shown = [], 0
        for i, message in enumerate(conversation[1:], 1):
            if isinstance(message, Stream):
                found += range(shown, shown + message.num_frames)
                shown += message.num_frames
                narrated = i + 1 < len(conversation) and isinstance(conversation[i + 1], Assistant)
                assert message.learn_frames == message.num_frames - (not narrated)
            else:
                found.append(message.text)
        assert found == events


def test_a_record_is_laid_along_the_frames_of_its_stretch():
    turns = (Turn("user", 1.2, "Q"), Turn("assistant", 2.5, "A", learn=False), turn("user", 4.0))
    record = Record(id="r", video="v", start=1.2, stop=4.0, turns=turns)
    # Frames at 1.5, 2.0, .. 3.5 s.
    assert conversation_of(record, 2.0, "s") == (
        System("s"),
        User("Q"),
        Stream(3, learn=3),
        Assistant("A", learn=False),
        Stream(2, learn=1),
        User("t"),
    )
    before = Record(id="r", video="v", start=10.0, stop=11.0, turns=(turn("assistant", 8.0),))
    expected = (Stream(1, learn=1), Assistant("t"), Stream(1, learn=0))
    assert conversation_of(before, 2.0, "s")[1:] == expected


N, Q, A = Assistant("N"), User("Q"), Assistant("A")
DRAWN = {
    "N 11.5           ->   |10.0 |10.5 |11.0 |11.5 N |12.0": (
        [turn("assistant", 11.5, "N")],
        12.5,
        (Stream(4, learn=4), N, Stream(1, learn=0)),
    ),
    "Q 9.75  A 10.0   ->   Q |10.0 A": (
        [turn("user", 9.75, "Q"), turn("assistant", 10.0, "A")],
        10.5,
        (Q, Stream(1, learn=1), A),
    ),
    "Q 10.0  A 10.0   ->   Q A |10.0": (
        [turn("user", 10.0, "Q"), turn("assistant", 10.0, "A")],
        10.5,
        (Q, A, Stream(1, learn=0)),
    ),
}


@pytest.mark.parametrize("drawn", DRAWN)
def test_drawn_examples_of_a_stretch(drawn):
    turns, stop, messages = DRAWN[drawn]
    assert drawn in conversation_of.__doc__
    record = Record(id="r", video="v", start=10.0, stop=stop, turns=tuple(turns))
    assert conversation_of(record, 2.0, "s") == (System("s"), *messages)
    # The first frame of a video is no other than the first of a later stretch.
    moved = tuple(Turn(one.role, one.time - 10.0, one.text) for one in turns)
    record = Record(id="r", video="v", start=0.0, stop=stop - 10.0, turns=moved)
    assert conversation_of(record, 2.0, "s") == (System("s"), *messages)


def test_times_in_messages_are_those_of_the_video():
    turns = (turn("assistant", 12.5),)
    record = Record(id="r", video="v", start=10.0, stop=12.0, turns=turns)
    with pytest.raises(UserError, match=r"expected at most 11\.5 s \(4 frames .*found 12\.5 s"):
        conversation_of(record, 2.0, "s")
    record = Record(id="r", video="v", start=10.0, stop=12.0, turns=(turn("user", math.nan),))
    with pytest.raises(UserError, match="'time': expected seconds >= 0, found nan"):
        conversation_of(record, 2.0, "s")


@pytest.mark.parametrize(
    ("turns", "words"),
    [
        ([turn("assistant", 1.0, "  ")], "'text': expected an annotation"),
        ([turn("assistant", 5.0)], "after the end of the video"),
        ([turn("user", 5.1)], "after the end of the video"),
        ([turn("assistant", 1.0), turn("assistant", 0.9 + 0.1)], "second narration"),
        ([turn("narrator", 1.0)], "'role': expected 'user' or 'assistant', found 'narrator'"),
        ([turn("user", -1.0)], "'time': expected seconds >= 0"),
        ([turn("user", math.nan)], "'time': expected seconds >= 0"),
        ([turn("user", 2.0), turn("user", 1.0)], "sort the turns"),
    ],
)
def test_bad_turns_are_named(turns, words):
    with pytest.raises(UserError, match=words) as caught:
        conversation_from_turns(turns, 10, 2.0, "s", record="video-7")
    assert str(caught.value).startswith(f"video-7: turn {len(turns) - 1}: field")
    assert "\n" not in str(caught.value)


def test_a_question_at_the_very_end_is_answered():
    turns = [turn("user", 5.0), turn("assistant", 5.0)]
    conversation = conversation_from_turns(turns, 10, 2.0, "s")
    assert conversation == (System("s"), Stream(10, learn=9), User("t"), Assistant("t"))
