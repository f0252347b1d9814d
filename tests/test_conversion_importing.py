"""Whatever the checkpoint, the converted model is complete, exact, and absent until it is."""

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import rich.console
from flax.traverse_util import flatten_dict

from tests import tiny_conversion
from tests.tiny import CONFIG, routed
from tests.tiny_conversion import make_conversion
from videollm_mod_jax.conversion import importing, loading
from videollm_mod_jax.conversion.importing import import_model
from videollm_mod_jax.conversion.manifest import read_manifest
from videollm_mod_jax.conversion.plan import Merge, Part
from videollm_mod_jax.conversion.source import open_source
from videollm_mod_jax.conversion.table import Table
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.models import VideoLLM, init_variables
from videollm_mod_jax.training.checkpoint import load_model

CONSOLE = rich.console.Console(quiet=True)
ROUTERS = ("params/decoder/layer_1/router/kernel", "params/decoder/layer_3/router/kernel")


def run(conversion, destination, overwrite=False):
    return import_model(conversion, destination, overwrite=overwrite, console=CONSOLE)


def loaded(directory):
    return flatten_dict(load_model(directory).variables, sep="/")


def assert_bitwise(found, expected):
    assert set(found) == set(expected)
    for path, value in expected.items():
        assert found[path].dtype == value.dtype, path
        np.testing.assert_array_equal(found[path], value, err_msg=path)


def test_a_converted_model_loads_with_every_value_in_its_place(tmp_path):
    conversion, expected = make_conversion(tmp_path / "source")
    run(conversion, tmp_path / "model")
    assert_bitwise(loaded(tmp_path / "model"), expected)
    model = load_model(tmp_path / "model")
    assert model.config == CONFIG
    assert model.system == "Watch."
    assert model.tokenizer.encode("a cat").ids.tolist()
    assert not (tmp_path / "model.partial").exists()


def test_large_tensors_are_read_in_slabs(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "SLAB_BYTES", 100)
    monkeypatch.setattr(loading, "CACHED_BYTES", 40)
    monkeypatch.setattr(importing, "BATCH_BYTES", 3000)
    conversion, expected = make_conversion(tmp_path / "source")
    run(conversion, tmp_path / "model")
    assert_bitwise(loaded(tmp_path / "model"), expected)


def test_any_slice_of_a_variable_is_that_slice_of_the_whole(tmp_path):
    vision = dataclasses.replace(CONFIG.vision, num_layers=3)
    config = dataclasses.replace(CONFIG, vision=vision)
    conversion, expected = make_conversion(tmp_path / "source", config)
    reader = loading.VariableReader(conversion)
    rng = np.random.default_rng(0)
    for path, whole in expected.items():
        np.testing.assert_array_equal(reader.read(path), whole, err_msg=path)
        ends = [np.sort(rng.integers(0, size + 1, 2)) for size in whole.shape]
        index = tuple(slice(int(start), int(stop)) for start, stop in ends)
        np.testing.assert_array_equal(reader.read(path, index), whole[index], err_msg=path)


def test_slabs_are_as_drawn():
    slabs = list(loading.slabs((10, 4), 0, 2, 24))
    assert [(s.start, s.stop) for s in slabs] == [(0, 3), (3, 6), (6, 9), (9, 10)]


def test_float16_becomes_bfloat16_in_one_rounding_and_the_manifest_says_so(tmp_path):
    config = dataclasses.replace(CONFIG, param_dtype="bfloat16")
    conversion, values = make_conversion(tmp_path / "source", config, np.float16)
    manifest = run(conversion, tmp_path / "model")
    found = loaded(tmp_path / "model")
    frozen, trained = "params/decoder/layer_0/block/mlp/up/kernel", "params/connector/fc1/kernel"
    assert found[frozen].dtype == ml_dtypes.bfloat16
    assert found[trained].dtype == np.float32
    np.testing.assert_array_equal(
        found[frozen], values[frozen].astype(np.float16).astype(ml_dtypes.bfloat16)
    )
    np.testing.assert_array_equal(found[trained], values[trained].astype(np.float16))
    exact = [p for p in values if "/connector/" in p or "/router/" in p]
    sources = {e.source for e in conversion.parts[0].table.entries() if e.target not in exact}
    assert manifest.rounded == {"float16": len(sources)}


