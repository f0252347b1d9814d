"""Dialogues keep the frames of VideoLLM-online, and every turn is counted."""

import pytest

from tests import tiny_ego4d
from tests.tiny_ego4d import read_all, said, source_of, write
from videollm_mod_jax.data.annotations import Videos, frame_range
from videollm_mod_jax.data.builders import ego4d_goalstep
from videollm_mod_jax.data.dialogue import conversation_of, render
from videollm_mod_jax.errors import UserError

NAME = "ego4d_goalstep_chat"


def read(tmp_path, *turns, frames=60, max_frames=1200):
    """The text of the dialogue of these turns, its record, and the report."""
    tiny_ego4d.write_benchmarks(tmp_path)
    write(tmp_path / ego4d_goalstep.FILE, [{"video_uid": "a", "conversation": turns}])
    source = source_of(tmp_path, Videos(2.0, {"a": frames}), max_frames)
    records = read_all(NAME, source)["train"]
    assert source.report.kept + sum(source.report.dropped.values()) == len(turns)
    record = records[0] if records else None
    return record and shown(record), record, source.report


def shown(record):
    """The dialogue from the last frame before the first question on."""
    text = render(conversation_of(record, 2.0, ""), 1, "", "").text
    return "|" + text.partition("]")[2].replace("<v>", "|").replace("\n", "/")


def test_golden_dialogue(tmp_path, monkeypatch):
    monkeypatch.setattr(ego4d_goalstep, "draw", lambda count, name: min(1, count - 1))
    source = source_of(tmp_path, tiny_ego4d.write_goalstep(tmp_path))
    splits = read_all(NAME, source)
    (record,), (validation,) = splits["train"], splits["validation"]
    rendered = render(conversation_of(record, 2.0, "Watch."), 1, "<s>", "</s>")
    # Asked at 2.3 s, after frame 4; helped at 4.1 s, after frame 9; asked at 5.6 s, after frame 11.
    assert frame_range(record, 2.0) == range(3, 15)
    assert rendered.text == (
        "<s>Watch.\n\n[<v>,<v>]\nUser: What next?\nAssistant: Cut the onion.</s>"
        "\n[<v>,<v>,<v>,<v>,<v>]\nAssistant: Now fry it.</s>"
        "\n[<v>,<v>]\nUser: ...\n[<v>,<v>,<v>]\nAssistant: Well done.</s>"
    )
    learnt = [rendered.text[a:b] for a, b in rendered.learn_ranges]
    assert [text for text in learnt if len(text) > 2] == [
        "Assistant: Cut the onion.</s>",
        "Assistant: Now fry it.</s>",
        "Assistant: Well done.</s>",
    ]
    assert len(learnt) == 3 + 1 + 5 + 1 + 3
    assert (validation.id, splits["test"]) == ("b/1", [])
    assert (source.report.kept, dict(source.report.dropped)) == (7, {})


def test_the_drawn_example(tmp_path, monkeypatch):
    monkeypatch.setattr(ego4d_goalstep, "draw", lambda count, name: 1)
    turns = [said("user", 10.3, "Q"), said("assistant", 10.3, "A"), said("assistant", 12.1, "H")]
    text, record, _ = read(tmp_path, *turns)
    assert frame_range(record, 2.0) == range(19, 26)
    assert text == "|/User: Q/Assistant: A/[|,|,|,|,|]/Assistant: H"


@pytest.mark.parametrize("asked", [0.3, 0.6, 2.0, 25.0])
def test_a_dialogue_begins_up_to_twenty_frames_before_its_question(tmp_path, asked):
    tiny_ego4d.write_benchmarks(tmp_path)
    turns = [said("user", asked, "Q"), said("assistant", asked, "A")]
    dialogues = [{"video_uid": "a", "conversation": turns}] * 400
    write(tmp_path / ego4d_goalstep.FILE, dialogues)
    source = source_of(tmp_path, Videos(2.0, {"a": 60}))
    records = read_all(NAME, source)["train"]
    frame = int(asked * 2)
    lengths = {len(frame_range(record, 2.0)) for record in records}
    assert lengths == set(range(1, max(1, min(20, frame)) + 1))
    assert {frame_range(record, 2.0).stop for record in records} == {frame + 1}
    assert len({record.id for record in records}) == 400


Q, A = said("user", 3.0, "Q"), said("assistant", 3.0, "A")


