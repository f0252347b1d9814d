"""Answers to many prompts: one forward over a batch of prompts, then one loop over new tokens.

Prompts of one shape are answered together, in rows that know nothing of each other, and what is
drawn at random depends on the seed and the record alone; so neither the batch nor the number of
processes changes an answer.

Shape suffixes: B rows, S tokens of a padded prompt, F frames, N tokens per frame, W vision feature
width, V vocabulary, T new tokens.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from videollm_mod_jax.config_dict import SEED, Checked, Interval
from videollm_mod_jax.data.pipeline import Examples
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.evaluation.placing import put_rows
from videollm_mod_jax.evaluation.prompts import Prompt, make_prompt, padded_shape, split_reference
from videollm_mod_jax.models import VideoLLM, trim_caches
from videollm_mod_jax.streaming import engine
from videollm_mod_jax.streaming.dialogues import read_answer
from videollm_mod_jax.training.checkpoint import LoadedModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoding(Checked):
    """How answers are found.

    Attributes:
      max_new_tokens: longest answer with its eos; a longer one is cut.
      temperature: 0 takes the most likely token; otherwise logits are divided by it.
      samples: answers per prompt.
      seed: of sampling.
    """

    max_new_tokens: Annotated[int, Interval("[2, 2**20]")]
    temperature: Annotated[float, Interval("[0, 1000]")]
    samples: Annotated[int, Interval("[1, 2**20]")]
    seed: SEED

    def __post_init__(self):
        super().__post_init__()
        if self.samples > 1 and not self.temperature:
            raise UserError(
                f"samples is {self.samples} and temperature is 0, so all would be the same; give a "
                "temperature above 0"
            )


@functools.partial(jax.jit, static_argnames=("model", "max_new_tokens"))
def prefill(
    model: VideoLLM, variables: dict, batch: dict[str, jax.Array], *, max_new_tokens: int
) -> engine.StreamState:
    """The state behind a batch of prompts, with room for an answer.

    Args:
      model: per-layer model (`scan=False`).
      variables: its variables.
      batch: tokens_BS int32, features [B, F, N, W], frame_starts_BF int32 and length_B int32: each
        row's prompt, behind it the frames and the text slots that it does not use.
      max_new_tokens: T, longest answer with its eos.
    """
    B, F = batch["frame_starts"].shape
    text = batch["tokens"].shape[1] - F * model.config.tokens_per_frame
    return engine.append(
        model,
        variables,
        engine.start(model, B, text + max_new_tokens, F, seed=0),
        batch["tokens"],
        batch["length"],
        batch["features"],
        batch["frame_starts"],
    )


@functools.partial(jax.jit, donate_argnames="state")
def rewind(
    state: engine.StreamState, position_B: jax.Array, logits_BV: jax.Array
) -> engine.StreamState:
    """The state as it was at an earlier position, whose logits were these."""
    caches = trim_caches(state.caches, position_B)
    return state.replace(caches=caches, position_B=position_B, logits_BV=logits_BV)


def answer_records(
    model: LoadedModel,
    examples: Examples,
    indices: Iterable[int],
    decoding: Decoding,
    *,
    batch_size: int,
) -> Iterator[tuple[int, Prompt, tuple[str, ...]]]:
    """Answers the last question of records.

    Args:
      model: weights, config and tokenizer.
      examples: of a split, undisturbed.
      indices: of records in it, in any order.
      decoding: how.
      batch_size: B, prompts per forward.

    Yields:
      Index, prompt and `decoding.samples` answers of every record, in the order in which batches
      of prompts of one shape become full.

    Raises:
      UserError: a record without features.
    """
    video_llm, N = VideoLLM(model.config), model.config.tokens_per_frame
    for shape, group in _grouped(_prompts(examples, indices), N, batch_size):
        batch = _stack(examples, group, shape, N, batch_size)
        texts = _answer(video_llm, model, batch, [index for index, _ in group], decoding)
        for (index, prompt), said in zip(group, texts, strict=True):
            yield index, prompt, said


def _prompts(examples: Examples, indices: Iterable[int]) -> Iterator[tuple[int, Prompt]]:
    for index in indices:
        before, _ = split_reference(examples.conversation(index))
        yield index, make_prompt(before, examples.tokenizer, examples.tokens_per_frame)


def _grouped(
    prompts: Iterable[tuple[int, Prompt]], tokens_per_frame: int, batch_size: int
) -> Iterator[tuple[tuple[int, int], list[tuple[int, Prompt]]]]:
    """Prompts of one padded shape, `batch_size` at a time, and at the end those left over."""
    waiting: dict[tuple[int, int], list[tuple[int, Prompt]]] = {}
    for index, prompt in prompts:
        shape = padded_shape(prompt, tokens_per_frame)
        group = waiting.setdefault(shape, [])
        group.append((index, prompt))
        if len(group) == batch_size:
            yield shape, waiting.pop(shape)
    yield from waiting.items()


def _stack(
    examples: Examples,
    group: Sequence[tuple[int, Prompt]],
    shape: tuple[int, int],
    tokens_per_frame: int,
    batch_size: int,
) -> dict[str, np.ndarray]:
    """The batch of `prefill`; rows beyond the group repeat its first one."""
    F, S = shape[0], shape[1] + shape[0] * tokens_per_frame
    rows = []
    for index, prompt in group:
        shown, length = len(prompt.frame_starts), len(prompt.tokens)
        features_FNW = examples.frames(examples.records[index])[:shown]
        padding = [(0, F - shown), (0, 0), (0, 0)]
        unused = length + tokens_per_frame * np.arange(F - shown, dtype=np.int32)
        rows.append(
            {
                "tokens": np.pad(prompt.tokens, (0, S - length)),
                "features": np.pad(features_FNW.astype(np.float32), padding),
                "frame_starts": np.append(prompt.frame_starts, unused),
                "length": np.int32(length),
            }
        )
    rows += rows[:1] * (batch_size - len(rows))
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _answer(
    video_llm: VideoLLM,
    model: LoadedModel,
    batch: dict[str, np.ndarray],
    indices: Sequence[int],
    decoding: Decoding,
) -> list[tuple[str, ...]]:
    """The answers of each record of a batch; rows beyond `indices` are filling."""
    B = len(batch["length"])
    names_B = np.array([*indices, *[0] * (B - len(indices))])
    answers_B = np.arange(B) < len(indices)
    batch = put_rows(batch, B, model.variables)
    state = prefill(video_llm, model.variables, batch, max_new_tokens=decoding.max_new_tokens)
    # Copied, because the state is donated.
    logits_BV = jnp.copy(state.logits_BV)
    samples = []
    for sample in range(decoding.samples):
        state, tokens_BT, _ = engine.generate_rows(
            video_llm,
            model.variables,
            state,
            answers_B,
            _key_data(decoding.seed, sample, names_B),
            eos_id=model.tokenizer.eos_id,
            max_new_tokens=decoding.max_new_tokens,
            temperature=decoding.temperature,
        )
        tokens_BT = np.asarray(tokens_BT)[: len(indices)]
        samples.append([read_answer(tokens_T, model.tokenizer) for tokens_T in tokens_BT])
        if sample < decoding.samples - 1:
            state = rewind(state, batch["length"], logits_BV)
    return list(zip(*samples, strict=True))


def _key_data(seed: int, sample: int, names_B: np.ndarray) -> jax.Array:
    key = jax.random.fold_in(jax.random.key(seed), sample)
    return jax.random.key_data(jax.vmap(jax.random.fold_in, (None, 0))(key, names_B))
