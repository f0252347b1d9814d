"""The `own` dataset: anybody's table becomes the conversations that a person would expect."""

import json
import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests import tiny_sources
from videollm_mod_jax.data import dialogue
from videollm_mod_jax.data.annotations import Report, Source, Turn, Videos, frame_range
from videollm_mod_jax.data.builders import counting, cutting, own
from videollm_mod_jax.errors import UserError

VIDEOS = Videos(2.0, {"kitchen": 20, "monday/street": 12})


def source(directory, max_frames=100, videos=VIDEOS):
    return Source(directory, videos, max_frames, Report())


def read(where):
    parsed = own.read(where)
    assert parsed.labels == ()
    return {split: records for split, of in parsed.splits.items() if (records := list(of))}


def read_csv(directory, *rows, header="video,time,text,role,split", **arguments):
    text = "\n".join([header, *rows]) + "\n"
    (directory / "annotations.csv").write_text(text, encoding="utf-8", newline="")
    where = source(directory, **arguments)
    return read(where), where.report


def rendered(record, fps=2.0):
    return dialogue.render(dialogue.conversation_of(record, fps, "Hi"), 1, "", "</s>")


def test_the_conversation_of_a_table(tmp_path):
    tiny_sources.own(tmp_path)
    where = source(tmp_path)
    records = read(where)
    (train,), (validation,) = records["train"], records["validation"]
    assert (train.id, train.video, train.start, train.stop) == ("kitchen/0-20", "kitchen", 0, 10)
    frame = "<v>,"
    text = rendered(train)
    assert text.text == (
        f"Hi\n\n[{frame * 7}<v>]\nAssistant: The person opens the fridge.</s>"
        f"\n[{frame * 3}<v>]\nUser: What is in the pan?\nAssistant: Two eggs, sunny side up.</s>"
        f'\n[{frame * 6}<v>]\nAssistant: It says "done".</s>'
        "\n[<v>]"
    )
    learnt = [text.text[first:end] for first, end in text.learn_ranges]
    assert learnt == [
        *([","] * 7 + ["]\n"]),
        "Assistant: The person opens the fridge.</s>",
        *([","] * 3),
        "Assistant: Two eggs, sunny side up.</s>",
        *([","] * 6 + ["]\n"]),
        'Assistant: It says "done".</s>',
    ]
    # 1.2 s is ceiled to the frame at 1.5 s, 4.25 s to that at 4.5 s.
    assert rendered(validation).text == (
        f"Hi\n\n[{frame * 3}<v>]\nAssistant: A bus stops.</s>"
        f"\n[{frame * 5}<v>]\nAssistant: It leaves.</s>\n[<v>,<v>]"
    )
    assert (where.report.kept, where.report.dropped.total()) == (6, 0)


def test_the_examples_of_the_page_are_what_it_says(tmp_path):
    blocks = [
        "\n".join(line[6:] for line in block.splitlines() if line.startswith(" " * 6))
        for block in own.PAGE.split("- `annotations.")[1:]
    ]
    videos = Videos(2.0, {"kitchen": 200})
    found = []
    for name, block in zip(("csv", "json"), blocks, strict=True):
        directory = tmp_path / name
        directory.mkdir()
        (directory / f"annotations.{name}").write_text(block)
        where = source(directory, 1200, videos)
        found.append(read(where))
        assert (where.report.kept, where.report.dropped.total()) == (3, 0)
    assert found[0] == found[1]
    assert [turn.role for turn in found[0]["train"][0].turns] == ["assistant", "user", "assistant"]


CSV_FORMS = {
    "commas": "video,time,text\nkitchen,1.5,Zwei Eier\n",
    "semicolons": "video;time;text\nkitchen;1.5;Zwei Eier\n",
    "tabs": "text\tvideo\ttime\nZwei Eier\tkitchen\t1.5\n",
    "a byte order mark": "\ufeffvideo,time,text\nkitchen,1.5,Zwei Eier\n",
    "line ends of Windows": "video,time,text\r\nkitchen,1.5,Zwei Eier\r\n",
    "line ends of old": "video,time,text\rkitchen,1.5,Zwei Eier",
    "capitals and spaces": 'Video, Time ,TEXT,Role,Split\n kitchen , 1.5," Zwei Eier ",,\n',
    "blank lines and short rows": "video,time,text,role\n\nkitchen,1.5,Zwei Eier\n, ,,\n",
    "an extension": "video,time,text\nkitchen.mp4,1.5,Zwei Eier\n",
}


