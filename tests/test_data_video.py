"""Sampling times, letterbox, stream choice, rotation and errors, on videos that the tests write."""

import fractions
import os
import subprocess
import sys

import av
import numpy as np
import pytest

from videollm_mod_jax.data.video import location, read_video, write_video
from videollm_mod_jax.errors import UserError


def numbered(count, height=32, width=64):
    """Frames whose grey level tells their number: frame i is 8 * i + 16 all over."""
    levels = (8 * np.arange(count) + 16).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (count, height, width, 3))


def numbers(frames):
    return [round((float(frame.image.mean()) - 16) / 8) for frame in frames]


@pytest.mark.parametrize(("video_fps", "fps"), [(10, 2.0), (5, 2.0), (2, 2.0), (2, 5.0), (10, 3.0)])
def test_a_sample_is_the_last_frame_that_began(tmp_path, video_fps, fps):
    write_video(tmp_path / "a.mp4", numbered(21), video_fps)
    frames = list(read_video(tmp_path / "a.mp4", fps))
    step = fractions.Fraction(video_fps) / fractions.Fraction(fps)
    samples = [k for k in range(200) if k * step <= 20]
    assert [frame.time for frame in frames] == [k / fps for k in samples]
    assert numbers(frames) == [k * step // 1 for k in samples]


def test_drawn_example_with_uneven_time_stamps(tmp_path):
    """Time stamps in milliseconds, one of them a hair late, and a gap."""
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        stream.codec_context.time_base = fractions.Fraction(1, 1000)
        for image, at in zip(numbered(5), (0, 501, 700, 1000, 2600), strict=True):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts, frame.time_base = at, fractions.Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert numbers(read_video(tmp_path / "a.mkv", 2.0)) == [0, 1, 3, 3, 3, 3]


@pytest.mark.parametrize(("height", "width"), [(32, 64), (64, 32), (40, 40)])
def test_letterbox_keeps_the_aspect_ratio(tmp_path, height, width):
    write_video(tmp_path / "a.mp4", np.full((2, height, width, 3), 200, np.uint8), 2.0)
    image = next(read_video(tmp_path / "a.mp4", 2.0, size=48)).image
    assert image.shape == (48, 48, 3)
    lit = image.max(-1) > 100
    scale = 48 / max(height, width)
    rows, columns = lit.any(1).sum(), lit.any(0).sum()
    assert (rows, columns) == (round(height * scale), round(width * scale))
    np.testing.assert_array_equal(lit, lit[::-1, ::-1])  # in the middle
    assert not image[~lit].any()


def test_writing_keeps_the_picture(tmp_path):
    y, x = np.mgrid[:47, :65]
    picture = np.stack([128 + 100 * np.sin(x / 9), 128 + 100 * np.cos(y / 7), 2.0 * x], -1)
    frames = np.stack([picture, picture[::-1]]).astype(np.uint8)
    write_video(tmp_path / "a.mp4", iter(frames), 2.0, crf=0)
    read = np.stack([frame.image for frame in read_video(tmp_path / "a.mp4", 2.0)])
    assert read.shape == (2, 48, 66, 3)  # odd sides are padded
    assert np.abs(read[:, :47, :65].astype(int) - frames).mean() < 3
    with av.open(str(tmp_path / "a.mp4")) as container:
        context = container.streams.video[0].codec_context
        assert (context.name, context.pix_fmt) == ("h264", "yuv420p")


def test_reading_is_bit_stable(tmp_path):
    write_video(tmp_path / "a.mp4", numbered(9), 3.0)
    once, again = (
        np.stack([f.image for f in read_video(tmp_path / "a.mp4", 2.0, 32)]) for _ in "ab"
    )
    np.testing.assert_array_equal(once, again)


def two_streams(path, small_first):
    """A file with a 32x16 stream of dark frames and a 64x32 stream of bright ones."""
    kinds = [(16, 32, 40), (32, 64, 200)]
    with av.open(str(path), "w") as container:
        streams = []
        for height, width, level in kinds if small_first else kinds[::-1]:
            stream = container.add_stream("libx264", rate=2)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            streams.append((stream, np.full((height, width, 3), level, np.uint8)))
        for stream, image in streams:
            for _ in range(3):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode())


@pytest.mark.parametrize("small_first", [True, False])
def test_the_largest_of_two_streams_is_read(tmp_path, small_first):
    path = tmp_path / "two.mp4"
    two_streams(path, small_first)
    frames = list(read_video(path, 2.0))
    assert len(frames) == 3
    assert frames[0].image.shape == (32, 64, 3)
    assert abs(float(frames[0].image.mean()) - 200) < 3
    small = next(read_video(path, 2.0, stream=0 if small_first else 1)).image
    assert small.shape == (16, 32, 3)
    with pytest.raises(UserError, match=r"two\.mp4: stream: expected one of .* \[0, 1\], found 7"):
        next(read_video(path, 2.0, stream=7))


