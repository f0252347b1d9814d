"""Answers mean the label at the smallest edit distance, as COIN's evaluation defines it."""

import random

import pytest

from videollm_mod_jax.evaluation.accuracy import accuracy
from videollm_mod_jax.evaluation.labels import label_correct, nearest_label, steps_correct

DRAWN = ("Cut potato.", "Peel potato.", "Cut tomato.")
STEPS = ("Stir.", "Pour milk.", "Serve.")


def levenshtein(a, b):
    """The textbook recurrence, for any two sequences."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


@pytest.mark.parametrize(
    ("answer", "distances"),
    [("Cut a potato", [3, 6, 5]), ("Cut", [8, 11, 8]), ("", [11, 12, 11])],
)
def test_drawn_distances(answer, distances):
    assert [levenshtein(answer, label) for label in DRAWN] == distances
    assert nearest_label(answer, DRAWN) == "Cut potato."


def test_the_nearest_is_the_first_minimum_of_the_textbook_distance():
    rng = random.Random(0)

    def word():
        return "".join(rng.choices("aAb. é", k=rng.randrange(1, 7)))

    for _ in range(300):
        labels, answer = [word() for _ in range(8)], word()
        distances = [levenshtein(answer, label) for label in labels]
        # As upstream writes it: the index of the largest negative distance.
        scores = [-distance for distance in distances]
        assert nearest_label(answer, labels) == labels[scores.index(max(scores))]


def test_case_space_and_punctuation_count():
    assert nearest_label("ABC", ["abcdef", "ABCDE"]) == "ABCDE"
    assert nearest_label("a b", ["ab__", "a b_"]) == "a b_"


def test_a_whole_answer_is_compared_for_single_labels():
    assert label_correct("Pour the milk.", "Pour milk.", STEPS)
    assert not label_correct("Pour the milk.", "Stir.", STEPS)
    assert not label_correct("Serve.\nPour milk.", "Serve.", STEPS)  # nearer to "Pour milk."


def test_drawn_procedure():
    truths = ("Pour milk.", "Stir.", "Serve.")
    assert steps_correct("1. Pour milk.\n2. Serve.", truths, STEPS) == (True, False, False)


@pytest.mark.parametrize(
    ("answer", "correct"),
    [
        pytest.param("1. Pour milk.\n2. Stir.", (True, True), id="right"),
        pytest.param("1. Stir.\n2. Pour milk.", (False, False), id="swapped"),
        pytest.param("1. Pour milk.\n2. Stir.\n3. Serve.", (True, True), id="longer_is_cut"),
        pytest.param("Pour milk.", (True, False), id="shorter"),
        pytest.param("\n1. Pour milk.\n2. Stir.", (False, False), id="an_empty_line_is_a_line"),
        pytest.param("", (False, False), id="nothing"),
    ],
)
def test_steps_are_compared_line_by_line(answer, correct):
    assert steps_correct(answer, ("Pour milk.", "Stir."), STEPS) == correct


def test_the_number_of_a_line_is_compared_too():
    # "1. Go." is three edits from "Go." and two from "1. On".
    assert steps_correct("1. Go.", ("Go.",), ("1. On", "Go.")) == (False,)


def test_accuracy_of_procedures_is_over_steps_not_answers():
    answers = [(True, True, True, False), (False,)]
    assert accuracy(step for steps in answers for step in steps) == 3 / 5
    assert accuracy([True, False, True, True]) == 0.75
    with pytest.raises(ValueError, match="no answers"):
        accuracy([])


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="no labels"):
        nearest_label("x", [])
    with pytest.raises(ValueError, match=r"true label 'Fry\.' is none of the 3 labels"):
        label_correct("x", "Fry.", STEPS)
    with pytest.raises(ValueError, match=r"true label 'Fry\.'"):
        steps_correct("x", ("Stir.", "Fry."), STEPS)
    with pytest.raises(ValueError, match="without steps"):
        steps_correct("x", (), STEPS)