@pytest.mark.parametrize("form", CSV_FORMS)
def test_tables_of_any_spreadsheet_are_read(tmp_path, form):
    path = tmp_path / "annotations.csv"
    path.write_text(CSV_FORMS[form], encoding="utf-8", newline="")
    assert read(source(tmp_path))["train"][0].turns == (Turn("assistant", 1.5, "Zwei Eier"),)


def test_only_the_ending_of_a_file_may_be_left_out(tmp_path):
    # The video kitchen.new has no features; that of kitchen are others.
    _, report = read_csv(tmp_path, "kitchen.new,1,x,,", "kitchen.MP4,1,x,,")
    assert (report.kept, report.dropped) == (1, {"unknown video": 1})
    assert "found 'kitchen.new'" in report.examples["unknown video"][0]


def test_a_quoted_text_may_hold_anything(tmp_path):
    records, _ = read_csv(tmp_path, 'kitchen,1.5,"a, ""b""\nc\u2028d; e",,')
    assert records["train"][0].turns[0].text == 'a, "b"\nc\u2028d; e'


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("3", 3.0),
        ("3.5", 3.5),
        ("0:07", 7.0),
        ("90:00", 5400.0),
        ("1:02:03.5", 3723.5),
        ("120:00:00", 432_000.0),
        ("1:60", None),
        ("1:5", None),
        ("1:60:00", None),
        ("1:2:03", None),
        ("-1", None),
        ("1e3", None),
        ("nan", None),
        ("soon", None),
        ("1:02:03:04", None),
        ("9" * 400, None),
    ],
)
def test_times_are_seconds_or_minutes_or_hours(tmp_path, text, seconds):
    videos = Videos(2.0, {"kitchen": 1_000_000})
    records, report = read_csv(tmp_path, f"kitchen,{text},x,,", max_frames=10**6, videos=videos)
    if seconds is None:
        assert not records
        assert report.dropped == {"bad time": 1}
        assert "annotations.csv: line 2: field 'time': expected seconds, m:ss" in str(
            report.examples
        )
    else:
        assert records["train"][0].turns[0].time == seconds


DROPS = {
    "unknown video": ("garden,1,x,,", "line 3: field 'video'"),
    "missing field": ("kitchen,1", "line 3: field 'text'"),
    "empty text": ("kitchen,1, ,,", "line 3: field 'text'"),
    "text too long": (f"kitchen,1,{'x' * 100_001},,", "line 3: field 'text'"),
    "reserved text": ("kitchen,1,a <v> b,,", "line 3: field 'text'"),
    "bad time": ("kitchen,-1,x,,", "line 3: field 'time'"),
    "unknown role": ("kitchen,1,x,narrator,", "line 3: field 'role'"),
    "unknown split": ("kitchen,1,x,,val", "line 3: field 'split'"),
    "video in two splits": ("kitchen,1,x,,test", "line 3: field 'split'"),
    "too many cells": ("kitchen,1,x,,,y", "line 3: expected 5 cells, found 6"),
    "duplicate": ("kitchen,2,The first.,,", "line 3"),
    "after the end of the video": ("kitchen,10.1,x,,", "line 3: expected at most 10 s"),
    "question without an answer": ("kitchen,3,What?,user,", "line 3: 'What?'"),
}


@pytest.mark.parametrize("reason", DROPS)
def test_what_cannot_be_used_is_counted_with_its_line(tmp_path, reason):
    row, where = DROPS[reason]
    records, report = read_csv(tmp_path, "kitchen,2,The first.,,train", row)
    assert report.dropped == {reason: 1}
    assert f"annotations.csv: {where}" in report.examples[reason][0]
    assert report.kept == 1
    assert [turn.text for turn in records["train"][0].turns] == ["The first."]


