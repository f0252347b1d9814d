"""POPE's scores equal those that LLaVA-1.5's evaluation printed for the same counts."""

import pytest
from sklearn import metrics

from videollm_mod_jax.evaluation.pope import PopeScores, mean_f1, pope_scores, yes_or_no


@pytest.mark.parametrize(
    ("text", "says"),
    [
        # The drawn ones.
        ("Yes, there is a dog.", "yes"),
        ("No, there is not.", "no"),
        ("There is no dog. Yes, a cat.", "no"),
        ("I cannot see it. No.", "yes"),
        ("NO", "yes"),
        ("", "yes"),
        ("No", "no"),
        ("no, a cat", "no"),
        ("It is not there", "no"),
        ("Yes. No dog", "yes"),
        ("Nothing", "yes"),
    ],
)
def test_yes_or_no(text, says):
    assert yes_or_no(text) == says


def answers(right_yes, wrong_yes, right_no, wrong_no):
    """Predictions and labels with these counts."""
    predictions = ["yes"] * (right_yes + wrong_yes) + ["no"] * (right_no + wrong_no)
    labels = ["yes"] * right_yes + ["no"] * (wrong_yes + right_no) + ["yes"] * wrong_no
    return predictions, labels


def test_llava_on_the_random_split():
    # Printed by eval_pope.py for LLaVA-1.5-7B on the 2910 questions (its issue 626).
    scores = pope_scores(*answers(1183, 31, 1379, 317))
    assert scores.accuracy == pytest.approx(0.8804123711340206, abs=1e-15)
    assert scores.precision == pytest.approx(0.9744645799011532, abs=1e-15)
    assert scores.recall == pytest.approx(0.7886666666666666, abs=1e-15)
    assert scores.f1 == pytest.approx(0.8717759764185703, abs=1e-15)
    assert scores.yes_ratio == (1183 + 31) / 2910


def test_scores_are_those_of_scikit_learn():
    predictions, labels = answers(5, 2, 7, 3)
    scores = pope_scores(predictions, labels)
    precision, recall, f1, _ = metrics.precision_recall_fscore_support(
        labels, predictions, pos_label="yes", average="binary"
    )
    assert (scores.precision, scores.recall, scores.f1) == pytest.approx((precision, recall, f1))
    assert scores.accuracy == pytest.approx(metrics.accuracy_score(labels, predictions))


def test_what_upstream_divides_by_zero_is_zero():
    assert pope_scores(["no", "no"], ["yes", "no"]) == PopeScores(0.5, 0.0, 0.0, 0.0, 0.0)
    assert pope_scores(["yes", "no"], ["no", "no"]) == PopeScores(0.5, 0.0, 0.0, 0.0, 0.5)


def test_papers_report_the_mean_f1_of_the_three_splits():
    # The same issue: F1 of the three splits and their mean, the 85.9 of the paper.
    f1 = {
        "random": 0.8717759764185703,
        "popular": 0.8628738147337709,
        "adversarial": 0.8450000000000001,
    }
    splits = {name: PopeScores(0.0, 0.0, 0.0, value, 0.0) for name, value in f1.items()}
    assert mean_f1(splits) == pytest.approx(0.859883263717447, abs=1e-15)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="1 predictions for 2 labels"):
        pope_scores(["yes"], ["yes", "no"])
    with pytest.raises(ValueError, match="0 predictions for 0 labels"):
        pope_scores([], [])
    with pytest.raises(ValueError, match="found 'Yes'; expected 'yes' or 'no'"):
        pope_scores(["yes"], ["Yes"])
    with pytest.raises(ValueError, match="expected \\['adversarial', 'popular', 'random'\\]"):
        mean_f1({"random": PopeScores(1.0, 1.0, 1.0, 1.0, 1.0)})
