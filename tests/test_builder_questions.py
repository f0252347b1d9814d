"""What the question answering datasets share: names of videos, whole videos, the count."""

import dataclasses
import json

import pytest

from tests import tiny_qa
from videollm_mod_jax.data import dialogue
from videollm_mod_jax.data.annotations import (
    FieldError,
    Report,
    Source,
    Videos,
    frame_range,
)
from videollm_mod_jax.data.builders import questions
from videollm_mod_jax.errors import UserError

STORED = {"coco/train2017/0001": 1, "gqa/images/0001": 1, "pope/val2014/0002": 1, "empty": 0}
NAMES = questions.StoredNames(Videos(tiny_qa.FPS, STORED))


@pytest.mark.parametrize(
    ("published", "stored"),
    [
        (("coco/train2017/0001",), "coco/train2017/0001"),
        (("images/0001",), "gqa/images/0001"),
        (("0002",), "pope/val2014/0002"),
        (("val2014/0001", "train2017/0001", "0002"), "coco/train2017/0001"),
    ],
)
def test_a_published_name_finds_the_only_stored_name_that_ends_in_it(published, stored):
    assert NAMES.find("here", *published) == stored


@pytest.mark.parametrize(
    ("published", "reason"),
    [
        ("0001", "ambiguous video"),
        ("002", "unknown video"),  # the end of a name is not the end of a path
        ("2017/0001", "unknown video"),
        ("gqa/images", "unknown video"),
        ("", "unknown video"),
        ("empty", "no frames"),
    ],
)
def test_a_name_that_finds_no_single_video_with_frames_says_why(published, reason):
    with pytest.raises(FieldError) as error:
        NAMES.find("here", published)
    assert error.value.reason == reason
    assert error.value.where == "here"


@pytest.mark.parametrize(
    ("path", "name"),
    [("coco/1.jpg", "coco/1"), ("v.1/2", "v.1/2"), ("a.b.mp4", "a.b"), (".jpg", ".jpg")],
)
def test_the_extension_is_what_follows_the_last_dot_of_the_last_part(path, name):
    assert questions.without_extension(path) == name


@pytest.mark.parametrize(
    ("frames", "max_frames", "shown"),
    [
        (10, 4, [0, 3, 6, 9]),
        (4, 4, [0, 1, 2, 3]),
        (5, 4, [0, 2, 4]),
        (1, 1, [0]),
        (7200, 600, list(range(0, 7200, 12))),
    ],
)
def test_a_long_video_is_shown_evenly_from_beginning_to_end(frames, max_frames, shown):
    source = Source(None, Videos(tiny_qa.FPS, {"v": frames}), max_frames, Report())
    record = questions.whole_video("id", "v", [("How many?", "One.")], source, {})
    assert list(frame_range(record, tiny_qa.FPS)) == shown
    text, _ = tiny_qa.rendered(record)
    assert text == (
        "<s>Watch.\n\n["
        + ",".join(["<v>"] * len(shown))
        + "]\nUser: How many?\nAssistant: One.</s>"
    )


@pytest.mark.parametrize("fps", [1.0, 2.0, 3.0, 29.97, 1 / 3])
def test_the_questions_come_after_the_last_frame_at_every_rate_and_length(fps):
    for frames in range(1, 200):
        source = Source(None, Videos(fps, {"v": frames}), 7, Report())
        record = questions.whole_video("id", "v", [("How many?", "One.")] * 2, source, {})
        kinds = [type(m).__name__ for m in dialogue.conversation_of(record, fps, "Watch.")]
        assert kinds == ["System", "Stream", *["User", "Assistant"] * 2]


@pytest.mark.parametrize("name", tiny_qa.WRITERS)
def test_every_annotation_is_kept_or_counted_when_some_have_no_video(name, tmp_path):
    frames = tiny_qa.WRITERS[name](tmp_path)
    whole, _ = tiny_qa.parse(name, tmp_path, frames)
    total = whole.kept + whole.dropped.total()
    lost = next(iter(frames))
    part, splits = tiny_qa.parse(name, tmp_path, frames | {lost: 0})
    assert part.dropped["no frames"] >= 1
    assert part.kept + part.dropped.total() == total
    assert sum(map(len, splits.values())) == part.kept
    assert all(record.video != lost for records in splits.values() for record in records)
    none, _ = tiny_qa.parse(name, tmp_path, {})
    assert (none.kept, none.dropped.total()) == (0, total)


@pytest.mark.parametrize("name", tiny_qa.WRITERS)
def test_the_ids_of_a_dataset_are_unique_and_its_target_is_json(name, tmp_path):
    frames = tiny_qa.WRITERS[name](tmp_path)
    _, splits = tiny_qa.parse(name, tmp_path, frames)
    records = [record for split in splits.values() for record in split]
    assert records
    assert len({record.id for record in records}) == len(records)
    for record in records:
        target = dataclasses.asdict(record)["target"]
        assert json.loads(json.dumps(target)) == target


@pytest.mark.parametrize("name", tiny_qa.WRITERS)
def test_a_directory_without_the_files_says_where_to_get_them(name, tmp_path):
    with pytest.raises(UserError, match=r"download .*https://") as error:
        tiny_qa.parse(name, tmp_path, {})
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", tiny_qa.WRITERS)
def test_the_page_says_where_to_get_the_dataset_and_what_is_dropped(name):
    page = tiny_qa.DATASETS[name].page
    assert page.startswith(f"# {name}\n")
    for part in ("## Where to get it\n", "https://", "## Files\n", "## Records\n", "## Dropped\n"):
        assert part in page


def test_the_second_annotation_of_an_id_is_dropped(tmp_path):
    frames = tiny_qa.write_gqa(tmp_path)
    path = tmp_path / "test_q.json"
    tiny_qa.write_json(
        path, [{"video_name": "n161313", "question": q, "question_id": 0} for q in "ab"]
    )
    tiny_qa.write_json(tmp_path / "test_a.json", [{"answer": "yes", "question_id": "0"}])
    report, splits = tiny_qa.parse("video_qa_msrvtt", tmp_path, frames)
    assert report.dropped == {"duplicate id": 1}
    assert report.examples["duplicate id"] == ["test_q.json: annotation 1: 'test/0' came before"]
    assert [record.turns[0].text for record in splits["test"]] == ["a"]


@pytest.mark.parametrize(
    ("text", "reason"), [("a <v> b", "reserved text"), ("a \ud800 b", "not Unicode")]
)
@pytest.mark.parametrize("place", ["question", "question_id"])
def test_a_text_that_no_dialogue_can_hold_is_dropped(tmp_path, place, text, reason):
    question = {"video_name": "v", "question": "who?", "question_id": "0"}
    tiny_qa.write_json(
        tmp_path / "test_q.json", [question, question | {"question_id": "1"} | {place: text}]
    )
    tiny_qa.write_json(
        tmp_path / "test_a.json", [{"answer": "he", "question_id": i} for i in ("0", "1", text)]
    )
    report, splits = tiny_qa.parse("video_qa_msrvtt", tmp_path, {"v": 1})
    assert [record.id for record in splits["test"]] == ["test/0"]
    assert report.dropped == {reason: 1}
