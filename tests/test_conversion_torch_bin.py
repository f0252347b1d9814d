import os
import pickle
import pickletools
import struct
import sys
import zipfile

import ml_dtypes
import numpy as np
import pytest

from videollm_mod_jax.conversion.restricted_pickle import RefusedError, interpret
from videollm_mod_jax.conversion.source import open_source
from videollm_mod_jax.conversion.torch_bin import torch_infos
from videollm_mod_jax.errors import UserError

# A small assembler of the instructions that torch.save writes, protocol 2.
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
ORDERED_DICT = b"ccollections\nOrderedDict\n"
CALL = b"R"


def number(value):
    return b"J" + struct.pack("<i", value)


def text(value):
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def group(*items):
    return b"(" + b"".join(items) + b"t"


def storage(key, count, kind="FloatStorage"):
    name = f"ctorch\n{kind}\n".encode()
    return group(text("storage"), name, text(key), text("cpu"), number(count)) + b"Q"


def tensor(stored, offset, shape, strides):
    sizes = [group(*map(number, numbers)) for numbers in (shape, strides)]
    hooks = ORDERED_DICT + b")" + CALL
    return REBUILD + group(stored, number(offset), *sizes, b"\x89", hooks) + CALL


def parameter(of):
    hooks = ORDERED_DICT + b")" + CALL
    return b"ctorch._utils\n_rebuild_parameter\n" + group(of, b"\x88", hooks) + CALL


def table(items):
    return b"}(" + b"".join(text(key) + value for key, value in items) + b"u"


def write(file, program, storages=(), root="archive", **options):
    with zipfile.ZipFile(file, "w", **options) as archive:
        archive.writestr(f"{root}/data.pkl", b"\x80\x02" + program + b".")
        archive.writestr(f"{root}/byteorder", b"little")
        for key, data in enumerate(storages):
            archive.writestr(f"{root}/data/{key}", data)


def message(file):
    with pytest.raises(UserError) as caught:
        torch_infos(file)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(f"{file.parent}/", "")


@pytest.fixture
def file(tmp_path):
    return tmp_path / "pytorch_model.bin"


def test_tensors_of_an_archive_made_by_hand(file):
    numbers = np.arange(24, dtype=np.float32)
    halves = np.arange(6).astype(ml_dtypes.bfloat16)
    first, second = storage("0", 24), storage("1", 6, "BFloat16Storage")
    state = b"}" + text("_metadata") + ORDERED_DICT + b")" + CALL + b"s"
    program = (
        ORDERED_DICT
        + b")"
        + CALL
        + table(
            [
                ("rows", tensor(first, 0, (4, 6), (6, 1))),
                ("tied", tensor(first, 0, (4, 6), (6, 1))),
                ("transposed", parameter(tensor(first, 0, (6, 4), (1, 6)))),
                ("every other", tensor(first, 1, (2, 3), (12, 2))),
                ("scalar", tensor(first, 7, (), ())),
                ("empty", tensor(first, 24, (0, 5), (5, 1))),
                ("halves", tensor(second, 2, (4,), (1,))),
            ]
        )[1:]
        + state
        + b"b"
    )
    write(file, program, [numbers.tobytes(), halves.tobytes()], root="any name")
    rows = numbers.reshape(4, 6)
    expected = {
        "rows": rows,
        "tied": rows,
        "transposed": rows.T,
        "every other": rows[::2, 1::2],
        "scalar": np.float32(7),
        "empty": np.zeros((0, 5), np.float32),
        "halves": halves[2:],
    }
    source = open_source(file.parent)
    assert set(source.names) == set(expected)
    for name, array in expected.items():
        found = source.read(name)
        assert found.dtype == source.info(name).dtype == array.dtype
        assert found.flags.owndata
        np.testing.assert_array_equal(found, array, strict=True)
    part = source.read_slice("transposed", np.s_[2:5, 1:3])
    np.testing.assert_array_equal(part, rows.T[2:5, 1:3])
    assert source.info("rows") == source.info("tied")


