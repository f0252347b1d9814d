"""Members come as the standard library decodes them, however the text is cut into pieces."""

import json
import tracemalloc

import pytest

from videollm_mod_jax.data.builders import json_members
from videollm_mod_jax.data.builders.json_members import array_members, object_members, whole_object
from videollm_mod_jax.errors import UserError

DOCUMENT = {
    "_map_errs": [{"videos": {"trap": 1}}, [], 2],
    "note": 'a "quoted" } text',
    "number": 123.5,
    "videos": {"a": {"n": [1, 23, 456]}, "b": 789, "ä\n": "\U0001f52a", "c": {}, "d": None},
}


@pytest.fixture(params=[1, 2, 3, 7, 1 << 24])
def piece(request, monkeypatch):
    monkeypatch.setattr(json_members, "_PIECE", request.param)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file.json"


@pytest.mark.usefixtures("piece")
@pytest.mark.parametrize("indent", [None, 4])
@pytest.mark.parametrize("escape", [True, False])
def test_members_are_what_the_whole_file_holds(path, indent, escape):
    path.write_text(json.dumps(DOCUMENT, indent=indent, ensure_ascii=escape), encoding="utf-8")
    assert list(object_members(path, "videos")) == list(DOCUMENT["videos"].items())
    assert list(object_members(path)) == list(DOCUMENT.items())
    assert list(array_members(path, "_map_errs")) == DOCUMENT["_map_errs"]


@pytest.mark.usefixtures("piece")
def test_numbers_are_not_cut_at_the_end_of_a_piece(path):
    path.write_text("[1234567, 89, NaN, -1e5]")
    assert str(list(array_members(path))) == "[1234567, 89, nan, -100000.0]"


@pytest.mark.usefixtures("piece")
@pytest.mark.parametrize(
    "text", ['{"a": {"b": [{"c": 1, "d": 2, "c": 1}]}}', '{"a": {"c": {}, "c": {}}, "b": 1}']
)
def test_a_name_that_comes_twice_in_a_member_is_an_error_that_names_it(path, text):
    path.write_text(text)
    with pytest.raises(UserError, match=r"in 'a', after character \d: the name 'c' comes twice"):
        list(object_members(path))


def test_a_whole_object_has_every_name_once(path):
    path.write_text(json.dumps(DOCUMENT))
    assert whole_object(path) == DOCUMENT
    path.write_text('{"a": 1, "b": 2, "b": 3}')
    with pytest.raises(UserError, match=r"file\.json: the name 'b' comes twice; correct the file"):
        whole_object(path)


def test_names_that_come_twice_come_twice(path):
    path.write_text('{"videos": {"a": 1, "a": 2}, "videos": {"b": 3}}')
    assert list(object_members(path, "videos")) == [("a", 1), ("a", 2), ("b", 3)]


@pytest.mark.usefixtures("piece")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "at the top, after character 0: expected {, found the end of the file"),
        (b'\xef\xbb\xbf{"videos": {}}', "at the top, after character 0: expected {, found \\ufeff"),
        (b"[1]", "expected {, found ["),
        (b'{"other": 1}', "expected a field 'videos' at the top; there are ['other']"),
        (b'{"videos": [1]}', "in 'videos', after character 11: expected {, found ["),
        (b'{"videos": {"a": 1, "b": {"c": tru}}}', "in 'b', after character 25: not json: "),
        (b'{"videos": {"a": 1', "expected , or }, found the end of the file"),
        (b'{"videos": {"a": 1 "b": 2}}', 'expected , or }, found "'),
        (b'{"videos": {1: 1}}', "expected a name, found 1"),
        (b'{"videos": {}} {', "expected the end of the file"),
        (
            b'{"videos": {"a": [1, 2',
            "in 'a', after character 17: not json: Expecting ',' delimiter",
        ),
        (b'{"videos": {"a": "\xff"}}', "not UTF-8: invalid start byte"),
    ],
)
def test_damage_is_one_line_that_names_the_member(path, text, message):
    path.write_bytes(text)
    with pytest.raises(UserError) as error:
        list(object_members(path, "videos"))
    assert str(path) in str(error.value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", ["[" * 100_000, "9" * 5000])
def test_what_python_refuses_to_decode_is_an_error(path, value):
    path.write_text('{"videos": {"a": ' + value + "}}")
    with pytest.raises(UserError, match=r"in 'a', after character 17: not json: "):
        list(object_members(path, "videos"))


def test_a_missing_file_is_named(path):
    with pytest.raises(UserError, match=r"file\.json cannot be read: No such file"):
        list(object_members(path))


def test_memory_does_not_grow_with_the_file(path, monkeypatch):
    monkeypatch.setattr(json_members, "_PIECE", 1 << 16)
    member = json.dumps({"narrations": [{"time": i, "text": "C walks."} for i in range(100)]})
    path.write_text("{" + ",".join(f'"{i}": {member}' for i in range(1000)) + "}")
    tracemalloc.start()
    count = sum(1 for _ in object_members(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 1000
    assert path.stat().st_size > 3_000_000
    assert peak < 1_000_000
