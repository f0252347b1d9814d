"""Long-term anticipation: lists of actions are read, and their distances are Levenshtein's."""

import random

import pytest

from tests.test_metrics_labels import levenshtein
from videollm_mod_jax.evaluation.anticipation import (
    EditDistances,
    Taxonomy,
    edit_distances,
    mean_edit_distances,
    parse_actions,
)

KITCHEN = Taxonomy(("take", "put"), ("knife", "onion"))


def letters(text):
    """Action ids whose verb and noun are both the letter's place in the alphabet."""
    return [(ord(letter) - ord("a"),) * 2 for letter in text]


ALPHABET = Taxonomy(tuple("abcdefghijklmnopqrstuvwxyz"), tuple("abcdefghijklmnopqrstuvwxyz"))


def test_drawn_answer():
    text = "Sure:\n1. Take knife.\n2. Puts the onion\n"
    assert parse_actions(text, KITCHEN, 4) == ((0, 0), (1, 1), (1, 1), (1, 1))


@pytest.mark.parametrize(
    ("text", "pairs"),
    [
        pytest.param("1. put knife.\n2. take onion.", [(1, 0), (0, 1)], id="lower_case"),
        pytest.param(" \n1.Put Knife...\n2.   Take onion", [(1, 0), (0, 1)], id="space_and_stops"),
        pytest.param("Action 1. Put knife\nAction 2. Put onion", [(1, 0), (1, 1)], id="a_word"),
        pytest.param("1. Put knife.\n2. Put onion.\n3. Take knife.", [(1, 0), (1, 1)], id="cut"),
        pytest.param("put knife\n7. take onion", [(0, 1), (0, 1)], id="no_number_no_action"),
        pytest.param("1. Put knife. 2. Put onion.", [(1, 0), (1, 0)], id="one_line_is_one_action"),
        pytest.param("9. Pot onions", [(1, 1), (1, 1)], id="nearest"),
        pytest.param("1. Take knife 2.\n12. Put onion", [(0, 0), (1, 1)], id="first_number"),
        pytest.param("nothing", [(0, 0), (0, 0)], id="fallback"),
        pytest.param("", [(0, 0), (0, 0)], id="empty"),
    ],
)
def test_what_a_text_lists(text, pairs):
    assert parse_actions(text, KITCHEN, 2) == tuple(pairs)


def test_what_the_taxonomy_renders_is_read_back():
    pairs = tuple((verb, noun) for verb in range(2) for noun in range(2))
    lines = [
        f"{number}. {KITCHEN.verbs[verb].capitalize()} {KITCHEN.nouns[noun]}."
        for number, (verb, noun) in enumerate(pairs, 1)
    ]
    assert parse_actions("\n".join(lines), KITCHEN, 4) == pairs


def test_ties_go_to_the_first_in_the_alphabet_not_to_the_lowest_id():
    # "cat x" is one edit from each of the three.
    assert parse_actions("1. cat x", Taxonomy(("rat", "bat", "hat"), ("x",)), 1) == ((1, 0),)


def test_the_full_stop_at_the_end_is_no_part_of_an_action():
    # "a b." is one edit from "a b" and from "a a.", which comes first in the alphabet.
    assert parse_actions("1. A b.", Taxonomy(("a",), ("b", "a.")), 1) == ((0, 0),)


def test_the_nearest_action_is_that_of_the_textbook_distance():
    taxonomy = Taxonomy(("cut", "cook up", "put"), ("egg", "eggplant", "pan", "a pan"))
    rng = random.Random(1)
    for _ in range(200):
        text = "".join(rng.choices("cutokpegan ", k=rng.randrange(3, 12))).strip()
        action = min((levenshtein(text, name), name) for name in taxonomy.actions)[1]
        assert parse_actions(f"1. {text}", taxonomy, 1) == (taxonomy.actions[action],)


def test_two_pairs_that_read_the_same_are_the_later_and_the_fallback():
    taxonomy = Taxonomy(("go", "take", "take up"), ("up knife", "knife"))
    assert taxonomy.actions["take up knife"] == (2, 1)
    assert taxonomy.fallback == (2, 1)  # two pairs read so, one each reads as any other


def test_drawn_distances():
    truth = letters("abcd")
    for attempt, edits in (("bacd", 2), ("xabc", 2), ("abcx", 1)):
        assert edit_distances([letters(attempt)], truth, ALPHABET).action == edits / 4
    attempts = [letters("bacd"), letters("xabc"), letters("abcx")]
    assert edit_distances(attempts, truth, ALPHABET) == EditDistances(1 / 4, 1 / 4, 1 / 4)


def test_the_best_attempt_is_chosen_for_verbs_nouns_and_actions_each():
    truth = [(0, 0), (1, 1)]
    right_verbs, right_nouns = [(0, 1), (1, 0)], [(1, 0), (0, 1)]
    distances = edit_distances([right_verbs, right_nouns], truth, KITCHEN)
    assert distances == EditDistances(verb=0.0, noun=0.0, action=1.0)


def test_distances_are_those_of_the_textbook():
    rng = random.Random(2)

    def actions():
        return [(rng.randrange(2), rng.randrange(2)) for _ in range(20)]

    for _ in range(50):
        attempts, truth = [actions() for _ in range(5)], actions()
        found = edit_distances(attempts, truth, KITCHEN)
        for name, token in (
            ("verb", lambda pair: pair[0]),
            ("noun", lambda pair: pair[1]),
            ("action", lambda pair: pair),
        ):
            true = list(map(token, truth))
            edits = min(levenshtein(list(map(token, attempt)), true) for attempt in attempts)
            assert getattr(found, name) == edits / 20


def test_mean_over_clips():
    clips = [EditDistances(0.0, 0.5, 1.0), EditDistances(0.5, 0.5, 1.0)]
    assert mean_edit_distances(clips) == EditDistances(0.25, 0.5, 1.0)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="an attempt has 1 actions, the truth 2"):
        edit_distances([letters("a")], letters("ab"), ALPHABET)
    with pytest.raises(ValueError, match=r"action ids \(2, 0\); the taxonomy has 2 verbs and 2"):
        edit_distances([[(2, 0)]], [(0, 0)], KITCHEN)
    with pytest.raises(ValueError, match=r"action ids \(0, -1\)"):
        edit_distances([[(0, 0)]], [(0, -1)], KITCHEN)
    with pytest.raises(ValueError, match="no attempts"):
        edit_distances([], [(0, 0)], KITCHEN)
    with pytest.raises(ValueError, match="to no actions"):
        edit_distances([[]], [], KITCHEN)
    with pytest.raises(ValueError, match="no clips"):
        mean_edit_distances([])
    with pytest.raises(ValueError, match="expected at least 1"):
        parse_actions("1. take knife", KITCHEN, 0)
    with pytest.raises(ValueError, match="without verbs or nouns"):
        Taxonomy((), ("knife",))
