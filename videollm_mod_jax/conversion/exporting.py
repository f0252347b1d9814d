"""Writes a model of ours as transformers and PEFT load it, one variable at a time.

DST/config.json, model.safetensors                       one part
DST/model/ ..., DST/vision_tower/ ..., DST/adapter/ ...  several
"""

import dataclasses
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import rich.console

from videollm_mod_jax.conversion import destination as output
from videollm_mod_jax.conversion.adapter import export_adapter
from videollm_mod_jax.conversion.companions import restore_companions
from videollm_mod_jax.conversion.families import Export, export_plan
from videollm_mod_jax.conversion.links import check_inside
from videollm_mod_jax.conversion.loading import CACHED_BYTES, slabs
from videollm_mod_jax.conversion.manifest import Manifest, PartRecord, read_manifest
from videollm_mod_jax.conversion.safetensors_writer import create_file
from videollm_mod_jax.conversion.stored_model import StoredModel
from videollm_mod_jax.conversion.table import Entry
from videollm_mod_jax.data.files import read_json
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.training.checkpoint import write_json

_JOURNAL = {"kind": "export"}
DTYPES = ("auto", "bfloat16", "float16", "float32")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Piece:
    """One directory to write: what is in it, and what it was when it was converted."""

    role: str
    export: Export
    record: PartRecord | None


_Tensors = Mapping[str, tuple[np.dtype, tuple[int, ...]]]
"""Dtype and shape by name."""


@dataclasses.dataclass(frozen=True)
class _Slot:
    """Where the elements of one tensor go: `size` bytes from `offset` on in a file."""

    file: Path
    offset: int
    size: int
    dtype: np.dtype


def export_model(
    directory: Path,
    destination: Path,
    *,
    part: str | None,
    family: str | None,
    dtype: str,
    merge: bool,
    drop_routers: bool,
    shard_bytes: int,
    overwrite: bool,
    console: rich.console.Console,
    verify: bool = True,
) -> tuple[Path, ...]:
    """Writes the directories that a model came from, or those that transformers would make of it.

    A converted model, and a run that started from one, gets back the names, dtypes and config.json
    of its sources. In memory there is one variable at a time, and a slab of its cast.

    Args:
      directory: a model of ours.
      destination: the directory to make.
      part: role of the only part to write; None writes all.
      family: of a model that was not converted; of one that was, replaces what it came from.
      dtype: one of `DTYPES`; `auto` gives every tensor the dtype that it came with.
      merge: add LoRA adapters to the kernels; otherwise they become a PEFT adapter.
      drop_routers: leave routers out where the family has no place for them.
      shard_bytes: largest file; a larger tensor has a file to itself.
      overwrite: replace what an earlier export wrote.
      console: gets the progress bar.
      verify: whether to compare the stored variables with their checksums before.

    Returns:
      the directories that were written.

    Raises:
      UserError: the model cannot be written as asked, the destination exists or the disk is full.
    """
    output.check_free(destination, overwrite, "**/*.safetensors")
    model = StoredModel(directory, verify=verify)
    pieces = _pieces(model, None if family else read_manifest(directory), family, merge)
    _check_complete(model, pieces, part, merge, drop_routers)
    chosen = [piece for piece in pieces if part in (None, piece.role)]
    if not chosen:
        roles = ", ".join(piece.role for piece in pieces)
        raise UserError(f"--part is {part}; {directory} has {roles}")
    tensors = [_tensors(model, piece, dtype) for piece in chosen]
    total = sum(_size(*tensor) for group in tensors for tensor in group.values())
    output.check_space(destination.parent, total)
    with output.full_disk_is_a_user_error(destination.parent):
        work = _open_work(destination)
    complete = work / "export"
    try:
        with (
            output.full_disk_is_a_user_error(destination.parent),
            output.byte_progress(console) as bar,
        ):
            task = bar.add_task("", total=total)
            for piece, group in zip(chosen, tensors, strict=True):
                where = complete if len(chosen) == 1 else complete / piece.role
                slots = _create_files(where, piece.role, group, shard_bytes)
                for name, size in _write_tensors(model, piece, slots, merge):
                    bar.update(task, advance=size, description=name)
                _write_description(where, piece, directory, dtype)
                if piece.export.note:
                    console.print(piece.export.note)
        output.put_in_place(complete, destination)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    if len(chosen) == 1:
        return (destination,)
    return tuple(destination / piece.role for piece in chosen)