def test_json_annotations_are_checked_one_by_one(tmp_path):
    rows = [
        {"video": "kitchen", "time": 1, "text": "x"},
        {"video": "kitchen", "time": True, "text": "x"},
        {"video": "kitchen", "time": float("nan"), "text": "x"},
        {"video": ["kitchen"], "time": 2, "text": "x"},
        {"video": "kitchen", "time": 3, "role": None, "split": None, "text": "y"},
        {"video": "kitchen", "time": 4, "role": 3, "text": "y"},
        {"video": "kitchen", "time": 5, "text": "half a pair: \ud83d"},
        "kitchen",
    ]
    (tmp_path / "annotations.json").write_text(json.dumps(rows))
    where = source(tmp_path)
    (record,) = read(where)["train"]
    assert [turn.time for turn in record.turns] == [1.0, 3.0]
    assert where.report.dropped == {
        "wrong type": 3,
        "bad time": 1,
        "not Unicode": 1,
        "not an object": 1,
    }
    assert where.report.examples["wrong type"][0] == (
        "annotations.json: annotation 1: field 'time': expected int or float, found True"
    )


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "expected annotations.csv or annotations.json, found neither"),
        ({"annotations.csv": "", "annotations.json": ""}, "found both; remove one"),
        ({"annotations.csv": ""}, "line 1: expected a header with video, time and text"),
        ({"annotations.csv": "video,time\n"}, "line 1: expected a header"),
        ({"annotations.csv": "video,time,text,text\n"}, "each column once"),
        ({"annotations.csv": 'video,time,text\na,1,"b\nc,2,d\n'}, "line 3: unexpected end of data"),
        ({"annotations.csv": 'video,time,text\na,1,"b" c\n'}, "line 2: ',' expected after"),
        ({"annotations.csv": b"video,time,text\na,1,caf\xe9\n"}, "expected UTF-8, found 0xe9 at"),
        ({"annotations.json": "[1"}, "annotations.json: expected a list in json, but Expecting"),
        ({"annotations.json": "[" * 100_000}, "annotations.json: expected a list in json, but"),
        ({"annotations.json": '[{"time": 1, "time": 2}]'}, "but the name 'time' comes twice"),
        ({"annotations.json": "{}"}, "expected a list of annotations, found {}"),
        ({"annotations.json": None}, "cannot be read"),
    ],
)
def test_a_file_that_is_no_table_is_an_error_that_names_it(tmp_path, files, message):
    for name, content in files.items():
        path = tmp_path / name
        if content is None:
            path.mkdir()
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match="annotations") as caught:
        read(source(tmp_path))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def said(*turns):
    """Turns from `role time text`, where N narrates, Q asks and A answers."""
    return [
        (f"turn {i}", Turn("user" if role == "Q" else "assistant", time, text))
        for i, (role, time, text) in enumerate(turns)
    ]


def cut(turns, num_frames, max_frames, fps=1.0):
    where = Source(None, Videos(fps, {"v": num_frames}), max_frames, Report())
    return list(cutting.cut("v", turns, where)), where


def test_a_long_video_is_cut_as_drawn():
    records, where = cut(said(("N", 1.0, "n"), ("Q", 5.0, "q"), ("A", 7.0, "a")), 10, 4)
    assert [record.id for record in records] == ["v/0-4", "v/4-8"]
    assert [rendered(record, 1.0).text for record in records] == [
        "Hi\n\n[<v>,<v>]\nAssistant: n</s>\n[<v>,<v>]",
        "Hi\n\n[<v>]\nUser: q\n[<v>,<v>,<v>]\nAssistant: a</s>",
    ]
    assert (where.report.kept, where.report.dropped.total()) == (3, 0)


def test_a_cut_never_parts_a_question_from_its_answer():
    # The question would still fit into the first record, its answer would not.
    records, _ = cut(said(("N", 0.0, "n"), ("Q", 3.0, "q"), ("A", 5.0, "a")), 8, 4)
    assert [record.id for record in records] == ["v/0-2", "v/2-6"]
    assert [[turn.text for turn in record.turns] for record in records] == [["n"], ["q", "a"]]


def test_a_question_that_is_answered_too_late_for_any_record_is_dropped():
    turns = said(("N", 0.0, "n"), ("Q", 3.0, "q"), ("A", 7.0, "a"), ("N", 8.0, "m"))
    records, where = cut(turns, 10, 4)
    assert where.report.dropped == {"question and answer too far apart": 2}
    assert where.report.examples["question and answer too far apart"] == [
        "turn 1: expected at most 4 frames, found 6",
        "turn 2: expected at most 4 frames, found 6",
    ]
    assert [[turn.text for turn in record.turns] for record in records] == [["n"], ["m"]]