def test_the_manifest_records_files_tensors_and_reasons(tmp_path):
    conversion, _ = make_conversion(tmp_path / "source")
    written = run(conversion, tmp_path / "model")
    assert read_manifest(tmp_path / "model") == written
    (part,) = written.parts
    assert list(part.tensors) == list(conversion.parts[0].source.names)
    for name, digest in part.files.items():
        assert hashlib.sha256((tmp_path / "source" / name).read_bytes()).hexdigest() == digest
    assert part.config == {"model_type": "made-up"}
    assert written.rounded == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v | {"table": 99}, "another version"),
        (lambda v: [], "another version"),
        (lambda v: {k: v[k] for k in v if k != "parts"}, "damaged"),
        (lambda v: v | {"parts": [{}]}, "damaged"),
    ],
)
def test_a_manifest_that_is_not_ours_is_refused(tmp_path, change, message):
    conversion, _ = make_conversion(tmp_path / "source")
    run(conversion, tmp_path / "model")
    path = tmp_path / "model" / "conversion.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(UserError, match=rf"conversion\.json.*{message}"):
        read_manifest(tmp_path / "model")


def test_what_no_source_has_starts_as_the_model_initialises_it(tmp_path):
    config = routed(weighting="tanh1")
    fresh = (*ROUTERS, "params/connector/fc1/kernel")
    conversion, expected = make_conversion(tmp_path / "source", config, fresh=fresh)
    run(conversion, tmp_path / "model")
    found = loaded(tmp_path / "model")
    whole = flatten_dict(init_variables(VideoLLM(config), jax.random.key(0)), sep="/")
    assert_bitwise(found, expected | {path: np.asarray(whole[path]) for path in fresh})
    assert not found[ROUTERS[0]].any()
    assert found[fresh[-1]].std() > 0


def adapter_of(tmp_path, in_size=32, out_size=48, rank=3):
    rng = np.random.default_rng(4)
    tensors = {
        "up.lora_A.weight": rng.normal(size=(rank, in_size)).astype(np.float32),
        "up.lora_B.weight": rng.normal(size=(out_size, rank)).astype(np.float32),
    }
    directory = tmp_path / "adapter"
    tiny_conversion.write_sharded(directory, tensors, shards=1)
    left_out = dict.fromkeys((r"up\.lora_[AB]\.weight",), "is merged")
    part = Part(
        role="adapter",
        family="peft",
        layout="tests",
        source=open_source(directory),
        table=Table(rules=(), left_out=left_out),
        config={},
    )
    return part, tensors


@pytest.mark.parametrize("slab", [100, 2**26])
def test_an_adapter_is_merged_into_its_kernel(tmp_path, monkeypatch, slab):
    monkeypatch.setattr(loading, "SLAB_BYTES", slab)
    conversion, expected = make_conversion(tmp_path / "source")
    part, tensors = adapter_of(tmp_path)
    path = "params/decoder/layer_2/block/mlp/up/kernel"
    conversion = dataclasses.replace(
        conversion,
        parts=(*conversion.parts, part),
        merges={path: Merge(a="up.lora_A.weight", b="up.lora_B.weight", scale=1.5)},
    )
    manifest = run(conversion, tmp_path / "model")
    a, b = (tensors[f"up.lora_{x}.weight"].astype(np.float64) for x in "AB")
    found = loaded(tmp_path / "model")
    np.testing.assert_allclose(found[path], expected[path] + 1.5 * (b @ a).T, atol=1e-5)
    others = {p: v for p, v in expected.items() if p != path}
    assert_bitwise({p: v for p, v in found.items() if p != path}, others)
    assert manifest.merged == (path,)
    assert list(manifest.part("adapter").left_out.values()) == ["is merged"] * 2