def _open_work(destination: Path) -> Path:
    """Makes the directory in which an export grows, in place of one that was killed.

    Raises:
      UserError: something else is there.
    """
    work = destination.with_name(destination.name + ".partial")
    output.check_work(work)
    if (work / output.JOURNAL).exists():
        if read_json(work / output.JOURNAL) != _JOURNAL:
            raise UserError(
                f"{work} belongs to an interrupted from-hf; finish that one, or remove {work}"
            )
        shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    write_json(work / output.JOURNAL, _JOURNAL)
    return work


def _pieces(
    model: StoredModel, manifest: Manifest | None, family: str | None, merge: bool
) -> list[_Piece]:
    """What the model came from, or what a family makes of it, and its adapters."""
    records = manifest.parts if manifest else ()
    if not records and family is None:
        raise UserError(
            f"{model.directory} was not converted from anything; say with --family what it becomes"
        )
    pieces = [
        _Piece(
            role=record.role,
            export=export_plan(model.config, record.family, record.layout, record.config),
            record=record,
        )
        for record in records
        if record.role != "adapter"
    ]
    if not records:
        pieces.append(_Piece(role="model", export=export_plan(model.config, family), record=None))
    if model.config.lora.rank and not merge:
        record = manifest.part("adapter") if manifest else None
        covered = {entry.target for piece in pieces for entry in piece.export.table.entries()}
        pieces.append(_adapter_piece(model, record, covered))
    return pieces


def _adapter_piece(model: StoredModel, record: PartRecord | None, covered: set[str]) -> _Piece:
    if record is not None:
        layout, names, original = record.layout, record.tensors, record.config
    else:
        is_llava = "params/connector/fc1/kernel" in covered
        born = "hf-5-modules" if is_llava else "live" if model.config.vision else "hf"
        layout, names, original = born, (), None
    table, config = export_adapter(model.config, layout, covered, names, original)
    return _Piece(role="adapter", export=Export(table=table, config=config), record=record)


def _check_complete(
    model: StoredModel, pieces: list[_Piece], part: str | None, merge: bool, drop_routers: bool
) -> None:
    """Checks that every variable goes somewhere, or was given up."""
    covered = {entry.target for piece in pieces for entry in piece.export.table.entries()}
    if foreign := sorted(covered - set(model.shapes)):
        raise UserError(
            f"{model.directory} has no {foreign[0]}, which its conversion.json or --family calls "
            "for; bring back the one that the conversion wrote, or name another --family"
        )
    left = [path for path in model.shapes if path not in covered]
    if merge:
        left = [path for path in left if not path.startswith("lora/")]
        if "lora/lm_head/a" in model.shapes and "params/lm_head/kernel" not in model.shapes:
            raise UserError(
                f"{model.directory} has an adapter on an output head that is tied to the "
                "embeddings, which cannot be merged; leave --merge out"
            )
    if drop_routers:
        left = [path for path in left if "/router/" not in path]
    elif part != "vision_tower" and any("/router/" in path for path in left):
        raise UserError(
            f"{model.directory} has routers, for which transformers has no place; --drop-routers "
            "writes the model without them: every token is then computed in every layer"
        )
    if part is None and left:
        raise UserError(
            f"{model.directory} has {left[0]} (and {len(left) - 1} more), for which "
            f"{', '.join(piece.role for piece in pieces)} have no place; write the parts one by "
            "one with --part, or name another --family"
        )


def _tensors(model: StoredModel, piece: _Piece, dtype: str) -> _Tensors:
    """What a piece holds: what its source held, in that order, then what is new."""
    table, record = piece.export.table, piece.record
    entries = table.by_source()
    kept = list(record.tensors) if record else []
    kept = [name for name in kept if name in {*entries, *table.same, *table.buffers}]
    tensors = {}
    for name in dict.fromkeys((*kept, *entries)):
        if name in table.buffers:
            shape = table.buffers[name]().shape
        else:
            entry = entries[table.same.get(name, name)][0]
            shape = entry.source_shape(model.shapes[entry.target].shape)
        if name in kept:
            kind = record.tensors[name].dtype
        else:
            kind = "float32" if piece.role == "adapter" else model.config.param_dtype
        is_float = jnp.issubdtype(np.dtype(kind), np.floating)
        if name not in table.buffers and not is_float:
            raise UserError(
                f"{model.directory}/conversion.json has {name!r} as {kind}; expected floating "
                "point; bring back the one that the conversion wrote"
            )
        tensors[name] = (np.dtype(kind if dtype == "auto" or not is_float else dtype), shape)
    return tensors


