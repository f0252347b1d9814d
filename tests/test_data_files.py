"""Json files of any origin: what is read, and what is refused, soon and in one line."""

import json
import os
import time

import pytest

from videollm_mod_jax.data.files import read_json, read_json_object
from videollm_mod_jax.errors import UserError


def written(tmp_path, content):
    path = tmp_path / "file.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    "value", [{"a": [1, 2.5, -1e30, None, True]}, [], "text \u00e9 \U0001f600", 12, {}]
)
@pytest.mark.parametrize("ascii_only", [True, False])
def test_reads_what_json_wrote(tmp_path, value, ascii_only):
    assert read_json(written(tmp_path, json.dumps(value, ensure_ascii=ascii_only))) == value


def test_a_byte_order_mark_means_nothing(tmp_path):
    assert read_json(written(tmp_path, b"\xef\xbb\xbf[1]")) == [1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not json"),
        ("{", "is not json"),
        (b"\xff\xfe", "is not UTF-8"),
        (b'{"a": "\x80"}', "is not UTF-8"),
        ("[" * 1_000_000, "nested too deeply"),
        ('{"a":' * 1_000_000, "nested too deeply"),
        ('{"a": 1, "a": 2}', "the name 'a' comes twice"),
        ('[{"b": {"a": 1, "a": 1}}]', "the name 'a' comes twice"),
        ("[NaN]", "NaN is not finite"),
        ("[-Infinity]", "-Infinity is not finite"),
        ("[1e999]", "1e999 is not finite"),
        ("[" + "9" * 10_000 + "]", "is not json"),
        ('["\\ud800"]', "is not UTF-8"),
        ('{"\\uDFFF": 1}', "is not UTF-8"),
    ],
)
def test_refuses_in_one_line(tmp_path, content, message):
    path = written(tmp_path, content)
    with pytest.raises(UserError, match=message) as error:
        read_json(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def test_reads_numbers_that_are_not_finite_where_that_is_asked_for(tmp_path):
    assert read_json(written(tmp_path, "[Infinity, 1e999]"), finite=False) == [float("inf")] * 2


def test_a_large_file_is_not_read(tmp_path):
    path = tmp_path / "sparse.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    began = time.perf_counter()
    with pytest.raises(UserError, match="more than 67108864 bytes"):
        read_json(path)
    assert time.perf_counter() - began < 5
    assert read_json(written(tmp_path, "[10]"), largest=4) == [10]
    with pytest.raises(UserError, match="more than 3 bytes"):
        read_json(written(tmp_path, "[10]"), largest=3)


def test_only_files_are_read(tmp_path):
    with pytest.raises(UserError, match=r"cannot be read: Is a directory|is no file"):
        read_json(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(UserError, match="is no file"):
            read_json(path)
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_json(tmp_path / "missing")


@pytest.mark.parametrize("content", ["[]", "null", '"a"', "1"])
def test_an_object_is_expected_at_the_top(tmp_path, content):
    assert read_json_object(written(tmp_path, '{"a": 1}')) == {"a": 1}
    with pytest.raises(UserError, match="expected an object"):
        read_json_object(written(tmp_path, content))
