"""The batched evaluation equals one forward after another over sequences made by hand."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny, tiny_stream
from videollm_mod_jax.data.annotations import Record
from videollm_mod_jax.data.annotations import Turn as RecordTurn
from videollm_mod_jax.data.example import Budget, Turn
from videollm_mod_jax.data.features import FeatureMeta, FeatureSource, FeatureWriter
from videollm_mod_jax.data.pipeline import Examples
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.evaluation import stream_metrics
from videollm_mod_jax.evaluation.stream import evaluate_stream, frames_to_wait
from videollm_mod_jax.models import VideoLLM

FPS = 2.0
N, W = tiny.CONFIG.tokens_per_frame, tiny.VISION.width
FRAMES, TEXT = 12, 72
A, B, C, D = tiny_stream.ANSWERS
Q = tiny_stream.QUESTION
# (role, time, text): turns of 4, 3 and 2 frames, a question in mid-stream, and frames left over.
VIDEOS = {
    "narrated": [("assistant", 1.5, A), ("assistant", 3.0, B), ("assistant", 4.0, D)],
    "asked": [("assistant", 1.0, A), ("user", 3.0, Q), ("assistant", 3.0, C), ("assistant", 5, D)],
    "last": [("assistant", 2.0, D)],
}


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    path = tmp_path_factory.mktemp("features") / "test"
    rng = np.random.default_rng(3)
    meta = FeatureMeta(features_per_frame=N, width=W, fps=FPS, resolution=16, tower="tiny")
    with FeatureWriter(path, meta) as writer:
        for name in VIDEOS:
            writer.add(name, rng.normal(size=(FRAMES, N, W)))
    records = [
        Record(
            id=name,
            video=name,
            start=0.0,
            stop=FRAMES / FPS,
            turns=tuple(RecordTurn(*turn) for turn in turns),
        )
        for name, turns in VIDEOS.items()
    ]
    budget = Budget(frames=FRAMES + 1, text_tokens=TEXT, labels=48)
    words = tiny_stream.tokenizer()
    return Examples(records, FeatureSource(path), words, N, tiny_stream.SYSTEM, budget)


@functools.partial(jax.jit, static_argnums=0)
def forward(model, variables, tokens_1S, features_1FNW, starts_1F):
    positions = jnp.arange(tokens_1S.shape[1], dtype=jnp.int32)[None]
    out = model.apply(variables, tokens_1S, features_1FNW, starts_1F, positions)
    return out.logits_BJV[0]


def run_by_hand(loaded, chunks, features):
    """Logits behind every token of a list of text ids and frame indices, padded to one shape."""
    tokens, starts, used = [], [], []
    for chunk in chunks:
        if isinstance(chunk, int):
            starts.append(len(tokens))
            used.append(features[chunk])
            tokens += [0] * N
        else:
            tokens += chunk
    slots, length = FRAMES + 1, len(tokens)
    S = TEXT + slots * N
    starts += [S - N * k for k in range(slots - len(starts), 0, -1)]
    padded = np.zeros((1, slots, N, W), np.float32)
    padded[0, : len(used)] = used
    tokens = np.array([tokens + [0] * (S - length)], np.int32)
    logits = forward(
        VideoLLM(loaded.config), loaded.variables, tokens, padded, np.array([starts], np.int32)
    )
    return np.asarray(logits, np.float64)[:length]


def speaks(logits_V, interval, threshold):
    p = np.exp(logits_V - logits_V.max())
    p /= p.sum()
    if threshold is not None and p[interval] < threshold:
        p[interval] = 0
    return bool(p.argmax() != interval)


def predict_by_hand(loaded, turns, features, threshold):
    """Turns as lists of (frames, question or None, answer), each judged by forwards of its own."""
    words = loaded.tokenizer
    interval, predictions = words.interval_id, []
    history, first = [], 0
    text = words.bos + tiny_stream.SYSTEM + "\n"
    for t, (count, question, answer) in enumerate(turns):
        frames = list(range(first, first + count))
        opened = [words.encode(text + "\n[").ids.tolist()] if count else []
        shown = [x for f in frames for x in ([interval], f)][1:]
        before = history + opened + shown
        prompt = "]" if count else text
        prompt += f"\nUser: {question}" if question else ""
        prompt_ids = words.encode(prompt + "\nAssistant:").ids.tolist()
        answer_ids = words.encode(f" {answer}{words.eos}").ids.tolist()
        logits = run_by_hand(loaded, [*before, prompt_ids, answer_ids], features)
        # Last token of frame i, counted back from the end.
        end = len(logits) - len(prompt_ids) - len(answer_ids)
        ends = [end - 1 - (count - 1 - i) * (N + 1) for i in range(count)]
        learnt = ends[:-1] if question else ends
        breaks = np.array([speaks(logits[e], interval, threshold) for e in learnt], bool)
        # "Assistant:" is learnt too, and the line end between "]" and it in a narration.
        role = "Assistant:" if question else "\nAssistant:"
        labels = words.encode(role).ids.tolist() + answer_ids
        rows = logits[len(logits) - len(labels) - 1 : -1]
        log_probs = rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))
        late = 0
        if not question and count and not breaks.any() and t + 1 < len(turns):
            given = min(turns[t + 1][0], count - 1)
            for late in range(1, given + 1):
                more = [x for f in range(late) for x in ([interval], frames[-1] + 1 + f)]
                if speaks(run_by_hand(loaded, before + more, features)[-1], interval, threshold):
                    break
        predictions.append(
            stream_metrics.TurnPrediction(
                breaks_silence=breaks,
                asked=question is not None,
                late_frames=late,
                log_probs=log_probs[np.arange(len(labels)), labels],
                correct=rows.argmax(axis=1) == labels,
            )
        )
        history = [*before, prompt_ids, answer_ids]
        first, text = first + count, ""
    return predictions


# The videos above as the template sees them: frames, question, answer.
TURNS = {
    "narrated": [(4, None, A), (3, None, B), (2, None, D)],
    "asked": [(3, None, A), (3, Q, C), (5, None, D)],
    "last": [(5, None, D)],
}


# Models that speak early, on time, late and never, as the counts below assert.
MODELS = [(0.12, 17), (0.16, 19), (0.12, 22), (0.25, 29), (0.25, 11), (0.25, 9)]


@pytest.mark.parametrize("threshold", [None, 0.1])
def test_batched_evaluation_equals_forwards_made_by_hand(examples, threshold):
    late = []
    for silence, seed in MODELS if threshold is None else MODELS[:2]:
        loaded = tiny_stream.loaded_model(silence, seed)
        report = evaluate_stream(loaded, examples, batch_size=2, silence_threshold=threshold)
        assert [sample.id for sample in report.samples] == list(VIDEOS)
        for sample, turns in zip(report.samples, TURNS.values(), strict=True):
            features = examples.features.read(sample.id).astype(np.float32)
            predictions = predict_by_hand(loaded, turns, features, threshold)
            expected = stream_metrics.mean_metrics(
                stream_metrics.turn_metrics(turn, FPS) for turn in predictions
            )
            assert sample.turns == len(turns)
            np.testing.assert_allclose(
                dataclasses.astuple(sample.metrics), dataclasses.astuple(expected), rtol=1e-4
            )
            late.append([turn.late_frames for turn in predictions])
    if threshold is None:
        # Two late replies in one video; replies before and at the end of the frames to wait for.
        assert any(sum(frames > 0 for frames in turns) == 2 for turns in late)
        assert {1, 2, 3} <= {frames for turns in late for frames in turns}


def test_report_is_the_mean_over_videos_and_is_written_whole(examples, tmp_path):
    loaded = tiny_stream.loaded_model(silence=0.12, seed=17)
    report = evaluate_stream(loaded, examples, batch_size=2)
    assert report.metrics == stream_metrics.mean_metrics(s.metrics for s in report.samples)
    no_answer = stream_metrics.mean_metrics([])
    report = dataclasses.replace(
        report, samples=(*report.samples, dataclasses.replace(report.samples[0], metrics=no_answer))
    )
    report.write_samples(tmp_path / "samples.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [*VIDEOS, "narrated"]
    assert [row["turns"] for row in rows] == [3, 3, 1, 3]
    assert rows[1]["fluency"] == report.samples[1].metrics.fluency
    assert rows[3]["lm_ppl"] is None
    assert [path.name for path in tmp_path.iterdir()] == ["samples.jsonl"]


def test_a_silent_model_waits_as_long_as_it_could_have_been_early():
    def turn(num_frames):
        none = np.zeros(0, np.int32)
        return Turn(0, num_frames, none, none, asked=False)

    turns = [turn(4), turn(2), turn(5), turn(0), turn(1), turn(3)]
    assert [frames_to_wait(turns, t) for t in range(6)] == [2, 1, 0, 0, 0, 0]


def test_a_threshold_that_is_no_probability_is_refused(examples):
    with pytest.raises(UserError, match="silence_threshold"):
        evaluate_stream(
            tiny_stream.loaded_model(silence=0.1), examples, batch_size=1, silence_threshold=2.0
        )
