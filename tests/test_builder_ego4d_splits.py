"""No video that any benchmark validates or tests on is trained on; nothing is guessed."""

import pytest

from tests.tiny_ego4d import write, write_benchmarks
from videollm_mod_jax.data.builders.ego4d_splits import BENCHMARKS, LISTS, read_splits
from videollm_mod_jax.errors import UserError


@pytest.fixture
def directory(tmp_path):
    write_benchmarks(tmp_path)
    return tmp_path


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_every_benchmark_holds_its_videos_out(directory, benchmark):
    key = BENCHMARKS[benchmark]
    write(directory / f"{benchmark}_val.json", {key: [{"video_uid": "x"}, {"video_uid": "both"}]})
    write(
        directory / f"{benchmark}_test_unannotated.json",
        {"split": "test", key: [{"video_uid": "y"}, {"video_uid": "both"}]},
    )
    splits = read_splits(directory)
    found = [splits.of(video) for video in ("x", "y", "both", "z")]
    assert found == ["validation", "test", "validation", "train"]


def test_one_missing_file_is_an_error_that_tells_both_ways_out(directory):
    (directory / "av_val.json").unlink()
    with pytest.raises(UserError) as error:
        read_splits(directory)
    assert ": av_val.json missing;" in str(error.value)
    assert "narration_stream_video_uids_train.json" in str(error.value)


def test_lists_are_the_rule_where_they_exist(directory):
    write(directory / LISTS["train"], ["a", "b"])
    splits = read_splits(directory)
    assert [splits.of(video) for video in ("a", "b", "c")] == ["train", "train", None]
    write(directory / LISTS["validation"], ["c"])
    write(directory / LISTS["test"], ["d"])
    splits = read_splits(directory)
    assert [splits.of(video) for video in "acd"] == ["train", "validation", "test"]


def test_a_video_in_two_lists_is_an_error(directory):
    write(directory / LISTS["train"], ["a"])
    write(directory / LISTS["test"], ["b", "a"])
    with pytest.raises(UserError, match=r"uids_test\.json: video 'a' is also in .*uids_train"):
        read_splits(directory)


@pytest.mark.parametrize("value", [{"a": 1}, ["a", 1], "a"])
def test_a_list_of_something_else_is_an_error(directory, value):
    write(directory / LISTS["train"], value)
    with pytest.raises(
        UserError, match=r"uids_train\.json: .*expected (an array of video|\[, found)"
    ):
        read_splits(directory)


def test_a_benchmark_entry_without_a_video_is_an_error(directory):
    write(directory / "vq_val.json", {"videos": [{"video_uid": "x"}, {"video": "y"}]})
    with pytest.raises(UserError, match=r"vq_val\.json: videos: entry 1: field 'video_uid'"):
        read_splits(directory)


def test_videos_of_a_group_are_held_out_one_by_one(directory):
    write(directory / "goalstep_val.json", {"videos": [{"video_uid": "grp-x"}]})
    table = directory / "goalstep_video_groups.tsv"
    with pytest.raises(UserError, match=r"grp-x is a group of videos, and .*groups\.tsv cannot"):
        read_splits(directory)
    table.write_text("university\tvideo_group\nu\t['y', 'z']\nu\t['x', 'w']\nu\t\n")
    splits = read_splits(directory)
    found = [splits.of(video) for video in "xwyz"]
    assert found == ["validation", "validation", "train", "train"]
    table.write_text("university\tvideo_group\nu\t['y', 'x']\n")
    with pytest.raises(UserError, match="expected a row that begins with x, found none"):
        read_splits(directory)
