"""Option letters are read as Video-MME and LLaVA's ScienceQA evaluation read them."""

import random

import pytest

from videollm_mod_jax.evaluation.choices import (
    ChoiceScores,
    choice_scores,
    scienceqa_letter,
    videomme_letter,
)


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        # The drawn ones.
        ("C. A red cup.", "C"),
        ("The best answer is: (D)", "D"),
        ("A red cup, so C", "A"),
        ("Answer: C", "A"),
        ("none of them", None),
        ("  B\n", "B"),
        ("The answer is D.", "D"),
        ("The correct answer is B", "B"),
        ("The answer: A", "A"),
        ("it shows nothing of what was asked for in the question at all", None),
        ("it shows nothing of what was asked for in the question: option C", "C"),
        ("E", None),
        ("", None),
        ("Best answer: C", "B"),
    ],
)
def test_videomme(response, letter):
    assert videomme_letter(response) == letter
    assert (upstream_letter(response) or None) == letter


def upstream_letter(text):
    """`extract_characters_regex`, step by step, with the two commas that it lacks."""
    text = text.strip()
    for phrase in (
        "The best answer is",
        "The correct answer is",
        "The answer is",
        "The answer",
        "The best option isThe correct option is",
        "Best answer:Best option:",
    ):
        text = text.replace(phrase, "")
    found = [letter for letter in text if letter in "ABCD"]
    if len(text.split()) > 10 and not found:
        return ""
    return found[0] if found else ""


def test_videomme_on_phrases():
    rng = random.Random(0)
    pieces = ["The best answer is", "The correct", "option is", "Best", "answer:", "A", "C.", "(D)"]
    pieces += ["the", "cat", "E", "is", "not", "\n", "The answer", ":"]
    for _ in range(500):
        text = " ".join(rng.choices(pieces, k=rng.randrange(14)))
        assert videomme_letter(text) == (upstream_letter(text) or None)


@pytest.mark.parametrize(
    ("response", "options", "letter"),
    [
        # The drawn ones.
        ("B", 2, "B"),
        ("B. The left one", 2, "B"),
        ("So: The answer is B.", 2, "B"),
        ("The answer is A. The answer is B.", 2, None),
        ("B. The left one", 1, None),
        ("The left one", 2, None),
        ("The answer is C", 3, None),  # a character must follow, in upstream's pattern
        ("The answer is C, the right one", 3, "C"),
        ("B.", 2, None),
        ("b", 2, None),
        ("E", 5, "E"),
        ("E", 4, None),
        ("The answer is F.", 5, None),
        ("A. x The answer is B.", 2, "A"),
        ("", 2, None),
    ],
)
def test_scienceqa(response, options, letter):
    assert scienceqa_letter(response, options) == letter


def test_scores_by_group():
    letters = ("A", "B", None, "D", None)
    answers = ("A", "C", "A", "D", "B")
    groups = ("short", "short", "short", "long", "medium")
    scores = choice_scores(letters, answers, groups)
    assert list(scores) == ["overall", "short", "long", "medium"]
    assert scores["overall"] == ChoiceScores(5, 3 / 5, 2 / 5, pytest.approx(2 / 3))
    assert scores["short"] == ChoiceScores(3, 2 / 3, 1 / 3, pytest.approx(1 / 2))
    assert scores["long"] == ChoiceScores(1, 1.0, 1.0, 1.0)
    assert scores["medium"] == ChoiceScores(1, 0.0, 0.0, 0.0)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="1 letters, 2 answers and 1 groups"):
        choice_scores(["A"], ["A", "B"], ["short"])
    with pytest.raises(ValueError, match="at least one"):
        choice_scores([], [], [])
    with pytest.raises(ValueError, match="right answer 'b'; expected one capital letter"):
        choice_scores(["A"], ["b"], ["short"])
    with pytest.raises(ValueError, match="named 'overall'"):
        choice_scores(["A"], ["A"], ["overall"])
    with pytest.raises(ValueError, match="6 options; expected 1 to 5"):
        scienceqa_letter("A", 6)
