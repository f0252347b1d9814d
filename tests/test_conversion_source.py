import hashlib
import json
import struct
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from videollm_mod_jax.conversion.source import open_source
from videollm_mod_jax.conversion.stored import TensorInfo, contiguous_strides, extent
from videollm_mod_jax.errors import UserError

CODES = {
    "bfloat16": "BF16",
    "float16": "F16",
    "float32": "F32",
    "float64": "F64",
    "int64": "I64",
    "uint8": "U8",
    "bool": "BOOL",
}


def draw(shape, dtype, seed=0):
    """Random bits, of which only two are a bool."""
    dtype = np.dtype(dtype)
    bits = np.random.default_rng(seed).integers(0, 256, (*shape, dtype.itemsize), np.uint8)
    return (bits % 2 if dtype.kind == "b" else bits).view(dtype)[..., 0]


def header_of(tensors):
    """The header of a safetensors file, and its data."""
    entries, data = {}, b""
    for name, tensor in tensors.items():
        offsets = [len(data), len(data) + tensor.nbytes]
        code = CODES[tensor.dtype.name]
        entries[name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": offsets}
        data += tensor.tobytes()
    return entries, data


def write_raw(file, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def write(file, tensors):
    write_raw(file, *header_of(tensors))


def write_index(directory, places, name="model.safetensors.index.json"):
    (directory / name).write_text(json.dumps({"metadata": {}, "weight_map": places}))


@pytest.fixture
def shards(tmp_path):
    """Two shards, with three tensors."""
    tensors = {
        "b": draw((4, 3), ml_dtypes.bfloat16, 1),
        "a": draw((2,), np.float32, 2),
        "c": draw((), np.int64, 3),
    }
    write(tmp_path / "model-1.safetensors", {"b": tensors["b"], "a": tensors["a"]})
    write(tmp_path / "model-2.safetensors", {"c": tensors["c"]})
    places = {name: f"model-{1 + (name == 'c')}.safetensors" for name in "abc"}
    write_index(tmp_path, places)
    return tmp_path, tensors, places


def message(directory, weights="model"):
    with pytest.raises(UserError) as caught:
        open_source(directory, weights)
    text = str(caught.value)
    assert "\n" not in text
    return text.replace(f"{directory}/", "")


def test_shards_are_one_set_of_tensors_in_the_order_of_their_bytes(shards):
    directory, tensors, _ = shards
    source = open_source(directory)
    assert source.names == ("b", "a", "c")
    assert [file.name for file in source.files] == ["model-1.safetensors", "model-2.safetensors"]
    for name, tensor in tensors.items():
        info, found = source.info(name), source.read(name)
        assert (info.shape, info.dtype) == (tensor.shape, tensor.dtype)
        assert (found.shape, found.dtype) == (tensor.shape, tensor.dtype)
        assert found.tobytes() == tensor.tobytes()
        assert found.flags.owndata
        assert found.flags.writeable
    assert source.info("c").file == directory / "model-2.safetensors"


def test_the_safetensors_library_writes_what_we_read(tmp_path):
    dtypes = [ml_dtypes.bfloat16, *np.typecodes["AllInteger"], *"efd?"]
    tensors = {f"{i}": draw((3, 5), dtype, i) for i, dtype in enumerate(dtypes)}
    tensors |= {"empty": np.zeros((0, 3), np.float32), "scalar": np.array(2.5)}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    source = open_source(tmp_path)
    assert set(source.names) == set(tensors)
    for name, tensor in tensors.items():
        assert source.read(name).dtype == tensor.dtype
        assert source.read(name).shape == tensor.shape
        assert source.read(name).tobytes() == tensor.tobytes()


@pytest.mark.parametrize(
    "index",
    [
        np.s_[:, :, :],
        np.s_[1:3, :, :],
        np.s_[:, 2:, 1:4],
        np.s_[4:, -2:-1, 0:1],
        np.s_[2:2, :, :],
    ],
)
def test_a_slice_is_the_slice_of_the_whole(tmp_path, index, monkeypatch):
    # So small that the slices are put together from several mapped parts of the file.
    monkeypatch.setattr("videollm_mod_jax.conversion.stored._MAPPED_BYTES", 100)
    tensor = draw((5, 4, 6), np.float32)
    write(tmp_path / "model.safetensors", {"before": draw((3,), np.uint8), "w": tensor})
    found = open_source(tmp_path).read_slice("w", index)
    assert found.flags.owndata
    np.testing.assert_array_equal(found.view(np.int32), tensor[index].view(np.int32))


def test_a_slice_with_a_step_is_refused(shards):
    with pytest.raises(ValueError, match="step"):
        open_source(shards[0]).read_slice("b", np.s_[::2, :])


def test_elements_are_where_the_drawing_says(tmp_path):
    matrix = np.array([[0, 1, 2], [10, 11, 12]], np.float16)
    file = tmp_path / "file"
    file.write_bytes(bytes(64) + matrix.T.tobytes())
    strides = (2, 4)
    info = TensorInfo(file=file, offset=64, shape=(2, 3), strides=strides, dtype=matrix.dtype)
    np.testing.assert_array_equal(info.read(np.s_[:, :]), matrix)
    np.testing.assert_array_equal(info.read(np.s_[1:, 1:]), matrix[1:, 1:])
    assert contiguous_strides((2, 3, 4), 2) == (24, 8, 2)
    assert extent((2, 3), (2, 4), 2) == 12 == info.nbytes
    assert extent((3, 0), (2, 4), 2) == 0


def test_a_tensor_without_elements_takes_no_bytes(tmp_path):
    entries, data = header_of({"w": draw((3,), np.uint8)})
    entries["empty"] = {"dtype": "F32", "shape": [0, 5], "data_offsets": [0, 0]}
    write_raw(tmp_path / "model.safetensors", entries, data)
    source = open_source(tmp_path)
    source.files[0].unlink()
    assert source.names == ("empty", "w")
    assert source.read("empty").shape == (0, 5)


PEAK = """
import re, sys
from pathlib import Path
from videollm_mod_jax.conversion.source import open_source

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024

source = open_source(Path(sys.argv[1]))
base = peak()
for name in source.names:
    source.read(name)
    source.read_slice(name, (slice(None), slice(0, 512)))
print(peak() - base)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_streaming_a_shard_keeps_little_of_it_in_memory(tmp_path):
    count, size = 12, 32 * 2**20
    entries = {
        f"{start}": {"dtype": "BF16", "shape": [16384, 1024], "data_offsets": [start, start + size]}
        for start in range(0, count * size, size)
    }
    file = tmp_path / "model.safetensors"
    write_raw(file, entries)
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size + count * size)
    command = [sys.executable, "-c", PEAK, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(result.stdout) < 2 * 32


def test_hash_is_that_of_the_whole_file(shards):
    source = open_source(shards[0])
    content = source.files[0].read_bytes()
    assert source.hash(source.files[0]) == hashlib.sha256(content).hexdigest()


def test_safetensors_are_preferred(shards):
    directory, _, _ = shards
    write_index(directory, {"a": "absent.bin"}, "pytorch_model.bin.index.json")
    assert open_source(directory).names == ("b", "a", "c")


def test_model_and_adapter_are_told_apart(shards):
    directory, _, _ = shards
    write(directory / "adapter_model.safetensors", {"lora": draw((2, 2), np.float32)})
    assert open_source(directory).names == ("b", "a", "c")
    assert open_source(directory, "adapter").names == ("lora",)


def test_an_adapter_is_no_model(tmp_path):
    write(tmp_path / "adapter_model.safetensors", {"lora": draw((2, 2), np.float32)})
    assert message(tmp_path).endswith(
        "it holds adapter weights: give the directory of the model instead"
    )


def test_a_directory_that_is_not_there(tmp_path):
    assert "does not exist; expected the directory of a checkpoint" in message(tmp_path / "x")
    (tmp_path / "file").touch()
    assert "file is a file; expected the directory" in message(tmp_path / "file")


@pytest.mark.parametrize(
    ("file", "found"),
    [
        ("README.md", "download them into it"),
        ("model.Q4.gguf", "it holds model.Q4.gguf, a format that is not read"),
        ("consolidated.00.pth", "it holds consolidated.00.pth, a format that is not read"),
        ("flax_model.msgpack", "it holds flax_model.msgpack, a format that is not read"),
        ("model-00001-of-00002.safetensors", "without an index: download the index too"),
        ("pytorch_model-00001-of-00002.bin", "without an index: download the index too"),
    ],
)
def test_a_directory_without_weights_says_what_was_looked_for(tmp_path, file, found):
    (tmp_path / file).touch()
    text = message(tmp_path)
    assert found in text
    assert "model.safetensors.index.json, pytorch_model.bin," in text


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_pointer_of_git_lfs_is_recognised(tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert message(tmp_path).startswith(
        f"{name} is a pointer of git-lfs, not the weights; run 'git lfs pull' in "
    )


def test_an_absent_shard_is_named(shards):
    directory, _, _ = shards
    (directory / "model-2.safetensors").unlink()
    assert "lacks the shard model-2.safetensors, which model.safetensors." in message(directory)


def test_a_tensor_that_is_not_in_its_shard(shards):
    directory, tensors, _ = shards
    write(directory / "model-1.safetensors", {"b": tensors["b"]})
    assert message(directory).startswith("model-1.safetensors lacks 'a', which model.safetensors")


def test_a_tensor_that_the_index_does_not_name(shards):
    directory, _, places = shards
    write_index(directory, {name: places[name] for name in "bc"})
    assert message(directory).startswith("model-1.safetensors holds 'a', which model.safetensors")


def test_a_tensor_in_two_shards(shards):
    directory, tensors, _ = shards
    write(directory / "model-2.safetensors", {"c": tensors["c"], "a": tensors["a"]})
    expected = "'a' is in model-1.safetensors and in model-2.safetensors; they are not of one"
    assert message(directory).startswith(expected)


def test_a_tensor_in_another_shard_than_the_index_says(shards):
    directory, _, places = shards
    write_index(directory, {**places, "a": "model-2.safetensors"})
    expected = "model-1.safetensors holds 'a', which model.safetensors.index.json has in model-2"
    assert message(directory).startswith(expected)


@pytest.mark.parametrize("shard", ["../model-1.safetensors", "/x.bin", "a.pth", 3, "", "x\n.bin"])
def test_a_shard_lies_beside_its_index(shards, shard):
    directory, _, places = shards
    write_index(directory, {**places, "a": shard})
    expected = f"'a' is in {shard!r}; expected a .safetensors or .bin file beside it"
    assert message(directory).endswith(expected)


def test_an_index_names_a_tensor_once(shards):
    directory, _, _ = shards
    text = '{"weight_map": {"a": "model-1.safetensors", "b": "x", "a": "model-2.safetensors"}}'
    (directory / "model.safetensors.index.json").write_text(text)
    assert message(directory).startswith("model.safetensors.index.json names 'a' twice")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("{", "does not hold json where it should"),
        ("[]", "holds json that is not an object"),
        ("{}", "has no table 'weight_map'"),
        ('{"weight_map": {}}', "has no table 'weight_map'"),
    ],
)
def test_a_damaged_index(shards, text, found):
    directory, _, _ = shards
    (directory / "model.safetensors.index.json").write_text(text)
    assert message(directory).startswith(f"model.safetensors.index.json {found}")


def test_a_name_twice_in_one_header(tmp_path):
    entry = '"w": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}'
    write_raw(tmp_path / "model.safetensors", f"{{{entry}, {entry}}}".encode(), b"1")
    assert message(tmp_path).startswith("model.safetensors names 'w' twice; the file is damaged")


@pytest.mark.parametrize("kept", [0, 7, 8, 30, -1])
def test_a_file_that_is_cut_short(tmp_path, kept):
    file = tmp_path / "model.safetensors"
    write(file, {"w": draw((4,), np.float32)})
    whole = file.read_bytes()
    file.write_bytes(whole[:kept])
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    missing = (len(whole) if kept < 0 else header) - len(whole[:kept])
    expected = f"cut short: {missing} bytes are missing" if kept not in (0, 7) else "has no safet"
    assert expected in message(tmp_path)


@pytest.mark.parametrize(
    ("header", "data", "found"),
    [
        (b"not json", b"", "does not hold json where it should"),
        (b"\xff\xfe", b"", "does not hold json where it should"),
        ({"w": 3}, b"", "the header describes 'w' as 3"),
        ({"w": {"dtype": "U8", "shape": [-1], "data_offsets": [0, 1]}}, b"", "describes 'w' as"),
        ({"w": {"dtype": "U8", "shape": [2], "data_offsets": [0, 1]}}, b"1", "'w' has 1 bytes;"),
        ({"w": {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]}}, b"12", "begins at byte"),
        ({"w": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}, b"12", "has 1 bytes behind"),
        (
            {
                "v": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]},
                "w": {"dtype": "U8", "shape": [2], "data_offsets": [1, 3]},
            },
            b"123",
            "'w' begins at byte",
        ),
        (
            {"w": {"dtype": "F8_E4M3", "shape": [1], "data_offsets": [0, 1]}},
            b"1",
            "'w' has the dtype F8_E4M3; expected one of BF16, F16,",
        ),
    ],
)
def test_a_header_that_is_wrong(tmp_path, header, data, found):
    write_raw(tmp_path / "model.safetensors", header, data)
    text = message(tmp_path)
    assert text.startswith("model.safetensors")
    assert found in text


def test_a_file_that_is_something_else(tmp_path):
    (tmp_path / "model.safetensors").write_text("<!DOCTYPE html><html>Not found</html>")
    assert message(tmp_path).startswith("model.safetensors has no safetensors header")


def test_a_file_that_shrinks_after_it_was_opened(shards):
    source = open_source(shards[0])
    source.files[0].write_bytes(b"")
    with pytest.raises(UserError, match=r"model-1\.safetensors cannot be read any more"):
        source.read("b")
