"""Every kind of benchmark marks answers by its rule, and its numbers come out of the rows alone."""

import dataclasses
import json

import pytest

from tests import tiny_benchmarks
from tests.tiny_benchmarks import asked
from videollm_mod_jax.data.annotations import Record
from videollm_mod_jax.data.builders.registry import DATASETS
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.evaluation import report, running, samples
from videollm_mod_jax.evaluation.benchmarks import BENCHMARKS, Marking, taxonomy_of
from videollm_mod_jax.evaluation.held_out import count_learnt
from videollm_mod_jax.evaluation.judge import ExactMatch, Verdict
from videollm_mod_jax.evaluation.running import Subject, narration_scores, parts_of, run_part
from videollm_mod_jax.models import early_exit, full_computation, layer_skip

STEPS = ("Cut potato.", "Peel potato.", "Serve.")
ACTIONS = ("verb: take", "verb: put", "noun: dough", "noun: onion")


class SaysMaybe:
    """A judge for tests: half the answers are right."""

    name = "maybe"

    def judge(self, question, answer, prediction):
        assert (question, answer) == ("How many?", "Two.")
        return Verdict(correct=prediction == "2", score=4 if prediction == "2" else 1)


def numbers(kind, cases, labels=(), judge=None):
    """Scores and marks of (answer, reference, target) cases."""
    benchmark, marking = BENCHMARKS[kind], Marking(labels, judge or ExactMatch())
    rows = []
    for answers, reference, target in cases:
        answers = [answers] if isinstance(answers, str) else answers
        record = asked("x", 2, answer=reference or "", target=target)
        marks = benchmark.mark(record, answers, reference, marking)
        # As they come back from a file.
        rows.append(json.loads(json.dumps({"reference": reference, **marks})))
    return benchmark.score(rows, marking), rows


def test_the_whole_answer_means_the_nearest_label():
    scores, rows = numbers(
        "labels",
        [
            ("Cut a potato", "Cut potato.", {"labels": ["Cut potato."]}),
            ("Peel potatoes!", "Cut potato.", {"labels": ["Cut potato."]}),
        ],
        STEPS,
    )
    assert [row["means"] for row in rows] == ["Cut potato.", "Peel potato."]
    assert scores == {"accuracy": 1 / 2}


def test_procedures_count_by_step():
    scores, rows = numbers(
        "steps",
        [
            ("1. Cut potato.", "...", {"labels": ["Cut potato."]}),
            ("1. Serve.\n2. Peel.", "...", {"labels": ["Serve.", "Peel potato.", "Cut potato."]}),
        ],
        STEPS,
    )
    assert rows[1]["correct"] == [True, False, False]
    # Two of the four steps that were to be named.
    assert scores == {"accuracy": 2 / 4}


def test_a_procedure_of_one_step_is_its_first_line():
    answer = "Serve.\nPeel potato.\nPeel potato."
    case = [(answer, "Serve.", {"labels": ["Serve."]})]
    assert numbers("steps", case, STEPS)[0] == {"accuracy": 1.0}
    assert numbers("labels", case, STEPS)[0] == {"accuracy": 0.0}


def test_exact_answers_are_normalized():
    cases = [("Red.", "red", {}), ("dark red", "red", {})]
    assert numbers("vqa", cases)[0] == {"accuracy": 0.5}


def test_choices_are_grouped_by_duration_or_subject():
    video = [
        ("B. because", "B", {"duration": "short", "options": []}),
        ("no idea", "C", {"duration": "long", "options": []}),
        ("A", "A", {"duration": "long", "options": []}),
        ("B", "A", {"duration": "long", "options": []}),
    ]
    scores, rows = numbers("choices", video)
    assert [row["letter"] for row in rows] == ["B", None, "A", "B"]
    assert scores == {"accuracy": 0.5, "answered": 0.75, "short": 1.0, "long": pytest.approx(1 / 3)}
    science = [
        ("The answer is B.", "B", {"subject": "natural science", "options": ["x", "y"]}),
        ("C", "B", {"subject": "natural science", "options": ["x", "y"]}),
    ]
    scores, rows = numbers("choices", science)
    assert [row["letter"] for row in rows] == ["B", None]
    assert scores == {"accuracy": 0.5, "answered": 0.5, "natural science": 0.5}


