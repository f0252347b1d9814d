"""Compares a converted model with the PyTorch one, stage by stage, on the same input.

PyTorch runs first and is dropped before ours is loaded, so one model is in memory at a time: in
float32 one of seven billion parameters takes 28 GB, in bfloat16 half of that.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import rich.console
import rich.table
from flax.traverse_util import flatten_dict, unflatten_dict

from videollm_mod_jax.conversion import stages
from videollm_mod_jax.conversion.cases import Case, make_cases
from videollm_mod_jax.conversion.families import plan_conversion
from videollm_mod_jax.conversion.llava import DEFAULTS as LLAVAS
from videollm_mod_jax.conversion.loading import VOCABULARY_AXES
from videollm_mod_jax.conversion.manifest import read_manifest
from videollm_mod_jax.conversion.plan import Conversion, Options
from videollm_mod_jax.conversion.reference import import_packages, load_reference
from videollm_mod_jax.conversion.stages import Stages
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.models import VideoLLMConfig, full_computation
from videollm_mod_jax.training.checkpoint import load_model, read_model_config

TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
"""By dtype: the largest difference in a stage that is rounding, relative to its largest value."""

Results = dict[str, tuple[Stages, list[int]]]


def verify(
    source: Path,
    model: Path,
    *,
    options: Options,
    prompt: str | None,
    image: str | None,
    video: str | None,
    max_kl: float,
    tokens: int,
    console: rich.console.Console,
) -> bool:
    """Compares a converted model with what it was made of, and prints a table per input.

    PyTorch's weights are rounded to the dtype of ours first, so what differs is the conversion and
    the arithmetic. Routing is off, and frames have as many tokens as the family gives them:
    transformers knows nothing else.

    Args:
      source: what was converted.
      model: the directory that came of it.
      options: of the conversion; `dtype` is the one to compute in, and `auto` is float32.
      prompt: text to compare on; None takes one of ours.
      image: file of a picture; None takes random pixels.
      video: file of a video, of which a few frames are seen; None takes random ones.
      max_kl: largest Kullback-Leibler divergence, in nats, of the next token's distribution.
      tokens: how many greedy tokens to compare.
      console: gets the tables.

    Returns:
      Whether every divergence is at most `max_kl`; of a tower alone, which has no distribution,
      whether every stage agrees.

    Raises:
      UserError: torch or transformers is missing, the model was made of another source, or what
        is asked does not fit the model.
    """
    if tokens < 1:
        raise UserError(f"--tokens is {tokens}; expected at least 1")
    manifest = read_manifest(model)
    if manifest is not None and manifest.added_rows:
        options = dataclasses.replace(options, resize_embeddings=True)
    conversion = plan_conversion(source, options)
    if conversion.parts[0].family in LLAVAS:
        # transformers pools as the family does.
        conversion = plan_conversion(source, dataclasses.replace(options, pool=None))
    import_packages(conversion)
    stored = read_model_config(model)
    _check_same_model(conversion.config, stored, source, model)
    dtype = "float32" if options.dtype == "auto" else options.dtype
    config = dataclasses.replace(
        _without_added_rows(conversion),
        routing=full_computation(),
        dtype=dtype,
        param_dtype=stored.param_dtype,
    )
    files = (None if name is None else Path(name) for name in (image, video))
    cases = make_cases(conversion, prompt, *files)
    _check_known(cases, conversion)
    console.print(_heading(conversion, stored, dtype))
    with console.status("PyTorch computes"):
        expected = _run_pytorch(conversion, config, cases, tokens)
    with console.status("JAX computes"):
        found = _run_ours(model, config, cases, tokens)
    verdicts = [
        _report(case.name, expected[case.name], found[case.name], TOLERANCE[dtype], max_kl, console)
        for case in cases
    ]
    return all(verdicts)


def divergence(expected_JV: np.ndarray, found_JV: np.ndarray) -> float:
    """The largest Kullback-Leibler divergence of `found` from `expected` logits, in nats.

    ```
    expected  log [1/2, 1/2]
    found     log [1/4, 3/4]     1/2 log 2 + 1/2 log 2/3 = 0.1438
    ```
    """

    def log_probabilities(logits_JV: np.ndarray) -> np.ndarray:
        shifted = logits_JV.astype(np.float64) - logits_JV.max(axis=-1, keepdims=True)
        return shifted - np.log(np.sum(np.exp(shifted), axis=-1, keepdims=True))

    p_JV, q_JV = log_probabilities(expected_JV), log_probabilities(found_JV)
    return float(np.max(np.sum(np.exp(p_JV) * (p_JV - q_JV), axis=-1)))


def difference(expected: np.ndarray, found: np.ndarray) -> tuple[float, float]:
    """The largest absolute difference, and its ratio to the largest absolute value of `expected`.

    ```
    expected  [-8, 1]    found  [-8, 3]        2, 0.25
    ```
    """
    largest = float(np.max(np.abs(expected - found)))
    return largest, largest / max(float(np.max(np.abs(expected))), np.finfo(np.float32).tiny)


def _run_pytorch(
    conversion: Conversion, config: VideoLLMConfig, cases: Sequence[Case], tokens: int
) -> Results:
    # The model is local, so that it is gone when ours is loaded.
    reference = load_reference(conversion, config.param_dtype, config.dtype)
    if config.decoder is None:
        return {case.name: (reference.run_tower(case), []) for case in cases}
    return {case.name: reference.run(case, tokens) for case in cases}


def _run_ours(model: Path, config: VideoLLMConfig, cases: Sequence[Case], tokens: int) -> Results:
    loaded = load_model(model)
    variables = flatten_dict(loaded.variables, sep="/")
    for path in variables.keys() & VOCABULARY_AXES.keys() if config.decoder else ():
        # PyTorch has no rows that were added here.
        rows = range(config.decoder.vocab_size)
        variables[path] = jnp.take(variables[path], jnp.asarray(rows), VOCABULARY_AXES[path])
    variables = unflatten_dict(variables, sep="/")
    loaded = dataclasses.replace(loaded, config=config, variables=variables)
    if config.decoder is None:
        return {case.name: (stages.run_tower(loaded, case), []) for case in cases}
    return {case.name: stages.run(loaded, case, tokens) for case in cases}


def _check_same_model(
    expected: VideoLLMConfig, stored: VideoLLMConfig, source: Path, model: Path
) -> None:
    if stored.vision is not None and expected.vision is not None:
        vision = dataclasses.replace(stored.vision, pool=expected.vision.pool)
        stored = dataclasses.replace(stored, vision=vision)
    for part in ("decoder", "vision", "lora"):
        if getattr(expected, part) != getattr(stored, part):
            raise UserError(
                f"{model} was not made of {source}: its {part} is another one; name what from-hf "
                "was given, with the same --base, --vision-tower and --merge"
            )


def _without_added_rows(conversion: Conversion) -> VideoLLMConfig:
    """The configuration of the model with the embeddings that its source has."""
    config, decoder = conversion.config, conversion.config.decoder
    if not conversion.added_rows:
        return config
    vocab_size = decoder.vocab_size - conversion.added_rows
    return dataclasses.replace(config, decoder=dataclasses.replace(decoder, vocab_size=vocab_size))


def _check_known(cases: Sequence[Case], conversion: Conversion) -> None:
    if not conversion.added_rows:
        return
    rows = conversion.config.decoder.vocab_size - conversion.added_rows
    for case in cases:
        if max((*case.before, *case.after)) >= rows:
            raise UserError(
                "--prompt has a token of which the source has no embedding (its row was added by "
                "--resize-embeddings), so that PyTorch cannot read it; leave it out"
            )


def _heading(conversion: Conversion, stored: VideoLLMConfig, dtype: str) -> str:
    lines = [
        f"{conversion.family}: weights in {stored.param_dtype} on both sides, computed in {dtype}"
    ]
    if stored.routing.insertion != ():
        lines.append("compared without routing: transformers computes every token in every layer")
    if stored.vision is not None and stored.vision.pool != conversion.config.vision.pool:
        lines.append(f"compared with the family's own pooling, {conversion.config.vision.pool}")
    if any(path.startswith("params/connector") for path in conversion.fresh):
        lines.append("the connector starts afresh, so that text alone can be compared")
    if conversion.added_rows:
        lines.append(f"compared without the {conversion.added_rows} rows added to the embeddings")
    return "\n".join(lines)


def _report(
    name: str,
    expected: tuple[Stages, list[int]],
    found: tuple[Stages, list[int]],
    tolerance: float,
    max_kl: float,
    console: rich.console.Console,
) -> bool:
    """Prints how far apart the stages are; returns whether that is near enough."""
    table = rich.table.Table(title=name, title_justify="left", box=None)
    for column in ("stage", "shape", "largest difference", "relative", ""):
        table.add_column(column)
    agrees = True
    for stage, value in expected[0].items():
        largest, relative = difference(value, found[0][stage])
        is_near = relative <= tolerance
        mark = "<- the first that differs" if agrees and not is_near else ""
        agrees = agrees and is_near
        shape = " x ".join(map(str, value.shape))
        table.add_row(stage, shape, f"{largest:.1e}", f"{relative:.1e}", mark)
    console.print(table)
    if "logits" not in expected[0]:
        return agrees
    kl = divergence(expected[0]["logits"], found[0]["logits"])
    verdict = f"at most {max_kl:g}" if kl <= max_kl else f"MORE than {max_kl:g}"
    console.print(f" divergence {kl:.1e} nats, {verdict}; {_agreement(expected[1], found[1])}")
    return kl <= max_kl


def _agreement(theirs: Sequence[int], ours: Sequence[int]) -> str:
    pairs = enumerate(zip(theirs, ours, strict=True), start=1)
    first = next((i for i, (a, b) in pairs if a != b), None)
    if first is None:
        return f"the same {len(ours)} greedy tokens"
    return f"greedy tokens differ from number {first} of {len(ours)} on"
