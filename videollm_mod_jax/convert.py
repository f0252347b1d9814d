r"""Converts PyTorch checkpoints of the Hugging Face Hub to models of ours, checks them, and back.

    python -m videollm_mod_jax.convert inspect llava-hf/llava-1.5-7b-hf
    python -m videollm_mod_jax.convert from-hf llava-hf/llava-1.5-7b-hf models/llava \
        --mod interleaved:0.2
    python -m videollm_mod_jax.convert verify llava-hf/llava-1.5-7b-hf models/llava
    python -m videollm_mod_jax.convert to-hf runs/tuned exported/tuned
"""

import argparse
import re
import shlex
import textwrap
from collections.abc import Sequence
from pathlib import Path

import rich.console

from videollm_mod_jax import cli
from videollm_mod_jax.console import make_console
from videollm_mod_jax.conversion import hub
from videollm_mod_jax.conversion.exporting import DTYPES as EXPORT_DTYPES
from videollm_mod_jax.conversion.exporting import export_model
from videollm_mod_jax.conversion.families import (
    ADAPTERS,
    FAMILIES,
    check_supported,
    plan_conversion,
)
from videollm_mod_jax.conversion.importing import import_model
from videollm_mod_jax.conversion.inspecting import inspect
from videollm_mod_jax.conversion.manifest import Manifest, read_manifest
from videollm_mod_jax.conversion.plan import DTYPES, Conversion, Options
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.locks import locked
from videollm_mod_jax.models.config import INSERTIONS, WEIGHTINGS

_RESUMABLE = "interrupted; the same command continues where it stopped"


def parse_mod(text: str) -> tuple[str | tuple[int, ...], float]:
    """Reads `--mod INSERTION:RATIO`.

    ```
    interleaved:0.2   ->  ("interleaved", 0.2)
    2,6:0.5           ->  ((2, 6), 0.5)
    ```

    Raises:
      UserError: it is neither.
    """
    insertion, _, ratio = text.rpartition(":")
    try:
        keep_ratio = float(ratio)
        if insertion in INSERTIONS:
            return insertion, keep_ratio
        return tuple(int(layer) for layer in insertion.split(",")), keep_ratio
    except ValueError as error:
        raise UserError(
            f"--mod is {text!r}; expected INSERTION:RATIO such as interleaved:0.2, where INSERTION "
            f"is one of {', '.join(INSERTIONS)}, or the routed layers, such as 2,6"
        ) from error


