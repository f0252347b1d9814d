"""Ego-Exo4D keysteps: golden conversations, the ego camera, the classes, every drop."""

import math

import pytest

from tests import tiny_egoexo4d as tiny
from videollm_mod_jax.data import dialogue
from videollm_mod_jax.data.annotations import Report, Source, Videos, frame_range
from videollm_mod_jax.data.builders.egoexo4d import DATASETS
from videollm_mod_jax.errors import UserError

(KEYSTEP,) = DATASETS
QUESTION = "What is the action in the video? Format your answer concisely. No extra text output."
EGO = "georgiatech_covid_07_6/frame_aligned_videos/downscaled/448/aria02_214-1"


def source_of(directory, takes=None, videos=tiny.VIDEOS, **files):
    tiny.write(directory, tiny.TRAIN if takes is None else takes, **files)
    return Source(directory, videos, 100, Report())


def read(source):
    parsed = KEYSTEP.read(source)
    return {split: list(records) for split, records in parsed.splits.items()}, parsed.labels


def rendered(record):
    conversation = dialogue.conversation_of(record, 2.0, "S")
    return dialogue.render(conversation, 1, "", "</s>")


def test_golden_records(tmp_path):
    source = source_of(tmp_path)
    records, labels = read(source)
    first, second = records["train"]
    text = f"S\n\nUser: {QUESTION}\n[<v>,<v>,<v>,<v>]\nAssistant: Unbox package.</s>"
    written = rendered(first)
    assert written.text == text
    stream = text.index("<v>")
    ranges = [(stream + 3 + 4 * i, stream + 4 + 4 * i) for i in range(3)]
    ranges += [(stream + 15, stream + 17), (text.index("Assistant"), len(text))]
    assert written.learn_ranges == tuple(ranges)
    # 0.85598 s to 2.20377 s and 2.204 s to 4.61153 s at 2 fps.
    assert [frame_range(one, 2.0) for one in (first, second)] == [range(2, 6), range(5, 11)]
    assert (first.id, first.video) == (f"{tiny.COVID}/0", EGO)
    assert first.target == {"labels": ["Unbox package."]}
    assert second.turns[-1].text == "Read the instructions."  # as the class is written
    assert labels == ("Read the instructions.", "Stir the mixture.", "Unbox package.")
    assert source.report.kept == 3
    assert source.report.dropped == {"not a class": 1}
    assert source.report.kept + source.report.dropped.total() == tiny.SEGMENTS


def test_a_segment_shorter_than_a_frame_shows_one(tmp_path):
    (record,) = read(source_of(tmp_path))[0]["validation"]
    assert frame_range(record, 2.0) == range(1, 2)
    assert rendered(record).text.endswith("\n[<v>]\nAssistant: Stir the mixture.</s>")
    assert record.video == "cmu_bike14_4/frame_aligned_videos/downscaled/448/aria01_214-1"


def test_version_1_with_other_numbers_gives_no_wrong_class(tmp_path):
    takes = tiny.train()
    takes[tiny.COVID]["segments"][0]["step_unique_id"] = 824
    source = source_of(tmp_path, takes)
    assert [one.id for one in read(source)[0]["train"]] == [f"{tiny.COVID}/1"]
    assert source.report.dropped == {"another name": 1, "not a class": 1}
    assert (
        "expected 'Read the instructions', the class 824, found 'Unbox package'"
        in (source.report.examples["another name"][0])
    )


@pytest.mark.parametrize(
    ("frames", "reason"),
    [
        ({}, "unknown video"),
        ({"georgiatech_covid_07_6/cam01": 12}, "unknown video"),
        ({"georgiatech_covid_07/aria02_214-1": 12}, "unknown video"),
        ({EGO: 12, EGO.replace("downscaled/448/", ""): 12}, "ambiguous video"),
        ({EGO: 0}, "no frames"),
    ],
)
def test_the_ego_video_of_a_take_is_found_or_its_segments_are_counted(tmp_path, frames, reason):
    frames = frames | {"cmu_bike14_4/aria01_214-1": 9}
    source = source_of(tmp_path, videos=Videos(2.0, frames))
    records = read(source)[0]
    assert [len(records[split]) for split in ("train", "validation")] == [0, 1]
    assert source.report.dropped == {reason: 3}


