"""Streaming evaluation: a teacher-forced forward per batch, then the replies that came late.

A turn whose right frame passed in silence is not simply wrong: how late would the model have
spoken? Its caches are trimmed, by position, to the end of the turn's frames, and the frames that
follow are appended without the true answer until the model speaks.

Source: `stream_evaluate` in `models/modeling_live.py` of showlab/videollm-online, here for batches.
"""

import dataclasses
import functools
import itertools
import json
import math
import os
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from rich import progress

from videollm_mod_jax.data import files
from videollm_mod_jax.data.example import Turn
from videollm_mod_jax.data.pipeline import Examples, evaluation_batches
from videollm_mod_jax.evaluation.placing import put_rows
from videollm_mod_jax.evaluation.stream_metrics import (
    StreamMetrics,
    TurnPrediction,
    mean_metrics,
    turn_metrics,
)
from videollm_mod_jax.models import EMPTY, Caches, VideoLLM, init_caches, trim_caches
from videollm_mod_jax.streaming import engine
from videollm_mod_jax.streaming.triggers import breaks_silence, check_threshold
from videollm_mod_jax.training import distributed
from videollm_mod_jax.training.checkpoint import LoadedModel


@dataclasses.dataclass(frozen=True)
class Sample:
    """The metrics of one video.

    Attributes:
      id: of its record.
      turns: answers that were judged.
      metrics: means over them.
    """

    id: str
    turns: int
    metrics: StreamMetrics


@dataclasses.dataclass(frozen=True)
class StreamReport:
    """What `evaluate_stream` gives.

    Attributes:
      metrics: means over the videos.
      samples: one per video, in the order of the split.
    """

    metrics: StreamMetrics
    samples: tuple[Sample, ...]

    def write_samples(self, path: str | os.PathLike) -> None:
        """Writes a json line per video: id, turns and the four metrics (null where undefined)."""
        with files.written_aside(path) as aside, open(aside, "w", encoding="utf-8") as out:
            for sample in self.samples:
                metrics = dataclasses.asdict(sample.metrics)
                row = {k: None if math.isnan(v) else v for k, v in metrics.items()}
                out.write(json.dumps({"id": sample.id, "turns": sample.turns, **row}) + "\n")


@flax.struct.dataclass
class Judgement:
    """The teacher-forced forward at the labelled positions.

    Attributes:
      log_probs_BJ: float32, log-probability of every label.
      correct_BJ: bool, whether it was the most likely token.
      breaks_BJ: bool, whether the model would speak there (of use at a frame's last token).
      caches: of the whole sequences, without their padding.
    """

    log_probs_BJ: jax.Array
    correct_BJ: jax.Array
    breaks_BJ: jax.Array
    caches: Caches


@functools.partial(jax.jit, static_argnames=("model", "interval_id", "silence_threshold"))
def judge(
    model: VideoLLM,
    variables: dict,
    batch: dict[str, jax.Array],
    *,
    interval_id: int,
    silence_threshold: float | None,
) -> Judgement:
    """Runs a batch of examples once, on their true history.

    Args:
      model: per-layer model (`scan=False`).
      variables: its variables.
      batch: the arrays of `build_example` with a leading B.
      interval_id: id of the token that keeps silent.
      silence_threshold: see `breaks_silence`.
    """
    B, F = batch["frame_starts"].shape
    S, N = batch["tokens"].shape[1], model.config.tokens_per_frame
    dtype = jnp.dtype(model.config.dtype)
    index_S = jnp.arange(S, dtype=jnp.int32)
    is_real_BS = index_S < batch["length"][:, None]
    out = model.apply(
        variables,
        batch["tokens"],
        batch["features"],
        batch["frame_starts"],
        batch["label_positions"],
        position_BS=jnp.where(is_real_BS, index_S, EMPTY),
        caches=init_caches(model.config, B, S - F * N, F, dtype),
    )
    log_probs_BJV = jax.nn.log_softmax(out.logits_BJV)
    labels_BJ1 = batch["labels"][..., None]
    return Judgement(
        log_probs_BJ=jnp.take_along_axis(log_probs_BJV, labels_BJ1, axis=-1)[..., 0],
        correct_BJ=jnp.argmax(out.logits_BJV, axis=-1) == batch["labels"],
        breaks_BJ=breaks_silence(out.logits_BJV, interval_id, silence_threshold),
        caches=out.caches,
    )