def _create_files(
    directory: Path, role: str, tensors: _Tensors, shard_bytes: int
) -> dict[str, _Slot]:
    """Writes the headers of as many files as are needed, and the index of several."""
    directory.mkdir(parents=True)
    stem = "adapter_model" if role == "adapter" else "model"
    # PEFT reads adapters from one file.
    shards = _shards(tensors, shard_bytes) if role != "adapter" else [list(tensors)]
    slots: dict[str, _Slot] = {}
    for number, names in enumerate(shards, start=1):
        suffix = f"-{number:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        file = directory / f"{stem}{suffix}.safetensors"
        offsets = create_file(file, {name: tensors[name] for name in names})
        for name in names:
            dtype, shape = tensors[name]
            slots[name] = _Slot(file, offsets[name], _size(dtype, shape), dtype)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(slot.size for slot in slots.values())},
            "weight_map": {name: slot.file.name for name, slot in slots.items()},
        }
        write_json(directory / f"{stem}.safetensors.index.json", index)
    return slots


def _shards(tensors: _Tensors, shard_bytes: int) -> list[list[str]]:
    """Splits names, in their order, into groups of at most `shard_bytes`.

    ```
    sizes  a 3  b 3  c 9  d 1      at most 6:  [a b] [c] [d]
    ```
    """
    shards: list[list[str]] = []
    room = 0
    for name, tensor in tensors.items():
        size = _size(*tensor)
        if not shards or size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= size
    return shards


def _write_tensors(
    model: StoredModel, piece: _Piece, slots: Mapping[str, _Slot], merge: bool
) -> Iterator[tuple[str, int]]:
    """Writes every tensor, variable by variable; yields what was written, and its bytes."""
    table = piece.export.table
    entries: dict[str, list[Entry]] = {}
    for name in slots:
        for entry in table.by_source().get(table.same.get(name, name), ()):
            entry = dataclasses.replace(entry, source=name)
            entries.setdefault(entry.target, []).append(entry)
    for path, group in entries.items():
        value = _merged(model, path) if merge else model.read(path)
        for entry in group:
            tensor = entry.from_target(value if entry.row is None else value[entry.row])
            yield entry.source, _write(entry.source, slots[entry.source], entry.part, tensor)
    for name in slots.keys() & table.buffers.keys():
        yield name, _write(name, slots[name], (0, 1), table.buffers[name]())


def _merged(model: StoredModel, path: str) -> np.ndarray:
    """A variable, with its adapter added where it has one."""
    value = model.read(path)
    adapter = path.replace("params/", "lora/", 1).removesuffix("/kernel")
    if not path.endswith("/kernel") or f"{adapter}/a" not in model.shapes:
        return value
    lora = model.config.lora
    update = model.read(f"{adapter}/a") @ model.read(f"{adapter}/b")
    return value.astype(np.float32) + np.float32(lora.alpha / lora.rank) * update


def _write(name: str, slot: _Slot, part: tuple[int, int], tensor: np.ndarray) -> int:
    """Writes one of n equal parts of a tensor into its slot; returns the bytes of it."""
    size = slot.size // part[1]
    rows = tensor.reshape(1) if not tensor.ndim else tensor
    with slot.file.open("r+b") as file:
        file.seek(slot.offset + part[0] * size)
        for chunk in slabs(rows.shape, 0, rows.itemsize, CACHED_BYTES):
            with np.errstate(over="ignore"):
                cast = rows[chunk].astype(slot.dtype, order="C")
            if not np.isfinite(cast).all():
                raise UserError(
                    f"{name} holds a value that is not finite as {slot.dtype.name}; take --dtype "
                    "bfloat16 or float32, or look at what training did to the weights"
                )
            file.write(cast.tobytes())
    return size


def _write_description(directory: Path, piece: _Piece, model: Path, dtype: str) -> None:
    config = dict(piece.export.config)
    if piece.record is not None:
        restore_companions(model, piece.role, directory)
    if piece.role == "adapter":
        write_json(directory / "adapter_config.json", config)
        return
    if dtype != "auto":
        config |= {key: dtype for key in ("torch_dtype", "dtype") if key in config}
    write_json(directory / "config.json", config)
    if piece.role == "model" and (model / "tokenizer.json").exists():
        check_inside(model, [model / "tokenizer.json", model / "tokenizer_config.json"])
        shutil.copyfile(model / "tokenizer.json", directory / "tokenizer.json")
        if not (directory / "tokenizer_config.json").exists():
            shutil.copyfile(model / "tokenizer_config.json", directory / "tokenizer_config.json")


def _size(dtype: np.dtype, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * dtype.itemsize
