"""Folders of videos become features: the tower's, whatever the batches; bad ones are named."""

import json
import os
import re
import signal
import subprocess

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests import tiny_videos
from tests.ended import status_of
from tests.tiny_videos import CONFIG, FRAMES, write_folder, write_model
from videollm_mod_jax import encode
from videollm_mod_jax.data import decoding, video_folder
from videollm_mod_jax.data.feature_index import FeatureMeta
from videollm_mod_jax.data.feature_shards import join_shards, shard_name
from videollm_mod_jax.data.features import FeatureSource
from videollm_mod_jax.data.frame_batches import Batch, Part, VideoError, batched
from videollm_mod_jax.data.video import read_video, write_video
from videollm_mod_jax.encoding import EncodingBar, fingerprint, write_shards
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.models.vision import VisionTower, preprocess
from videollm_mod_jax.training.checkpoint import load_tower


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    write_model(directory)
    return directory


@pytest.fixture
def folder(tmp_path):
    write_folder(tmp_path / "videos")
    return tmp_path / "videos"


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(video_folder, "LEAST_FRAMES", 16)


def run(model, folder, out, *more):
    arguments = ["--checkpoint", model, "--videos", folder, "--out", out, *more]
    return encode.main([str(argument) for argument in arguments])


def test_batches_run_across_videos_as_drawn():
    def frames(letter, count, error=None):
        yield from (np.full((2, 2, 3), ord(letter), np.uint8) for _ in range(count))
        if error:
            raise VideoError(error)

    videos = [("a", frames("a", 3)), ("b", frames("b", 5)), ("c", frames("c", 1))]
    batches = list(batched(iter(videos), batch_size=4, side=2))
    drawn = ["".join(chr(image[0, 0, 0] or ord(".")) for image in b.images_BAAC) for b in batches]
    assert drawn == ["aaab", "bbbb", "c..."]
    assert [batch.parts for batch in batches] == [
        (Part("a", 3, ends=True), Part("b", 1, ends=False)),
        (Part("b", 4, ends=True),),
        (Part("c", 1, ends=True),),
    ]
    assert [batch.last for batch in batches] == [False, False, True]

    bad = [
        ("a", frames("a", 5, "no more")),
        ("b", frames("b", 0, "nothing")),
        ("c", frames("c", 1)),
    ]
    parts = [part for batch in batched(iter(bad), 4, 2) for part in batch.parts]
    assert parts[1:] == [
        Part("a", 1, ends=True, error="no more"),
        Part("b", 0, ends=True, error="nothing"),
        Part("c", 1, ends=True),
    ]


def test_videos_are_divided_as_drawn():
    shards = video_folder.divide([300, 300, 100, 600, 20, 1], frame_bytes=100)
    assert shards == [range(1), range(1, 3), range(3, 4), range(4, 6)]


@given(st.lists(st.integers(1, 10**6), min_size=1), st.integers(1, 10**6))
def test_shards_cover_the_videos_and_are_bounded(frames, frame_bytes):
    shards = video_folder.divide(frames, frame_bytes)
    assert [i for shard in shards for i in shard] == list(range(len(frames)))
    for shard in shards:
        assert len(shard) == 1 or sum(frames[i] for i in shard) * frame_bytes <= 2**29


def test_names_are_paths_without_their_ending(tmp_path):
    for file in ("b.mp4", "a/x.y.JPG", "a/z.MKV", "a/notes.txt", ".b.mp4", ".trash/c.mp4", "a/b"):
        (tmp_path / "videos" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "videos" / file).touch()
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "q.webm").touch()
    (tmp_path / "videos" / "linked").symlink_to(tmp_path / "more")
    found = video_folder.find_videos(tmp_path / "videos")
    assert list(found) == ["a/x.y", "a/z", "b", "linked/q"]
    assert found["a/x.y"] == tmp_path / "videos" / "a" / "x.y.JPG"

    for make, said in (
        (lambda path: path.symlink_to(tmp_path / "gone.mp4"), "a link to nothing"),
        (os.mkfifo, "no file"),
    ):
        odd = tmp_path / "videos" / "odd.mp4"
        make(odd)
        with pytest.raises(UserError, match=rf"odd\.mp4 is {said}; expected a video: remove"):
            video_folder.find_videos(tmp_path / "videos")
        odd.unlink()
    (tmp_path / "videos" / "a" / "z.png").touch()
    with pytest.raises(UserError, match=r"a/z\..* and .*a/z\..*: both are named 'a/z'"):
        video_folder.find_videos(tmp_path / "videos")
    (tmp_path / "more" / "round").symlink_to(tmp_path)
    with pytest.raises(UserError, match="round links to a directory around it"):
        video_folder.find_videos(tmp_path)
    (tmp_path / "empty").mkdir()
    for directory, words in (("empty", "holds no video; .*.mp4"), ("none", "is not a directory")):
        with pytest.raises(UserError, match=words):
            video_folder.find_videos(tmp_path / directory)


