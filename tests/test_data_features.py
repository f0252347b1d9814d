"""The feature store: exact reads of any frames, expectations, nothing left of a failed write."""

import dataclasses
import json
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from videollm_mod_jax.data.feature_index import FeatureIndex, FeatureMeta
from videollm_mod_jax.data.feature_shards import (
    FRAMES_PER_RECORD,
    ShardWriter,
    join_shards,
    read_shard_index,
    shard_name,
)
from videollm_mod_jax.data.features import FeatureSource, FeatureWriter
from videollm_mod_jax.errors import UserError

META = FeatureMeta(features_per_frame=3, width=4, fps=2.0, resolution=48, tower="abc")


def features(seed, frames):
    return np.random.default_rng(seed).standard_normal((frames, 3, 4)).astype(np.float32)


VIDEOS = {
    "vidéo 0": features(0, 1),
    "a/b": features(1, 2 * FRAMES_PER_RECORD),
    "c": features(2, 2 * FRAMES_PER_RECORD + 1),
    "d": features(3, 17),
}


def write(path, videos=VIDEOS):
    with FeatureWriter(path, META) as writer:
        for name, features_FNW in videos.items():
            writer.add(name, features_FNW)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("store") / "f"
    write(path)
    return FeatureSource(path, **dataclasses.asdict(META))


def test_round_trip_in_any_order(source):
    assert source.meta == META
    for one in (source, pickle.loads(pickle.dumps(source))):
        assert one.videos.fps == 2.0
        assert one.videos.frames == {name: len(whole) for name, whole in VIDEOS.items()}
        for name in ("c", "vidéo 0", "d", "a/b", "c"):
            assert name in one
            read = one.read(name)
            assert read.dtype == np.float16
            np.testing.assert_array_equal(read, VIDEOS[name].astype(np.float16))
    assert "e" not in source


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_reading_some_frames_is_slicing_the_whole(source, data):
    name = data.draw(st.sampled_from(sorted(VIDEOS)))
    whole = VIDEOS[name].astype(np.float16)
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.one_of(st.none(), st.integers(start, len(whole))))
    stride = data.draw(st.integers(1, len(whole) + 1))
    read = source.read(name, start, stop, stride)
    np.testing.assert_array_equal(read, whole[start:stop:stride])


def test_only_the_records_of_the_frames_are_read(source, monkeypatch):
    read = []
    records = source._records
    monkeypatch.setattr(
        type(records), "__getitem__", lambda self, i: read.append(i) or b"\0" * 24 * 128
    )
    source.read("c", FRAMES_PER_RECORD, FRAMES_PER_RECORD + 1)
    # vidéo 0 has record 0, a/b 1 and 2, c 3 to 5.
    assert read == [4]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (("e",), "f: e: no such video was encoded"),
        (("d", -1), "f: d: expected frames of 0 ... 17, found -1 ... 17 by 1"),
        (("d", 3, 18), "f: d: expected frames of 0 ... 17, found 3 ... 18 by 1"),
        (("d", 3, 2), "f: d: expected frames of 0 ... 17, found 3 ... 2 by 1"),
        (("d", 3, 5, 0), "f: d: expected frames of 0 ... 17, found 3 ... 5 by 0"),
    ],
)
def test_frames_that_are_not_there_are_named(source, asked, words):
    with pytest.raises(UserError, match=words):
        source.read(*asked)


@pytest.mark.parametrize("field", ["features_per_frame", "width", "fps", "resolution", "tower"])
def test_a_field_that_is_not_as_expected_is_named(source, field):
    other = "other" if field == "tower" else 7
    expected = dataclasses.asdict(META) | {field: other}
    found = getattr(META, field)
    with pytest.raises(
        UserError, match=f"meta.json: field '{field}': expected {other}, found {found}"
    ):
        FeatureSource(source.path, **expected)


