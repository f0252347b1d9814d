"""Times the variants of one computation beside each other, in one process."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from rich.progress import Progress

from videollm_mod_jax.console import make_console


@dataclasses.dataclass(frozen=True)
class Timing:
    """How long every timed call of a variant took.

    Attributes:
      seconds: by round.
    """

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Of the seconds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Interquartile range, in seconds."""
        low, high = np.percentile(self.seconds, [25, 75])
        return float(high - low)

    def to_dict(self) -> dict[str, Any]:
        """For a JSON file: the median, the spread, and every round."""
        return {"median": self.median, "spread": self.spread, "seconds": list(self.seconds)}


def measure(
    variants: Mapping[str, Callable[[], Any]],
    rounds: int,
    warmup: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Times variants in turn, so that what disturbs the machine disturbs all of them.

    ```
    variants A B, warmup 1, rounds 2       A B | A B A B      timed: those behind the bar
    ```

    Args:
      variants: by name, a function that runs one step and returns its arrays; a call ends when
        they are ready.
      rounds: timed calls of each variant.
      warmup: calls of each variant before, which compile and are not timed.
      clock: seconds.

    Returns:
      By name, in the order of `variants`.
    """
    seconds = {name: [] for name in variants}
    console = make_console(stderr=True)
    shown = {"console": console, "transient": True, "disable": not console.is_terminal}
    # Drawn between rounds only: a thread that draws would take part of a core.
    with Progress(auto_refresh=False, **shown) as progress:
        task = progress.add_task(" and ".join(variants), total=warmup + rounds)
        for index in range(warmup + rounds):
            for name, step in variants.items():
                start = clock()
                jax.block_until_ready(step())
                if index >= warmup:
                    seconds[name].append(clock() - start)
            progress.update(task, advance=1, refresh=True)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}
