"""The streaming metrics equal cases worked by hand."""

import math

import numpy as np
import pytest

from videollm_mod_jax.evaluation.stream_metrics import (
    StreamMetrics,
    TurnPrediction,
    frame_difference,
    frames_early,
    leading_correct,
    mean_metrics,
    turn_metrics,
)

FPS = 2.0
SIX_TOKENS = (True, True, True, False, True, True)


def turn(breaks, *, asked=False, late_frames=0, correct=SIX_TOKENS, probability=0.5):
    return TurnPrediction(
        breaks_silence=np.array([mark == "x" for mark in breaks], bool),
        asked=asked,
        late_frames=late_frames,
        log_probs=np.full(len(correct), math.log(probability), np.float32),
        correct=np.array(correct, bool),
    )


@pytest.mark.parametrize(
    ("prediction", "difference", "seconds", "fluency"),
    [
        pytest.param(turn("...x"), 0, 0.0, 7 / 10, id="on_time"),
        pytest.param(turn(".x.."), 2, 1.0, 2 / 10, id="two_frames_early"),
        pytest.param(turn(".xxx"), 2, 1.0, 2 / 10, id="the_first_break_counts"),
        pytest.param(turn("....", late_frames=1), -1, 0.5, 3 / 10, id="one_frame_late"),
        pytest.param(turn("....", late_frames=3), -3, 1.5, 3 / 10, id="never_given_three_frames"),
        pytest.param(
            turn("....", late_frames=0), 0, 0.0, 7 / 10, id="last_turn_has_no_later_frame"
        ),
        pytest.param(
            turn("....", asked=True, late_frames=2), 0, 0.0, 7 / 10, id="silent_until_the_question"
        ),
        pytest.param(turn("...x", asked=True), 1, 0.5, 3 / 10, id="spoke_a_frame_before_question"),
        pytest.param(turn("x...", asked=True), 4, 2.0, 0 / 10, id="spoke_four_before_question"),
    ],
)
def test_timing_and_fluency_of_a_turn(prediction, difference, seconds, fluency):
    assert frame_difference(prediction) == difference
    metrics = turn_metrics(prediction, FPS)
    assert metrics.time_diff == seconds
    assert metrics.fluency == pytest.approx(fluency, abs=1e-12)


def test_language_metrics_of_a_turn():
    metrics = turn_metrics(turn("...x", probability=0.25), FPS)
    assert metrics.lm_ppl == pytest.approx(4.0)
    assert metrics.lm_correctness == 3 / 6
    assert leading_correct(np.array([False, True, True])) == 0
    assert leading_correct(np.array([True, True])) == 2
    mixed = TurnPrediction(
        breaks_silence=np.zeros(0, bool),
        asked=True,
        late_frames=0,
        log_probs=np.log(np.array([0.5, 0.125], np.float32)),
        correct=np.array([True, True]),
    )
    assert turn_metrics(mixed, FPS).lm_ppl == pytest.approx(4.0)  # sqrt(2 * 8)


def test_what_a_turn_does_not_have_is_nan_and_is_left_out_of_means():
    answer_alone = turn_metrics(turn("", asked=True), FPS)
    assert math.isnan(answer_alone.time_diff)
    assert math.isnan(answer_alone.fluency)
    assert answer_alone.lm_correctness == 0.5
    silence_alone = turn_metrics(turn("...", asked=True, correct=()), FPS)
    assert math.isnan(silence_alone.lm_ppl)
    assert math.isnan(silence_alone.lm_correctness)
    assert silence_alone.time_diff == 0.0
    mean = mean_metrics([answer_alone, silence_alone, turn_metrics(turn(".x.."), FPS)])
    assert mean.time_diff == 0.5
    assert mean.fluency == pytest.approx(0.2)
    assert mean.lm_correctness == 0.5


def test_mean_over_turns_comes_before_mean_over_videos():
    def video(*seconds):
        return mean_metrics(
            StreamMetrics(lm_ppl=1.0, time_diff=s, fluency=1.0, lm_correctness=1.0) for s in seconds
        )

    # (0 + 0 + 0) / 3 = 0 and 1: 0.5, where the mean over all four turns is 0.25.
    assert mean_metrics([video(0.0, 0.0, 0.0), video(1.0)]).time_diff == 0.5
    assert math.isnan(mean_metrics([]).lm_ppl)


def test_drawn_examples():
    five = np.zeros(5, bool)
    at_4, at_2 = five.copy(), five.copy()
    at_4[4] = at_2[2] = at_2[3] = True
    assert frames_early(at_4, asked=False) == 0
    assert frames_early(at_2, asked=False) == 2
    assert frames_early(at_4, asked=True) == 1
    assert frames_early(five, asked=True) is None
    correct = (True, True, True, False, False, False)
    assert turn_metrics(turn("...x", correct=correct), FPS).fluency == (4 + 3) / 10
    assert turn_metrics(turn(".x..", correct=correct), FPS).fluency == (4 - 2) / 10
    assert turn_metrics(turn("....", correct=correct, late_frames=1), FPS).fluency == (4 - 1) / 10