@pytest.mark.parametrize(
    ("turns", "text", "dropped"),
    [
        # Another answer at the time of an answer is the one that counts.
        ([Q, A, said("assistant", 3.0, "B")], "|/User: Q/Assistant: B", "another answer at the"),
        (
            [Q, A, said("assistant", 4.0, "B"), said("assistant", 4.0, "C")],
            "|/User: Q/Assistant: A/[|,|]/Assistant: C",
            "another answer at the same time",
        ),
        # Two help in one frame: the first counts.
        (
            [Q, A, said("assistant", 3.7, "B"), said("assistant", 3.9, "C")],
            "|/User: Q/Assistant: A/[|,|]/Assistant: B",
            "no frame since the turn before",
        ),
        ([Q, A, said("user", 4.0, "R")], "|/User: Q/Assistant: A", "question without an answer"),
        (
            [Q, said("assistant", 3.2, "B")],
            "|/User: Q/[|]/Assistant: B",
            None,
        ),
        (
            [
                Q,
                A,
                said("assistant", 3.2, "B"),
                said("user", 3.6, "R"),
                said("assistant", 3.6, "C"),
            ],
            "|/User: Q/Assistant: A/[|]/Assistant: B/User: R/Assistant: C",
            None,
        ),
        # Asked in the frame that was last: at once.
        (
            [
                Q,
                A,
                said("assistant", 4.1, "B"),
                said("user", 4.3, "R"),
                said("assistant", 4.3, "C"),
            ],
            "|/User: Q/Assistant: A/[|,|,|]/Assistant: B/User: R/Assistant: C",
            None,
        ),
        ([Q, A, said("assistant", 2.0, "B")], "|/User: Q/Assistant: A", "unordered times"),
        ([Q, A, said("user", 3.0, "R")], "|/User: Q/Assistant: A", "question at the time of"),
        ([Q, A, said("assistant", 29.6, "B")], "|/User: Q/Assistant: A", "after the end of the"),
        ([Q, A, said("assistant", 4.0, " ")], "|/User: Q/Assistant: A", "empty text"),
        ([Q, A, {"role": "system", "time": 4.0, "content": "B"}], "|/User: Q/Assistant: A", "unkn"),
        ([Q, A, 7], "|/User: Q/Assistant: A", "not an object"),
        ([Q, A, said("assistant", float("nan"), "B")], "|/User: Q/Assistant: A", "bad time"),
        ([A], None, "begins without a question"),
        ([said("user", 0.0, "Q")], None, "question before the first frame"),
        ([said("user", 29.6, "Q")], None, "after the end of the video"),
    ],
)
def test_turns_that_cannot_be_laid_are_counted(tmp_path, turns, text, dropped):
    found, _, report = read(tmp_path, *turns)
    assert found == text
    assert [reason[: len(dropped)] for reason in report.dropped] == ([dropped] if dropped else [])


def test_a_damaged_answer_goes_alone_and_a_damaged_question_with_the_rest(tmp_path):
    rest = [said("user", 5.0, "R"), said("assistant", 5.0, "B")]
    text, _, report = read(tmp_path, Q, A, said("assistant", 4.0, ""), *rest)
    assert text == "|/User: Q/Assistant: A/[|,|,|,|]/User: R/Assistant: B"
    assert report.dropped == {"empty text": 1}
    text, _, report = read(tmp_path, Q, A, said("user", 4.0, ""), *rest)
    assert text == "|/User: Q/Assistant: A"
    assert report.dropped == {"empty text": 1, "after a turn that cannot be used": 2}


@pytest.mark.parametrize(
    ("turns", "text", "dropped"),
    [
        ([Q, A, said("assistant", 2.0, "B")], "|/User: Q/Assistant: A", "unordered times"),
        (
            [Q, A, said("assistant", 30.0, "B")],
            "|/User: Q/Assistant: A",
            "after the end of the video",
        ),
        ([said("assistant", 2.0, "B")], None, "begins without a question"),
    ],
)
def test_what_ends_a_dialogue_drops_all_turns_after_it(tmp_path, turns, text, dropped):
    found, _, report = read(tmp_path, *turns, said("user", 5.0, "R"), said("assistant", 5.0, "C"))
    assert found == text
    assert report.dropped == {dropped: 1, "after a turn that cannot be used": 2}


def test_a_dialogue_is_cut_at_max_frames(tmp_path, monkeypatch):
    monkeypatch.setattr(ego4d_goalstep, "draw", lambda count, name: 2)
    turns = [Q, A, said("assistant", 4.5, "B"), said("assistant", 5.0, "C"), said("user", 9.0, "R")]
    text, record, report = read(tmp_path, *turns, max_frames=6)
    assert text == "|/User: Q/Assistant: A/[|,|,|]/Assistant: B"
    assert frame_range(record, 2.0) == range(4, 10)
    assert report.dropped == {"more than 6 frames into the record": 2}


def test_dialogues_that_cannot_be_used_are_counted(tmp_path):
    tiny_ego4d.write_benchmarks(tmp_path)
    dialogues = [
        7,
        {"conversation": [Q, A]},
        {"video_uid": "zz", "conversation": [Q, A]},
        {"video_uid": "b", "conversation": "none"},
        {"video_uid": "a", "conversation": []},
    ]
    write(tmp_path / ego4d_goalstep.FILE, dialogues)
    source = source_of(tmp_path)
    assert not any(read_all(NAME, source).values())
    expected = {"not an object": 1, "missing field": 1, "unknown video": 2, "wrong type": 1}
    assert (source.report.kept, dict(source.report.dropped)) == (0, expected)


def test_a_missing_file_is_an_error_that_says_where_to_get_it(tmp_path):
    with pytest.raises(UserError, match="which is not there; download it from huggingface"):
        read_all(NAME, source_of(tmp_path))
