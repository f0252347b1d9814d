"""Conversations as arrays: labels against a walk over bytes, padding, budgets, turns."""

import numpy as np
import pytest

from videollm_mod_jax.data import dialogue
from videollm_mod_jax.data.dialogue import Assistant, Stream, System, User
from videollm_mod_jax.data.example import (
    LANGUAGE,
    STREAM,
    Budget,
    _overlapping,
    build_example,
    fit,
    turns_of,
)
from videollm_mod_jax.data.tokenizer import BOS, EOS, train_bpe
from videollm_mod_jax.errors import UserError

LINES = ["Watch.\n\n[", "]\nAssistant: A cat appears.", "]\nUser: How many?\nAssistant: Two."] * 9
TOKENIZER = train_bpe(LINES, 300)
BYTES = train_bpe([], 258)
BUDGET = Budget(frames=12, text_tokens=200, labels=150)


def conversation_of(rng):
    """A random conversation with texts that byte-level tokens cut in the middle of characters."""
    words = ["cat", "é", "字", "appears", "two", "🐈", "ü?"]

    def text():
        return " ".join(rng.choice(words, rng.integers(1, 4)))

    messages = [System("Watch.")]
    for _ in range(rng.integers(1, 4)):
        frames = int(rng.integers(1, 4))
        if rng.random() < 0.5:
            messages += [Stream(frames, learn=int(rng.integers(0, frames + 1)))]
            messages += [Assistant(text(), learn=bool(rng.random() < 0.8))]
        else:
            messages += [Stream(frames, learn=frames - 1), User(text()), Assistant(text())]
    return (*messages, Stream(1, learn=0))


def features_of(conversation, tokens_per_frame, width=4):
    frames = sum(m.num_frames for m in conversation if isinstance(m, Stream))
    shape = (frames, tokens_per_frame, width)
    return np.random.default_rng(frames).standard_normal(shape).astype(np.float32)


def brute_force(conversation, tokens_per_frame):
    """(tokens, frame starts, {position: (label, kind)}) by one byte-by-byte walk."""
    rendered = dialogue.render(conversation, tokens_per_frame, BOS, EOS)
    learnt = {i for a, b in rendered.learn_ranges for i in range(a, b)}
    char_of_byte = [i for i, c in enumerate(rendered.text) for _ in c.encode()]
    tokens, spans, at = [], [], 0
    for i in TOKENIZER.encode(rendered.text).ids.tolist():
        if i == TOKENIZER.placeholder_id:
            size = 3
        elif i in (TOKENIZER.eos_id, TOKENIZER.encode(BOS).ids[0]):
            size = len(EOS if i == TOKENIZER.eos_id else BOS)
        else:  # a byte-level token has one printable character per byte
            size = len(TOKENIZER._tokenizer.id_to_token(i))
        tokens.append(i)
        spans.append({char_of_byte[b] for b in range(at, at + size)})
        at += size
    assert at == len(char_of_byte)
    starts, labels, run = [], {}, 0
    for p, token in enumerate(tokens):
        run = run + 1 if token == TOKENIZER.placeholder_id else 0
        if run % tokens_per_frame == 1 or (tokens_per_frame == 1 and run):
            starts.append(p)
        if p + 1 < len(tokens) and spans[p + 1] & learnt:
            labels[p] = (tokens[p + 1], STREAM if run == tokens_per_frame else LANGUAGE)
    return tokens, starts, labels


@pytest.mark.parametrize("tokens_per_frame", [1, 3])
def test_example_equals_a_brute_force_walk(tokens_per_frame):
    rng = np.random.default_rng(tokens_per_frame)
    for _ in range(60):
        conversation = conversation_of(rng)
        features = features_of(conversation, tokens_per_frame)
        built = build_example(conversation, features, TOKENIZER, tokens_per_frame, BUDGET)
        tokens, starts, labels = brute_force(conversation, tokens_per_frame)
        length = int(built["length"])
        assert length == len(tokens)
        placeholder = TOKENIZER.placeholder_id
        expected = [0 if t == placeholder else t for t in tokens]
        assert built["tokens"][:length].tolist() == expected
        assert built["frame_starts"][: len(starts)].tolist() == starts
        count = len(labels)
        assert built["label_positions"][:count].tolist() == sorted(labels)
        found = zip(built["labels"][:count], built["label_kinds"][:count], strict=True)
        assert [tuple(map(int, pair)) for pair in found] == [labels[p] for p in sorted(labels)]
        assert not built["label_kinds"][count:].any()
        np.testing.assert_array_equal(built["features"][: len(starts)], features)
        assert not built["features"][len(starts) :].any()


def test_drawn_example_of_overlap():
    offsets = np.array([(0, 2), (2, 3), (2, 3), (3, 5)])
    assert _overlapping(offsets, ((2, 4),)).tolist() == [False, True, True, True]
    assert "(0,2) (2,3) (2,3) (3,5), ranges (2,4)  ->  False True True True" in _overlapping.__doc__


def test_drawn_example_of_labels():

    def text(ids):
        return "".join(BYTES.decode([i]) for i in ids).replace("\n", "/")

    conversation = (System(""), Stream(2), Assistant("ok"))
    built = build_example(conversation, features_of(conversation, 2), BYTES, 2, BUDGET)
    first = int(built["frame_starts"][0])
    assert text(built["tokens"][first - 2 : first]) == "/["
    positions = built["label_positions"][:5] - first
    assert positions.tolist() == [1, 4, 5, 6, 7]  # , ] / A s
    assert text(built["labels"][:5]) == ",]/As"
    assert built["label_kinds"][:5].tolist() == [2, 2, 1, 1, 1]


