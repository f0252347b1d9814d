"""A checkpoint or a converted model that a stranger made names no place outside of itself."""

import json
import os
import stat

import numpy as np
import pytest
import rich.console
from safetensors.numpy import save_file

from tests.test_conversion_exporting import bring_in, make_source, send_out
from videollm_mod_jax.conversion import links
from videollm_mod_jax.conversion.companions import keep_companions
from videollm_mod_jax.conversion.families import plan_conversion
from videollm_mod_jax.conversion.importing import import_model
from videollm_mod_jax.conversion.manifest import read_manifest
from videollm_mod_jax.conversion.plan import Options
from videollm_mod_jax.conversion.source import open_source
from videollm_mod_jax.errors import UserError

CONSOLE = rich.console.Console(quiet=True)


def tree(directory):
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


def link_out(directory, name):
    """Moves a file elsewhere and puts a link in its place."""
    elsewhere = directory.parent / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    os.rename(directory / name, elsewhere / name)
    (directory / name).symlink_to(elsewhere / name)


@pytest.mark.parametrize(
    "change",
    [
        lambda part: part | {"role": "../../victim"},
        lambda part: part | {"role": "/tmp"},
        lambda part: part | {"role": "encoder"},
        lambda part: part | {"role": None},
        lambda part: part | {"layout": "../x"},
        lambda part: part | {"family": "a/b"},
        lambda part: part | {"files": {"../../x": "00"}},
        lambda part: part | {"tensors": {"a": {"dtype": "float32", "file": "../a"}}},
        lambda part: part | {"tensors": {"a": {"dtype": "object", "file": "a"}}},
        lambda part: part | {"tensors": {"a": []}},
        lambda part: part | {"tensors": []},
        lambda part: part | {"config": 3},
        lambda part: part | {"unknown": 3},
    ],
)
def test_a_manifest_names_no_other_place_than_a_conversion_does(tmp_path, change):
    model = bring_in(make_source(tmp_path / "source", "clip"), tmp_path / "model")
    path = model / "conversion.json"
    values = json.loads(path.read_text())
    values["parts"] = [change(part) for part in values["parts"]]
    path.write_text(json.dumps(values))
    before = tree(tmp_path)
    with pytest.raises(UserError, match=r"conversion\.json.*convert again"):
        send_out(model, tmp_path / "out" / "exported")
    assert tree(tmp_path) == before


def test_two_parts_of_one_role_are_refused(tmp_path):
    model = bring_in(make_source(tmp_path / "source", "clip"), tmp_path / "model")
    path = model / "conversion.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"parts": values["parts"] * 2}))
    with pytest.raises(UserError, match="of another part"):
        read_manifest(model)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layout": "other"}, "no layout of the family"),
        ({"family": "llama", "layout": "hf"}, "decoder"),
        ({"family": "other"}, "unknown family"),
    ],
)
def test_a_family_or_layout_that_the_model_has_not_is_one_line(tmp_path, change, words):
    model = bring_in(make_source(tmp_path / "source", "clip"), tmp_path / "model")
    path = model / "conversion.json"
    values = json.loads(path.read_text())
    values["parts"] = [part | change for part in values["parts"]]
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=words):
        send_out(model, tmp_path / "exported")