def test_the_drawn_index(tmp_path):
    shards = [shard_name(i, 2) for i in range(2)]
    with ShardWriter(tmp_path / shards[0], META) as shard:
        for name, frames in (("a", 300), ("b", 20)):
            shard.append(name, features(0, frames))
            shard.end(name)
    with ShardWriter(tmp_path / shards[1], META) as shard:
        shard.append("c", features(1, 130))
        shard.end("c")
        shard.fail("d", "cannot read the video")
    index = join_shards(tmp_path, shards)
    assert index == FeatureIndex(
        frames_per_record=128,
        shards={shards[0]: 4, shards[1]: 2},
        record={"a": 0, "b": 3, "c": 4},
        frames={"a": 300, "b": 20, "c": 130},
        bad={"d": "cannot read the video"},
    )
    index.write(tmp_path, META)
    written = json.loads((tmp_path / "index.json").read_text())
    assert len(written.pop("sha256")) == 64
    assert written == {
        "frames_per_record": 128,
        "shards": {
            "features-00000-of-00002.array_record": 4,
            "features-00001-of-00002.array_record": 2,
        },
        "videos": {"name": ["a", "b", "c"], "record": [0, 3, 4], "frames": [300, 20, 130]},
        "bad": {"d": "cannot read the video"},
    }
    assert sorted(p.name for p in tmp_path.iterdir()) == [*shards, "index.json", "meta.json"]
    source = FeatureSource(tmp_path)
    np.testing.assert_array_equal(source.read("c", 125), features(1, 130)[125:].astype(np.float16))
    assert source.bad == {"d": "cannot read the video"}
    with pytest.raises(UserError, match="d: cannot read the video"):
        source.read("d")


def test_the_beginning_of_a_bad_video_is_nobodys(tmp_path):
    name = shard_name(0, 1)
    with ShardWriter(tmp_path / name, META) as shard:
        shard.append("a", features(0, FRAMES_PER_RECORD + 5))
        shard.fail("a", "the rest is damaged")
        for part in np.split(VIDEOS["c"], [1, 100, 200]):
            shard.append("c", part)
        shard.end("c")
    join_shards(tmp_path, [name]).write(tmp_path, META)
    source = FeatureSource(tmp_path)
    assert source.videos.frames == {"c": len(VIDEOS["c"])}
    np.testing.assert_array_equal(source.read("c"), VIDEOS["c"].astype(np.float16))


def test_two_shards_may_not_hold_one_name(tmp_path):
    shards = [shard_name(i, 2) for i in range(2)]
    for name in shards:
        with ShardWriter(tmp_path / name, META) as shard:
            shard.append("a", features(0, 2))
            shard.end("a")
    with pytest.raises(UserError, match="a: two videos have this name"):
        join_shards(tmp_path, shards)


def write_and_stop(path):
    with FeatureWriter(path, META) as writer:
        writer.add("a", features(0, 2))
        raise KeyboardInterrupt


def test_an_interrupted_write_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write_and_stop(tmp_path / "f")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="f: not a feature store"):
        FeatureSource(tmp_path / "f")


def test_bad_features_are_named_and_leave_nothing(tmp_path):
    nan = features(0, 2)
    nan[0, 0, 0] = np.nan
    for bad, words in [
        (np.zeros((2, 2, 4)), r"v7: expected features \(frames, 3, 4\), found \(2, 2, 4\)"),
        (np.zeros((0, 3, 4)), "v7: the video has no frames"),
        (features(0, 2) + 1e6, "v7: features are not finite in float16"),
        (nan, "v7: features are not finite in float16"),
    ]:
        with pytest.raises(UserError, match=words), FeatureWriter(tmp_path / "f", META) as writer:
            writer.add("v7", bad)
        assert list(tmp_path.iterdir()) == []


def test_a_store_that_is_not_whole_is_refused(tmp_path):
    write(tmp_path / "f")
    with pytest.raises(UserError, match="f: exists already"):
        FeatureWriter(tmp_path / "f", META)
    (tmp_path / "f" / shard_name(0, 1)).rename(tmp_path / "away")
    with pytest.raises(UserError, match=f"{shard_name(0, 1)} is missing"):
        FeatureSource(tmp_path / "f")
    write(tmp_path / "g")
    (tmp_path / "g" / "index.json").write_text("{")
    with pytest.raises(UserError, match=r"g/index\.json is not json"):
        FeatureSource(tmp_path / "g")
    (tmp_path / "g" / "index.json").unlink()
    with pytest.raises(UserError, match="g: not a feature store"):
        FeatureSource(tmp_path / "g")


