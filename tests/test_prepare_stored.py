"""Prepared datasets: records come back exactly and in order, and a failed run leaves nothing."""

import dataclasses
import itertools
import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import given, settings
from hypothesis import strategies as st

from videollm_mod_jax import encode
from videollm_mod_jax.data.annotations import (
    Dataset,
    Parsed,
    Record,
    Report,
    Source,
    Turn,
    Videos,
    frame_range,
)
from videollm_mod_jax.data.builders import stored
from videollm_mod_jax.errors import UserError

VIDEOS = Videos(30.0, {"küche/1": 400_000, "b": 90})
RECORDS = (
    Record(
        id="küche/1",
        video="küche/1",
        # In float32, 5400.1 s at 30 fps is a frame later.
        start=5400.1,
        stop=5410.123456789012,
        turns=(
            Turn("user", 5401.7, "Wieviele Eier?\nGenau, bitte."),
            Turn("assistant", 5401.7 + 1e-9, "Zwei 🥚🥚.", learn=False),
            Turn("assistant", 5403.0, "Fertig."),
        ),
        target={"labels": ["zwei", None], "score": 0.1, "deep": {"a": [1, []]}},
    ),
    Record(id="b", video="b", start=0.0, stop=3.0, stride=7, turns=()),
    Record(id="c", video="b", start=1 / 3, stop=2 / 3, turns=(Turn("user", 0.5, "?"),)),
)


def dataset(name="toy", labels=(), **splits):
    return Dataset(
        name=name,
        page="A toy.",
        read=lambda source: Parsed({split: iter(splits[split]) for split in splits}, labels),
        benchmark="stream",
    )


def source(directory, videos=VIDEOS):
    return Source(Path(directory), videos, 500, Report())


def write(directory, **splits):
    return stored.write_dataset(dataset(**splits), source(directory), directory / "out")


def test_records_come_back_exactly_and_in_order(tmp_path):
    opened = stored.open_dataset(write(tmp_path, train=RECORDS, validation=RECORDS[1:]))
    assert tuple(opened.records("train")) == RECORDS
    assert tuple(opened.records("validation")) == RECORDS[1:]
    assert opened.records("train")[-1] == RECORDS[-1]


def test_many_records_keep_their_order(tmp_path):
    many = [dataclasses.replace(RECORDS[1], id=f"{number}") for number in range(60)]
    assert list(stored.open_dataset(write(tmp_path, train=many)).records("train")) == many


def test_times_keep_the_frames_that_float32_would_move(tmp_path):
    read = stored.open_dataset(write(tmp_path, train=RECORDS)).records("train")[0]
    rounded = dataclasses.replace(RECORDS[0], start=float(np.float32(RECORDS[0].start)))
    assert frame_range(rounded, 30.0) != frame_range(RECORDS[0], 30.0)
    assert frame_range(read, 30.0) == frame_range(RECORDS[0], 30.0) == range(162003, 162304)


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.floats(0, 1e9), min_size=3, max_size=8).map(sorted),
    st.text(st.characters(exclude_categories=["Cs"])),
    st.booleans(),
)
def test_any_time_and_text_survive_storage(times, text, learn):
    turns = tuple(Turn("assistant", time, text, learn) for time in times[1:-1])
    record = Record(id=text, video=text, start=times[0], stop=times[-1], turns=turns)
    features = tfds.features.FeaturesDict(stored._FEATURES)
    serialised = features.serialize_example(stored._example(record))
    assert stored._record(features.deserialize_example_np(serialised)) == record


def test_records_are_read_by_other_processes(tmp_path):
    records = stored.open_dataset(write(tmp_path, train=RECORDS)).records("train")
    assert list(pickle.loads(pickle.dumps(records))) == list(RECORDS)


def test_there_are_no_records_behind_the_last(tmp_path):
    records = stored.open_dataset(write(tmp_path, train=RECORDS)).records("train")
    assert len(records) == 3
    for index in (3, -4):
        with pytest.raises(IndexError):
            records[index]