def test_pope_has_one_number_where_all_splits_are_there():
    cases = [
        ("Yes, a dog", "yes", {"split": "random"}),
        ("No.", "no", {"split": "random"}),
        ("yes", "no", {"split": "popular"}),
        ("yes", "yes", {"split": "popular"}),
        ("no", "yes", {"split": "adversarial"}),
    ]
    scores, _ = numbers("yes_no", cases)
    # F1 of the splits: 1, 2 / 3 (precision 1 / 2, recall 1), 0.
    assert scores["popular f1"] == pytest.approx(2 / 3)
    assert scores["random accuracy"] == 1.0
    assert scores["f1"] == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert "f1" not in numbers("yes_no", cases[:4])[0]


def test_mme_pairs_the_questions_of_an_image():
    cases = [
        ("Yes", "Yes", {"task": "count", "image": "1"}),
        ("no", "No", {"task": "count", "image": "1"}),
        ("Yes", "Yes", {"task": "count", "image": "2"}),
        ("It is", "No", {"task": "count", "image": "2"}),
    ]
    # 3 of 4 questions, 1 of 2 images; the other tasks are absent, and so the total.
    assert numbers("mme", cases)[0] == {"count": 125.0}


def test_open_answers_are_judged_and_the_fallback_gives_no_score():
    cases = [("2", "Two.", {}), ("Three.", "Two.", {}), ("two", "Two.", {})]
    judged = numbers("open_qa", cases, judge=SaysMaybe())[0]
    assert judged == {"accuracy": pytest.approx(1 / 3), "score": 2.0}
    assert numbers("open_qa", cases)[0] == {"accuracy": pytest.approx(1 / 3)}


def test_of_several_anticipations_the_best_counts():
    assert taxonomy_of(ACTIONS).nouns == ("dough", "onion")
    truth = {"verbs": [0, 1] * 10, "nouns": [0] * 20}
    right = "\n".join(f"{i + 1}. {('Take', 'Put')[i % 2]} dough." for i in range(20))
    wrong = "1. Put onion."
    scores, rows = numbers("anticipation", [([wrong, right], "", truth)], ACTIONS)
    assert scores == {"verb": 0.0, "noun": 0.0, "action": 0.0}
    scores, _ = numbers("anticipation", [([wrong, wrong], "", truth)], ACTIONS)
    assert scores == {"verb": 0.5, "noun": 1.0, "action": 1.0}
    assert rows[0]["predicted_verbs"] == [[1] * 20, [0, 1] * 10]
    assert BENCHMARKS["anticipation"].samples == 5
    # Of a split whose truth only the benchmark's server has.
    scores, (row,) = numbers("anticipation", [([wrong], None, {})], ACTIONS)
    assert (scores, row["predicted_nouns"]) == ({}, [[1] * 20])


def test_every_dataset_names_a_benchmark_that_there_is():
    kinds = {dataset.benchmark for dataset in DATASETS.values()}
    assert kinds <= {running.STREAM, *BENCHMARKS}
    placed = {column.dataset for _, columns in report._LAYOUT for column in columns}
    asked_for = {name for name, one in DATASETS.items() if one.benchmark != running.STREAM}
    assert placed == asked_for


def test_self_conditioned_scores_leave_out_videos_without_narrations():
    def row(narrations, truth):
        return {"start": 0.0, "narrations": narrations, "truth": truth}

    true = [[1.0, "You cut the bread."], [3.0, "You wash both of your hands."]]
    scores = narration_scores([row(true, true), row([[1.0, "You."]], [])], window=0.5)
    perfect = {"precision": 1.0, "recall": 1.0, "f1": 1.0, "f1_in_window": 1.0}
    assert {name: scores[name] for name in perfect} == perfect
    late = [[2.0, "You cut the bread."], [3.0, "You wash both of your hands."]]
    assert narration_scores([row(late, true)], window=0.5)["f1_in_window"] == 0.5
    assert narration_scores([row(late, true)], window=1.0)["f1_in_window"] == 1.0
    silent = narration_scores([row([], true)], window=0.5)
    assert silent == dict.fromkeys((*perfect, "cider"), 0.0)
    assert narration_scores([row([[1.0, "You."]], [])], window=0.5) == {}


