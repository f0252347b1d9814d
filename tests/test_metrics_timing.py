"""Times of narrations are compared as FlowNar compares them, and within a window one to one."""

import itertools
import random

import pytest

from videollm_mod_jax.evaluation.timing import (
    Narration,
    TimingScores,
    mean_scores,
    segment_pairs,
    segment_scores,
    window_matches,
    window_scores,
)


def narrations(**times):
    return [Narration(float(time), text) for text, time in times.items()]


TRUE, PREDICTED = narrations(A=3, B=6), narrations(a=2, b=5, c=6)


def test_drawn_segments():
    scores = segment_scores(PREDICTED, TRUE, start=0.0, min_iou=0.5)
    assert scores == TimingScores(2 / 3, 1.0, pytest.approx(0.8))
    assert segment_pairs(PREDICTED, TRUE, start=0.0) == (("a", "A"), ("b", "B"))
    # IoU A a 2/3, B b 2/4, B c 1/3: each counts up to its own value.
    for min_iou, precision in ((0.3, 1.0), (0.34, 2 / 3), (0.51, 1 / 3), (0.67, 0.0)):
        scores = segment_scores(PREDICTED, TRUE, start=0.0, min_iou=min_iou)
        assert scores.precision == precision


def test_the_right_narrations_at_the_right_times():
    assert segment_scores(TRUE, TRUE, start=0.0, min_iou=1.0) == TimingScores(1.0, 1.0, 1.0)
    assert segment_pairs(TRUE, TRUE, start=0.0) == (("A", "A"), ("B", "B"))
    assert window_scores(TRUE, TRUE, window=0.0) == TimingScores(1.0, 1.0, 1.0)


def test_the_start_is_where_the_first_stretch_begins():
    late = narrations(a=3.5)
    assert segment_scores(late, narrations(A=3), start=0.0, min_iou=0.8).f1 == 1.0  # 3 / 3.5
    assert segment_scores(late, narrations(A=3), start=2.0, min_iou=0.8).f1 == 0.0  # 1 / 1.5


def segments(series, start):
    times = [start] + [narration.time for narration in series]
    return list(itertools.pairwise(times))


def test_segments_against_a_scalar_computation():
    rng = random.Random(0)

    def series(letter, count):
        times = sorted(rng.uniform(1, 20) for _ in range(count))
        return [Narration(time, f"{letter}{index}") for index, time in enumerate(times)]

    for _ in range(100):
        predicted, true = series("p", rng.randrange(1, 8)), series("t", rng.randrange(1, 8))
        iou, giou = {}, {}
        for (i, p), (j, t) in itertools.product(
            enumerate(segments(predicted, 1.0)), enumerate(segments(true, 1.0))
        ):
            shared = max(0.0, min(p[1], t[1]) - max(p[0], t[0]))
            union = (p[1] - p[0]) + (t[1] - t[0]) - shared
            hull = max(p[1], t[1]) - min(p[0], t[0])
            iou[i, j], giou[i, j] = shared / union, shared / union - (hull - union) / hull
        right = {i for (i, _), value in iou.items() if value >= 0.5}
        found = {j for (_, j), value in iou.items() if value >= 0.5}
        scores = segment_scores(predicted, true, start=1.0, min_iou=0.5)
        assert scores.precision == len(right) / len(predicted)
        assert scores.recall == len(found) / len(true)
        nearest = [max((giou[i, j], i) for i in range(len(predicted)))[1] for j in range(len(true))]
        assert segment_pairs(predicted, true, start=1.0) == tuple(
            (f"p{i}", f"t{j}") for j, i in enumerate(nearest)
        )


def test_silence_finds_nothing():
    assert segment_scores([], TRUE, start=0.0, min_iou=0.5) == TimingScores(0.0, 0.0, 0.0)
    assert segment_pairs([], TRUE, start=0.0) == (("", "A"), ("", "B"))
    assert window_scores([], TRUE, window=1.0) == TimingScores(0.0, 0.0, 0.0)


def test_two_narrations_at_once_leave_a_stretch_without_length():
    twice = narrations(a=3, b=3)
    scores = segment_scores(twice, narrations(A=3), start=0.0, min_iou=0.5)
    assert scores == TimingScores(0.5, 1.0, pytest.approx(2 / 3))


def test_drawn_window():
    true, predicted = narrations(A=1, B=2, C=6), narrations(a=0, b=1, c=4)
    assert window_matches(predicted, true, window=1.0) == ((0, 0), (1, 1))
    assert window_scores(predicted, true, window=1.0) == TimingScores(
        2 / 3, 2 / 3, pytest.approx(2 / 3)
    )


def test_a_narration_matches_once():
    often = narrations(a=2.5, b=3, c=3.5)
    assert window_scores(often, narrations(A=3), window=0.5) == TimingScores(1 / 3, 1.0, 0.5)
    assert window_scores(narrations(a=3), narrations(A=3, B=3), window=0.5).recall == 0.5


def test_the_window_includes_its_ends():
    assert window_matches(narrations(a=2.5), narrations(A=3), window=0.5) == ((0, 0),)
    assert window_matches(narrations(a=3.5), narrations(A=3), window=0.5) == ((0, 0),)
    assert window_matches(narrations(a=3.5), narrations(A=3), window=0.49) == ()


def test_the_matching_is_the_largest_there_is():
    scipy = pytest.importorskip("scipy.sparse.csgraph")
    sparse = pytest.importorskip("scipy.sparse")
    rng = random.Random(3)
    for _ in range(200):
        p, t = (sorted(rng.randrange(20) / 2 for _ in range(rng.randrange(1, 9))) for _ in "pt")
        near = [[abs(x - y) <= 1.0 for y in t] for x in p]
        largest = scipy.maximum_bipartite_matching(sparse.csr_matrix(near), perm_type="column")
        pairs = window_matches(
            [Narration(x, "p") for x in p], [Narration(y, "t") for y in t], window=1.0
        )
        assert len(pairs) == (largest >= 0).sum()
        assert all(near[i][j] for i, j in pairs)
        assert len({i for i, _ in pairs}) == len({j for _, j in pairs}) == len(pairs)


def test_the_mean_f1_is_not_the_f1_of_means():
    videos = [TimingScores(1.0, 1.0, 1.0), TimingScores(0.0, 0.5, 0.0)]
    assert mean_scores(videos) == TimingScores(0.5, 0.75, 0.5)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="no true narrations"):
        segment_scores(PREDICTED, [], start=0.0, min_iou=0.5)
    with pytest.raises(ValueError, match="no true narrations"):
        window_matches(PREDICTED, [], window=1.0)
    with pytest.raises(ValueError, match=r"predicted times .* are not in order"):
        segment_pairs(narrations(a=2, b=1), TRUE, start=0.0)
    with pytest.raises(ValueError, match=r"true times .* expected finite seconds from 4 on"):
        segment_pairs([], TRUE, start=4.0)
    with pytest.raises(ValueError, match="expected finite seconds"):
        window_matches(narrations(a="nan"), TRUE, window=1.0)
    with pytest.raises(ValueError, match="expected finite seconds"):
        segment_pairs(narrations(a="inf"), TRUE, start=0.0)
    with pytest.raises(ValueError, match="min_iou is 0; expected"):
        segment_scores(PREDICTED, TRUE, start=0.0, min_iou=0)
    with pytest.raises(ValueError, match="window is nan"):
        window_matches(PREDICTED, TRUE, window=float("nan"))
    with pytest.raises(ValueError, match="no videos"):
        mean_scores([])
