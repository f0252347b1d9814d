"""`llava_instruct`: conversations of LLaVA's layout about images and videos."""

import json

import pytest

from tests import tiny_qa
from tests.tiny_qa import said
from videollm_mod_jax.data.annotations import frame_range
from videollm_mod_jax.errors import UserError

NAME = "llava_instruct"


def records_by_id(directory, frames, **kwargs):
    report, splits = tiny_qa.parse(NAME, directory, frames, **kwargs)
    assert list(splits) == ["train"]
    return report, {record.id: record for record in splits["train"]}


def test_an_image_comes_first_and_then_all_turns_without_placeholders(tmp_path):
    frames = tiny_qa.write_llava_instruct(tmp_path)
    _, records = records_by_id(tmp_path, frames)
    record = records["llava_v1_5_mix665k/0"]
    assert (record.video, record.start, record.stop) == ("coco/train2017/000000033471", 0.0, 0.5)
    text, learnt = tiny_qa.rendered(record)
    assert text == (
        "<s>Watch.\n"
        "\n[<v>]"
        "\nUser: What are the colors of the bus?"
        "\nAssistant: The bus is white and red.</s>"
        "\nUser: What feature can be seen on the back?"
        "\nAssistant: An advertisement.</s>"
    )
    assert learnt == [
        "Assistant: The bus is white and red.</s>",
        "Assistant: An advertisement.</s>",
    ]


def test_a_long_video_is_shown_whole_with_a_stride(tmp_path):
    frames = tiny_qa.write_llava_instruct(tmp_path)
    _, records = records_by_id(tmp_path, frames)
    record = records["llava_v1_5_mix665k/1"]
    assert list(frame_range(record, tiny_qa.FPS)) == [0, 3, 6, 9]
    text, learnt = tiny_qa.rendered(record)
    assert text == (
        "<s>Watch.\n\n[<v>,<v>,<v>,<v>]\nUser: What happens?\nAssistant: A man cooks.</s>"
    )
    assert learnt == [",", ",", ",", "Assistant: A man cooks.</s>"]


def test_questions_of_video_chatgpt_are_read_as_they_are_published(tmp_path):
    frames = tiny_qa.write_llava_instruct(tmp_path)
    _, records = records_by_id(tmp_path, frames)
    assert tiny_qa.rendered(records["VideoInstruct100K/0"]) == (
        "<s>Watch.\n\n[<v>,<v>]\nUser: What is he doing?\nAssistant: He skis.</s>",
        [",", "Assistant: He skis.</s>"],
    )


def test_text_only_samples_are_dropped_and_repeated_ids_are_not(tmp_path):
    frames = tiny_qa.write_llava_instruct(tmp_path)
    report, records = records_by_id(tmp_path, frames)
    assert list(records) == [
        "VideoInstruct100K/0",
        "llava_v1_5_mix665k/0",
        "llava_v1_5_mix665k/1",
    ]
    assert report.kept == 3
    assert report.dropped == {"no image or video": 1}
    assert report.examples["no image or video"] == [
        "llava_v1_5_mix665k.json: annotation 2: expected 'image' or 'video' in "
        "['conversations', 'id', 'model']"
    ]


@pytest.mark.parametrize(
    "asked",
    ["<video>\nWhat?", "What?\n<video>", "<image>\nWhat?", "<image><image>\nWhat?", "What?"],
)
def test_the_placeholder_may_stand_anywhere_and_be_either(tmp_path, asked):
    tiny_qa.write_json(
        tmp_path / "samples.json", [{"video": "a.mp4", "conversations": said(asked, "That.")}]
    )
    _, records = records_by_id(tmp_path, {"a": 1})
    assert [turn.text for turn in records["samples/0"].turns] == ["What?", "That."]


GOOD = {"image": "a.jpg", "conversations": said("<image>\nWhat?", "That.")}
BAD = {
    "image and video": GOOD | {"video": "a.mp4"},
    "no image or video": GOOD | {"image": None},
    "unknown video": GOOD | {"image": "b.jpg"},
    "unpaired turns": GOOD | {"conversations": said("<image>\nWhat?", "That.", "And?")},
    "turn out of order": GOOD | {"conversations": said("<image>\nWhat?", "That.")[::-1]},
    "empty text": GOOD | {"conversations": said("<image>", "That.")},
    "reserved text": GOOD | {"conversations": said("What is <<image>v>?", "That.")},
    "not Unicode": GOOD | {"conversations": said("What?", "That \ud83d.")},
    "wrong type": GOOD | {"image": ["a.jpg", "b.jpg"]},
    "missing field": {"image": "a.jpg"},
    "not an object": 7,
    "text too long": GOOD | {"conversations": said("What?", "x" * 100_001)},
}


@pytest.mark.parametrize("reason", BAD)
def test_a_sample_that_cannot_be_used_is_dropped_and_the_others_are_kept(tmp_path, reason):
    tiny_qa.write_json(tmp_path / "samples.json", [GOOD, BAD[reason], GOOD])
    report, records = records_by_id(tmp_path, {"a": 1})
    assert list(records) == ["samples/0", "samples/2"]
    assert (report.kept, report.dropped) == (2, {reason: 1})
    assert report.examples[reason][0].startswith("samples.json: annotation 1")


def test_a_conversation_without_turns_is_dropped(tmp_path):
    tiny_qa.write_json(tmp_path / "samples.json", [GOOD | {"conversations": []}])
    report, records = records_by_id(tmp_path, {"a": 1})
    assert (records, report.dropped) == ({}, {"unpaired turns": 1})


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (json.dumps({"a": 1}).encode(), r"at the top.*: expected \[, found \{"),
        (b"[{", "not json"),
        (b"[7, ", "not json"),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_a_file_that_is_not_a_list_is_named(tmp_path, written, message):
    (tmp_path / "samples.json").write_bytes(written)
    with pytest.raises(UserError, match=message) as error:
        records_by_id(tmp_path, {"a": 1})
    assert str(tmp_path / "samples.json") in str(error.value)