def with_tensors(tmp_path, change, **tables):
    """A conversion of a checkpoint whose tensors were changed, and whose table says more."""
    conversion, _ = make_conversion(tmp_path / "source")
    source = conversion.parts[0].source
    tensors = {name: source.read(name) for name in source.names}
    change(tensors)
    shutil.rmtree(tmp_path / "source")
    _, _ = make_conversion(tmp_path / "source")
    tiny_conversion.write_sharded(tmp_path / "source", tensors)
    part = dataclasses.replace(
        conversion.parts[0],
        source=open_source(tmp_path / "source"),
        table=dataclasses.replace(conversion.parts[0].table, **tables),
    )
    return dataclasses.replace(conversion, parts=(part,))


EMBEDDING, INVERSE = "model.params.embedding", "rotary.inv_freq"


def test_repeated_tensors_and_buffers_are_checked(tmp_path):
    frequencies = 10000.0 ** -np.linspace(0, 1, 8, dtype=np.float32)

    def change(tensors):
        tensors["head"] = tensors[EMBEDDING].copy()
        tensors[INVERSE] = frequencies.astype(ml_dtypes.bfloat16)
        tensors["position_ids"] = np.arange(5)[None]

    tables = {
        "same": {"head": EMBEDDING, "absent": EMBEDDING},
        "buffers": {
            INVERSE: lambda: frequencies,
            "position_ids": lambda: np.arange(5)[None],
            "absent too": lambda: frequencies,
        },
    }
    manifest = run(with_tensors(tmp_path, change, **tables), tmp_path / "model")
    assert {"head", INVERSE, "position_ids"} <= set(manifest.parts[0].tensors)


def differ(name, value):
    def change(tensors):
        tensors[name] = value(tensors[EMBEDDING])

    return change


def nan_at_the_end(embedding):
    embedding = embedding.copy()
    embedding[-1, -1] = np.nan
    return embedding


@pytest.mark.parametrize(
    ("change", "tables", "message"),
    [
        (differ("head", lambda e: e + 1e-6), {"same": {"head": EMBEDDING}}, "head differs from"),
        (differ("head", lambda e: e[1:]), {"same": {"head": EMBEDDING}}, "head differs from"),
        (
            differ(INVERSE, lambda _: np.full(8, 1.01, np.float32)),
            {"buffers": {INVERSE: lambda: np.ones(8, np.float32)}},
            r"rotary\.inv_freq is not .*found 1\.01",
        ),
        (
            differ("ids", lambda _: np.arange(1, 5)),
            {"buffers": {"ids": lambda: np.arange(4)}},
            "ids is not",
        ),
        (differ(EMBEDDING, nan_at_the_end), {}, rf"{EMBEDDING} holds a value that is not finite"),
    ],
)
def test_wrong_values_are_named_and_leave_nothing(tmp_path, change, tables, message):
    conversion = with_tensors(tmp_path, change, **tables)
    with pytest.raises(UserError, match=message):
        run(conversion, tmp_path / "model")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_a_value_too_large_for_the_dtype_is_refused(tmp_path):
    change = differ(EMBEDDING, lambda e: np.full_like(e, 3.4e38))
    conversion = with_tensors(tmp_path, change)
    config = dataclasses.replace(CONFIG, param_dtype="bfloat16")
    conversion = dataclasses.replace(conversion, config=config)
    with pytest.raises(UserError, match=rf"{EMBEDDING} holds 3.4e\+38, too large for bfloat16"):
        run(conversion, tmp_path / "model")


def test_a_value_too_large_for_any_dtype_is_not_sent_to_one_that_cannot_hold_it(tmp_path):
    change = differ(EMBEDDING, lambda e: np.full(e.shape, 1e39))
    with pytest.raises(UserError, match=rf"{EMBEDDING} holds 1e\+39, too large") as error:
        run(with_tensors(tmp_path, change), tmp_path / "model")
    assert "no dtype of ours holds it" in str(error.value)