@functools.partial(jax.jit, static_argnames=("model", "interval_id", "silence_threshold"))
def late_frames(
    model: VideoLLM,
    variables: dict,
    caches: Caches,
    features_BFNW: jax.Array,
    limit_B: jax.Array,
    first_frame_B: jax.Array,
    given_B: jax.Array,
    *,
    interval_id: int,
    silence_threshold: float | None,
) -> jax.Array:
    """How many frames after the end of a turn the model breaks its silence, one turn per stream.

    ```
    sequence       [ v v v , v v v ]A x e [ v v v , v v v ] ...      N = 3, turn of two frames
    trimmed        [ v v v , v v v                                   limit = 8
    appended                       , v v v , v v v                   the next turn's frames
    ```

    Args:
      model: per-layer model (`scan=False`).
      variables: its variables.
      caches: of the whole sequences, from `judge`.
      features_BFNW: of all frames.
      limit_B: int32, index behind the last vision token of the turn.
      first_frame_B: int32, index of the first frame to append.
      given_B: int32, how many frames to append at most; 0 for a stream that waits.
      interval_id: id of the token that goes before an appended frame.
      silence_threshold: see `breaks_silence`.

    Returns:
      int32 [B]: 1 for the first frame appended, and so on; `given_B` if none broke the silence.
    """
    B, N = len(features_BFNW), model.config.tokens_per_frame
    chunk_BS = jnp.zeros((B, 1 + N), jnp.int32).at[:, 0].set(interval_id)
    starts_B1 = jnp.ones((B, 1), jnp.int32)

    def waits(step, late_B):
        return (late_B == 0) & (step < given_B)

    def unfinished(carry):
        _, step, late_B = carry
        return jnp.any(waits(step, late_B))

    def append_next(carry):
        state, step, late_B = carry
        waits_B = waits(step, late_B)
        frame_B111 = (first_frame_B + step)[:, None, None, None]
        features_B1NW = jnp.take_along_axis(features_BFNW, frame_B111, axis=1, mode="clip")
        length_B = jnp.where(waits_B, 1 + N, 0)
        state = engine.append(model, variables, state, chunk_BS, length_B, features_B1NW, starts_B1)
        breaks_B = breaks_silence(state.logits_BV, interval_id, silence_threshold)
        return state, step + 1, jnp.where(waits_B & breaks_B, step + 1, late_B)

    state = engine.start(model, B, 0, 0, seed=0)
    state = state.replace(caches=trim_caches(caches, limit_B), position_B=limit_B)
    zero_B = jnp.zeros((B,), jnp.int32)
    _, _, late_B = jax.lax.while_loop(unfinished, append_next, (state, jnp.int32(0), zero_B))
    return jnp.where(late_B == 0, given_B, late_B)


def frames_to_wait(turns: Sequence[Turn], index: int) -> int:
    """How many frames a silent model is given behind turn `index`, before it counts as never.

    As many as could have been too early, so that neither side is favoured, and no more than the
    next turn has; none behind the last turn (upstream: the stream has ended).
    """
    if index == len(turns) - 1:
        return 0
    return max(0, min(turns[index + 1].num_frames, turns[index].num_frames - 1))