def test_silence_that_fills_a_record_makes_none():
    records, _ = cut(said(("N", 13.0, "n"), ("N", 1.0, "m")), 20, 4)
    assert [record.id for record in records] == ["v/0-4", "v/12-16"]


def test_what_is_said_in_one_frame_is_one_turn():
    turns = said(("N", 0.6, "One."), ("N", 1.0, "Two."), ("N", 1.1, "Three."))
    (record,), where = cut(turns, 4, 4)
    assert [turn.text for turn in record.turns] == ["One. Two.", "Three."]
    assert where.report.kept == 3


def test_an_answer_in_the_frame_before_its_question_follows_it_at_once():
    # The narration at 0.5 s shows the frame at 1 s, before which the question is asked.
    (record,), _ = cut(said(("N", 0.5, "n"), ("Q", 0.7, "q"), ("A", 0.9, "a")), 4, 4)
    expected = "Hi\n\n[<v>,<v>]\nAssistant: n</s>\nUser: q\nAssistant: a</s>\n[<v>,<v>]"
    assert rendered(record, 1.0).text == expected


def test_what_is_said_after_the_last_frame_comes_at_the_last_frame():
    (record,), _ = cut(said(("N", 3.7, "n")), 4, 9)
    assert rendered(record, 1.0).text == "Hi\n\n[<v>,<v>,<v>,<v>]\nAssistant: n</s>"
    (record,), _ = cut(said(("Q", 3.7, "q"), ("A", 3.9, "a")), 4, 9)
    expected = "Hi\n\n[<v>,<v>,<v>,<v>]\nUser: q\nAssistant: a</s>"
    assert rendered(record, 1.0).text == expected


@settings(deadline=None, max_examples=300)
@example([("N", 2.5, "a"), ("Q", 3.7, "b"), ("N", 7.0, "c")], 10, 6, 1.0)
@example([("Q", 1e-132, "a"), ("N", 1.0, "a")], 1, 1, 0.5)
@example([("Q", 1e-132, "a"), ("N", 1e-132, "a"), ("N", 1.0, "a")], 1, 1, 0.5)
@given(
    st.lists(st.tuples(st.sampled_from("QNN"), st.floats(0, 31), st.sampled_from("abcd"))),
    st.integers(1, 60),
    st.integers(1, 12),
    st.sampled_from([0.5, 1.0, 2.0, 29.97]),
)
def test_any_turns_become_conversations_and_none_is_lost(turns, num_frames, max_frames, fps):
    videos = Videos(fps, {"v": num_frames})
    records, where = cut(said(*turns), num_frames, max_frames, fps)
    assert where.report.kept + where.report.dropped.total() == len(turns)
    end = 0
    for record in records:
        counting.check_record(record, videos)
        frames = frame_range(record, fps)
        assert end <= frames.start
        assert 0 < len(frames) <= max_frames
        assert record.turns[-1].role == "assistant"
        end = frames.stop
    # Narrations that stand alone come after the frame of their time, in whichever record.
    texts = [turn for record in records for turn in record.turns]
    if not any(role == "Q" for role, _, _ in turns):
        expected = {}
        for _, time, text in sorted(set(turns), key=lambda turn: turn[1]):
            if time <= num_frames / fps:
                frame = min(math.ceil(round(time * fps, 6)), num_frames - 1)
                expected[frame] = [*expected.get(frame, ()), text]
        assert [sorted(turn.text.split()) for turn in texts] == [
            sorted(expected[frame]) for frame in sorted(expected)
        ]
        found = [
            frame_range(record, fps).start + count
            for record in records
            for count in _frames_before_answers(record, fps)
        ]
        assert found == [frame + 1 for frame in sorted(expected)]


def _frames_before_answers(record, fps):
    shown, found = 0, []
    for message in dialogue.conversation_of(record, fps, ""):
        if isinstance(message, dialogue.Stream):
            shown += message.num_frames
        elif isinstance(message, dialogue.Assistant):
            found.append(shown)
    return found