def test_a_folder_that_comes_twice_in_a_name_is_no_second_video(tmp_path):
    videos = Videos(2.0, {"georgiatech_covid_07_6/georgiatech_covid_07_6/aria02_214-1": 12})
    assert len(read(source_of(tmp_path, videos=videos))[0]["train"]) == 2


def test_a_take_of_both_splits_is_learnt_from_and_not_judged(tmp_path):
    takes = tiny.train() | tiny.VALIDATION
    source = source_of(tmp_path, takes)
    records = read(source)[0]
    assert [len(records[split]) for split in ("train", "validation")] == [3, 0]
    assert source.report.dropped["duplicate id"] == 1


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("start_time", ..., "missing field"),
        ("start_time", "0.8", "wrong type"),
        ("start_time", -0.5, "bad time"),
        ("start_time", 3.0, "unordered times"),
        ("end_time", math.nan, "bad time"),
        ("end_time", 10**400, "bad time"),
        ("end_time", 0.5, "unordered times"),
        ("step_unique_id", "843", "wrong type"),
        ("step_unique_id", True, "wrong type"),
        ("step_unique_id", 1, "not a class"),
        ("step_name", "", "empty text"),
        ("step_name", None, "wrong type"),
        ("step_name", "Pack the box", "another name"),
    ],
)
def test_bad_segments_are_counted_with_their_name(tmp_path, field, value, reason):
    takes = tiny.train()
    del takes[tiny.COVID]["segments"][2]
    segment = takes[tiny.COVID]["segments"][0]
    if value is ...:
        del segment[field]
    else:
        segment[field] = value
    source = source_of(tmp_path, takes)
    assert [one.id for one in read(source)[0]["train"]] == [f"{tiny.COVID}/1"]
    assert source.report.dropped == {reason: 1}
    where = f"keystep_train.json: {tiny.COVID}: segment 0"
    assert source.report.examples[reason][0].startswith(where)


@pytest.mark.parametrize(
    ("take", "reason", "count"),
    [
        (None, "not an object", 1),
        ({"take_name": "georgiatech_covid_07_6"}, "missing field", 1),
        ({"take_name": "georgiatech_covid_07_6", "segments": {}}, "wrong type", 1),
        ({"segments": [None, None]}, "missing field", 2),
        ({"take_name": 3, "segments": [{}, {}]}, "wrong type", 2),
        ({"take_name": "georgiatech_covid_07_6", "segments": [None, 1]}, "not an object", 2),
        ({"take_name": "georgiatech_covid_07_6", "segments": []}, "none", 0),
    ],
)
def test_bad_takes_are_counted(tmp_path, take, reason, count):
    source = source_of(tmp_path, {tiny.COVID: take})
    assert not read(source)[0]["train"]
    assert source.report.dropped == ({reason: count} if count else {})


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("keystep_train.json", None, "no such file; download it: egoexo"),
        ("keystep_val.json", None, "no such file; download it: egoexo"),
        ("keystep_train.json", b'{"annotations": [', "keystep_train.json"),
        ("keystep_train.json", b"{}", "field 'annotations'"),
        ("keystep_train.json", b"\xff", "keystep_train.json"),
        ("keystep_benchmark/label_mapping.csv", None, "no such file; download it: egoexo"),
        ("keystep_benchmark/label_mapping.csv", b"a,b\n1,2\n", "found KeyError"),
        ("keystep_benchmark/label_mapping.csv", b"label_id,step_unique_id,step_name\n", "none"),
        ("keystep_benchmark/label_mapping.csv", b"step_unique_id,step_name\nx,y\n", "'x'"),
        ("keystep_benchmark/label_mapping.csv", b"step_unique_id,step_name\n1\n", "found"),
        ("keystep_benchmark/label_mapping.csv", b"step_unique_id,step_name\n1,\n", "no name"),
        ("keystep_benchmark/label_mapping.csv", b"step_unique_id,step_name\n1,a\n1,b\n", "twice"),
        ("keystep_benchmark/label_mapping.csv", b"step_unique_id,step_name\n1,\xff\n", "Unicode"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(tmp_path, file, content, words):
    source = source_of(tmp_path)
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        read(source)
    assert file in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_page_shows_the_question_that_is_asked():
    assert f"User: {QUESTION}\n" in KEYSTEP.page
    assert KEYSTEP.page.startswith("# egoexo4d_keystep\n")