def parse_pool(text: str) -> tuple[int, int]:
    """Reads `--pool HxW`: `3x3` is (3, 3).

    Raises:
      UserError: it is not of this form.
    """
    if not (found := re.fullmatch(r"(\d+)x(\d+)", text)):
        raise UserError(f"--pool is {text!r}; expected HxW, such as 3x3")
    return int(found[1]), int(found[2])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Returns:
      The exit status: 0, 1 when `verify` found a difference, 2 after bad input, 130 after Ctrl-C.
    """
    arguments = _parser().parse_args(argv)
    console = make_console(stderr=True)
    verdicts: list[bool | None] = []
    status = cli.report_user_errors(
        lambda: verdicts.append(arguments.run(arguments, console)), _RESUMABLE
    )
    return 1 if verdicts == [False] else status


def _from_hf(arguments: argparse.Namespace, console: rich.console.Console) -> None:
    destination = Path(arguments.destination)
    source = hub.resolve(arguments.source, check_supported)
    conversion = plan_conversion(source, _options(arguments))
    with locked(destination, "convert", beside=True):
        manifest = import_model(
            conversion, destination, overwrite=arguments.overwrite, console=console
        )
    print(_made(conversion, manifest, destination))
    print(_next_commands(conversion, arguments))


def _to_hf(arguments: argparse.Namespace, console: rich.console.Console) -> None:
    with locked(arguments.destination, "convert", beside=True):
        made = export_model(
            Path(arguments.source),
            Path(arguments.destination),
            part=arguments.part,
            family=arguments.family,
            dtype=arguments.dtype,
            merge=arguments.merge,
            drop_routers=arguments.drop_routers,
            shard_bytes=int(arguments.shard_gb * 1e9),
            overwrite=arguments.overwrite,
            verify=arguments.verify,
            console=console,
        )
    for directory in made:
        print(f"wrote {directory}")
    manifest = read_manifest(Path(arguments.source))
    if manifest is not None and not arguments.family:
        for dtype, count in manifest.rounded.items():
            print(f"  {count} tensors were {dtype} and were rounded to {manifest.dtype} on the way")


def _verify(arguments: argparse.Namespace, console: rich.console.Console) -> bool:
    del console  # the tables are the result, and go to stdout
    # torch and transformers, of the extra `parity`, are loaded by this verb only.
    from videollm_mod_jax.conversion.verify import verify

    return verify(
        hub.resolve(arguments.source),
        Path(arguments.model),
        options=_options(arguments),
        prompt=arguments.prompt,
        image=arguments.image,
        video=arguments.video,
        max_kl=arguments.max_kl,
        tokens=arguments.tokens,
        console=make_console(),
    )


def _inspect(arguments: argparse.Namespace, console: rich.console.Console) -> None:
    del console  # of progress bars, which go to stderr
    inspect(hub.resolve(arguments.path), make_console())


def _options(arguments: argparse.Namespace) -> Options:
    def directory(name: str | None) -> Path | None:
        return None if name is None else hub.resolve(name)

    return Options(
        base=directory(arguments.base),
        vision_tower=directory(arguments.vision_tower),
        mod=None if arguments.mod is None else parse_mod(arguments.mod),
        weighting=arguments.weighting,
        pool=None if arguments.pool is None else parse_pool(arguments.pool),
        dtype=arguments.dtype,
        merge=arguments.merge,
        tokenizer=directory(arguments.tokenizer),
        system=arguments.system,
        resize_embeddings=getattr(arguments, "resize_embeddings", False),
    )


def _made(conversion: Conversion, manifest: Manifest, destination: Path) -> str:
    """What a conversion did, in words."""
    used = sum(len(part.tensors) for part in manifest.parts)
    lines = [f"{destination}: {manifest.family}, {manifest.dtype}, made of {used} tensors"]
    for part in manifest.parts:
        for reason in dict.fromkeys(part.left_out.values()):
            count = list(part.left_out.values()).count(reason)
            lines.append(f"  {count} tensors of {part.role} left out: {reason}")
    for dtype, count in manifest.rounded.items():
        lines.append(f"  {count} tensors were {dtype} and are rounded; --dtype float32 is exact")
    if manifest.added_rows:
        lines.append(f"  {manifest.added_rows} rows are added to embeddings and head: their mean")
    if manifest.merged:
        lines.append(f"  an adapter is merged into {len(manifest.merged)} kernels")
    if manifest.fresh:
        kinds = dict.fromkeys(path.split("/")[-2] for path in manifest.fresh)
        lines.append(f"  {len(manifest.fresh)} variables start afresh: {', '.join(kinds)}")
    weighting = conversion.config.routing.weighting
    disturbs = weighting not in ("tanh1", "none")
    if any("/router/" in path for path in manifest.fresh) and disturbs:
        lines.append(
            f"  with weighting {weighting} a kept token does not start as the pretrained block "
            "leaves it; with tanh1 it does"
        )
    return "\n".join(lines)


def _next_commands(conversion: Conversion, arguments: argparse.Namespace) -> str:
    prefix = "python -m videollm_mod_jax."
    given = [arguments.source, arguments.destination]
    for name in ("base", "vision_tower", "mod", "weighting", "pool", "tokenizer"):
        value = getattr(arguments, name)
        if value not in (None, "auto"):
            given += [f"--{name.replace('_', '-')}", value]
    given += ["--merge"] if arguments.merge else []
    places = shlex.join(given)
    lines = ["Compare it with PyTorch (needs the extra `parity`):"]
    lines.append(f"  {prefix}convert verify {places}")
    if conversion.config.decoder is not None and conversion.config.vision is not None:
        lines.append("Fine-tune it:")
        config = f"configs/finetune.py:{arguments.destination}"
        lines.append(f"  {prefix}train --config {config} --workdir runs/finetuned")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    families = "\n".join(
        textwrap.fill(
            ": ".join([family.title, ", ".join(family.examples)]).removesuffix(": "),
            width=96,
            initial_indent="  ",
            subsequent_indent="    ",
            break_on_hyphens=False,
        )
        for family in (*FAMILIES, *ADAPTERS)
    )
    parser = cli.Parser(
        prog="python -m videollm_mod_jax.convert",
        description=__doc__,
        epilog=f"Families, with names on the Hub:\n{families}\n\nEach command has its own --help.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_from_hf(commands)
    _add_to_hf(commands)
    _add_verify(commands)
    add = _command(commands, "inspect", _inspect, "says what a directory or a Hub name holds: "
                   "family, sizes, dtypes, what a conversion needs and leaves out")  # fmt: skip
    add("path", metavar="PATH", help="a checkpoint of the Hub, or a model of ours")
    return parser


def _command(commands, name: str, run, summary: str, example: str = ""):
    parser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=example,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser.add_argument


def _add_from_hf(commands) -> None:
    add = _command(commands, "from-hf", _from_hf, "converts a checkpoint to a model of ours",
                   _FROM_HF_EXAMPLES)  # fmt: skip
    add("source", metavar="SRC", help="a directory as downloaded from the Hub, or a name there")
    add("destination", metavar="DST", help="directory to make; it appears when it is complete")
    dtype = "of frozen weights; auto keeps float32 and makes bfloat16 of halves"
    _add_conversion_options(add, dtype)
    add("--resize-embeddings", action="store_true", help="add rows to embeddings and head, each "
        "the mean of the others, for tokens that the weights have none of")  # fmt: skip
    add("--overwrite", action="store_true", help="replace the converted model in DST")


def _add_to_hf(commands) -> None:
    add = _command(commands, "to-hf", _to_hf, "writes a model of ours as transformers (and PEFT) "
                   "load it", _TO_HF_EXAMPLES)  # fmt: skip
    add("source", metavar="SRC", help="a converted model, or the directory of a training run")
    add("destination", metavar="DST", help="directory to make; several parts (language model, "
        "vision tower, adapter) become directories in it")  # fmt: skip
    add("--part", metavar="ROLE", help="write only this part: model, vision_tower or adapter")
    add("--family", metavar="NAME", choices=[family.name for family in FAMILIES], help="of a model "
        "that was not converted: " + ", ".join(family.name for family in FAMILIES))  # fmt: skip
    add("--dtype", choices=EXPORT_DTYPES, default="auto", help="of the tensors; auto: those that "
        "they came with")  # fmt: skip
    add("--merge", action="store_true", help="add LoRA adapters to the kernels, instead of writing "
        "them as a PEFT adapter")  # fmt: skip
    add("--drop-routers", action="store_true", help="write a model with routers without them: "
        "every token is computed in every layer then")  # fmt: skip
    add("--shard-gb", type=cli.number("(0, 1e6]"), default=4.0, metavar="GB",
        help="largest file, in 10^9 bytes; by "
        "default %(default)s")  # fmt: skip
    add("--overwrite", action="store_true", help="replace the exported model in DST")
    cli.add_verify_argument(add)


def _add_verify(commands) -> None:
    add = _command(commands, "verify", _verify, "compares a converted model with PyTorch, layer by "
                   "layer (needs the extra `parity`)", _VERIFY_EXAMPLES)  # fmt: skip
    add("source", metavar="SRC", help="what from-hf converted")
    add("model", metavar="DST", help="the model that came of it")
    dtype = "to compute in, whatever the weights are stored in; auto is float32"
    _add_conversion_options(add, dtype)
    add("--prompt", help="text to compare on; by default one of ours")
    add("--image", metavar="FILE", help="picture to compare on; by default random pixels")
    add("--video", metavar="FILE", help="video to compare on; by default random frames")
    add("--max-kl", type=cli.number("[0, 1e6]"), default=1e-3, metavar="NATS",
        help="largest divergence of the next "
        "token's distribution that passes; by default %(default)s")  # fmt: skip
    add("--tokens", type=cli.whole_number("[1, 2**20]"), default=32, metavar="N",
        help="greedy tokens to compare; by default "
        "%(default)s")  # fmt: skip


def _add_conversion_options(add, dtype: str) -> None:
    add("--base", metavar="DIR", help="the model that an adapter adapts; by default the one that "
        "its config names")  # fmt: skip
    add("--vision-tower", metavar="DIR", help="vision tower of a checkpoint that holds none")
    add("--mod", metavar="INSERTION:RATIO", help="route vision tokens with Mixture-of-Depths: "
        f"{', '.join(INSERTIONS)}, or layers such as 2,6, and the share of each frame's tokens "
        "that they keep")  # fmt: skip
    add("--weighting", choices=WEIGHTINGS, help="of the kept tokens; by default tanh1, with which "
        "the kept path starts as the pretrained block")  # fmt: skip
    add("--pool", metavar="HxW", help="spatial tokens per frame; by default the family's")
    add("--dtype", choices=DTYPES, default="auto", help=dtype)
    add("--merge", action="store_true", help="add an adapter to the kernels")
    add("--tokenizer", metavar="DIR", help="tokenizer.json to use; by default the one in SRC")
    add("--system", default="", metavar="TEXT", help="instruction that opens every conversation")


_FROM_HF_EXAMPLES = """examples:
  A LLaVA, ready to fine-tune with Mixture-of-Depths:
    python -m videollm_mod_jax.convert from-hf llava-hf/llava-1.5-7b-hf models/llava \\
        --mod interleaved:0.2
  The start of VideoLLM-online: a language model and a tower, with a fresh connector between them:
    python -m videollm_mod_jax.convert from-hf meta-llama/Meta-Llama-3-8B-Instruct models/start \\
        --vision-tower google/siglip-large-patch16-384 --mod interleaved:0.2
  A PEFT adapter, merged into its base:
    python -m videollm_mod_jax.convert from-hf my/adapter models/merged --base my/base --merge

Interrupted, the same command continues where it stopped."""

_TO_HF_EXAMPLES = """examples:
  What from-hf read, bit by bit:
    python -m videollm_mod_jax.convert to-hf models/llava exported/llava
  A fine-tuned run without its routers, adapters merged:
    python -m videollm_mod_jax.convert to-hf runs/finetuned exported/tuned --merge --drop-routers"""

_VERIFY_EXAMPLES = """examples:
  python -m videollm_mod_jax.convert verify llava-hf/llava-1.5-7b-hf models/llava --image cat.png

One model is in memory at a time: seven billion parameters take 28 GB in float32, and 14 GB with
--dtype bfloat16, where a larger --max-kl may be rounding alone. Exits with status 1 where they
differ. Give the other options that from-hf was given."""


if __name__ == "__main__":
    cli.leave(main())
