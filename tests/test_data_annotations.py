"""Frames of records, fields of text, and the report of what became of annotations."""

import json
from pathlib import Path

import pytest

from videollm_mod_jax.data.annotations import (
    MAX_TEXT,
    FieldError,
    Record,
    Report,
    Source,
    Videos,
    ceil_frame,
    check_unicode,
    frame_range,
    text_field,
    time_before,
)


def test_drawn_examples_of_frames():
    drawn = Record(id="r", video="v", start=1.2, stop=3.0, turns=())
    assert list(frame_range(drawn, 2.0)) == [3, 4, 5]
    assert "frames 3 4 5 (at 1.5, 2.0 and 2.5 s)" in frame_range.__doc__
    strided = Record(id="r", video="v", start=1.2, stop=3.0, turns=(), stride=2)
    assert list(frame_range(strided, 2.0)) == [3, 5]
    assert ceil_frame(1.2, 2.0) == 3
    assert "1.2 s   ->   frame 3, at 1.5 s" in ceil_frame.__doc__
    assert ceil_frame(7 / 25, 25.0) == 7 < 7 / 25 * 25


def test_drawn_example_of_a_stride():
    source = Source(Path(), Videos(2.0, {}), 4, Report())
    assert source.stride(10) == 3
    assert "10 frames, max_frames 4   ->   3: frames 0 3 6 9" in Source.stride.__doc__
    for frames in range(1, 50):
        assert len(range(0, frames, source.stride(frames))) <= 4
        assert source.stride(frames) == 1 or len(range(0, frames, source.stride(frames) - 1)) > 4


@pytest.mark.parametrize("fps", [0.5, 2.0, 25.0, 29.97])
def test_a_question_before_a_frame_comes_after_the_frame_before_it(fps):
    assert time_before(7, 2.0) == 3.25
    assert "before frame 7   ->   3.25 s" in time_before.__doc__
    for frame in range(1, 1000):
        time = time_before(frame, fps)
        assert (frame - 1) / fps < time < frame / fps
        assert ceil_frame(time, fps) == frame


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "wrong type"),
        (7, "wrong type"),
        ("", "empty text"),
        (" \n", "empty text"),
        ("x" * (MAX_TEXT + 1), "text too long"),
        ("half \ud83d", "not Unicode"),
        ("a <v> b", "reserved text"),
    ],
)
def test_a_text_that_cannot_be_used_says_why_and_where(value, reason):
    with pytest.raises(FieldError) as error:
        text_field({"text": value}, "text", "a.json: 3")
    assert (error.value.reason, error.value.where) == (reason, "a.json: 3: field 'text'")
    error.value.what.encode()


def test_any_other_text_is_stripped_and_kept():
    assert text_field({"text": " é\u2028 \U0001f52a <V>\n"}, "text", "") == "é\u2028 \U0001f52a <V>"


def test_a_name_may_be_anything_but_half_a_character():
    check_unicode("<v> ", "here")
    with pytest.raises(FieldError, match=r"here: expected no half .*found 'a.udfff'"):
        check_unicode("a\udfff", "here")


def test_a_report_of_damaged_names_can_be_written():
    report = Report()
    report.drop("unknown video", "a.json: b\ud800é", "found \udfff")
    text = json.dumps(report.examples, ensure_ascii=False)
    assert json.loads(text.encode()) == {
        "unknown video": ["a.json: b\\ud800é: found \\udfff"],
    }


def test_what_holds_many_annotations_is_one_example_of_their_number():
    report = Report()
    report.drop("unknown video", "a.json: b", count=5)
    report.drop("unknown video", "a.json: c", count=0)
    report.drop("bad time", "a.json: d", count=0)
    assert dict(report.dropped) == {"unknown video": 5}
    assert report.examples == {"unknown video": ["a.json: b"]}