@pytest.fixture(scope="module")
def subject():
    """A model that is asked two questions about two videos."""
    records = [
        asked("a", 3, target={"labels": ["Serve."]}),
        asked("b", 3, "And?", target={"labels": ["Cut potato."]}),
    ]
    examples = tiny_benchmarks.examples(records, tiny_benchmarks.drawn({"a": 3, "b": 3}))
    return Subject(
        model=tiny_benchmarks.loaded_model(),
        examples=examples,
        labels=STEPS,
        batch_size=2,
        answer_tokens=6,
        silence_threshold=None,
        judge=ExactMatch(),
        seed=0,
    )


def test_rows_hold_what_was_asked_and_answered(subject, tmp_path):
    (part,) = parts_of("labels", subject)
    scores = run_part(part, subject.examples, "steps", {"split": "test"}, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == ["a", "b"]
    assert rows[0].keys() == {
        *("index", "id", "video", "prompt", "answer", "reference", "means", "correct")
    }
    assert rows[1]["prompt"].endswith("[3 frames]\nUser: And?\nAssistant:")
    assert scores == {"accuracy": sum(row["correct"] for row in rows) / 2}


def test_a_record_without_a_true_answer_is_refused(subject, tmp_path):
    one = subject.examples.records[0]
    records = [dataclasses.replace(one, turns=one.turns[:1])]
    examples = dataclasses.replace(subject.examples, records=records)
    (part,) = parts_of("vqa", dataclasses.replace(subject, examples=examples))
    with pytest.raises(UserError, match=r"a: field 'turns': expected an answer"):
        run_part(part, examples, "vqa", {}, tmp_path)


def test_a_target_that_the_benchmark_cannot_use_names_the_record(subject, tmp_path):
    (part,) = parts_of("yes_no", subject)
    with pytest.raises(UserError, match=r"a: field 'target': .*\('split'\)"):
        run_part(part, subject.examples, "pope", {}, tmp_path)


def test_a_record_that_changed_since_is_noticed(subject, tmp_path):
    (part,) = parts_of("labels", subject)
    left = samples.Samples(tmp_path, "steps", part.settings, 0, 1)
    left.add({"index": 1, "id": "another", "correct": True})
    with pytest.raises(UserError, match=r"sample 1: expected one of record 'b', found 'another'"):
        run_part(part, subject.examples, "steps", {}, tmp_path)


def test_damage_in_the_middle_is_named_and_at_the_end_is_cut_off(tmp_path):
    one = samples.Samples(tmp_path, "x", {}, 0, 1)
    one.add({"index": 0, "id": "a"})
    file = tmp_path / "unfinished/x/0-of-1.jsonl"
    whole = file.read_text()
    file.write_text(whole + '{"index": 1')
    assert samples.Samples(tmp_path, "x", {}, 0, 1).rows == {0: {"index": 0, "id": "a"}}
    assert file.read_text() == whole
    file.write_text("what?\n" + whole)
    with pytest.raises(UserError, match="line 1: expected a sample, found damage"):
        samples.Samples(tmp_path, "x", {}, 0, 1)


def test_rows_are_read_by_any_number_of_processes(tmp_path):
    for process in range(3):
        left = samples.Samples(tmp_path, "x", {"a": 1}, process, 3)
        left.add({"index": process, "id": "r"})
    for processes in (1, 2, 4):
        read = [samples.Samples(tmp_path, "x", {"a": 1}, p, processes) for p in range(processes)]
        assert sorted(index for one in read for index in one.rows) == [0, 1, 2]
    with pytest.raises(UserError, match="a is 1 there and 2 now"):
        samples.Samples(tmp_path, "x", {"a": 2}, 0, 1)


class Opened:
    """The datasets of a run, for `count_learnt`: 10 seconds of two videos per split."""

    def records(self, name, split):
        videos = {"train": ("a", "b"), "test": ("c", "d")}[split]
        return [Record(id=v, video=v, start=5.0, stop=15.0, turns=()) for v in videos]


def test_learnt_videos_are_found_whatever_dataset_taught_them(tmp_path):
    manifest = tmp_path / "trained_on.json"
    splits = {"ego4d_lta": "test"}
    assert count_learnt(manifest, Opened(), splits, force=False) == {"ego4d_lta": None}
    learnt = {"a": [[0, 30]], "b": [[0, 3], [14.5, 20]]}
    narrated = {"a": [[0, 30]], "d": [[0, 6]]}
    manifest.write_text(json.dumps({"ego4d_lta": learnt, "ego4d_narration": narrated}))
    with pytest.raises(UserError, match=r"ego4d_lta, split test: 1 of its 2 .* ego4d_narration"):
        count_learnt(manifest, Opened(), splits, force=False)
    assert count_learnt(manifest, Opened(), splits, force=True) == {"ego4d_lta": 1}
    assert count_learnt(manifest, Opened(), {"ego4d_lta": "train"}, force=True) == {"ego4d_lta": 2}
    manifest.write_text(json.dumps({"ego4d_lta": learnt}))
    assert count_learnt(manifest, Opened(), splits, force=False) == {"ego4d_lta": 0}


def test_other_stretches_of_a_learnt_video_are_not_learnt(tmp_path):
    manifest = tmp_path / "trained_on.json"
    manifest.write_text(json.dumps({"ego4d_lta": {"c": [[0, 5], [15, 20]], "d": [[20, 30]]}}))
    assert count_learnt(manifest, Opened(), {"ego4d_lta": "test"}, force=False) == {"ego4d_lta": 0}


def entry(kind, scores, trained_on=0, part="answers", **settings):
    parts = {part: {"settings": settings, "scores": scores}}
    return {
        "benchmark": kind,
        "split": "test",
        "records": 20,
        "trained_on": trained_on,
        "parts": parts,
    }


def test_reports_become_the_tables_of_the_paper():
    model = {"name": "Full-computation", "tokens_per_frame": 10, "macs": 48.285e12, "step": None}
    full = {"model": model, "benchmarks": {"coin_step": entry("labels", {"accuracy": 0.631})}}
    mod = {
        "model": model | {"name": "VideoLLM-MoD r=0.2", "macs": 30.73e12},
        "benchmarks": {
            "coin_step": entry("labels", {"accuracy": 0.634}, trained_on=2),
            "coin_task": entry("labels", {"accuracy": 0.928}),
            "video_qa_msvd": entry("open_qa", {"accuracy": 0.5}, judge="exact match, not judged"),
        },
    }
    text = report.as_markdown(report.grids([full, mod]))
    assert text == (
        "## COIN, top-1 accuracy (%)\n\n"
        "| Model | Tokens per frame | FLOPs, 600 frames | Step ↑ | Task ↑ |\n"
        "|---|---:|---:|---:|---:|\n"
        "| Full-computation | 10 | 48.28T | 63.1 | - |\n"
        "| VideoLLM-MoD r=0.2 † | 10 | 30.73T | 63.4 | 92.8 |\n\n"
        "coin_step: 20 records of split test.\n"
        "† coin_step: 2 of its videos show what the model was trained on (--force).\n"
        "coin_task: 20 records of split test.\n\n"
        "## Open video question answering, accuracy (%)\n\n"
        "| Model | Tokens per frame | FLOPs, 600 frames | MSVD ↑ |\n"
        "|---|---:|---:|---:|\n"
        "| VideoLLM-MoD r=0.2 | 10 | 30.73T | 50.0 |\n\n"
        "video_qa_msvd: 20 records of split test.\n"
        "video_qa_msvd: judge: exact match, not judged.\n"
    )


def test_models_have_the_names_of_the_paper():
    config = tiny_benchmarks.CONFIG
    decoder = dataclasses.replace(config.decoder, num_layers=6)

    def name(routing, **vision):
        return report.variant(
            dataclasses.replace(
                config,
                decoder=decoder,
                routing=routing,
                vision=dataclasses.replace(config.vision, **vision),
            )
        )

    assert name(full_computation()) == "Full-computation"
    assert name(full_computation(), pool=(0, 0)) == "VideoLLM-online"
    assert name(early_exit(2, 6)) == "EarlyExit (layer 2)"
    assert name(layer_skip()) == "LayerSkip"
    assert name(config.routing) == "VideoLLM-MoD r=0.4"
    everywhere = dataclasses.replace(config.routing, insertion="all", selection="random")
    assert name(everywhere) == "VideoLLM-MoD r=0.4, all, random"