@pytest.fixture(scope="module")
def tokens(model):
    """Gives the tokens of the frames of a video, one frame at a time."""
    tower = VisionTower(CONFIG.vision, CONFIG.dtype, CONFIG.param_dtype)
    params = load_tower(model)

    @jax.jit
    def encode_one(image_AAC):
        images_BAAC = preprocess(image_AAC[None], CONFIG.vision)
        return tower.apply({"params": params}, images_BAAC)[0]

    def encode_all(path, fps):
        frames = read_video(path, fps, CONFIG.vision.image_size)
        return np.stack([encode_one(frame.image) for frame in frames])

    return encode_all


@pytest.mark.parametrize("fps", [2.0, 3.0])
def test_features_are_the_towers(model, tokens, folder, tmp_path, small_shards, capsys, fps):
    picture = np.random.default_rng(9).integers(0, 256, (30, 20, 3), np.uint8)
    Image.fromarray(picture).save(folder / "picture.png")
    assert run(model, folder, tmp_path / "out", "--fps", fps, "--workers", 2) == 0
    source = FeatureSource(
        tmp_path / "out",
        features_per_frame=5,
        width=12,
        fps=fps,
        resolution=16,
        tower=fingerprint(CONFIG, load_tower(model)),
    )
    assert list(source.videos.frames) == sorted([*FRAMES, "picture"])
    assert source.videos.frames["picture"] == 1
    if fps == 2.0:
        assert source.videos.frames.items() >= FRAMES.items()
    for name in source.videos.frames:
        path = folder / (f"{name}.png" if name == "picture" else f"{name}.mp4")
        np.testing.assert_allclose(source.read(name), tokens(path, fps), atol=2e-3)
    frames = sum(source.videos.frames.values())
    assert f"out holds 6 videos, {frames} frames" in capsys.readouterr().out
    shards = list((tmp_path / "out").glob("*.array_record"))
    assert len(shards) == len(json.loads((tmp_path / "out" / "sources.json").read_text())["shards"])
    assert len(shards) > 2


def test_bad_videos_are_skipped_and_listed(model, tokens, folder, tmp_path, capfd):
    (folder / "text.mp4").write_text("no video at all")
    (folder / "nothing.jpg").touch()
    noise = np.random.default_rng(0).integers(0, 256, (300, 64, 64, 3), np.uint8)
    write_video(folder / "spoilt.mp4", noise, 2.0)
    data = (folder / "spoilt.mp4").read_bytes()
    middle = data.index(b"mdat") + 2 * len(data) // 3
    (folder / "spoilt.mp4").write_bytes(data[:middle] + b"\xff" * 9999 + data[middle + 9999 :])
    for _ in range(2):  # the second time there is nothing left to do but to say it again
        assert run(model, folder, tmp_path / "out", "--workers", 2) == 1
        said = capfd.readouterr().err.splitlines()
        assert said[-4] == "3 of 8 videos could not be read:"
        assert [line.split(":")[0] for line in said[-3:]] == ["  nothing", "  spoilt", "  text"]
        assert all("cannot read the video: Invalid data" in line for line in said[-3:])
        assert str(folder) not in "".join(said[-3:])
    source = FeatureSource(tmp_path / "out")
    assert source.videos.frames == FRAMES
    assert set(source.bad) == {"nothing", "spoilt", "text"}
    for name in FRAMES:
        expected = tokens(folder / f"{name}.mp4", 2.0)
        np.testing.assert_allclose(source.read(name), expected, atol=2e-3)


