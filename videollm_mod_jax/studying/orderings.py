"""Do the orderings of the paper hold? Differences over seeds, with their spread, and a verdict.

All variants see the same seeds, so that differences are taken seed by seed, and what a seed does to
both sides falls out.
"""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence

from videollm_mod_jax.studying.variants import EARLY_EXIT, FULL, LAYER_SKIP, MOD

# 95% of Student's t with n - 1 degrees of freedom, two-sided, for n = 2, 3, ... values.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)

HOLDS, FAILS, OPEN, MISSING = "holds", "does not hold", "within the spread", "not run"


@dataclasses.dataclass(frozen=True)
class Ordering:
    """A claim about two variants.

    Attributes:
      better: name of the variant that should be ahead.
      worse: of the other.
      strict: whether it must be ahead; otherwise it must not be behind by more than the spread.
    """

    better: str
    worse: str
    strict: bool = True

    @property
    def text(self) -> str:
        """The claim in words."""
        relation = "above" if self.strict else "within the spread of, or above,"
        return f"{self.better} {relation} {self.worse}"


ORDERINGS = (
    Ordering(MOD, "random"),
    Ordering(MOD, "uniform"),
    Ordering(MOD, FULL, strict=False),
    Ordering(MOD, EARLY_EXIT),
    Ordering(MOD, LAYER_SKIP),
    Ordering(FULL, EARLY_EXIT),
    Ordering(FULL, LAYER_SKIP),
    Ordering(MOD, "all"),
    Ordering("all", "all-uniform"),
    Ordering(MOD, "tanh1"),
    Ordering(MOD, "no-exploration"),
)


@dataclasses.dataclass(frozen=True)
class Judged:
    """What became of a claim.

    Attributes:
      ordering: the claim.
      difference: mean of better - worse over the seeds that both have; None without any.
      interval: half the width of its 95% confidence interval, by Student's t over paired seeds;
        None with fewer than two.
      seeds: how many there are.
      verdict: of `HOLDS`, `FAILS`, `OPEN`, `MISSING`.
    """

    ordering: Ordering
    difference: float | None
    interval: float | None
    seeds: int
    verdict: str


def judge(
    ordering: Ordering, values: Mapping[str, Mapping[int, float]], *, higher_is_better: bool
) -> Judged:
    """Judges a claim by a metric.

    ```
    strict         difference - interval > 0: holds    difference + interval < 0: does not hold
                   otherwise within the spread
    not strict     difference + interval >= 0: holds   otherwise does not hold
    ```

    Args:
      ordering: the claim.
      values: the metric by variant and seed.
      higher_is_better: of the metric.
    """
    better, worse = values.get(ordering.better, {}), values.get(ordering.worse, {})
    seeds = sorted(better.keys() & worse.keys())
    if not seeds:
        return Judged(ordering, None, None, 0, MISSING)
    sign = 1 if higher_is_better else -1
    differences = [sign * (better[seed] - worse[seed]) for seed in seeds]
    difference, interval = statistics.fmean(differences), confidence(differences)
    if interval is None:
        return Judged(ordering, difference, None, 1, OPEN)
    if ordering.strict:
        low, high = difference - interval, difference + interval
        verdict = HOLDS if low > 0 else FAILS if high < 0 else OPEN
    else:
        verdict = HOLDS if difference + interval >= 0 else FAILS
    return Judged(ordering, difference, interval, len(seeds), verdict)


def confidence(values: Sequence[float]) -> float | None:
    """Half the width of the 95% confidence interval of a mean; None of fewer than two values."""
    if len(values) < 2:
        return None
    t = _T95[min(len(values) - 2, len(_T95) - 1)]
    return t * statistics.stdev(values) / math.sqrt(len(values))