def test_what_the_records_share_is_kept(tmp_path):
    where = source(tmp_path)
    where.report.keep(3)
    where.report.drop("bad time", "f.json: r", "expected 1, found \ud800")
    toy = dataset(labels=("a", "b"), train=RECORDS, validation=RECORDS[:1], test=())
    path = stored.write_dataset(toy, where, tmp_path / "out")
    opened = stored.open_dataset(path)
    assert path == tmp_path / "out" / "toy" == opened.directory
    assert [inside.name for inside in path.iterdir()] == ["1.0.0"]
    assert (opened.name, opened.benchmark, opened.labels) == ("toy", "stream", ("a", "b"))
    assert (opened.fps, opened.max_frames) == (30.0, 500)
    # 5400.1 to 5410.12 s at 30 fps, every seventh of 90 frames, and frames 10 to 19.
    assert opened.splits == {
        "train": stored.Split(records=3, videos=2, frames=301 + 13 + 10, turns=4),
        "validation": stored.Split(records=1, videos=1, frames=301, turns=3),
    }
    assert opened.videos("train") == ("küche/1", "b")
    assert opened.videos("validation") == ("küche/1",)
    report = json.loads((path / "1.0.0" / "dataset.json").read_text())["report"]
    assert report["kept"] == 3
    assert report["dropped"] == {"bad time": 1}
    assert report["examples"] == {"bad time": ["f.json: r: expected 1, found \\ud800"]}


def test_tfds_finds_it_by_name(tmp_path):
    write(tmp_path, train=RECORDS)
    first = tfds.data_source("toy", data_dir=tmp_path / "out", split="train")[0]
    assert first["video"].decode() == "küche/1"
    assert first["turns"]["text"][2] == b"Fertig."


def test_checking_counts_the_same_and_writes_nothing(tmp_path):
    toy = dataset(train=RECORDS, test=())
    splits = stored.check_dataset(toy, source(tmp_path))
    assert not list(tmp_path.iterdir())
    path = stored.write_dataset(dataset(train=RECORDS), source(tmp_path), tmp_path)
    assert splits == stored.open_dataset(path).splits


def test_a_dataset_is_never_overwritten(tmp_path):
    path = write(tmp_path, train=RECORDS)
    for other in (
        {"train": RECORDS[:1]},
        {"train": RECORDS, "test": RECORDS},
        {"train": RECORDS[::-1]},
        {"train": (*RECORDS[:2], dataclasses.replace(RECORDS[2], target="other"))},
    ):
        with pytest.raises(UserError, match="toy: exists already, made of other records; remove"):
            write(tmp_path, **other)
    assert len(stored.open_dataset(path).records("train")) == 3
    (path / "1.0.0" / "dataset.json").write_text("{}")
    with pytest.raises(UserError, match="toy: exists already, and holds no prepared dataset"):
        write(tmp_path, train=RECORDS)


def test_the_same_records_are_not_written_again(tmp_path):
    path = write(tmp_path, train=RECORDS)
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*")}
    assert write(tmp_path, train=RECORDS) == path
    assert {file: file.stat().st_mtime_ns for file in path.rglob("*")} == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, UserError("f.json: damaged")])
def test_an_interrupted_run_leaves_nothing_and_the_next_one_works(tmp_path, error):
    def interrupted():
        yield RECORDS[0]
        raise error

    with pytest.raises(error if isinstance(error, type) else type(error)) as caught:
        write(tmp_path, train=interrupted())
    assert error in (caught.type, caught.value)
    assert not list((tmp_path / "out").iterdir())
    assert len(stored.open_dataset(write(tmp_path, train=RECORDS)).records("train")) == 3


def endless():
    for number in itertools.count():
        yield dataclasses.replace(RECORDS[1], id=str(number))


def test_a_killed_run_leaves_no_dataset_and_the_next_one_works(tmp_path):
    code = (
        "import pathlib, sys; from tests import test_prepare_stored as t; "
        "t.write(pathlib.Path(sys.argv[1]), train=t.endless())"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, os.fspath(tmp_path)],
        cwd=Path(__file__).parent.parent,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("out/.toy.*.partial/tfds/toy/*")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    with pytest.raises(UserError, match="expected a prepared dataset, found none"):
        stored.open_dataset(tmp_path / "out" / "toy")
    assert len(stored.open_dataset(write(tmp_path, train=RECORDS)).records("train")) == 3


def test_nothing_to_write_says_what_was_dropped(tmp_path):
    where = source(tmp_path)
    with pytest.raises(UserError, match="no annotation of toy can be used; there is none"):
        stored.write_dataset(dataset(train=()), where, tmp_path / "out")
    for number in range(3):
        where.report.drop("unknown video", f"f.json: annotation {number}", "found 'x'")
    where.report.drop("bad time", "f.json: annotation 3")
    message = "no annotation of toy can be used; 4 were dropped, 3 of them for 'unknown video'$"
    with pytest.raises(UserError, match=message):
        stored.write_dataset(dataset(train=()), where, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def changed(**changes):
    return dataclasses.replace(RECORDS[0], **changes)


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([changed(video="nope")], "expected frames among the 0 of 'nope'"),
        ([changed(stop=1e6)], "expected frames among the 400000"),
        ([changed(stop=5400.1, turns=())], "expected frames among"),
        ([changed(turns=RECORDS[0].turns[::-1])], "turn 1: field 'time': expected at least"),
        ([changed(turns=(Turn("assistant", 5403.0, "a <v>"),))], "1: turn 0: expected no '<v>'"),
        ([changed(turns=(Turn("assistant", 5403.0, "\ud800"),))], "1: turn 0: expected no half"),
        ([changed(id="\ud800")], "^'.ud800': expected no half of a surrogate pair"),
        ([changed(turns=(Turn("assistant", 5403.0, " "),))], "expected an annotation"),
        (RECORDS + RECORDS[:1], "expected one record of this name, found two"),
    ],
)
def test_records_that_training_would_trip_over_are_refused(tmp_path, records, message):
    with pytest.raises(UserError, match=message):
        write(tmp_path, train=records)
    assert not list((tmp_path / "out").iterdir())