def test_an_existing_destination_stays_unless_it_may_be_overwritten(tmp_path):
    conversion, _ = make_conversion(tmp_path / "source")
    run(conversion, tmp_path / "model")
    with pytest.raises(UserError, match=r"model exists; .*--overwrite"):
        run(conversion, tmp_path / "model")
    other = dataclasses.replace(conversion, system="Other.")
    run(other, tmp_path / "model", overwrite=True)
    assert load_model(tmp_path / "model").system == "Other."
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "source"]


def test_nothing_but_a_converted_model_is_overwritten(tmp_path):
    conversion, _ = make_conversion(tmp_path / "source")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    with pytest.raises(UserError, match="nothing that a conversion wrote"):
        run(conversion, tmp_path / "thesis", overwrite=True)
    run(conversion, tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="training run"):
        run(conversion, tmp_path / "run", overwrite=True)
    (tmp_path / "new.partial").mkdir()
    (tmp_path / "new.partial" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="in the way"):
        run(conversion, tmp_path / "new")
    assert (tmp_path / "new.partial" / "notes.txt").exists()


def test_the_old_model_stays_when_the_new_one_fails(tmp_path):
    conversion, expected = make_conversion(tmp_path / "source")
    run(conversion, tmp_path / "model")
    bad = with_tensors(tmp_path / "bad", differ(EMBEDDING, nan_at_the_end))
    with pytest.raises(UserError, match="not finite"):
        run(bad, tmp_path / "model", overwrite=True)
    assert_bitwise(loaded(tmp_path / "model"), expected)


class Killed(BaseException):
    """As an interrupt: nothing but `finally` runs."""


def run_killed(monkeypatch, conversion, destination, calls, function, before):
    """Makes the n-th call of `v1.partial.<function>` the last thing that happens."""
    partial = importing.v1.partial
    real, count = getattr(partial, function), iter(range(calls))

    def patched(path, *rest):
        last = next(count) == calls - 1
        if last and before:
            raise Killed
        real(path, *rest)
        if last:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(partial, function, patched)
        with pytest.raises(Killed):
            run(conversion, destination)


@pytest.mark.parametrize(
    ("calls", "function", "before", "said"),
    [
        (1, "save", True, "0 variables are there"),
        (2, "save", True, "variables are there"),
        (2, "save", False, "variables are there"),
        (1, "finalize", True, "going on"),
        (1, "finalize", False, "variables are there"),
    ],
)
def test_an_interrupted_conversion_goes_on(
    tmp_path, monkeypatch, capsys, calls, function, before, said
):
    monkeypatch.setattr(importing, "BATCH_BYTES", 20_000)
    fresh = ("params/connector/fc1/kernel",)
    conversion, expected = make_conversion(tmp_path / "source", fresh=fresh)
    run_killed(monkeypatch, conversion, tmp_path / "model", calls, function, before)
    assert not (tmp_path / "model").exists()
    # What Orbax leaves of a save that a signal stopped.
    (tmp_path / "model.partial" / "weights.partial_save.orbax-checkpoint-tmp" / "state").mkdir(
        parents=True
    )
    if (function, before) == ("finalize", False):
        # All is there: nothing is saved again.
        monkeypatch.setattr(importing.v1.partial, "save", None)
    console = rich.console.Console(width=200)
    import_model(conversion, tmp_path / "model", overwrite=False, console=console)
    assert said in capsys.readouterr().out
    found = loaded(tmp_path / "model")
    assert_bitwise(
        {p: v for p, v in found.items() if p not in fresh},
        {p: v for p, v in expected.items() if p not in fresh},
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "source"]


