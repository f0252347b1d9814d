"""Carries a conversion out: streams the variables into a model directory, a few at a time.

    DST.partial/journal.json     what is saved so far, and of which conversion
    DST.partial/weights.*        Orbax's partial checkpoint; each batch of variables adds to it
    DST.partial/kept/            what Orbax is completing, as it was before, by links
    DST.partial/model/           becomes DST in one rename, when all is there

Interrupted at any moment, the same command goes on behind the last batch that the journal knows.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import orbax.checkpoint.experimental.v1 as v1
import rich.console
from flax.traverse_util import unflatten_dict
from rich import progress

from videollm_mod_jax.config_dict import build
from videollm_mod_jax.conversion import destination as output
from videollm_mod_jax.conversion.companions import keep_companions
from videollm_mod_jax.conversion.loading import VariableReader, check_repeats, fresh_variables
from videollm_mod_jax.conversion.manifest import (
    TABLE_VERSION,
    Manifest,
    describe,
    read_manifest,
    write_manifest,
)
from videollm_mod_jax.conversion.plan import Conversion
from videollm_mod_jax.data.files import read_json
from videollm_mod_jax.data.tokenizer import Tokenizer
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.names import check_name
from videollm_mod_jax.training import integrity
from videollm_mod_jax.training.checkpoint import (
    CONFIG_FILE,
    MANIFEST_FILE,
    WEIGHTS,
    write_description,
    write_json,
)

BATCH_BYTES = 256 * 2**20
"""Variables are saved in batches of at most this size, or one by one where one is larger."""

_ORBAX = "weights"
_KEPT = "kept"
_LINKED_BYTES = 2**20
_CHUNK_BYTES = 64 * 2**20


def import_model(
    conversion: Conversion,
    destination: Path,
    *,
    overwrite: bool,
    console: rich.console.Console,
) -> Manifest:
    """Writes the model of a conversion to a directory that `load_model` reads.

    Resident memory stays below that of an idle process plus the largest variable, or a batch of
    them, and a slab of a source tensor. An interrupted call is resumed by the next one with the
    same conversion; a failed one leaves nothing.

    Args:
      conversion: from `plan_conversion`.
      destination: the directory to make.
      overwrite: replace the converted model that is there, once the new one is complete.
      console: gets the progress bar.

    Returns:
      what `conversion.json` says.

    Raises:
      UserError: the destination exists, a tensor is not finite or not what it should be, or the
        disk is full.
    """
    work = destination.with_name(destination.name + ".partial")
    output.check_work(work)
    if _is_in_place(work, destination, conversion):
        shutil.rmtree(work)
        console.print(f"{destination} is complete; only its work directory was left")
        return read_manifest(destination)
    _check_destination(destination, overwrite)
    tokenizer = None if conversion.tokenizer is None else Tokenizer.load(conversion.tokenizer)
    with output.full_disk_is_a_user_error(destination.parent):
        journal = _resume(work, _fingerprint(conversion), console)
        try:
            return _import(conversion, destination, tokenizer, journal, console)
        except Exception:
            # Not an interrupt, which leaves the work to be resumed.
            shutil.rmtree(work, ignore_errors=True)
            raise


def _import(
    conversion: Conversion,
    destination: Path,
    tokenizer: Tokenizer | None,
    journal: "_Journal",
    console: rich.console.Console,
) -> Manifest:
    reader, work = VariableReader(conversion), journal.work
    left = [path for path in reader.shapes if path not in journal.saved]
    output.check_space(destination.parent, sum(_size(reader, path) for path in left))
    check_repeats(conversion)
    model = work / "model"
    with output.byte_progress(console) as bar:
        if not (model / WEIGHTS).exists():
            _write_weights(conversion, reader, journal, bar)
            _take_weights(work / _ORBAX, model)
        hashes = _hashes(conversion, bar)
    write_description(model, conversion.config, tokenizer, conversion.system)
    for part in conversion.parts:
        keep_companions(part.source.directory, model, part.role)
    dtypes = {path: leaf.dtype for path, leaf in reader.shapes.items()}
    manifest = describe(conversion, dtypes, hashes)
    write_manifest(model, manifest)
    output.put_in_place(model, destination)
    return manifest


def _write_weights(
    conversion: Conversion, reader: VariableReader, journal: "_Journal", bar: progress.Progress
) -> None:
    """Adds every variable that is not saved yet to the partial checkpoint, and completes it."""
    # Orbax takes absolute paths only.
    path = (journal.work / _ORBAX).absolute()
    if path.exists():
        return
    total = sum(_size(reader, name) for name in reader.shapes)
    task = bar.add_task("", total=total, completed=sum(_size(reader, n) for n in journal.saved))
    for batch in _batches(conversion, reader, set(journal.saved)):
        is_fresh = set(batch) <= set(conversion.fresh)
        fresh = fresh_variables(conversion, reader.shapes) if is_fresh else {}
        arrays = {}
        for name in batch:
            bar.update(task, description=name)
            arrays[name] = np.asarray(fresh[name]) if fresh else reader.read(name)
            bar.advance(task, arrays[name].nbytes)
        with _context(arrays.values()):
            v1.partial.save(path, unflatten_dict(arrays, sep="/"))
        journal = dataclasses.replace(journal, saved=(*journal.saved, *batch))
        journal.write()
    bar.update(task, description="completing the checkpoint")
    _keep(journal.work)
    dataclasses.replace(journal, completing=True).write()
    v1.partial.finalize(path)
    shutil.rmtree(journal.work / _KEPT, ignore_errors=True)
    bar.update(task, description="weights")


def _keep(work: Path) -> None:
    """Keeps what Orbax is about to complete, which a killed process leaves neither old nor new.

    Large files are links, which cost no space: Orbax renames and removes them, and writes into the
    small ones alone. Where the file system has no links, an interrupted completion starts over.
    """
    shutil.rmtree(work / _KEPT, ignore_errors=True)
    with contextlib.suppress(OSError, shutil.Error):
        shutil.copytree(_partial(work), work / f"{_KEPT}.new", copy_function=_link)
        os.rename(work / f"{_KEPT}.new", work / _KEPT)
    shutil.rmtree(work / f"{_KEPT}.new", ignore_errors=True)


def _restore(work: Path) -> None:
    """Brings back what was there before the completion that was interrupted."""
    shutil.rmtree(_partial(work), ignore_errors=True)
    shutil.copytree(work / _KEPT, _partial(work), copy_function=_link)


def _link(source: str, target: str) -> None:
    if os.path.getsize(source) < _LINKED_BYTES:
        shutil.copyfile(source, target)
    else:
        os.link(source, target)


def _take_weights(checkpoint: Path, model: Path) -> None:
    """Moves the one item of a complete checkpoint to where `load_model` looks for it."""
    model.mkdir(exist_ok=True)
    metadata = "_CHECKPOINT_METADATA"
    if (checkpoint / metadata).exists():
        os.rename(checkpoint / metadata, checkpoint / "state" / metadata)
    integrity.record(checkpoint / "state")
    os.rename(checkpoint / "state", model / WEIGHTS)


def _context(arrays: Iterable[np.ndarray]) -> v1.Context:
    """How Orbax saves some arrays: without a second copy of any large one."""
    context = v1.Context()
    context.memory.deepcopy_host_arrays = False
    # Compression copies every array, and saves little: weights are noise.
    context.array.saving.use_compression = False
    # Chunks, of which a device reads those it needs, divide the longest axis. They are written from
    # where they are if that is the first one, and copied, all of them at once, if it is another.
    if not any(a.nbytes > BATCH_BYTES and len(a) < max(a.shape) for a in arrays):
        context.array.saving.storage_options.chunk_byte_size = _CHUNK_BYTES
    return context


def _batches(
    conversion: Conversion, reader: VariableReader, saved: set[str]
) -> Iterator[list[str]]:
    """Names of variables to save together: fresh ones, then in the order of the source files."""
    position = {
        (part.role, name): (i, part.source.files.index(part.source.info(name).file), j)
        for i, part in enumerate(conversion.parts)
        for j, name in enumerate(part.source.names)
    }

    def first_read(path: str) -> tuple[int, int, int]:
        return min(position[part.role, entry.source] for part, entry in reader.origins(path))

    if fresh := [path for path in conversion.fresh if path not in saved]:
        yield fresh
    batch: list[str] = []
    read = [path for path in reader.shapes if reader.origins(path) and path not in saved]
    for path in sorted(read, key=first_read):
        if batch and sum(_size(reader, p) for p in (*batch, path)) > BATCH_BYTES:
            yield batch
            batch = []
        batch.append(path)
    if batch:
        yield batch


@dataclasses.dataclass(frozen=True)
class _Journal:
    """What is saved in a work directory.

    Attributes:
      work: the directory.
      fingerprint: of the conversion.
      saved: paths of the variables that the partial checkpoint holds.
      completing: the partial checkpoint is being made a complete one, which cannot be resumed.
    """

    work: Path
    fingerprint: str
    saved: tuple[str, ...] = ()
    completing: bool = False

    def write(self) -> None:
        """Records the state, and the directory entries that belong to it."""
        entries = tuple(sorted(p.name for p in _partial(self.work).glob("*")))
        record = _Record(
            fingerprint=self.fingerprint,
            saved=self.saved,
            completing=self.completing,
            entries=entries,
        )
        write_json(self.work / output.JOURNAL, dataclasses.asdict(record))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Record:
    """What `journal.json` says: a `_Journal`, and the entries of the partial checkpoint."""

    fingerprint: str
    saved: tuple[str, ...]
    completing: bool
    entries: tuple[str, ...]


def _resume(work: Path, fingerprint: str, console: rich.console.Console) -> _Journal:
    """Opens the work directory, with what an interrupted call of the same conversion left in it."""
    if (work / output.JOURNAL).exists():
        stored = _read_journal(work / output.JOURNAL)
        complete = any(path.exists() for path in (work / _ORBAX, work / "model" / WEIGHTS))
        if stored.fingerprint != fingerprint:
            console.print(f"{work} is of another conversion; starting over")
        elif stored.completing and not complete and not (work / _KEPT).exists():
            console.print(f"{work} was interrupted while it was being completed; starting over")
        else:
            if stored.completing and not complete:
                _restore(work)
            _remove_unfinished(work, stored.entries)
            console.print(f"going on in {work}: {len(stored.saved)} variables are there")
            return _Journal(work, fingerprint, stored.saved, stored.completing)
        shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    journal = _Journal(work, fingerprint)
    journal.write()
    return journal


def _is_in_place(work: Path, destination: Path, conversion: Conversion) -> bool:
    """Whether a killed process of the same conversion had all but removed its work directory."""
    if not (work / output.JOURNAL).exists() or not (destination / MANIFEST_FILE).exists():
        return False
    left = (work / _ORBAX / "state", work / "model", work / _KEPT, _partial(work))
    if any(path.exists() for path in left):
        return False
    stored = read_json(work / output.JOURNAL)
    if not isinstance(stored, dict) or "completing" not in stored:
        return False
    stored = _read_journal(work / output.JOURNAL)
    return stored.completing and stored.fingerprint == _fingerprint(conversion)


def _read_journal(path: Path) -> _Record:
    """Reads `journal.json` strictly: what it names is kept, and all else in its directory removed.

    Raises:
      UserError: it is damaged.
    """
    try:
        record = build(_Record, read_json(path), str(path))
        for i, name in enumerate(record.entries):
            check_name(name, f"{path}.entries[{i}]")
    except UserError as error:
        raise UserError(
            f"{error}; the work there cannot be resumed: remove {path.parent}"
        ) from error
    return record


def _remove_unfinished(work: Path, entries: Sequence[str]) -> None:
    """Removes what the journal does not know: a batch that was being saved when the end came."""
    ours = (output.JOURNAL, output.REPLACED, _KEPT, _ORBAX, _partial(work).name, "model")
    known = {work / name for name in ours}
    known |= {_partial(work) / name for name in entries}
    for path in {*work.iterdir(), *_partial(work).glob("*")} - known:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _partial(work: Path) -> Path:
    """Where Orbax keeps a checkpoint that is not finalised: each save adds an entry."""
    return work / f"{_ORBAX}.partial_save"


def _fingerprint(conversion: Conversion) -> str:
    """Tells one conversion from another: its sources, and all that was asked for."""
    files = [file.stat() for part in conversion.parts for file in part.source.files]
    values = [
        TABLE_VERSION,
        conversion.family,
        conversion.config.to_dict(),
        [
            [part.role, part.layout, *(str(file.absolute()) for file in part.source.files)]
            for part in conversion.parts
        ],
        [[stat.st_size, stat.st_mtime_ns] for stat in files],
        conversion.fresh,
        {path: dataclasses.astuple(merge) for path, merge in conversion.merges.items()},
        str(conversion.tokenizer),
        conversion.system,
    ]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def _hashes(conversion: Conversion, bar: progress.Progress) -> dict[Path, str]:
    sources = {file: part.source for part in conversion.parts for file in part.source.files}
    task = bar.add_task("", total=sum(file.stat().st_size for file in sources))
    hashes = {}
    for file, source in sources.items():
        bar.update(task, description=f"SHA-256 of {file.name}")
        hashes[file] = source.hash(file)
        bar.advance(task, file.stat().st_size)
    return hashes


def _size(reader: VariableReader, path: str) -> int:
    return math.prod(reader.shapes[path].shape) * reader.shapes[path].dtype.itemsize


def _check_destination(destination: Path, overwrite: bool) -> None:
    output.check_free(destination, overwrite, MANIFEST_FILE)
    if (destination / CONFIG_FILE).exists():
        raise UserError(f"{destination} holds a training run; name another directory")
