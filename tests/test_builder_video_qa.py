"""`video_qa_msvd`, `video_qa_msrvtt`, `video_qa_activitynet`: open questions about videos."""

import pytest

from tests import tiny_qa
from videollm_mod_jax.data.annotations import frame_range
from videollm_mod_jax.errors import UserError


def test_msvd_finds_videos_by_number_or_by_the_mapping_to_their_titles(tmp_path):
    frames = tiny_qa.write_msvd(tmp_path)
    report, splits = tiny_qa.parse("video_qa_msvd", tmp_path, frames)
    assert {split: [r.id for r in records] for split, records in splits.items()} == {
        "train": ["train/0"],
        "test": ["test/37348"],
    }
    assert splits["train"][0].video == "YouTubeClips/-4wsuPCjDBc_5_15"
    assert splits["test"][0].video == "YouTubeClips/x1_0_3"
    assert (report.kept, report.dropped) == (2, {})
    _, splits = tiny_qa.parse("video_qa_msvd", tmp_path, frames | {"vid1301": 2})
    assert splits["test"][0].video == "vid1301"


def test_the_clip_comes_first_and_then_the_bare_question(tmp_path):
    frames = tiny_qa.write_msvd(tmp_path)
    _, splits = tiny_qa.parse("video_qa_msvd", tmp_path, frames)
    record = splits["test"][0]
    assert list(frame_range(record, tiny_qa.FPS)) == [0, 1, 2, 3]
    assert tiny_qa.rendered(record) == (
        "<s>Watch.\n\n[<v>,<v>,<v>,<v>]\nUser: what is a man doing?\nAssistant: cook</s>",
        [",", ",", ",", "Assistant: cook</s>"],
    )
    assert record.target == {}


def test_msrvtt_reads_either_layout_of_a_split(tmp_path):
    frames = tiny_qa.write_msrvtt(tmp_path)
    report, splits = tiny_qa.parse("video_qa_msrvtt", tmp_path, frames)
    found = {
        split: [(r.id, r.video, [t.text for t in r.turns]) for r in records]
        for split, records in splits.items()
    }
    assert found == {
        "validation": [("validation/158581", "video6513", ["what is cooked?", "fish"])],
        "test": [("test/0", "video7010", ["what is a person doing?", "talk"])],
    }
    assert (report.kept, report.dropped) == (2, {})
    assert list(frame_range(splits["validation"][0], tiny_qa.FPS)) == [0, 2, 4]


def test_activitynet_pairs_questions_with_answers_by_id_and_names_their_type(tmp_path):
    frames = tiny_qa.write_activitynet(tmp_path)
    report, splits = tiny_qa.parse("video_qa_activitynet", tmp_path, frames)
    assert [(r.id, r.turns[1].text, r.target) for r in splits["test"]] == [
        ("test/v_1QIUV7WYKXg_1", "yes", {"type": "yes/no"}),
        ("test/v_1QIUV7WYKXg_2", "no", {"type": "motion"}),
    ]
    assert (report.kept, report.dropped) == (2, {})
    assert {r.video for r in splits["test"]} == {"v_1QIUV7WYKXg"}
    _, splits = tiny_qa.parse("video_qa_activitynet", tmp_path, {"all_test/1QIUV7WYKXg": 9})
    assert {r.video for r in splits["test"]} == {"all_test/1QIUV7WYKXg"}


ANSWER = {"answer": "yes", "type": 3, "question_id": "v_1QIUV7WYKXg_1"}


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (ANSWER | {"question_id": "v_1QIUV7WYKXg_3"}, "no answer"),
        (ANSWER | {"question_id": ["v_1QIUV7WYKXg_1"]}, "no answer"),
        (7, "no answer"),
        (ANSWER | {"answer": " "}, "empty text"),
        (ANSWER | {"answer": None}, "wrong type"),
        (ANSWER | {"type": 9}, "unknown type"),
        (ANSWER | {"type": True}, "wrong type"),
    ],
)
def test_a_question_whose_answer_cannot_be_used_is_dropped(tmp_path, answer, reason):
    frames = tiny_qa.write_activitynet(tmp_path)
    second = ANSWER | {"question_id": "v_1QIUV7WYKXg_2"}
    tiny_qa.write_json(tmp_path / "test_a.json", [answer, second])
    report, splits = tiny_qa.parse("video_qa_activitynet", tmp_path, frames)
    assert [r.id for r in splits["test"]] == ["test/v_1QIUV7WYKXg_2"]
    assert (report.kept, report.dropped) == (1, {reason: 1})
    assert report.examples[reason][0].startswith("test_q.json: annotation 0")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ({"question": ""}, "empty text"),
        ({"question": 3}, "wrong type"),
        ({"video_id": 2.5}, "wrong type"),
        ({"video_id": 3}, "unknown video"),
        ({"id": None}, "wrong type"),
    ],
)
def test_a_damaged_question_is_dropped_and_the_others_are_kept(tmp_path, damage, reason):
    frames = tiny_qa.write_msvd(tmp_path)
    good = tiny_qa.MSVD_QUESTION
    tiny_qa.write_json(tmp_path / "test_qa.json", [good | damage, good])
    report, splits = tiny_qa.parse("video_qa_msvd", tmp_path, frames)
    assert [r.id for r in splits["test"]] == ["test/37348"]
    assert report.dropped == {reason: 1}


def test_questions_without_their_file_of_answers_say_which_is_missing(tmp_path):
    frames = tiny_qa.write_activitynet(tmp_path)
    (tmp_path / "test_a.json").unlink()
    with pytest.raises(UserError, match=r"test_a\.json: there is no such file; download it from"):
        tiny_qa.parse("video_qa_activitynet", tmp_path, frames)