def test_work_that_was_saved_is_not_done_again(tmp_path, monkeypatch):
    monkeypatch.setattr(importing, "BATCH_BYTES", 20_000)
    conversion, expected = make_conversion(tmp_path / "source")
    run_killed(monkeypatch, conversion, tmp_path / "model", 3, "save", True)
    saved = json.loads((tmp_path / "model.partial" / "journal.json").read_text())["saved"]
    assert saved
    reads = []
    real = loading.VariableReader.read
    monkeypatch.setattr(
        loading.VariableReader, "read", lambda self, path: reads.append(path) or real(self, path)
    )
    run(conversion, tmp_path / "model")
    assert sorted(saved + reads) == sorted(expected)


def test_another_conversion_starts_over_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importing, "BATCH_BYTES", 20_000)
    conversion, _ = make_conversion(tmp_path / "source")
    run_killed(monkeypatch, conversion, tmp_path / "model", 3, "save", True)
    # The same names and shapes; other values.
    file = tmp_path / "source" / "model-00001-of-00003.safetensors"
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    console = rich.console.Console(width=200)
    import_model(conversion, tmp_path / "model", overwrite=False, console=console)
    assert "is of another conversion; starting over" in capsys.readouterr().out


WORKER = """
import os, signal, sys
from pathlib import Path
import rich.console
from tests.tiny_conversion import make_conversion
from videollm_mod_jax.conversion import importing

importing.BATCH_BYTES = 20_000
conversion, _ = make_conversion(Path(sys.argv[1]) / "source")
real = importing.{where}
count = iter(range(100))

def patched(*arguments):
    if next(count) == {calls}:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments)

importing.{where} = patched
importing.import_model(
    conversion, Path(sys.argv[1]) / "model", overwrite=False, console=rich.console.Console()
)
"""


@pytest.mark.parametrize(("where", "calls"), [("write_json", 2), ("output.put_in_place", 0)])
def test_a_killed_process_leaves_no_model_and_the_next_one_finishes(tmp_path, where, calls):
    code = WORKER.format(where=where, calls=calls)
    command = [sys.executable, "-c", code, str(tmp_path)]
    killed = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "model").exists()
    conversion, expected = make_conversion(tmp_path / "again")
    parts = dataclasses.replace(conversion.parts[0], source=open_source(tmp_path / "source"))
    conversion = dataclasses.replace(
        conversion, parts=(parts,), tokenizer=tmp_path / "source", config=CONFIG
    )
    run(conversion, tmp_path / "model")
    assert_bitwise(loaded(tmp_path / "model"), expected)
    assert not (tmp_path / "model.partial").exists()


ENDING = """
import os, shutil, signal, sys
from pathlib import Path
import rich.console
from tests.tiny_conversion import make_conversion
from videollm_mod_jax.conversion import destination, importing
from orbax.checkpoint._src.path import async_path

def kill(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

importing.BATCH_BYTES, importing._LINKED_BYTES = 20_000, 1000
conversion, _ = make_conversion(Path(sys.argv[1]) / "source")
module, name = {where}
real, count = getattr(module, name), iter(range(1000))

def patched(*arguments, **options):
    if next(count) == {calls}:
        kill()
    return real(*arguments, **options)

def armed(*arguments, **options):
    setattr(module, name, patched)
    return finalize(*arguments, **options)

finalize = importing.v1.partial.finalize
importing.v1.partial.finalize = armed
importing.import_model(
    conversion, Path(sys.argv[1]) / "model", overwrite=False, console=rich.console.Console()
)
"""