def changes(value):
    """Copies of a json value with one part changed, or left out."""
    if isinstance(value, dict):
        for key in value:
            yield {k: v for k, v in value.items() if k != key}
            yield {f"{k} again" if k == key else k: v for k, v in value.items()}
            yield from ({**value, key: changed} for changed in changes(value[key]))
    elif isinstance(value, list):
        for i in range(len(value)):
            yield value[:i] + value[i + 1 :]
            yield [*value[:i], value[i - 1], *value[i + 1 :]]
            yield from ([*value[:i], changed, *value[i + 1 :]] for changed in changes(value[i]))
    else:
        yield from (None, [], {}, "other", True, 0, -1, 0.5, 1, 2, 10**9, 10**30)


@pytest.mark.parametrize("file", ["meta.json", "index.json"])
def test_no_change_of_an_index_gives_other_features(tmp_path, file):
    write(tmp_path / "f")
    path = tmp_path / "f" / file
    whole = json.loads(path.read_text())
    # Stores of older versions have no checksum: their shards are asked.
    without = {name: value for name, value in whole.items() if name != "sha256"}
    tried = 0
    for stored in (whole, without) if file == "index.json" else (whole,):
        for changed in changes(stored):
            path.write_text(json.dumps(changed))
            tried += 1
            if json.dumps(changed) in (json.dumps(whole), json.dumps(without)):
                source = FeatureSource(tmp_path / "f")
                for name, features_FNW in VIDEOS.items():
                    np.testing.assert_array_equal(source.read(name), features_FNW.astype("f2"))
            else:
                with pytest.raises(UserError) as caught:
                    FeatureSource(tmp_path / "f")
                assert str(tmp_path / "f") in str(caught.value)
    assert tried > 50


def test_no_size_that_an_index_names_is_allocated(tmp_path):
    write(tmp_path / "f")
    path = tmp_path / "f" / "index.json"
    index = json.loads(path.read_text())
    del index["sha256"]
    index["videos"]["frames"][0] = 10**9
    path.write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"index.json has 1,000,000,530 frames of 24 bytes, and "):
        FeatureSource(tmp_path / "f")


def test_damage_is_named(tmp_path):
    write(tmp_path / "f")
    shard = tmp_path / "f" / shard_name(0, 1)
    data = shard.read_bytes()
    for damaged in (data[: len(data) // 2], data[:9000] + b"\0" * 5000 + data[14000:]):
        shard.write_bytes(damaged)
        source = FeatureSource(tmp_path / "f")
        with pytest.raises(UserError, match="f: c: the stored features are damaged") as caught:
            source.read("c")
        assert "\n" not in str(caught.value)
    shard.write_bytes(b"")
    with pytest.raises(UserError, match="frames of 24 bytes, and its shards have 0 bytes"):
        FeatureSource(tmp_path / "f")
    with pytest.raises(UserError, match="array_record is damaged"):
        read_shard_index(shard)


FULL = """
import resource, signal, sys
import numpy as np
from videollm_mod_jax.data.feature_index import FeatureMeta
from videollm_mod_jax.data.features import FeatureWriter

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    with FeatureWriter(sys.argv[1], FeatureMeta(3, 4, 2.0, 48, "abc")) as writer:
        writer.add("a", np.zeros((9999, 3, 4)))
except ValueError as error:
    print(error)
"""


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    command = [sys.executable, "-c", FULL, tmp_path / "f"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert re.search(r"array_record cannot be written: .*File too large.*\n", done.stdout)
    assert done.stdout.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_bfloat16_is_stored_exactly():
    """Every bfloat16 of a size that features have survives float16; see feature_shards."""
    bits = np.arange(2**16, dtype=np.uint32) << 16
    values = bits.view(np.float32)
    fits = (np.abs(values) >= 2**-14) & (np.abs(values) < 65504)
    assert fits.sum() > 7000
    np.testing.assert_array_equal(values[fits].astype(np.float16).astype(np.float32), values[fits])