def test_another_task_is_refused(model, folder, tmp_path, capsys):
    assert run(model, folder, tmp_path / "out") == 0
    write_model(tmp_path / "other", seed=1)

    def refused(words, *flags, model=model):
        for directory in ("out", "out.partial"):
            (tmp_path / "out").replace(tmp_path / directory)
            capsys.readouterr()
            assert run(model, folder, tmp_path / "out", *flags) == 2
            error = capsys.readouterr().err
            assert re.fullmatch(rf"error: \S*/{directory}\b.*{words}.*remove it .*\n", error), error
            (tmp_path / directory).replace(tmp_path / "out")

    refused("field 'fps': expected 4.0, found 2.0", "--fps", 4)
    refused("field 'tower': expected .*, found", model=tmp_path / "other")
    tiny_videos.write_folder(folder, {"f": 2, "g": 2})
    refused(r"f was not there, is f.mp4 of \d+ bytes \(1 more differ\)")
    (folder / "g.mp4").unlink()
    (folder / "f.mp4").replace(folder / "e.mp4")
    refused(r"e was e.mp4 of \d+ bytes, is e.mp4 of \d+ bytes")
    (folder / "e.mp4").unlink()
    refused(r"e was e.mp4 of \d+ bytes, is not there")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--fps", "0"], r"--fps is '0'; expected a number in "),
        (["--fps", "nan"], "--fps is 'nan'; expected"),
        (["--workers", "0"], "--workers is '0'; expected a whole number"),
        (["--videos", "nowhere"], "nowhere is not a directory"),
    ],
)
def test_bad_flags_are_one_line(model, folder, tmp_path, capsys, flags, words):
    assert status_of(lambda out: run(model, folder, out, *flags), tmp_path / "out") == 2
    assert re.fullmatch(rf"error: {words}.*\n", capsys.readouterr().err)
    assert not list(tmp_path.glob("out*"))


def test_a_directory_of_something_else_is_refused(model, folder, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    assert run(model, folder, tmp_path / "out") == 2
    assert "out exists and holds no features" in capsys.readouterr().err


def test_a_decoding_process_that_dies_is_one_line(model, folder, tmp_path, capsys, monkeypatch):
    write_folder(folder, {"0": 400})
    started = []

    class Popen(subprocess.Popen):
        def __init__(self, *arguments, **more):
            super().__init__(*arguments, **more)
            started.append(self)

    receive = decoding._Worker.receive

    def receive_and_kill(self):
        batch = receive(self)
        if batch is not None:
            started[0].send_signal(signal.SIGKILL)
        return batch

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", Popen)
        patch.setattr(decoding._Worker, "receive", receive_and_kill)
        assert run(model, folder, tmp_path / "out", "--workers", 1) == 2
    error = capsys.readouterr().err
    words = "a decoding process ended with SIGKILL decoding .*/0.mp4; the same command continues"
    assert re.fullmatch(f"error: {words}.*\n", error), error
    assert all(process.poll() is not None for process in started)
    assert not (tmp_path / "out").exists()
    assert run(model, folder, tmp_path / "out") == 0


def test_nothing_is_left_of_the_decoders(folder, tmp_path):
    shards = {7: [("a", folder / "long/a.mp4")], 9: [("b", folder / "long/b.mp4")]}
    batches = decoding.decode_shards(shards, 2.0, 16, 8, workers=5)
    shard, _ = next(batches)
    assert shard in shards
    workers = [worker._process for worker in batches.gi_frame.f_locals["running"].values()]
    assert len(workers) == 2
    batches.close()
    assert all(process.poll() is not None for process in workers)


def test_the_device_has_the_next_batch_before_we_wait_for_one(tmp_path):
    order = []

    class Promise:
        def __init__(self, number):
            self.number = number

        def __array__(self, dtype=None, copy=None):
            order.append(f"take {self.number}")
            return np.full((4, 3, 2), self.number, np.float32)

    def decoded():
        for number in range(3):
            order.append(f"decode {number}")
            images_BAAC = np.full((4, 8, 8, 3), number, np.uint8)
            part = Part("a", 4 - number, ends=number == 2)
            yield 0, Batch(images_BAAC, (part,), last=number == 2)

    def encode_frames(images_BAAC):
        order.append(f"encode {images_BAAC[0, 0, 0, 0]}")
        return Promise(images_BAAC[0, 0, 0, 0])

    meta = FeatureMeta(features_per_frame=3, width=2, fps=2.0, resolution=8, tower="t")
    with EncodingBar(1) as bar:
        write_shards(encode_frames, decoded(), tmp_path, meta, 1, bar)
    assert order == [
        *("decode 0", "encode 0", "decode 1", "encode 1", "take 0"),
        *("decode 2", "encode 2", "take 1", "take 2"),
    ]
    join_shards(tmp_path, [shard_name(0, 1)]).write(tmp_path, meta)
    stored_F = FeatureSource(tmp_path).read("a")[:, 0, 0]
    assert stored_F.tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2]
