"""CIDEr-D equals the published implementation, a case worked by hand and a dense computation."""

import math
import random

import numpy as np
import pytest

from videollm_mod_jax.evaluation.captions import cider, words


def test_drawn_words():
    text = "You pick up the well-worn knife, don't you?"
    assert " ".join(words(text)) == "you pick up the well-worn knife don't you"
    assert words("#C C picks 2 cups -- (red).") == ["c", "c", "picks", "2", "cups", "red"]
    assert words("...") == []


def test_drawn_scores():
    scores = cider(
        ["you cut bread", "you wash hands"], [["you cut bread"], ["you open a door"]]
    ).scores
    assert scores == pytest.approx((7.5, 0.0), abs=1e-12)


def test_a_case_worked_by_hand():
    # Two captions, so an n-gram weighs log 2 if the references of only one hold it, or of none,
    # and nothing if those of both do. First caption against "a b c": 1-grams a, b, x against
    # a, b, c; a weighs nothing, so the cosine is 1 of (b x) and (b c): 1/2. 2-grams ab, bx against
    # ab, bc: 1/2. 3-grams abx against abc: 0. Equal lengths: 10 * (1/2 + 1/2) / 4.
    # Second caption "d d d" against "a d": d counts once at most, and three to one in its norm:
    # 1-grams (d: 3) against (a: 0, d: 1), clipped: 1 / (3 * 1). Longer by one word.
    scores = cider(["a b x", "d d d"], [["a b c"], ["a d"]]).scores
    assert scores[0] == pytest.approx(10 * (1 / 2 + 1 / 2) / 4)
    assert scores[1] == pytest.approx(10 * (1 / 3) / 4 * math.exp(-1 / (2 * 6**2)))


def test_the_published_implementation():
    # Of pycocoevalcap 1.2, on texts that its tokenizer leaves as they are.
    predictions = [
        "you pick up the knife",
        "you cut the potato with the knife",
        "you put the knife down on the table",
    ]
    references = [
        ["you pick up a knife", "the knife is picked up"],
        ["you cut a potato with the knife"],
        ["you open the fridge"],
    ]
    scores = cider(predictions, references)
    assert scores.scores == pytest.approx((2.9374684916133447, 5.5989365534510105, 0.0), abs=1e-12)
    assert scores.mean == pytest.approx(2.8454683483547853, abs=1e-12)


def dense_cider(predictions, references):
    """The definition over dense vectors of all n-grams that occur."""

    def counts(text, order):
        tokens = text.split()
        grams = [" ".join(tokens[i : i + order]) for i in range(len(tokens) - order + 1)]
        return np.array([grams.count(gram) for gram in vocabulary[order]], float)

    everything = [*predictions, *(text for texts in references for text in texts)]
    vocabulary = {
        order: sorted(
            {
                " ".join(text.split()[i : i + order])
                for text in everything
                for i in range(len(text.split()) - order + 1)
            }
        )
        for order in range(1, 5)
    }
    scores = np.zeros(len(predictions))
    for order in range(1, 5):
        holding = sum(
            np.any([counts(text, order) > 0 for text in texts], axis=0) for texts in references
        )
        idf = np.log(len(predictions) / np.maximum(1, holding))
        for index, (prediction, texts) in enumerate(zip(predictions, references, strict=True)):
            p = counts(prediction, order) * idf
            for text in texts:
                r = counts(text, order) * idf
                norms = np.linalg.norm(p) * np.linalg.norm(r)
                longer = len(prediction.split()) - len(text.split())
                cosine = (np.minimum(p, r) @ r) / norms if norms else 0.0
                scores[index] += cosine * np.exp(-(longer**2) / 72) / 4 / len(texts) * 10
    return scores


def test_a_dense_computation():
    rng = random.Random(0)
    vocabulary = ["you", "cut", "take", "the", "a", "knife", "onion", "down"]

    def caption():
        return " ".join(rng.choices(vocabulary, k=rng.randrange(12)))

    for size in (1, 2, 9, 30):
        predictions = [caption() for _ in range(size)]
        references = [[caption() for _ in range(rng.randrange(1, 4))] for _ in range(size)]
        found = cider(predictions, references)
        expected = dense_cider(predictions, references)
        np.testing.assert_allclose(found.scores, expected, atol=1e-12)
        assert found.mean == pytest.approx(expected.mean(), abs=1e-12)
        assert min(found.scores) >= 0
        assert max(found.scores) <= 10 + 1e-12


def test_case_and_punctuation_do_not_count():
    references = [["you cut the bread now"], ["you open a red door"]]
    assert cider(["You cut the bread, now.", "x"], references).scores[0] == pytest.approx(10)


def test_a_corpus_of_one_scores_nothing():
    assert cider(["you cut the bread now"], [["you cut the bread now"]]).mean == 0


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="2 predictions for 1 references"):
        cider(["a", "b"], [["a"]])
    with pytest.raises(ValueError, match="0 predictions"):
        cider([], [])
    with pytest.raises(ValueError, match="not a list of at least one text"):
        cider(["a", "b"], [["a"], []])
    with pytest.raises(ValueError, match="not a list of at least one text"):
        cider(["a"], ["a"])
