"""`videomme`: multiple choice questions about long videos."""

import pyarrow
import pytest
from pyarrow import parquet

from tests import tiny_qa
from videollm_mod_jax.data.annotations import frame_range
from videollm_mod_jax.errors import UserError

PROMPT = (
    "Select the best answer to the following multiple-choice question based on the video. Respond "
    "with only the letter (A, B, C, or D) of the correct option.\n"
    "How many red socks are above the fireplace?\n"
    "A. 1.\n"
    "B. 4.\n"
    "C. 2.\n"
    "D. 3.\n"
    "The best answer is:"
)


def parse(directory, frames=tiny_qa.VIDEOMME_FRAMES, max_frames=600):
    report, splits = tiny_qa.parse("videomme", directory, frames, max_frames)
    assert list(splits) == ["test"]
    return report, splits["test"]


def test_the_prompt_is_that_of_the_authors_without_subtitles(tmp_path):
    report, records = parse(tmp_path, tiny_qa.write_videomme(tmp_path))
    assert tiny_qa.rendered(records[0]) == (
        f"<s>Watch.\n\n[<v>,<v>,<v>]\nUser: {PROMPT}\nAssistant: D</s>",
        [",", ",", "Assistant: D</s>"],
    )
    assert records[0].id == "001-1"
    assert records[0].target == {
        "options": ["A. 1.", "B. 4.", "C. 2.", "D. 3."],
        "duration": "short",
        "domain": "Knowledge",
        "sub_category": "Humanity & History",
        "task": "Counting Problem",
    }
    assert (report.kept, report.dropped) == (2, {})


def test_an_hour_of_video_is_shown_from_beginning_to_end(tmp_path):
    _, records = parse(tmp_path, tiny_qa.write_videomme(tmp_path))
    assert list(frame_range(records[1], tiny_qa.FPS)) == list(range(0, 7200, 12))
    assert records[1].stop == 3600.0
    text, _ = tiny_qa.rendered(records[1])
    assert text.count("<v>") == 600
    assert text.endswith("D. Nothing.\nThe best answer is:\nAssistant: A</s>")


@pytest.mark.parametrize("write", [tiny_qa.write_videomme_json, tiny_qa.write_videomme_by_video])
def test_every_published_layout_gives_the_same_records(tmp_path, write):
    tiny_qa.write_videomme(tmp_path / "table")
    write(tmp_path / "json")
    assert parse(tmp_path / "json")[1] == parse(tmp_path / "table")[1]


ROW = tiny_qa.VIDEOMME_ROWS[0]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ({"answer": "E"}, "unknown answer"),
        ({"answer": None}, "wrong type"),
        ({"duration": "hour"}, "unknown duration"),
        ({"options": ROW["options"][:3]}, "bad options"),
        ({"options": ROW["options"][::-1]}, "bad options"),
        ({"options": ["1.", "4.", "2.", "3."]}, "bad options"),
        ({"options": [*ROW["options"][:3], 3]}, "bad options"),
        ({"videoID": "absent"}, "unknown video"),
        ({"options": [*ROW["options"][:3], "D. <v>"]}, "reserved text"),
        ({"question": ""}, "empty text"),
        ({"question_id": "601-1"}, "duplicate id"),
    ],
)
def test_a_damaged_row_is_dropped_and_the_others_are_kept(tmp_path, damage, reason):
    tiny_qa.write_json(tmp_path / "videomme.json", [tiny_qa.VIDEOMME_ROWS[1], ROW | damage])
    report, records = parse(tmp_path)
    assert [record.id for record in records] == ["601-1"]
    assert (report.kept, report.dropped) == (1, {reason: 1})


@pytest.mark.parametrize(
    ("damage", "reason", "dropped"),
    [
        ({"url": "https://example.com/1"}, "unknown address", 2),
        ({"video_category": None}, "wrong type", 2),
        ({"questions": None}, "wrong type", 1),
        ({"questions": [3]}, "not an object", 1),
    ],
)
def test_a_damaged_video_drops_each_of_its_questions(tmp_path, damage, reason, dropped):
    question = {
        "question_id": "1-1",
        "task_type": "Counting Problem",
        "question": "How many?",
        "choices": ROW["options"],
        "answer": "A",
    }
    video = {
        "video_id": "001",
        "duration_category": "short",
        "video_category": "Knowledge",
        "video_subcategory": "Law",
        "url": ROW["url"],
        "questions": [question, question | {"question_id": "1-2"}],
    }
    tiny_qa.write_json(tmp_path / "videomme.json", [video])
    report, _ = parse(tmp_path)
    assert (report.kept, report.dropped) == (2, {})
    tiny_qa.write_json(tmp_path / "videomme.json", [video | damage])
    report, _ = parse(tmp_path)
    assert (report.kept, report.dropped) == (0, {reason: dropped})


def test_a_file_that_is_no_table_is_named(tmp_path):
    path = tmp_path / "test-00000-of-00001.parquet"
    path.write_bytes(b"PAR1 damaged PAR1")
    with pytest.raises(UserError, match=r"is not a parquet file .*download it again") as error:
        parse(tmp_path)
    assert str(path) in str(error.value)


def test_a_table_of_something_else_drops_every_row(tmp_path):
    path = tmp_path / "test-00000-of-00001.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([{"a": 1}, {"a": None}]), path)
    report, records = parse(tmp_path)
    assert (records, report.dropped) == ([], {"missing field": 2})