def test_an_unknown_split_is_named_with_the_known_ones(tmp_path):
    opened = stored.open_dataset(write(tmp_path, train=RECORDS, test=RECORDS))
    for get in (opened.records, opened.videos):
        with pytest.raises(UserError, match="the split is 'val'; expected one of train, test"):
            get("val")


def cut_shard(path):
    (shard,) = path.glob("1.0.0/*.array_record*")
    shard.write_bytes(shard.read_bytes()[:-100])


DAMAGE = {
    "no directory": lambda path: path.rename(path.with_name("gone")),
    "no json": lambda path: (path / "1.0.0" / "dataset.json").unlink(),
    "cut json": lambda path: (path / "1.0.0" / "dataset.json").write_text('{"name": '),
    "wrong json": lambda path: (path / "1.0.0" / "dataset.json").write_text("{}"),
    "list for json": lambda path: (path / "1.0.0" / "dataset.json").write_text("[]"),
    "no tfds info": lambda path: (path / "1.0.0" / "dataset_info.json").unlink(),
    "no features": lambda path: (path / "1.0.0" / "features.json").unlink(),
    "no shard": lambda path: next(path.glob("1.0.0/*.array_record*")).unlink(),
    "cut shard": cut_shard,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_dataset_is_one_line_that_says_what_to_do(tmp_path, damage):
    path = write(tmp_path, train=RECORDS)
    DAMAGE[damage](path)
    with pytest.raises(UserError, match="prepare it") as caught:
        list(stored.open_dataset(path).records("train"))
    assert "\n" not in str(caught.value)
    assert os.fspath(path) in str(caught.value)


def name_class(path, name):
    features = path / "1.0.0" / "features.json"
    features.write_text(features.read_text().replace(f"{tfds.features.Text.__module__}.Text", name))


def encode_opens(path):
    encode._open("toy", path.parent, "train")


@pytest.mark.parametrize("opens", [stored.open_dataset, encode_opens])
def test_a_dataset_runs_no_code(tmp_path, monkeypatch, opens):
    """TFDS would import the class from the current directory."""
    path = write(tmp_path, train=RECORDS)
    (tmp_path / "evilmodule.py").write_text("import pathlib; pathlib.Path('ran').touch()")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    name_class(path, "evilmodule.Text")
    with pytest.raises(UserError, match=r"features\.json names the Python class 'evilmodule.Text'"):
        opens(path)
    assert not (tmp_path / "ran").exists()


def test_a_dataset_of_other_features_is_not_ours(tmp_path):
    path = write(tmp_path, train=RECORDS)
    name_class(path, f"{tfds.features.Tensor.__module__}.Tensor")
    with pytest.raises(UserError, match="describes other records than ours; remove it and prepare"):
        stored.open_dataset(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "../toy"}, "name is '../toy'; expected a name of 1 to"),
        ({"fileFormat": "tfrecord"}, "fileFormat is 'tfrecord'; expected 'array_record'"),
        ({"splits": {"train": 1}}, "splits is {'train': 1}; expected a list of tables"),
        ({"splits": [{"name": "../../x"}]}, r"name of a split is '../../x'"),
        ({"filepathTemplate": "../{SPLIT}"}, r"filepathTemplate is '\.\./{SPLIT}'; expected {DATA"),
        ({"shardLengths": ["-1"]}, r"shardLengths is \['-1'\]; expected numbers of records"),
        ({"shardLengths": ["1"] * 3}, "00000-of-00003 is missing, of the 3 shards"),
    ],
)
def test_shards_are_files_of_the_dataset_itself(tmp_path, change, message):
    path = write(tmp_path, train=RECORDS)
    file = path / "1.0.0" / "dataset_info.json"
    info = json.loads(file.read_text())
    (info if change.keys() <= info.keys() else info["splits"][0]).update(change)
    file.write_text(json.dumps(info))
    with pytest.raises(UserError, match=message):
        stored.open_dataset(path)
