"""`conversion.json`: where a converted model came from, so that anyone can check it or go back.

It lists every source file with its SHA-256, and every tensor that was used with its dtype and file:
the way back restores exactly those names and dtypes.
"""

import collections
import dataclasses
import importlib.metadata
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from videollm_mod_jax.config_dict import COUNT_OR_NONE, build, require, require_choice
from videollm_mod_jax.conversion.plan import ROLES, Conversion, Part
from videollm_mod_jax.conversion.safetensors_file import DTYPES
from videollm_mod_jax.conversion.table import match
from videollm_mod_jax.data.files import read_json
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.names import check_name
from videollm_mod_jax.training.checkpoint import MANIFEST_FILE, write_json

FORMAT = 2
TABLE_VERSION = 1
"""Counts up whenever a rule of an existing family changes."""

_DTYPE_NAMES = tuple(dtype.name for dtype in DTYPES.values())
_PACKAGES = ("jax", "flax", "orbax-checkpoint", "numpy", "ml_dtypes")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorRecord:
    """A tensor of the source: its dtype by name, and the file that holds it."""

    dtype: str
    file: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class PartRecord:
    """One source directory, as it was.

    Attributes:
      role, family, layout: as in `Part`.
      directory: its path when it was converted.
      config: its config.json, word by word.
      files: SHA-256 in hexadecimal of each file of weights.
      tensors: those that were used or checked, in the order of the source.
      left_out: those that have no place in our model, with the reason.
    """

    role: str
    family: str
    layout: str
    directory: str
    config: Mapping
    files: Mapping[str, str]
    tensors: Mapping[str, TensorRecord]
    left_out: Mapping[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What `conversion.json` says.

    Attributes:
      family: as in `Conversion`.
      dtype: of the frozen weights here.
      parts: the sources.
      fresh: variables that no source had and that were initialised.
      merged: kernels into which an adapter was merged; what they were before is lost.
      added_rows: how many of the last rows of embeddings and head no source had; each began as the
        mean of the others.
      rounded: number of tensors that lost bits to `dtype`, by their own dtype.
      versions: of the packages that converted.
    """

    family: str
    dtype: str
    parts: tuple[PartRecord, ...]
    fresh: tuple[str, ...]
    merged: tuple[str, ...]
    added_rows: COUNT_OR_NONE
    rounded: Mapping[str, int]
    versions: Mapping[str, str]

    def part(self, role: str) -> PartRecord | None:
        """The part with a role, if there is one."""
        return next((part for part in self.parts if part.role == role), None)


def describe(
    conversion: Conversion,
    dtypes: Mapping[str, np.dtype],
    hashes: Mapping[Path, str],
) -> Manifest:
    """The manifest of a conversion that was carried out.

    Args:
      conversion: the plan.
      dtypes: of every variable, by path.
      hashes: SHA-256 of every source file.
    """
    rounded: collections.Counter[str] = collections.Counter()
    for part in conversion.parts:
        for name, entries in part.table.by_source().items():
            dtype = part.source.info(name).dtype
            if any(loses_bits(dtype, dtypes[entry.target]) for entry in entries):
                rounded[dtype.name] += 1
    return Manifest(
        family=conversion.family,
        dtype=conversion.config.param_dtype,
        parts=tuple(_record(part, hashes) for part in conversion.parts),
        fresh=conversion.fresh,
        merged=tuple(conversion.merges),
        added_rows=conversion.added_rows,
        rounded=dict(rounded),
        versions={name: importlib.metadata.version(name) for name in _PACKAGES},
    )


def loses_bits(source: np.dtype, target: np.dtype) -> bool:
    """Whether values of a dtype are rounded on their way to `target`, bfloat16 or float32."""
    return ml_dtypes.finfo(source).nmant > ml_dtypes.finfo(target).nmant


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Writes `conversion.json`; `read_manifest` is the inverse."""
    write_json(
        directory / MANIFEST_FILE,
        {"format": FORMAT, "table": TABLE_VERSION, **dataclasses.asdict(manifest)},
    )


def read_manifest(directory: Path) -> Manifest | None:
    """Reads `conversion.json`; None where there is none, as for a model that was trained here.

    Raises:
      UserError: it is damaged, of another format or table version, or names a role, file or dtype
        that no conversion writes.
    """
    path = directory / MANIFEST_FILE
    if not path.exists():
        return None
    values = read_json(path)
    found = tuple(values.get(key) for key in ("format", "table")) if _is_table(values) else None
    if found == (1, TABLE_VERSION):
        # Before rows could be added.
        values, found = {"added_rows": 0, **values}, (FORMAT, TABLE_VERSION)
    if found != (FORMAT, TABLE_VERSION):
        raise UserError(
            f"{path}: format and table are {found}; expected {(FORMAT, TABLE_VERSION)}; it was "
            "written by another version: convert again"
        )
    fields = {key: value for key, value in values.items() if key not in ("format", "table")}
    try:
        manifest = build(Manifest, fields, str(path))
        _check_parts(manifest.parts, path)
    except UserError as error:
        raise UserError(
            f"{error}; the file is damaged: bring back the one that the conversion wrote, or "
            "convert again"
        ) from error
    return manifest


def _check_parts(parts: Sequence[PartRecord], path: Path) -> None:
    """Checks all that becomes a path or a dtype on the way back: the file may be a stranger's."""
    for i, part in enumerate(parts):
        where = f"{path}.parts[{i}]"
        require_choice(f"{where}.role", part.role, ROLES)
        require(
            all(part.role != other.role for other in parts[:i]),
            f"{where}.role is {part.role!r}, as of another part; expected one part of a role",
        )
        check_name(part.family, f"{where}.family")
        check_name(part.layout, f"{where}.layout")
        for file in part.files:
            check_name(file, f"{where}.files")
        for name, record in part.tensors.items():
            check_name(record.file, f"{where}.tensors.{name}.file")
            require_choice(f"{where}.tensors.{name}.dtype", record.dtype, _DTYPE_NAMES)


def _record(part: Part, hashes: Mapping[Path, str]) -> PartRecord:
    names = match(part.table, part.source.names, str(part.source.directory))
    kept = {*names.used, *names.same, *names.buffers}
    infos = {name: part.source.info(name) for name in part.source.names if name in kept}
    return PartRecord(
        role=part.role,
        family=part.family,
        layout=part.layout,
        directory=str(part.source.directory.absolute()),
        config=part.config,
        files={file.name: hashes[file] for file in part.source.files},
        tensors={
            name: TensorRecord(dtype=info.dtype.name, file=info.file.name)
            for name, info in infos.items()
        },
        left_out={name: _reason(part, name) for name in names.left_out},
    )


def _reason(part: Part, name: str) -> str:
    return next(why for p, why in part.table.left_out.items() if re.fullmatch(p, name))


def _is_table(values: Any) -> bool:
    return isinstance(values, Mapping)
