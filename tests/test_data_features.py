"""The feature store: exact round trip, expectations, and nothing left of a write that failed."""

import dataclasses
import pickle

import numpy as np
import pytest

from videollm_mod_jax.data.features import FeatureMeta, FeatureSource, FeatureWriter
from videollm_mod_jax.errors import UserError

META = FeatureMeta(features_per_frame=3, width=4, fps=2.0, resolution=48, tower="abc")


def features(i):
    return np.random.default_rng(i).standard_normal((i + 1, 3, 4)).astype(np.float32)


def write(path, count=5):
    with FeatureWriter(path, META) as writer:
        for i in range(count):
            writer.add(f"vidéo {i}", features(i))


def test_round_trip_in_any_order(tmp_path):
    write(tmp_path / "f")
    source = FeatureSource(tmp_path / "f", **dataclasses.asdict(META))
    assert len(source) == 5
    assert source.meta == META
    for one in (source, pickle.loads(pickle.dumps(source))):
        for i in (3, 0, 4, 3):
            video_id, read = one.read(i)
            assert video_id == f"vidéo {i}"
            assert read.dtype == np.float16
            np.testing.assert_array_equal(read, features(i).astype(np.float16))
            np.testing.assert_array_equal(one[i], read)


@pytest.mark.parametrize("field", ["features_per_frame", "width", "fps", "resolution", "tower"])
def test_a_field_that_is_not_as_expected_is_named(tmp_path, field):
    write(tmp_path / "f", 1)
    other = "other" if field == "tower" else 7
    expected = dataclasses.asdict(META) | {field: other}
    found = getattr(META, field)
    with pytest.raises(
        UserError, match=f"meta.json: field '{field}': expected {other}, found {found}"
    ):
        FeatureSource(tmp_path / "f", **expected)


def write_and_stop(path):
    with FeatureWriter(path, META) as writer:
        writer.add("a", features(0))
        raise KeyboardInterrupt


def test_an_interrupted_write_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write_and_stop(tmp_path / "f")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="f: not a feature store"):
        FeatureSource(tmp_path / "f")


def test_bad_features_are_named_and_leave_nothing(tmp_path):
    nan = features(0)
    nan[0, 0, 0] = np.nan
    for bad, words in [
        (np.zeros((2, 2, 4)), r"v7: expected features \(frames, 3, 4\), found \(2, 2, 4\)"),
        (features(0) + 1e6, "v7: features are not finite in float16"),
        (nan, "v7: features are not finite in float16"),
    ]:
        with pytest.raises(UserError, match=words), FeatureWriter(tmp_path / "f", META) as writer:
            writer.add("v7", bad)
        assert list(tmp_path.iterdir()) == []


def test_an_existing_store_is_not_overwritten(tmp_path):
    write(tmp_path / "f")
    with pytest.raises(UserError, match="f: exists already"):
        FeatureWriter(tmp_path / "f", META)
    (tmp_path / "f" / "meta.json").write_text("{")
    with pytest.raises(UserError, match="f: not a feature store"):
        FeatureSource(tmp_path / "f")
