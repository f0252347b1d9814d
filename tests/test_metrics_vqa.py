"""Exact match normalizes answers as LLaVA's GQA evaluation does, and no further."""

import pytest

from videollm_mod_jax.evaluation.vqa import exact_match, normalized


@pytest.mark.parametrize(
    ("prediction", "answer", "right"),
    [
        ("Yes.", "yes", True),
        (" yes\n", "yes", True),
        ("a dog...", "a dog", True),
        ("Barcelona", "Barcelona", True),
        ("the dog", "dog", False),
        ("3", "three", False),
        ("yes, it is", "yes", False),
        ("yes!", "yes", False),
        ("", "yes", False),
    ],
)
def test_exact_match(prediction, answer, right):
    assert exact_match(prediction, answer) is right


def test_only_full_stops_at_the_end_go():
    assert normalized("U.S.A.") == "u.s.a"
    assert normalized("No. .") == "no. "  # as rstrip('.') leaves it
