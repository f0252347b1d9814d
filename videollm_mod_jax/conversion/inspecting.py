"""What a directory holds, as tables for people: a checkpoint of the Hub, or a model of ours."""

import collections
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import rich.console
import rich.table
from flax.traverse_util import flatten_dict

from videollm_mod_jax.conversion.families import plan_conversion
from videollm_mod_jax.conversion.manifest import read_manifest
from videollm_mod_jax.conversion.plan import Options, Part
from videollm_mod_jax.conversion.source import Source, open_source
from videollm_mod_jax.conversion.stored_model import StoredModel
from videollm_mod_jax.conversion.table import match
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.models import VideoLLM, VideoLLMConfig, config_plan
from videollm_mod_jax.training.checkpoint import MODEL_FILE
from videollm_mod_jax.training.sharding import abstract_variables

Row = tuple[str, str]


def inspect(path: Path, console: rich.console.Console) -> None:
    """Prints what a directory holds; reads no tensor, and needs no PyTorch.

    Raises:
      UserError: it is neither a checkpoint nor a model, or its files are damaged.
    """
    rows = _model_rows(path) if (path / MODEL_FILE).exists() else _checkpoint_rows(path)
    table = rich.table.Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    console.print(table)


def _checkpoint_rows(path: Path) -> Iterator[Row]:
    is_adapter = (path / "adapter_config.json").exists()
    source = open_source(path, "adapter" if is_adapter else "model")
    yield "checkpoint", str(path)
    yield from _source_rows(source)
    try:
        conversion = plan_conversion(path, Options())
    except UserError as error:
        yield "from-hf alone", f"is refused: {error}"
        return
    for part in conversion.parts:
        yield part.role, f"{part.family}, names of layout {part.layout}, {part.source.directory}"
        yield from _left_out_rows(part)
    yield from _architecture_rows(conversion.config)
    yield from _size_rows(_variables(conversion.config), conversion.config)
    if conversion.fresh:
        yield "starts afresh", _first_of(conversion.fresh)
    yield "from-hf needs", "no other option"


def _model_rows(path: Path) -> Iterator[Row]:
    model = StoredModel(path)
    yield "model", str(path)
    yield from _architecture_rows(model.config)
    yield from _size_rows(model.shapes, model.config)
    manifest = read_manifest(path)
    if manifest is None:
        yield "made", "here, not converted"
        return
    for part in manifest.parts:
        yield (
            f"from {part.role}",
            (
                f"{part.family}, names of layout {part.layout}, {len(part.tensors)} tensors in "
                f"{len(part.files)} files, {part.directory}"
            ),
        )
    if manifest.rounded:
        yield "rounded", ", ".join(f"{n} tensors from {d}" for d, n in manifest.rounded.items())
    if manifest.added_rows:
        yield "added rows", f"{manifest.added_rows} of embeddings and head"
    if manifest.merged:
        yield "merged", f"adapters into {len(manifest.merged)} kernels"
    if manifest.fresh:
        yield "started afresh", _first_of(manifest.fresh)


def _source_rows(source: Source) -> Iterator[Row]:
    infos = [source.info(name) for name in source.names]
    kinds = collections.Counter(info.dtype.name for info in infos)
    yield "files", _first_of([file.name for file in source.files])
    yield "tensors", f"{len(infos)}: " + ", ".join(f"{n} {kind}" for kind, n in kinds.items())
    yield "bytes", f"{sum(info.nbytes for info in infos):,}"


def _left_out_rows(part: Part) -> Iterator[Row]:
    names = match(part.table, part.source.names, str(part.source.directory)).left_out
    if names:
        yield "left out", _first_of(names)


def _architecture_rows(config: VideoLLMConfig) -> Iterator[Row]:
    if (decoder := config.decoder) is not None:
        yield (
            "decoder",
            (
                f"{decoder.num_layers} layers of width {decoder.hidden_size}, {decoder.num_heads} "
                f"heads ({decoder.num_kv_heads} key/value), MLP {decoder.mlp_size}, vocabulary "
                f"{decoder.vocab_size}"
            ),
        )
    if (vision := config.vision) is not None:
        yield (
            "vision tower",
            (
                f"{vision.architecture}, {vision.num_layers} blocks of width {vision.width}, "
                f"images of {vision.image_size}, {vision.tokens_per_frame} tokens per frame"
            ),
        )
    if config.decoder is not None and config.vision is not None:
        routed = [i for i, spec in enumerate(config_plan(config)) if spec.keep is not None]
        yield "routed layers", ", ".join(map(str, routed)) or "none"
    if config.lora.rank:
        yield "adapters", f"rank {config.lora.rank} on {', '.join(config.lora.targets)}"


def _size_rows(shapes: dict, config: VideoLLMConfig) -> Iterator[Row]:
    """Parameters by part: `params/decoder/layer_0/...` counts for `decoder`."""
    counts: collections.Counter[str] = collections.Counter()
    for path, leaf in shapes.items():
        collection, part = path.split("/")[:2]
        counts["lora" if collection == "lora" else part] += math.prod(leaf.shape)
    total = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in shapes.values())
    parts = ", ".join(f"{part} {count:,}" for part, count in counts.items())
    yield "parameters", f"{counts.total():,}: {parts}"
    yield "stored as", f"{config.param_dtype}, {total:,} bytes"


def _variables(config: VideoLLMConfig) -> dict:
    return flatten_dict(abstract_variables(VideoLLM(config), None), sep="/")


def _first_of(names: Sequence[str]) -> str:
    return f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]