@pytest.mark.parametrize(
    "name",
    ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"],
)
def test_a_link_out_of_the_source_is_not_followed(tmp_path, name):
    source = make_source(tmp_path / "source", "llama")
    link_out(source, name)
    with pytest.raises(UserError, match=rf"{name} is a link to .*elsewhere.*outside of"):
        bring_in(source, tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("name", ["generation_config.json", "chat_template.jinja"])
def test_a_companion_that_links_out_of_the_source_is_not_copied(tmp_path, name):
    source = make_source(tmp_path / "source", "llama")
    (source / name).write_text("{}")
    link_out(source, name)
    with pytest.raises(UserError, match=rf"{name} is a link to .*outside of"):
        bring_in(source, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    assert not (tmp_path / "model.partial").exists()


def test_a_shard_that_links_out_of_the_source_is_not_read(tmp_path):
    (tmp_path / "source").mkdir()
    save_file({"a": np.zeros(2, np.float32)}, tmp_path / "source" / "a.safetensors")
    index = {"weight_map": {"a": "a.safetensors"}}
    (tmp_path / "source" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert open_source(tmp_path / "source").names == ("a",)
    link_out(tmp_path / "source", "a.safetensors")
    with pytest.raises(UserError, match=r"a\.safetensors is a link to"):
        open_source(tmp_path / "source")


def test_a_companion_that_links_out_of_a_model_is_not_exported(tmp_path):
    source = make_source(tmp_path / "source", "clip")
    (source / "preprocessor_config.json").write_text("{}")
    model = bring_in(source, tmp_path / "model")
    link_out(model / "conversion" / "model", "preprocessor_config.json")
    (model / "conversion" / "elsewhere").rename(tmp_path / "elsewhere")
    link = model / "conversion" / "model" / "preprocessor_config.json"
    link.unlink()
    link.symlink_to(tmp_path / "elsewhere" / "preprocessor_config.json")
    with pytest.raises(UserError, match="is a link to"):
        send_out(model, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


def in_the_cache_of_the_hub(directory, source):
    """Lays a directory out as the Hub's cache does; returns the snapshot."""
    repository = directory / "models--somebody--something"
    snapshot, blobs = repository / "snapshots" / "4f2a", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, file in enumerate(sorted(source.iterdir())):
        os.rename(file, blobs / str(i))
        (snapshot / file.name).symlink_to(os.path.join("..", "..", "blobs", str(i)))
    return snapshot


def test_the_links_of_the_cache_of_the_hub_are_followed(tmp_path):
    source = make_source(tmp_path / "source", "llama")
    (source / "generation_config.json").write_text("{}")
    snapshot = in_the_cache_of_the_hub(tmp_path / "cache", source)
    model = bring_in(snapshot, tmp_path / "model")
    kept = model / "conversion" / "model" / "generation_config.json"
    assert kept.read_text() == "{}"
    assert not kept.is_symlink()


@pytest.mark.parametrize("target", ["../../../elsewhere/secret.json", "../../refs/main"])
def test_another_link_in_the_cache_of_the_hub_is_not_followed(tmp_path, target):
    source = make_source(tmp_path / "source", "llama")
    snapshot = in_the_cache_of_the_hub(tmp_path / "cache", source)
    for place in ("elsewhere/secret.json", "models--somebody--something/refs/main"):
        (tmp_path / "cache" / place).parent.mkdir()
        (tmp_path / "cache" / place).write_text("{}")
    (snapshot / "generation_config.json").symlink_to(target)
    with pytest.raises(UserError, match=r"generation_config\.json is a link to"):
        keep_companions(snapshot, tmp_path / "model", "model")


def test_files_are_inside_as_drawn(tmp_path):
    directory = tmp_path / "source"
    directory.mkdir()
    (directory / "revised.json").write_text("{}")
    (directory / "config.json").symlink_to("revised.json")
    links.check_inside(directory, [directory / "config.json", directory / "absent.json"])
    (tmp_path / "linked").symlink_to(directory)
    links.check_inside(tmp_path / "linked", [tmp_path / "linked" / "config.json"])
    (directory / "dead.json").symlink_to("nothing.json")
    with pytest.raises(UserError, match="does not exist"):
        links.check_inside(directory, [directory / "dead.json"])


@pytest.mark.parametrize(
    "journal",
    [
        [],
        {"fingerprint": "0"},
        {"fingerprint": "0", "saved": [], "completing": False, "entries": ["../../victim"]},
        {"fingerprint": "0", "saved": {}, "completing": False, "entries": []},
        {"fingerprint": 0, "saved": [], "completing": False, "entries": []},
        {"kind": "export"},
    ],
)
def test_a_journal_that_no_conversion_wrote_is_refused_and_stays(tmp_path, journal):
    conversion = plan_conversion(make_source(tmp_path / "source", "clip"), Options())
    work = tmp_path / "model.partial"
    work.mkdir()
    (work / "journal.json").write_text(json.dumps(journal))
    (work / "precious").write_text("")
    with pytest.raises(UserError, match=r"journal\.json"):
        import_model(conversion, tmp_path / "model", overwrite=False, console=CONSOLE)
    assert (work / "precious").exists()


@pytest.mark.parametrize("send", [False, True])
@pytest.mark.parametrize("kind", ["link", "file", "directory"])
def test_nothing_that_a_conversion_did_not_make_is_removed(tmp_path, kind, send):
    source = make_source(tmp_path / "source", "clip")
    model = bring_in(source, tmp_path / "model")
    victim, work = tmp_path / "victim", tmp_path / "made.partial"
    victim.mkdir()
    (victim / "precious").write_text("")
    if kind == "link":
        work.symlink_to(victim)
    elif kind == "file":
        work.write_text("precious")
    else:
        os.rename(victim, work)
    before = tree(tmp_path)
    with pytest.raises(UserError, match=r"made\.partial is in the way"):
        send_out(model, tmp_path / "made") if send else bring_in(source, tmp_path / "made")
    assert tree(tmp_path) == before


def test_a_work_directory_of_somebody_else_is_refused(tmp_path, monkeypatch):
    source = make_source(tmp_path / "source", "clip")
    (tmp_path / "model.partial").mkdir()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(UserError, match="no directory of yours"):
        bring_in(source, tmp_path / "model")


def test_what_a_killed_export_left_is_removed_by_the_next_one(tmp_path, monkeypatch):
    model = bring_in(make_source(tmp_path / "source", "clip"), tmp_path / "model")
    work = tmp_path / "made.partial"
    (work / "export").mkdir(parents=True)
    (work / "journal.json").write_text('{"kind": "export"}')
    (work / "export" / "model.safetensors").write_text("half")
    send_out(model, tmp_path / "made")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["made", "model", "source"]
    assert not stat.S_IMODE((tmp_path / "made").stat().st_mode) & stat.S_IWOTH