def evaluate_stream(
    model: LoadedModel,
    examples: Examples,
    *,
    batch_size: int,
    silence_threshold: float | None = None,
) -> StreamReport:
    """Computes LM-PPL, TimeDiff, Fluency and LM-Correctness of a split.

    Several processes call it together, each with a whole model on devices of its own: every one
    judges its rows of a batch, and all get the whole report.

    Turns that a user's question opens count for the language metrics; their timing can only be
    wrong by speaking before the question. Frames behind the last answer are not judged.

    Args:
      model: weights, config and tokenizer.
      examples: of the split, undisturbed.
      batch_size: streams per forward, over all processes.
      silence_threshold: see `breaks_silence`.

    Returns:
      Means over turns, then over videos, and the metrics of each video.

    Raises:
      UserError: a threshold that is no probability, or a batch that the processes do not divide.
    """
    check_threshold(silence_threshold)
    video_llm = VideoLLM(model.config)
    rule = {
        "interval_id": model.tokenizer.interval_id,
        "silence_threshold": silence_threshold,
    }
    fps = examples.features.meta.fps
    judged = {}
    batches = progress.track(
        evaluation_batches(examples, batch_size, jax.process_index(), jax.process_count()),
        "Evaluating",
        total=-(-len(examples) // batch_size),
        disable=not distributed.is_lead(),
    )
    for batch in batches:
        indices = batch.pop("example_index")[batch.pop("example_valid")]
        turns = [examples.turns(int(i)) for i in indices]
        predictions = _predict(video_llm, model.variables, batch, turns, rule)
        for i, predicted in zip(indices, predictions, strict=True):
            name = examples.records[int(i)].id
            metrics = mean_metrics(turn_metrics(turn, fps) for turn in predicted)
            judged[int(i)] = (name, len(predicted), dataclasses.asdict(metrics))
    everyone = itertools.chain.from_iterable(part.items() for part in distributed.gather(judged))
    samples = tuple(
        Sample(name, turns, StreamMetrics(**metrics))
        for _, (name, turns, metrics) in sorted(everyone, key=lambda item: int(item[0]))
    )
    return StreamReport(mean_metrics(s.metrics for s in samples), samples)


def _predict(
    model: VideoLLM,
    variables: dict,
    batch: dict[str, np.ndarray],
    turns: Sequence[Sequence[Turn]],
    rule: dict,
) -> list[list[TurnPrediction]]:
    """What the model does in every turn of a batch; rows beyond `turns` are filling."""
    placed = put_rows(batch, len(batch["length"]), variables)
    judged = judge(model, variables, placed, **rule)
    log_probs_BJ, correct_BJ, breaks_BJ = (
        np.asarray(x) for x in (judged.log_probs_BJ, judged.correct_BJ, judged.breaks_BJ)
    )
    predictions = [
        [
            TurnPrediction(
                breaks_silence=breaks_BJ[b, turn.stream_slots],
                asked=turn.asked,
                late_frames=0,
                log_probs=log_probs_BJ[b, turn.answer_slots],
                correct=correct_BJ[b, turn.answer_slots],
            )
            for turn in example_turns
        ]
        for b, example_turns in enumerate(turns)
    ]
    silent = [
        [
            t
            for t, predicted in enumerate(predictions[b])
            if not (predicted.asked or predicted.breaks_silence.any())
            and len(predicted.breaks_silence) > 0
            and frames_to_wait(turns[b], t) > 0
        ]
        for b in range(len(turns))
    ]
    # One silent turn of every stream at a time: their caches are all there, so nothing is gathered.
    for round_index in range(max(map(len, silent), default=0)):
        limit_B, first_frame_B, given_B = np.zeros((3, len(breaks_BJ)), np.int32)
        chosen = [
            (b, late[round_index]) for b, late in enumerate(silent) if round_index < len(late)
        ]
        for b, t in chosen:
            limit_B[b] = batch["label_positions"][b, turns[b][t].stream_slots[-1]] + 1
            first_frame_B[b] = turns[b][t + 1].first_frame
            given_B[b] = frames_to_wait(turns[b], t)
        late_B = np.asarray(
            late_frames(
                model,
                variables,
                judged.caches,
                placed["features"],
                limit_B,
                first_frame_B,
                given_B,
                **rule,
            )
        )
        for b, t in chosen:
            predictions[b][t] = dataclasses.replace(predictions[b][t], late_frames=int(late_B[b]))
    return predictions