def test_a_turned_video_is_read_upright(tmp_path):
    """As a telephone writes it: the matrix in the track header turns frames a quarter clockwise."""
    image = np.zeros((32, 64, 3), np.uint8)
    image[:16, :32] = 220  # top left, so top right once turned
    write_video(tmp_path / "a.mp4", image[None], 2.0)
    data = (tmp_path / "a.mp4").read_bytes()

    def fixed(*rows):
        return np.array(rows, ">i4").tobytes()

    upright = fixed(1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    turned = fixed(0, 1 << 16, 0, -1 << 16, 0, 0, 32 << 16, 0, 1 << 30)
    at = data.index(upright, data.index(b"tkhd"))
    (tmp_path / "b.mp4").write_bytes(data[:at] + turned + data[at + len(turned) :])
    for size in (None, 64):
        read = next(read_video(tmp_path / "b.mp4", 2.0, size)).image
        read = read[:, 16:48] if size else read
        assert read.shape == (64, 32, 3)
        assert read[:28, 20:].min() > 180
        assert read[36:].max() < 40
        assert read[:, :12].max() < 40


def test_unreadable_videos_are_named_in_one_line(tmp_path):
    (tmp_path / "text.mp4").write_text("no video at all")
    noise = np.random.default_rng(0).integers(0, 256, (9, 64, 64, 3), np.uint8)
    write_video(tmp_path / "whole.mp4", noise, 2.0)
    data = (tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) // 2])  # the index at the end is missing
    middle = data.index(b"mdat") + len(data) // 3
    (tmp_path / "spoilt.mp4").write_bytes(data[:middle] + b"\xff" * 999 + data[middle + 999 :])
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        sound.sample_rate = 16000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    for name, words in [
        ("none.mp4", "No such file or directory; check the path"),
        ("text.mp4", "cannot read the video: .*; download it again"),
        ("cut.mp4", "cannot read the video"),
        ("spoilt.mp4", "cannot read the video"),
        ("sound.mp4", "found no video stream; take a file with pictures"),
    ]:
        with pytest.raises(UserError, match=words) as caught:
            list(read_video(tmp_path / name, 2.0))
        assert str(caught.value).startswith(str(tmp_path / name))
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="fps: expected more than 0"):
        list(read_video(tmp_path / "whole.mp4", 0))


SPOILT = """
import sys
from videollm_mod_jax.data.video import read_video

try:
    list(read_video(sys.argv[1], 2.0))
except ValueError as error:
    print(error)
"""


def test_ffmpeg_adds_no_lines_of_its_own(tmp_path):
    """In a process of its own, because FFmpeg may hold its lines back until the end."""
    noise = np.random.default_rng(0).integers(0, 256, (9, 64, 64, 3), np.uint8)
    write_video(tmp_path / "whole.mp4", noise, 2.0)
    data = (tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) // 2])
    done = subprocess.run(
        [sys.executable, "-c", SPOILT, tmp_path / "cut.mp4"],
        capture_output=True,
        text=True,
        timeout=60,
        env={"PYTHONPATH": ":".join(filter(None, sys.path)), "PATH": ""},
        check=True,
    )
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("name", "options"), [("a.avi", {}), ("a.mp4", {"movflags": "frag_keyframe+empty_moov"})]
)
def test_a_video_without_frames_is_refused(tmp_path, name, options):
    """A header that announces H.264, and not a packet after it."""
    with av.open(str(tmp_path / name), "w", options=options) as container:
        stream = container.add_stream("libx264", rate=2)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        container.start_encoding()
    with pytest.raises(UserError, match=f"{name}: the video has no frames; it was"):
        list(read_video(tmp_path / name, 2.0))


def test_a_failed_write_leaves_nothing(tmp_path):
    def broken():
        for _ in range(100):  # enough that the encoder has written some of them
            yield np.zeros((32, 32, 3), np.uint8)
        assert len(list(tmp_path.iterdir())) == 1
        raise RuntimeError("camera lost")

    with pytest.raises(RuntimeError, match="camera lost"):
        write_video(tmp_path / "a.mp4", broken(), 2.0)
    with pytest.raises(UserError, match=r"a\.mp4: expected 1 frame or more"):
        write_video(tmp_path / "a.mp4", [], 2.0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf"), 1e300])
def test_a_rate_without_sense_is_refused_before_the_file_is_opened(tmp_path, fps):
    with pytest.raises(UserError, match="fps: expected more than 0"):
        next(iter(read_video(tmp_path / "none.mp4", fps)))


def test_a_colon_in_a_name_is_no_protocol(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_video("clip.mp4", np.zeros((2, 16, 16, 3), np.uint8), fps=2)
    os.rename("clip.mp4", "12:30 lunch.mp4")
    assert [frame.time for frame in read_video("12:30 lunch.mp4", fps=2)] == [0.0, 0.5]
    assert location("12:30 lunch.mp4") == "file:12:30 lunch.mp4"
    assert location("rtsp://10.0.0.5/door") == "rtsp://10.0.0.5/door"


def test_sound_with_a_cover_is_no_video(tmp_path):
    path = tmp_path / "song.m4a"
    with av.open(str(path), "w", format="mp4") as container:
        sound = container.add_stream("aac", rate=16000)
        cover = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 32, 32, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 16000
        picture = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
        for packets in (cover.encode(picture), sound.encode(frame), cover.encode(), sound.encode()):
            container.mux(packets)
    with pytest.raises(UserError, match=r"song\.m4a: .* found sound with a cover picture; take"):
        next(read_video(path, 2.0))


def test_a_bare_stream_is_said_to_have_no_time_stamps(tmp_path):
    with av.open(str(tmp_path / "a.h264"), "w", format="h264") as container:
        stream = container.add_stream("libx264", rate=2)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        for image in numbered(3):
            image = np.ascontiguousarray(image)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    with pytest.raises(
        UserError, match=r"no time stamps, .* its 3 frames .* -framerate 25 -i FILE"
    ):
        next(read_video(tmp_path / "a.h264", 2.0))