@pytest.mark.parametrize(
    ("where", "calls"),
    [
        ("async_path, 'rename'", 0),
        ("async_path, 'rename'", 7),
        ("async_path, 'rmtree'", 1),
        ("importing, '_take_weights'", 0),
        ("importing, '_hashes'", 0),
        ("destination.os, 'rename'", 1),
        ("destination.os, 'rename'", 2),
        ("importing.output, 'put_in_place'", 0),
        ("destination.shutil, 'rmtree'", -1),
    ],
)
def test_a_process_killed_while_it_completes_is_gone_on_with(tmp_path, monkeypatch, where, calls):
    code = ENDING.format(where=where, calls=calls)
    if calls < 0:
        # After the rename to the destination.
        code = code.replace(
            "importing.import_model(",
            "place = importing.os.rename\n"
            "def rename(a, b):\n    place(a, b)\n    Path(b).name == 'model' "
            "and Path(a).name == 'model' and kill()\n"
            "importing.os.rename = rename\nimporting.import_model(",
        )
    command = [sys.executable, "-c", code, str(tmp_path)]
    killed = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    conversion, expected = make_conversion(tmp_path / "again")
    parts = dataclasses.replace(conversion.parts[0], source=open_source(tmp_path / "source"))
    conversion = dataclasses.replace(conversion, parts=(parts,), tokenizer=tmp_path / "source")
    read = []
    real = loading.VariableReader.read
    monkeypatch.setattr(loading.VariableReader, "read", lambda *a: [read.append(a[1]), real(*a)][1])
    run(conversion, tmp_path / "model")
    assert read == []
    assert_bitwise(loaded(tmp_path / "model"), expected)
    assert not (tmp_path / "model.partial").exists()


def test_too_little_room_is_said_before_any_work(tmp_path, monkeypatch):
    conversion, values = make_conversion(tmp_path / "source")
    needed = sum(value.nbytes for value in values.values())
    usage = shutil._ntuple_diskusage
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2 * needed, needed + 1, needed - 1))
    with pytest.raises(UserError, match=f"{needed:,} bytes are needed and {needed - 1:,} are free"):
        run(conversion, tmp_path / "model")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        # As Orbax has it.
        ValueError("RESOURCE_EXHAUSTED: Failed to write: No space left on device [os_error_code]"),
    ],
)
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, error):
    monkeypatch.setattr(importing, "BATCH_BYTES", 20_000)
    conversion, _ = make_conversion(tmp_path / "source")

    def full(*_):
        raise error

    monkeypatch.setattr(importing.v1.partial, "finalize", full)
    with pytest.raises(UserError, match="the disk is full; make room") as caught:
        run(conversion, tmp_path / "model")
    assert "\n" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


EIGHT_DEVICES = """
import sys
from pathlib import Path
import jax, numpy as np
from flax.traverse_util import flatten_dict
from tests.tiny import CONFIG, routed
from tests.tiny_conversion import make_conversion
from videollm_mod_jax.conversion.loading import load_hf
from videollm_mod_jax.conversion.source import Source
from videollm_mod_jax.training import sharding

assert jax.device_count() == 8
fresh = ("params/connector/fc1/kernel",)
conversion, expected = make_conversion(Path(sys.argv[1]), fresh=fresh)
read = []
real = Source.read_slice
def counted(self, name, index):
    array = real(self, name, index)
    read.append(array.nbytes)
    return array
Source.read_slice = counted
Source.read = None
one = None
for rules, shape in (("fsdp_tensor", (1, 4, 2)), ("fsdp", (1, -1, 1)), ("fsdp", (2, 4, 1))):
    read.clear()
    layout = sharding.make_layout(rules, shape)
    model = load_hf(conversion, layout)
    leaves = flatten_dict(model.variables, sep="/")
    assert set(leaves) == set(expected)
    held, split = 0, 0
    for path, leaf in leaves.items():
        if path in fresh:
            one = np.asarray(leaf) if one is None else one
            np.testing.assert_array_equal(leaf, one)
            continue
        np.testing.assert_array_equal(leaf, expected[path], err_msg=path)
        sizes = [shard.data.nbytes for shard in leaf.addressable_shards]
        # A leaf that all devices hold is read once for all of them.
        held += sizes[0] if leaf.is_fully_replicated else sum(sizes)
        split += not leaf.is_fully_replicated
    assert split > 10
    assert sum(read) == held, (rules, sum(read), held)
print("equal")
"""


def test_each_device_of_a_mesh_reads_its_own_slices(tmp_path):
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-c", EIGHT_DEVICES, str(tmp_path / "source")],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"XLA_FLAGS": flags},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip().endswith("equal"), done.stderr
