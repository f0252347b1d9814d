"""No stored byte changes unnoticed: what checksums record, what they refuse, and when."""

import json
import os
import random
import shutil
import threading
from pathlib import Path

import orbax.checkpoint as ocp
import pytest

from tests.test_checkpoint import assert_bitwise, write_checkpoints
from videollm_mod_jax.conversion.stored_model import StoredModel
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.training import checkpoint, integrity
from videollm_mod_jax.training.checkpoint import load_model
from videollm_mod_jax.training.checkpointer import Checkpointer, remedy

DO = "write it again"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run") / "run"
    write_checkpoints(directory, {4: 0.5, 8: 0.7}, keep=2)
    return directory


@pytest.fixture
def run(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


@pytest.fixture
def small(tmp_path):
    """A directory of two files, recorded; `test_record_example` says how."""
    directory = tmp_path / "small"
    (directory / "d").mkdir(parents=True)
    (directory / "_METADATA").write_bytes(b"{}")
    (directory / "d" / "1f").write_bytes(b"ab")
    integrity.record(directory)
    return directory


def stored_files(directory):
    return sorted(path for path in directory.rglob("*") if path.is_file())


def verify_all(run):
    """Compares everything that a run stores in Orbax directories, as its readers do."""
    for step in checkpoint.checkpoint_steps(run):
        for part in checkpoint.stored_parts(run, step):
            checkpoint.verify_part(part)
        for item in ("optimizer", "metrics"):
            path = run / "checkpoints" / str(step) / item
            integrity.verify(path, remedy(path))


def test_record_example(small):
    recorded = json.loads((small / "checksums.json").read_text())["sha256"]
    assert {name: (size, digest[:6]) for name, (size, digest) in recorded.items()} == {
        "_METADATA": (2, "44136f"),
        "d/1f": (2, "fb8e20"),
    }
    integrity.verify(small, DO)


def test_a_directory_with_checksums_of_its_own_stands_for_its_files(run):
    step = run / "checkpoints" / "8"
    recorded = json.loads((step / "checksums.json").read_text())["sha256"]
    assert sorted(recorded) == [
        "_CHECKPOINT_METADATA",
        "meta/checksums.json",
        "metrics/checksums.json",
        "optimizer/checksums.json",
        "trained/checksums.json",
    ]
    assert not list((run / "weights").rglob("?*/checksums.json"))


def test_a_changed_byte_in_any_stored_file_is_refused_and_the_file_named(run):
    verify_all(run)
    rng = random.Random(0)
    files = [path for part in ("weights", "checkpoints") for path in stored_files(run / part)]
    assert len(files) > 40
    for path in files:
        content = path.read_bytes()
        for position in {0, len(content) - 1, rng.randrange(len(content))}:
            changed = bytearray(content)
            changed[position] ^= 1 << rng.randrange(8)
            path.write_bytes(changed)
            named = rf"^{path.parent}.*{path.name} is damaged: "
            with pytest.raises(UserError, match=named):
                verify_all(run)
        path.write_bytes(content)
    verify_all(run)


def test_loading_refuses_changed_bytes(run):
    files = stored_files(run / "weights") + stored_files(run / "checkpoints" / "8" / "trained")
    rng = random.Random(1)
    for _ in range(8):
        path = rng.choice(files)
        content = path.read_bytes()
        changed = bytearray(content)
        changed[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        with pytest.raises(UserError, match=f"{path.name} is damaged"):
            load_model(run)
        path.write_bytes(content)
    load_model(run)


def damage(change):
    """Names a case after its function."""
    return pytest.param(change, id=change.__name__)


def removed(path: Path):
    path.unlink()
    return f"{path} is damaged: it is missing; restore it from a copy, or {DO}"


def cut(path: Path):
    path.write_bytes(b"a")
    return f"{path} is damaged: it has 1 bytes where 2 were written; restore"


def swapped(path: Path):
    other = path.parents[1] / "_METADATA"
    content = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(content)
    return f"{other} is damaged: its content is not what was written; restore"


def one_too_many(path: Path):
    (path.parent / "manifest.ocdbt").write_bytes(b"")
    return f"{path.parent}/manifest.ocdbt is damaged: no such file was written"


def a_directory(path: Path):
    path.unlink()
    path.mkdir()
    return f"{path} is damaged: it is missing"


def a_pipe(path: Path):
    path.unlink()
    os.mkfifo(path)
    return f"{path} is damaged: it is not a regular file"


def a_dead_link(path: Path):
    path.unlink()
    path.symlink_to("nowhere")
    return f"{path} is damaged: it is not a regular file"


def a_link_to_a_directory(path: Path):
    path.unlink()
    path.symlink_to("/")
    return f"{path} is damaged: it is not a regular file"


def an_endless_file(path: Path):
    path.unlink()
    path.symlink_to("/dev/zero")
    return f"{path} is damaged: it is not a regular file"


def an_unprintable_name(path: Path):
    (path.parent / "\x1b[2J\udc80").write_bytes(b"")
    return r"\x1b[2J\udc80' is damaged: no such file was written"


@pytest.mark.parametrize(
    "change",
    map(
        damage,
        [
            removed,
            cut,
            swapped,
            one_too_many,
            a_directory,
            a_pipe,
            a_dead_link,
            a_link_to_a_directory,
            an_endless_file,
            an_unprintable_name,
        ],
    ),
)
def test_a_directory_that_is_not_what_was_written_is_refused_in_one_line(small, change):
    integrity.verify(small, DO)
    message = change(small / "d" / "1f")
    with pytest.raises(UserError) as caught:
        integrity.verify(small, DO)
    assert message in str(caught.value)
    assert str(caught.value).isprintable()


def test_links_to_the_very_content_and_hidden_files_are_no_damage(small):
    # As download caches have them, and systems leave them.
    path = small / "d" / "1f"
    path.rename(small.parent / "blob")
    path.symlink_to(small.parent / "blob")
    (small / ".DS_Store").write_bytes(b"")
    integrity.verify(small, DO)
    (small.parent / "blob").write_bytes(b"ba")
    with pytest.raises(UserError, match="1f is damaged"):
        integrity.verify(small, DO)


RECORDS = [
    "",
    "{",
    "[]",
    "null",
    '{"sha256": {}}',
    "[" * 100_000,
]
FORGED = [
    [],
    {"_METADATA": 2},
    {"_METADATA": [2]},
    {"_METADATA": ["a", "b"], "d/1f": [{}, []]},
    {"_METADATA": [2, "44136f"], "d/1f": [2, 7]},
    {"../../secret": [2, "fb8e20"]},
    {"/etc/passwd": [2, "fb8e20"]},
]
RECORDS += [
    json.dumps({"sha256": table, "sha256_of_this_table": integrity._digest(table)})
    for table in FORGED
]


@pytest.mark.parametrize("text", RECORDS, ids=range(len(RECORDS)))
def test_checksums_that_are_none_are_refused_in_one_line(small, text):
    (small / "checksums.json").write_text(text)
    with pytest.raises(UserError, match=r"is damaged: ") as caught:
        integrity.verify(small, DO)
    assert "\n" not in str(caught.value)


def test_checksums_that_are_a_pipe_are_refused_unread(small):
    (small / "checksums.json").unlink()
    os.mkfifo(small / "checksums.json")
    # The thread is left to wait, and the test fails, where a pipe is read.
    refusal = []

    def verify():
        with pytest.raises(UserError, match=r"checksums\.json is damaged: it is no file") as caught:
            integrity.verify(small, DO)
        refusal.append(str(caught.value))

    thread = threading.Thread(target=verify, daemon=True)
    thread.start()
    thread.join(10)
    assert len(refusal) == 1
    assert "\n" not in refusal[0]


def test_what_has_no_checksums_is_refused_and_loads_unverified(run):
    expected = load_model(run).variables
    for path in list(run.rglob("checksums.json")):
        path.unlink()
    message = r"checksums\.json is missing, so that damage would not be seen; .* --no-verify"
    for read in (load_model, checkpoint.load_trained, checkpoint.load_tower):
        with pytest.raises(UserError, match=message):
            read(run)
        read(run, verify=False)
    with pytest.raises(UserError, match=message):
        StoredModel(run, verify=True)
    assert_bitwise(load_model(run, verify=False).variables, expected)


def test_what_was_verified_is_read_again_only_when_it_changed(small, monkeypatch):
    hashed = []
    real = integrity._hash
    monkeypatch.setattr(integrity, "_hash", lambda path: hashed.append(path.name) or real(path))
    integrity.verify(small, DO)
    integrity.verify(small, DO)
    assert sorted(hashed) == ["1f", "_METADATA"]
    times = (small / "_METADATA").stat()
    (small / "_METADATA").write_bytes(b"[]")
    os.utime(small / "_METADATA", ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(UserError, match="_METADATA is damaged"):
        integrity.verify(small, DO)


def test_what_gets_its_name_is_on_the_disk_and_has_its_checksums(tmp_path, monkeypatch):
    synced, named = set(), []
    real_sync, real_rename = os.fsync, os.rename

    def fsync(descriptor):
        synced.add(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        real_sync(descriptor)

    def rename(source, target):
        source = Path(source)
        if ".orbax" in source.name:
            below = {source, *source.rglob("*")}
            # Parts were synced before they got their own names; their parent knows these.
            done = {p for p in below if any((q / "checksums.json").exists() for q in p.parents)}
            assert below - synced <= {p for p in done if p.parent != source and p.parent in done}
            assert (source / "checksums.json").exists()
            named.append(Path(target).name)
        real_rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    write_checkpoints(tmp_path, {4: 0.5}, keep=2)
    assert sorted(named) == ["4", "meta", "metrics", "optimizer", "trained", "weights"]
    assert {tmp_path, tmp_path / "checkpoints"} <= synced


def test_a_part_of_another_checkpoint_is_refused(run):
    steps = run / "checkpoints"
    shutil.rmtree(steps / "8" / "trained")
    shutil.copytree(steps / "4" / "trained", steps / "8" / "trained")
    with pytest.raises(UserError, match=r"8/trained/checksums\.json is damaged: .* delete .*/8 to"):
        load_model(run)
    load_model(run, step=4)


def test_a_renamed_checkpoint_is_refused_verified_or_not(run):
    (run / "checkpoints" / "8").rename(run / "checkpoints" / "12")
    with pytest.raises(UserError, match=r"12/meta is .*'step': 8.*; expected .* step 12"):
        load_model(run)


@pytest.mark.parametrize(
    "name", ["junk", "-1", "1e3", "007", "٣", "9" * 30, "12.orbax-checkpoint-tmp"]
)
def test_directories_that_are_no_checkpoints_are_none(run, name):
    shutil.copytree(run / "checkpoints" / "8", run / "checkpoints" / name)
    (run / "checkpoints" / "16").write_text("a file")
    assert checkpoint.checkpoint_steps(run) == [4, 8]
    assert checkpoint.best_step(run) == 4
    load_model(run)


def test_checkpoints_that_are_a_file_are_refused(run):
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").write_text("")
    for read in (load_model, checkpoint.best_step, lambda d: Checkpointer(d, keep=2)):
        with pytest.raises(UserError, match="checkpoints cannot be read: Not a directory"):
            read(run)


def test_a_run_that_has_saved_no_update_is_told_to_go_on(run):
    (run / "config.json").write_text("{}")
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match=r"no checkpoint yet; run the same train command to go on"):
        load_model(run)
    (run / "model.json").unlink()
    with pytest.raises(UserError, match=r"no model.json yet; run the same train command to go on"):
        load_model(run)


def test_a_checkpoint_that_its_run_deletes_gives_way_to_a_newer_one(run):
    asked = []

    def read(parts):
        asked.append(parts[-1].parent.name)
        if asked == ["8"]:
            # What the run does meanwhile: it saves, then deletes what it does not keep.
            shutil.copytree(run / "checkpoints" / "8", run / "checkpoints" / "12")
            shutil.rmtree(run / "checkpoints" / "8")
        return [stored.name for stored in parts if checkpoint.stored_tree(stored, 99)]

    assert checkpoint.read_parts(run, None, read) == ["weights", "trained"]
    assert asked == ["8", "12"]
    asked.clear()
    with pytest.raises(UserError, match=r"no checkpoint of update 8; it has 4, 12$"):
        checkpoint.read_parts(run, 8, read)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("[" * 100_000, "cannot be read"),
        ("null", "cannot be read"),
        ('{"tree_metadata": 3}', "cannot be read"),
        (
            json.dumps({"tree_metadata": dict.fromkeys(map(str, range(9_000)))}),
            "has 9000 arrays; ",
        ),
        (json.dumps({"tree_metadata": {"x": "x" * 10**7}}), r"has more than \d+ bytes; expected"),
    ],
    ids=["deep", "null", "number", "many", "large"],
)
def test_a_table_of_absurd_size_is_refused_before_orbax_opens_its_arrays(
    run, monkeypatch, table, words
):
    monkeypatch.setattr(ocp.StandardCheckpointer, "metadata", None)
    (run / "weights" / "_METADATA").write_text(table)
    for read in (load_model, checkpoint.load_tower):
        with pytest.raises(UserError, match=f"weights/_METADATA is damaged: .*{words}"):
            read(run, verify=False)
    with pytest.raises(UserError, match=f"weights/_METADATA is damaged: .*{words}"):
        StoredModel(run)


def test_every_file_is_hashed_by_one_of_the_processes_that_share_it(run):
    weights = run / "weights"
    for path in stored_files(weights):
        if path.name == "checksums.json":
            continue
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        faults = [fault_of(weights, index) for index in range(3)]
        assert len(list(filter(None, faults))) == 1
        assert path.name in "".join(faults)
        path.write_bytes(content)


def fault_of(directory, index):
    """What one of three processes finds."""
    try:
        integrity.verify(directory, DO, index=index, count=3)
    except UserError as error:
        return str(error)
    return ""
