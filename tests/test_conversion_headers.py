"""Headers of strangers' weights: one line, soon, whatever they claim.

What took quadratic time would be waited for in vain: hours.
"""

import json
import resource
import struct
import zipfile

import numpy as np
import pytest

from videollm_mod_jax.conversion.safetensors_file import safetensors_infos
from videollm_mod_jax.conversion.source import open_source
from videollm_mod_jax.conversion.torch_bin import torch_infos
from videollm_mod_jax.errors import UserError

torch = pytest.importorskip("torch")


def write_header(path, header, data=b""):
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


def refused(read, path, words):
    """The line of a refusal that took no memory to speak of."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=words) as error:
        read(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600 * 2**10
    message = str(error.value)
    assert str(path) in message
    assert "\n" not in message
    assert len(message) < 600


def entry(shape, begin=0, end=0):
    return json.dumps({"dtype": "F32", "shape": shape, "data_offsets": [begin, end]})


def test_names_that_repeat_are_refused_however_many_there_are(tmp_path):
    names = [f'"{i}": {entry([0])}' for i in range(100_000)]
    header = "{" + ", ".join([*names, names[-1]]) + "}"
    path = write_header(tmp_path / "model.safetensors", header.encode())
    refused(safetensors_infos, path, "names '99999' twice")


def test_a_million_axes_are_refused(tmp_path):
    header = f'{{"a": {entry([1] * 1_000_000, 0, 4)}}}'.encode()
    path = write_header(tmp_path / "model.safetensors", header, bytes(4))
    refused(safetensors_infos, path, "'a' has 1000000 axes; expected at most 32")


def test_a_million_tensors_are_refused_before_they_are_read(tmp_path):
    header = ("{" + ", ".join(f'"{i}": {entry([0])}' for i in range(1_500_000)) + "}").encode()
    path = write_header(tmp_path / "model.safetensors", header)
    del header
    refused(safetensors_infos, path, "has no safetensors header of at most 16777216 bytes")


@pytest.mark.parametrize(
    ("ranges", "words"),
    [
        ([(0, 8), (4, 12)], "'1' begins at byte"),
        ([(0, 8), (8, 10**15)], "'1' has .* bytes; expected 8"),
        ([(0, 8), (16, 24)], "'1' begins at byte"),
        ([(-8, 0), (0, 8)], "begins at byte"),
        ([(8, 0), (0, 8)], "'0' has -8 bytes"),
        ([(0, 8), (8, 16), (16, 24)], "cut short: 8 bytes are missing"),
    ],
)
def test_ranges_that_overlap_or_lie_outside_are_refused(tmp_path, ranges, words):
    entries = ", ".join(f'"{i}": {entry([2], *ends)}' for i, ends in enumerate(ranges))
    path = write_header(tmp_path / "model.safetensors", f"{{{entries}}}".encode(), bytes(16))
    refused(safetensors_infos, path, words)


def test_an_index_without_end_is_not_read(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    with index.open("wb") as file:
        file.truncate(8 << 30)
    refused(lambda path: open_source(path.parent), index, "more than 67108864 bytes")


def test_a_pickle_of_gigabytes_is_not_read(tmp_path):
    path, size = tmp_path / "pytorch_model.bin", (4 << 30) - 4096
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"")
        archive.writestr("archive/byteorder", b"little")
    data = path.read_bytes()
    # The bytes of the pickle become a hole between its header and the next one's.
    second = data.index(b"PK\3\4", 4)
    directory = data.index(b"PK\1\2")
    local = data[:18] + struct.pack("<II", size, size) + data[26:second]
    with path.open("wb") as file:
        file.write(local)
        file.seek(len(local) + size)
        file.write(data[second:directory])
        at = file.tell()
        first = bytearray(data[directory:])
        first[20:28] = struct.pack("<II", size, size)
        other = first.index(b"PK\1\2", 4)
        first[other + 42 : other + 46] = struct.pack("<I", len(local) + size)
        end = first.index(b"PK\5\6")
        first[end + 16 : end + 20] = struct.pack("<I", at)
        file.write(bytes(first))
    refused(torch_infos, path, f"'data.pkl' in it has {size} bytes; expected at most")


def test_a_directory_of_gigabytes_is_not_read(tmp_path):
    path, size = tmp_path / "pytorch_model.bin", 3 << 30
    with path.open("wb") as file:
        file.write(b"PK\3\4")
        file.truncate(size)
        file.seek(size)
        file.write(struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 1, 1, size - 16, 16, 0))
    refused(torch_infos, path, "is cut short")


def test_a_tensor_of_many_axes_in_a_pickle_is_refused(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.zeros([1] * 40)}, path)
    refused(torch_infos, path, "40 axes")


def test_what_torch_and_safetensors_write_is_still_read(tmp_path):
    torch.save({"a": torch.arange(6.0).reshape(2, 3)}, tmp_path / "pytorch_model.bin")
    np.testing.assert_array_equal(open_source(tmp_path).read("a"), np.arange(6).reshape(2, 3))
