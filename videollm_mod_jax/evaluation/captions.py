"""CIDEr-D: how much the words of a caption agree with those of reference captions.

Source: Vedantam, Zitnick and Parikh, "CIDEr: Consensus-based Image Description Evaluation" (2015),
and its reference implementation, which papers call CIDEr: `cider/cider_scorer.py` of
pycocoevalcap. Ours in place of it, because its tokenizer needs Java; `words` says how they differ.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Sequence

NGRAM_ORDERS = 4
LENGTH_SIGMA = 6.0  # words
SCALE = 10.0

_WORD = re.compile(r"\w+(?:[-'\u2019]\w+)*")

Ngram = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class CiderScores:
    """CIDEr-D of a corpus; papers show 100 times the mean.

    Attributes:
      mean: over captions, in [0, 10].
      scores: of each caption, in [0, 10].
    """

    mean: float
    scores: tuple[float, ...]


def words(text: str) -> list[str]:
    """The words that are compared: in lower case, without punctuation.

    The published tokenizer (Penn Treebank, lower case, punctuation removed) gives the same but for
    clitics, which it cuts off ("don't": do n't), and symbols, which it keeps.

    ```
    You pick up the well-worn knife, don't you?  ->  you pick up the well-worn knife don't you
    ```
    """
    return _WORD.findall(text.lower())


def cider(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> CiderScores:
    """CIDEr-D of captions, each against its references.

    For n-grams of each length from 1 to 4, a caption is a vector of counts times log(captions /
    captions of the corpus whose references hold the n-gram). The score is the cosine with the
    reference's vector, where no n-gram counts more often than in the reference, times a Gaussian
    of the difference in length; averaged over references and over the four lengths; times 10.

    ```
    predictions       references          score
    you cut bread     you cut bread        7.5   equal, but of three words: no 4-grams
    you wash hands    you open a door      0.0   only "you", which is everywhere: log(2 / 2) = 0
    ```

    A corpus of one has only such n-grams, so its score is 0.

    Args:
      predictions: one caption each.
      references: for each prediction, one or more true captions.

    Raises:
      ValueError: no captions, unequal lengths, or a caption without references.
    """
    if not predictions or len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references")
    if isinstance(references[0], str) or not all(references):
        raise ValueError("references of a caption are not a list of at least one text")
    reference_words = [[words(text) for text in texts] for texts in references]
    holding = collections.Counter(
        ngram
        for texts in reference_words
        for ngram in set().union(*(ngrams for text in texts for ngrams in _ngrams(text)))
    )
    log_captions = math.log(len(predictions))

    def vectors(text: list[str]) -> list[dict[Ngram, float]]:
        return [
            {
                n: count * (log_captions - math.log(max(1, holding[n])))
                for n, count in counts.items()
            }
            for counts in _ngrams(text)
        ]

    def similarity(prediction: list[str], reference: list[str]) -> float:
        cosines = map(_clipped_cosine, vectors(prediction), vectors(reference))
        difference = len(prediction) - len(reference)
        penalty = math.exp(-(difference**2) / (2 * LENGTH_SIGMA**2))
        return penalty * sum(cosines) / NGRAM_ORDERS

    scores = []
    for prediction, texts in zip(map(words, predictions), reference_words, strict=True):
        similar = [similarity(prediction, text) for text in texts]
        scores.append(SCALE * sum(similar) / len(similar))
    return CiderScores(mean=sum(scores) / len(scores), scores=tuple(scores))


def _ngrams(text: list[str]) -> list[collections.Counter[Ngram]]:
    """Counts of the n-grams of each order."""
    return [
        collections.Counter(tuple(text[i : i + order]) for i in range(len(text) - order + 1))
        for order in range(1, NGRAM_ORDERS + 1)
    ]


def _clipped_cosine(prediction: dict[Ngram, float], reference: dict[Ngram, float]) -> float:
    norms = math.hypot(*prediction.values()) * math.hypot(*reference.values())
    shared = sum(
        min(weight, reference[ngram]) * reference[ngram]
        for ngram, weight in prediction.items()
        if ngram in reference
    )
    return shared / norms if norms else 0.0
