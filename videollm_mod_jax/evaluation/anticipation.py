"""Long-term action anticipation: what actions a text lists, and their edit distance to the true.

The benchmark asks for the next Z = 20 actions, each a verb and a noun, with K = 5 attempts; the
best attempt counts. The distance is Levenshtein's: insertions, deletions and substitutions. The
official code speaks of Damerau-Levenshtein, but what it calls (`editdistance.eval`) counts a swap
of neighbours as two edits, and so do the published numbers.

Sources: `edit_distance` of EGO4D/forecasting (`ego4d_forecasting/evaluation/lta_metrics.py`); the
reading of texts: `text_to_verb_noun_ids` in `data/ego4d/lta.py` of showlab/videollm-online.
"""

import collections
import dataclasses
import functools
import itertools
import re
from collections.abc import Iterable, Sequence

import numpy as np
from rapidfuzz import process
from rapidfuzz.distance import Levenshtein

_NUMBERED = re.compile(r"(?:\d+\.|\S+\s\d+\.)\s*(.*)")
"""A listed action: what follows a number, with or without a word before it ("Action 3. ...")."""


@dataclasses.dataclass(frozen=True)
class Taxonomy:
    """The words of the verbs and nouns, by id.

    Attributes:
      verbs: the words that stand for each verb id in a text.
      nouns: the same for noun ids.
    """

    verbs: tuple[str, ...]
    nouns: tuple[str, ...]

    def __post_init__(self) -> None:
        if not (self.verbs and self.nouns):
            raise ValueError("a taxonomy without verbs or nouns")

    @functools.cached_property
    def actions(self) -> dict[str, tuple[int, int]]:
        """Verb and noun id by "verb noun"; the later pair where two read the same."""
        pairs = itertools.product(enumerate(self.verbs), enumerate(self.nouns))
        return {f"{verb} {noun}": (i, j) for (i, verb), (j, noun) in pairs}

    @functools.cached_property
    def sorted_actions(self) -> list[str]:
        """Every "verb noun" in alphabetical order, in which ties of distance are decided."""
        return sorted(self.actions)

    @functools.cached_property
    def fallback(self) -> tuple[int, int]:
        """What an answer without any action means: the "verb noun" that most pairs read as."""
        counts = collections.Counter(f"{v} {n}" for v in self.verbs for n in self.nouns)
        # max() keeps the first of equals, in the order of ids.
        return self.actions[max(counts, key=counts.__getitem__)]


@dataclasses.dataclass(frozen=True)
class EditDistances:
    """Edit distances in [0, 1], over the number of true actions; lower is better.

    Attributes:
      verb: of the verbs alone.
      noun: of the nouns alone.
      action: of pairs, which are equal only if both are.
    """

    verb: float
    noun: float
    action: float


def parse_actions(text: str, taxonomy: Taxonomy, count: int) -> tuple[tuple[int, int], ...]:
    """The verb and noun ids of the actions that a text lists.

    A line counts if it holds a number with a full stop; what follows is the action, in lower case
    and without a full stop at its end. One that the taxonomy does not have means the one at the
    smallest edit distance, the first in the alphabet of several. What is missing at the end
    repeats the last action; a text without any means `Taxonomy.fallback` throughout.

    ```
    verbs: take, put    nouns: knife, onion    count: 4
    Sure:                     (no number: not an action)
    1. Take knife.         -> take knife   (0, 0)
    2. Puts the onion      -> put onion    (1, 1)
                              put onion    (1, 1)   the last again
                              put onion    (1, 1)
    ```

    Args:
      text: an answer, without special tokens.
      taxonomy: the words to look for.
      count: how many actions to return; more are cut off.

    Returns:
      `count` pairs of ids.

    Raises:
      ValueError: count is below 1.
    """
    if count < 1:
        raise ValueError(f"count of actions is {count}; expected at least 1")
    found = [_NUMBERED.search(line) for line in text.strip(" \n").split("\n")]
    actions = [match.group(1).lower().rstrip(".") for match in found if match][:count]
    pairs = [_nearest_action(action, taxonomy) for action in actions] or [taxonomy.fallback]
    return tuple(pairs + pairs[-1:] * (count - len(pairs)))


@functools.lru_cache(maxsize=1 << 16)
def _nearest_action(action: str, taxonomy: Taxonomy) -> tuple[int, int]:
    if action not in taxonomy.actions:
        names = taxonomy.sorted_actions
        distances = process.cdist([action], names, scorer=Levenshtein.distance, dtype=np.int32)
        action = names[int(np.argmin(distances[0]))]
    return taxonomy.actions[action]


def edit_distances(
    attempts: Sequence[Sequence[tuple[int, int]]],
    truth: Sequence[tuple[int, int]],
    taxonomy: Taxonomy,
) -> EditDistances:
    """The edit distances of one clip: of the best attempt, for verbs, nouns and actions each.

    ```
    truth      a b c d
    attempt 1  b a c d    2 edits: a swap counts as two
    attempt 2  x a b c    2 edits: one insertion, one deletion
    attempt 3  a b c x    1 edit -> 1 / 4
    ```

    Args:
      attempts: [K][Z] pairs of verb and noun id; K is 5 in the benchmark.
      truth: [Z] pairs of ids; Z is 20 in the benchmark.
      taxonomy: whose ids they are.

    Raises:
      ValueError: nothing to compare, an attempt of another length than the truth, or an id that
        the taxonomy does not have.
    """
    if not (attempts and truth):
        raise ValueError("edit distance of no attempts or to no actions")
    for attempt in attempts:
        if len(attempt) != len(truth):
            raise ValueError(f"an attempt has {len(attempt)} actions, the truth {len(truth)}")
    for verb, noun in itertools.chain(truth, *attempts):
        if not (0 <= verb < len(taxonomy.verbs) and 0 <= noun < len(taxonomy.nouns)):
            raise ValueError(
                f"action ids ({verb}, {noun}); the taxonomy has {len(taxonomy.verbs)} verbs and "
                f"{len(taxonomy.nouns)} nouns"
            )

    def best(token) -> float:
        true = [token(*pair) for pair in truth]
        edits = (Levenshtein.distance([token(*pair) for pair in a], true) for a in attempts)
        return min(edits) / len(true)

    return EditDistances(
        verb=best(lambda verb, noun: verb),
        noun=best(lambda verb, noun: noun),
        action=best(lambda verb, noun: verb * len(taxonomy.nouns) + noun),
    )


def mean_edit_distances(clips: Iterable[EditDistances]) -> EditDistances:
    """The mean over clips, which is ED@20 where each has 20 actions.

    Raises:
      ValueError: there are no clips.
    """
    rows = [dataclasses.astuple(clip) for clip in clips]
    if not rows:
        raise ValueError("mean edit distance of no clips")
    return EditDistances(*(float(mean) for mean in np.mean(rows, axis=0)))
