"""Disturbed histories: what moves, what is not learnt, and that chance is reproducible."""

import numpy as np

from videollm_mod_jax.data.augment import Disturbance, disturb
from videollm_mod_jax.data.dialogue import Assistant, Stream, System, User, render

CONVERSATION = (
    System("s"),
    Stream(4),
    Assistant("A"),
    Stream(5),
    Assistant("B"),
    Stream(1, learn=0),
    User("Q"),
    Assistant("R"),
    Stream(3),
    Assistant("C"),
    Stream(2, learn=1),
)
ALWAYS = Disturbance(probability=1.0, window=2)


def times(conversation):
    """(frame of the message, text, learnt) of all answers, and which frames are learnt."""
    shown, answers, learnt = 0, [], []
    for message in conversation:
        if isinstance(message, Stream):
            learnt += [f < message.learn_frames for f in range(message.num_frames)]
            shown += message.num_frames
        elif isinstance(message, Assistant):
            answers.append((shown, message.text, message.learn))
    return answers, learnt


def test_drawn_example():
    before = (System("s"), Stream(4), Assistant("A"), Stream(5), Assistant("C"))
    results = {disturb(before, Disturbance(1.0, 1), np.random.default_rng(s)) for s in range(50)}
    moved = (Stream(3, learn=2), Assistant("A", learn=False), Stream(6, learn=0), Assistant("C"))
    assert (System("s"), *moved) in results
    # "C" has no stream behind it here, so it lends no words; with one it does.
    results = {
        disturb((*before, Stream(1)), Disturbance(1.0, 1), np.random.default_rng(s))
        for s in range(50)
    }
    worded = (Stream(4, learn=3), Assistant("C", learn=False), Stream(5, learn=0), Assistant("C"))
    assert (System("s"), *worded, Stream(1)) in results


def test_one_narration_is_disturbed_and_nothing_beside_it_is_learnt():
    kinds = set()
    true_answers, true_learnt = times(CONVERSATION)
    for seed in range(300):
        answers, learnt = times(disturb(CONVERSATION, ALWAYS, np.random.default_rng(seed)))
        assert len(learnt) == len(true_learnt)
        changed = [
            i
            for i, pair in enumerate(zip(true_answers, answers, strict=True))
            if len(set(pair)) > 1
        ]
        assert len(changed) == 1
        (true_time, true_text, _), (time, text, learn) = (
            true_answers[changed[0]],
            answers[changed[0]],
        )
        assert not learn
        assert abs(time - true_time) <= ALWAYS.window
        assert (time, text) != (true_time, true_text)
        kinds.add((time < true_time, time > true_time, text != true_text))
        # Silence stays learnt where history and truth agree, and only there.
        following = answers[changed[0] + 1][0] if changed[0] + 1 < len(answers) else len(learnt)
        first_wrong = min(time, true_time) - 1
        expected = [was and not first_wrong <= f < following for f, was in enumerate(true_learnt)]
        assert learnt == expected
    assert kinds == {
        (True, False, False), (False, True, False),
        (False, False, True), (True, False, True), (False, True, True),
    }  # fmt: skip


def test_disturbed_text_is_in_no_learnt_range():
    for seed in range(50):
        rendered = render(disturb(CONVERSATION, ALWAYS, np.random.default_rng(seed)), 2, "", "$")
        learnt = "".join(rendered.text[a:b] for a, b in rendered.learn_ranges)
        assert learnt.count("Assistant: ") == 3
        assert "Assistant: R$" in learnt


def test_the_same_generator_disturbs_alike_and_probability_is_kept():
    for seed in range(20):
        one, two = (disturb(CONVERSATION, ALWAYS, np.random.default_rng(seed)) for _ in "ab")
        assert one == two
    rng = np.random.default_rng(0)
    rare = [disturb(CONVERSATION, Disturbance(0.25, 2), rng) != CONVERSATION for _ in range(800)]
    assert 0.2 < np.mean(rare) < 0.3
    only = (System("s"), Stream(1), Assistant("A"))
    assert disturb(only, ALWAYS, rng) == only
