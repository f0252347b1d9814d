"""Pictures are read as a player shows them: turned, mirrored, with square pixels."""

import fractions
import itertools

import av
import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest

from videollm_mod_jax.data.display import turned
from videollm_mod_jax.data.video import read_video, write_video

QUARTERS = [(a, 0, 0, d) for a, d in itertools.product((1, -1), repeat=2)] + [
    (0, b, c, 0) for b, c in itertools.product((1, -1), repeat=2)
]


def corners():
    """A picture whose four quarters differ: (32, 64, 3)."""
    levels = np.array([[30, 90], [150, 210]], np.uint8)
    return levels.repeat(16, 0).repeat(32, 1)[..., None].repeat(3, -1)


def shown(image, matrix):
    """Pixel by pixel, from the definition of the matrix (libavutil/display.h)."""
    a, b, c, d = matrix
    height, width = image.shape[:2]
    points = {
        (a * x + c * y, b * x + d * y): image[y, x] for y in range(height) for x in range(width)
    }
    left, top = (min(point[i] for point in points) for i in (0, 1))
    result = np.empty((height, width, 3) if a else (width, height, 3), np.uint8)
    for (x, y), pixel in points.items():
        result[y - top, x - left] = pixel
    return result


def test_drawn_examples():
    image = np.array([[1, 2], [3, 4]])
    np.testing.assert_array_equal(turned(image, (-1, 0, 0, 1)), [[2, 1], [4, 3]])
    np.testing.assert_array_equal(turned(image, (0, 1, -1, 0)), [[3, 1], [4, 2]])
    np.testing.assert_array_equal(turned(image, (0, 1, 1, 0)), [[1, 3], [2, 4]])


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_shown_as_their_exif_says(tmp_path, orientation, ending):
    picture = PIL.Image.fromarray(corners())
    exif = PIL.Image.Exif()
    exif[274] = orientation
    options = {"quality": 100, "subsampling": 0} if ending == "jpg" else {}
    options |= {"lossless": True} if ending == "webp" else {}
    path = tmp_path / f"a.{ending}"
    picture.save(path, exif=exif, **options)
    with PIL.Image.open(path) as opened:
        expected = np.asarray(PIL.ImageOps.exif_transpose(opened).convert("RGB"), np.int16)
    (frame,) = read_video(path, 2.0)
    assert frame.image.shape == expected.shape
    assert np.abs(frame.image - expected).max() <= 3


@pytest.mark.parametrize("matrix", QUARTERS)
def test_videos_are_shown_as_their_display_matrix_says(tmp_path, matrix):
    write_video(tmp_path / "a.mp4", corners()[None], 2.0)
    data = (tmp_path / "a.mp4").read_bytes()

    def fixed(a, b, c, d):
        one = 1 << 16
        return np.array((a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30), ">i4").tobytes()

    at = data.index(fixed(1, 0, 0, 1), data.index(b"tkhd"))
    (tmp_path / "b.mp4").write_bytes(data[:at] + fixed(*matrix) + data[at + 36 :])
    (frame,) = read_video(tmp_path / "b.mp4", 2.0)
    expected = shown(corners(), matrix)
    assert frame.image.shape == expected.shape
    # Compression blurs the edges between the quarters.
    inside = np.ones(expected.shape[:2], bool)
    for axis, size in enumerate(inside.shape):
        inside &= np.expand_dims(np.abs(np.arange(size) - (size - 1) / 2) > 4, 1 - axis)
    assert np.abs(frame.image.astype(np.int16) - expected)[inside].max() <= 6


@pytest.mark.parametrize(
    ("stored", "aspect", "seen"),
    [
        ((576, 720), fractions.Fraction(64, 45), (576, 1024)),
        ((480, 720), fractions.Fraction(8, 9), (540, 720)),
        ((480, 720), fractions.Fraction(32, 27), (480, 853)),
        ((32, 64), fractions.Fraction(1, 200), (32, 64)),
    ],
)
def test_pixels_are_square(tmp_path, stored, aspect, seen):
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=2)
        (stream.height, stream.width), stream.pix_fmt = stored, "yuv420p"
        stream.codec_context.sample_aspect_ratio = aspect
        image = np.full((*stored, 3), 200, np.uint8)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    (frame,) = read_video(path, 2.0)
    assert frame.image.shape == (*seen, 3)
    (small,) = read_video(path, 2.0, size=64)
    lit = small.image.max(-1) > 100
    height, width = (round(side * 64 / max(seen)) for side in seen)
    assert (lit.any(1).sum(), lit.any(0).sum()) == (height, width)