@pytest.mark.parametrize("protocol", [2, 4])
def test_torch_saved_what_we_read(file, protocol):
    torch = pytest.importorskip("torch")
    base = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    floats = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
    integers = [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8]
    tensors = {str(dtype): base.to(dtype) for dtype in floats + integers}
    tensors |= {
        "bool": base > 0,
        "parameter": torch.nn.Parameter(base),
        "transposed": base.T,
        "sliced": base[3:30:3, 5::2],
        "swapped": base.reshape(4, 10, 30).permute(2, 0, 1)[1:],
        "expanded": base[0].expand(5, 30),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "tied": base,
    }
    for saved in (tensors, torch.nn.Linear(3, 2).state_dict()):
        torch.save(saved, file, pickle_protocol=protocol)
        source = open_source(file.parent)
        assert set(source.names) == set(saved)
        for name, theirs in saved.items():
            ours = source.read(name)
            assert str(theirs.dtype) == f"torch.{ours.dtype.name}"
            assert tuple(theirs.shape) == ours.shape
            flat = theirs.detach().contiguous().reshape(-1)
            assert flat.view(torch.uint8).numpy().tobytes() == ours.tobytes()


class Danger:
    """Pickles to a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def touch_by_system(path):
    return Danger(os.system, f"touch '{path}'")


def touch_by_eval(path):
    return Danger(eval, f"open({str(path)!r}, 'w')")


def touch_by_open(path):
    return Danger(open, str(path), "w")


def touch_by_attribute(path):
    return Danger(Danger(getattr, os, "system"), f"touch '{path}'")


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    ("attack", "name"),
    [
        (touch_by_system, f"{os.system.__module__}.system"),
        (touch_by_eval, "eval"),
        (touch_by_open, "open"),
    ],
)
def test_a_pickle_that_calls_something_else_runs_nothing(file, protocol, attack, name):
    canary = file.parent / "canary"
    program = pickle.dumps(attack(canary), protocol)
    pickle.loads(program)
    assert canary.exists(), "the attack works"
    canary.unlink()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", program)
    found = message(file)
    assert found.startswith("pytorch_model.bin: its pickle asks for '")
    assert f"{name}'; nothing was run; if you trust its origin, load it once with torch" in found
    assert not canary.exists()


TENSOR = tensor(storage("0", 1), 0, (1,), (1,))


@pytest.mark.parametrize(
    ("program", "found"),
    [
        # Other ways to name a function.
        (b"cos\nsystem\n" + group(text("touch canary")) + CALL, "asks for 'os.system'"),
        (b"c__builtin__\neval\n" + group(text("1")) + CALL, "asks for '__builtin__.eval'"),
        (b"cbuiltins\ngetattr\n", "asks for 'builtins.getattr'"),
        (b"\x8c\x02os\x8c\x06system\x93", "asks for 'os.system'"),
        (b"\x8c\x05torch\x8c\x10_utils.os.system\x93", "asks for 'torch._utils.os.system'"),
        (b"ccollections\nOrderedDict.__init__\n", "asks for 'collections.OrderedDict.__init__'"),
        (b"ctorch._utils\n_rebuild_tensor_v2.__globals__\n", "_rebuild_tensor_v2.__globals__'"),
        (b"ctorch._utils\n_rebuild_sparse_tensor\n", "asks for 'torch._utils._rebuild_sparse"),
        (b"ctorch\nload\n", "asks for 'torch.load'"),
        (b"(ios\nsystem\n", "uses the instruction INST 'os system'"),
        # Other ways to call, or to build an object.
        (ORDERED_DICT + b")\x81", "uses the instruction NEWOBJ"),
        (ORDERED_DICT + b")}\x92", "uses the instruction NEWOBJ_EX"),
        (b"(" + ORDERED_DICT + b"o", "uses the instruction OBJ"),
        (b"\x82\x01", "uses the instruction EXT1 1"),
        (b"Pid\n", "uses the instruction PERSID 'id'"),
        (b"\x97", "uses the instruction NEXT_BUFFER"),
        # State.
        (ORDERED_DICT + table([("__code__", b"N")]) + b"b", "sets the state of a function"),
        (TENSOR + table([("__setstate__", b"N")]) + b"b", "sets the state of a TensorInfo"),
        (ORDERED_DICT + b"N" + table([("__defaults__", b"N")]) + b"\x86b", "state of a function"),
        # Hostile arguments of what may be called.
        (REBUILD + b")" + CALL, "TypeError"),
        (REBUILD + group(*[text("os.system")] * 6) + CALL, "rebuilt of something else"),
        (ORDERED_DICT + group(b"]") + CALL, "TypeError"),
        (ORDERED_DICT + b"]" + CALL, "a function is called with a list"),
        (text("torch._utils._rebuild_tensor_v2") + b")" + CALL, "a str is called"),
        (parameter(text("w")), "rebuilt of something else than a tensor"),
        (tensor(text("w"), 0, (1,), (1,)), "rebuilt of something else than a storage"),
        (tensor(storage("0", 1), 0, (2,), (1,)), "reaches beyond its storage"),
        (tensor(storage("0", 1), 1, (1,), (1,)), "reaches beyond its storage"),
        (tensor(storage("0", 1), -1, (1,), (1,)), "offset, shape and strides of a tensor are (-1,"),
        (tensor(storage("0", 1), 1, (2,), (-1,)), "offset, shape and strides of a tensor are (1,"),
        (tensor(storage("0", 1), 0, (1, 1), (1,)), "ValueError"),
        (tensor(storage("0", -1), 0, (1,), (1,)), "reaches beyond its storage"),
        (
            group(text("storage"), text("os"), text("0"), text("cpu"), number(1)) + b"Q",
            "no storage",
        ),
        (text("storage") + b"Q", "'storage' is no storage"),
        # Damaged programs.
        (b"R", "ValueError"),
        (b"0", "uses the instruction POP"),
        (b"s", "IndexError"),
        (b"t", "IndexError"),
        (b"h\x07", "KeyError"),
        (b"\xff", "ValueError"),
        (b"Nub", "IndexError"),
        (b"N(u", "items are set on a NoneType"),
        (b"N(e", "something is appended to a NoneType"),
        (b"}" + b")" + b"Ns", "a tuple is a key"),
        (table([("w", TENSOR), ("w", TENSOR)]), "the key 'w' is set twice"),
    ],
)
def test_a_hostile_or_damaged_pickle_is_one_line(file, monkeypatch, program, found):
    monkeypatch.chdir(file.parent)
    write(file, program, [bytes(4)])
    said = message(file)
    assert said.startswith("pytorch_model.bin: its pickle ")
    assert found in said
    assert ("nothing was run" in said) != ("cannot be read" in said)
    assert os.listdir(file.parent) == [file.name]


def test_instructions_build_what_the_drawing_says():
    program = b"\x80\x02}" + text("w") + ORDERED_DICT + b")Rs."
    drawn = "PROTO EMPTY_DICT BINUNICODE GLOBAL EMPTY_TUPLE REDUCE SETITEM STOP"
    assert [one.name for one, *_ in pickletools.genops(program)] == drawn.split()
    assert interpret(program, {"collections.OrderedDict": lambda: 5}, lambda _: None) == {"w": 5}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_data_means_what_pickle_says(protocol):
    shared = [1, 2.5, "three"]
    data = {
        "a": shared,
        "b": (shared, (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), ()),
        "c": {"x": {}, 3: None, 2**40: True, -1: False, 300: 70000},
        "d": [[], [1]],
    }
    found = interpret(pickle.dumps(data, protocol), {}, lambda _: None)
    assert found == data
    assert found["a"] is found["b"][0]


def test_names_are_refused_before_they_are_looked_up():
    with pytest.raises(RefusedError, match=r"asks for 'no_such_module\.name'"):
        interpret(b"\x80\x02cno_such_module\nname\n.", {}, lambda _: None)
    assert "no_such_module" not in sys.modules


@pytest.mark.parametrize(
    ("items", "found"),
    [
        ([("w", TENSOR), ("state_dict", table([("w", TENSOR)]))], "'state_dict' (dict)"),
        ([("w", TENSOR), ("epoch", number(3))], "'epoch' (int)"),
        ([("args", b"]")], "'args' (list)"),
    ],
)
def test_only_names_and_tensors_are_expected(file, items, found):
    write(file, table(items), [bytes(4)])
    assert message(file).startswith(f"pytorch_model.bin: the entry {found} is not a named tensor;")


def test_a_tensor_alone_is_no_checkpoint(file):
    write(file, TENSOR, [bytes(4)])
    assert message(file).startswith("pytorch_model.bin is not a dict of tensors")
    write(file, b"}" + number(3) + TENSOR + b"s", [bytes(4)])
    assert "the entry 3 (TensorInfo) is not a named tensor" in message(file)


def test_files_of_other_kinds_are_told_apart(file):
    program = table([("w", TENSOR)])
    write(file, program, [bytes(4)])
    whole = file.read_bytes()
    old = pickle.dumps(0x1950A86A20F9469CFC6C, 2)
    for content, found in [
        (whole[:-30], "is cut short; download it again"),
        (whole[:40], "is cut short; download it again"),
        (old + pickle.dumps(1001, 2), "was written by torch before 1.6; if you trust its origin"),
        (b"", "is not a file of torch.save"),
        (b"<html>Not found</html>", "is not a file of torch.save"),
    ]:
        file.write_bytes(content)
        assert message(file).startswith(f"pytorch_model.bin {found}")


def test_a_zip_of_something_else(file):
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("readme.txt", "")
        archive.writestr("weights.txt", "")
    assert message(file).startswith("pytorch_model.bin is a zip archive without data.pkl")


def test_members_are_stored_whole_and_once(file):
    program = table([("w", TENSOR)])
    write(file, program, [bytes(400)], compression=zipfile.ZIP_DEFLATED)
    assert "'archive/data.pkl' in it is compressed; if you trust" in message(file)
    write(file, program)
    assert "the storage 'data/0' is absent; the file is damaged" in message(file)
    write(file, program, [bytes(3)])
    assert "1 bytes of the storage 'data/0' are missing; the file is damaged" in message(file)
    write(file, program, [bytes(4)])
    with zipfile.ZipFile(file, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("archive/data/0", bytes(4))
    assert "'archive/data/0' is in it twice; the file is damaged" in message(file)


# Places in the last entry of the directory and in the record behind it.
@pytest.mark.parametrize("field", [24, 42, -6], ids=["size", "offset", "base"])
def test_a_member_outside_the_file_is_not_read(file, field):
    write(file, table([("w", TENSOR)]), [bytes(4)])
    content = bytearray(file.read_bytes())
    entry = content.rindex(b"PK\1\2")
    struct.pack_into("<I", content, field if field < 0 else entry + field, 4000)
    file.write_bytes(content)
    assert "in it is not where it should be; the file is damaged" in message(file)


def test_numbers_of_a_big_endian_machine_are_refused(file):
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", b"")
        archive.writestr("archive/byteorder", b"big")
    assert "holds big-endian numbers" in message(file)


def test_a_damaged_member_header_is_not_read_as_weights(file):
    write(file, table([("w", TENSOR)]), [bytes(4)])
    content = bytearray(file.read_bytes())
    content[content.index(b"PK\3\4", 1)] = 0
    file.write_bytes(content)
    assert "'archive/byteorder' in it is not where it should be;" in message(file)