def test_unused_slots_lie_behind_the_text_and_fill_the_budget():
    conversation = conversation_of(np.random.default_rng(5))
    built = build_example(conversation, features_of(conversation, 3), TOKENIZER, 3, BUDGET)
    used = sum(m.num_frames for m in conversation if isinstance(m, Stream))
    length, starts = int(built["length"]), built["frame_starts"]
    assert built["tokens"].shape == (BUDGET.text_tokens + BUDGET.frames * 3,)
    assert starts.shape == (BUDGET.frames,)
    assert (np.diff(starts) >= 3).all()
    assert starts[used] == length
    assert starts[-1] + 3 <= len(built["tokens"])
    assert not built["tokens"][length:].any()
    slots = (starts[:, None] + np.arange(3)).ravel()
    assert len(set(slots.tolist())) == BUDGET.frames * 3
    assert not built["tokens"][slots].any()
    assert {key: array.dtype for key, array in built.items()} == {
        "tokens": np.int32,
        "frame_starts": np.int32,
        "features": np.float32,
        "length": np.int32,
        "label_positions": np.int32,
        "labels": np.int32,
        "label_kinds": np.int8,
    }


def test_a_full_budget_is_enough_and_one_less_is_named():
    conversation = conversation_of(np.random.default_rng(1))
    features = features_of(conversation, 2)
    built = build_example(conversation, features, TOKENIZER, 2, BUDGET)
    exact = {
        "frames": len(features),
        "text_tokens": int(built["length"]) - 2 * len(features),
        "labels": int((built["label_kinds"] > 0).sum()),
    }
    build_example(conversation, features, TOKENIZER, 2, Budget(**exact))
    for field, size in exact.items():
        small = Budget(**exact | {field: size - 1})
        with pytest.raises(
            UserError, match=f"v1: {field}: expected at most {size - 1}, found {size}"
        ):
            build_example(conversation, features, TOKENIZER, 2, small, record="v1")


def test_features_of_other_frames_are_named():
    conversation = (System("a"), Stream(2), Assistant("b"))
    with pytest.raises(UserError, match=r"v1: features: expected the 2 frames .* found 3"):
        build_example(conversation, np.zeros((3, 3, 4)), TOKENIZER, 3, BUDGET, record="v1")


def test_turns_point_at_the_silence_and_the_answers():
    conversation = (
        System("Watch."),
        Stream(3),
        Assistant("A cat."),
        Stream(2, learn=1),
        User("How many?"),
        Assistant("Two."),
        User("Sure?"),
        Assistant("Yes.", learn=False),
        Stream(2),
        Assistant("字 é."),
        Stream(4, learn=3),
    )
    built = build_example(conversation, features_of(conversation, 2), TOKENIZER, 2, BUDGET)
    turns = turns_of(conversation, TOKENIZER, 2)
    assert [(t.first_frame, t.num_frames, t.learn_frames, t.asked) for t in turns] == [
        (0, 3, 3, False),
        (3, 2, 1, True),
        (5, 0, 0, True),
        (5, 2, 2, False),
    ]
    said = [TOKENIZER.decode(built["labels"][t.answer_slots]) for t in turns]
    assert said == ["\nAssistant: A cat.", "Assistant: Two.", "", "\nAssistant: 字 é."]
    for t in turns:
        ends = built["frame_starts"][t.first_frame : t.first_frame + t.learn_frames] + 1
        assert built["label_positions"][t.stream_slots].tolist() == ends.tolist()
        assert (built["label_kinds"][t.stream_slots] == STREAM).all()
        labels = built["labels"][t.stream_slots].tolist()
        if not t.asked:
            assert TOKENIZER.decode(labels[-1:]) == "]"
            labels.pop()
        assert labels == [TOKENIZER.interval_id] * len(labels)
    slots = [s for t in turns for s in (*t.stream_slots, *t.answer_slots)]
    # Beyond the last answer only the three silences of the end are left.
    assert slots == list(range(len(slots)))
    assert (built["label_kinds"] > 0).sum() == len(slots) + 3


def test_turns_do_not_take_a_bos_that_is_also_eos_for_an_answer():
    tokenizer = type(TOKENIZER)(TOKENIZER._definition, EOS, EOS)
    conversation = (System("a"), Stream(1), Assistant("b"), Stream(2), Assistant("c"))
    turns = turns_of(conversation, tokenizer, 2)
    built = build_example(conversation, features_of(conversation, 2), tokenizer, 2, BUDGET)
    said = [tokenizer.decode(built["labels"][t.answer_slots]) for t in turns]
    assert said == ["\nAssistant: b", "\nAssistant: c"]


def test_drawn_example_of_fit():
    conversation = (
        System("s"), Stream(9), User("u"), Assistant("a"), Stream(9), Assistant("b"), Stream(9),
    )  # fmt: skip

    def fitted(**limits):
        budget = Budget(**({"frames": 27, "text_tokens": 500, "labels": 500} | limits))
        return fit(conversation, TOKENIZER, 2, budget)

    assert fitted(frames=20) == conversation[:-1]
    assert fitted(frames=27) == conversation
    assert fitted(frames=17) == conversation[:4]
    # Not even the first answer fits: left whole, for `build_example` to refuse.
    assert fitted(frames=8) == conversation
    whole = build_example(
        conversation[:-1], np.zeros((18, 2, 1)), TOKENIZER, 2, Budget(18, 500, 500)
    )
    labels = int((whole["label_kinds"] > 0).sum())
    assert fitted(labels=labels) == conversation[:-1]
    assert fitted(labels=labels - 1) == conversation[:4]
