"""Were the videos of a benchmark among those that the model was trained on?"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from videollm_mod_jax.data.files import read_json, understanding
from videollm_mod_jax.data.sources import Sources, merge_stretches
from videollm_mod_jax.errors import UserError

Stretches = Mapping[str, Sequence[Sequence[float]]]


def count_learnt(
    manifest: Path, sources: Sources, splits: Mapping[str, str], *, force: bool
) -> dict[str, int | None]:
    """How many videos of each benchmark show what the model was trained on.

    A video counts whatever the dataset that it was learnt from: narrations and questions of one
    video teach the same video. It is known by its name in the feature store. Other stretches of it
    do not count, since Ego4D's own splits of action anticipation share videos and no clips.

    Args:
      manifest: what was learnt, as `train` writes it: `Sources.training_stretches`.
      sources: the datasets of the benchmarks.
      splits: of the benchmarks, by name of the dataset.
      force: whether learnt videos are only counted.

    Returns:
      By name of the dataset; None where there is no manifest, so that nobody knows.

    Raises:
      UserError: an unknown split, or learnt videos without `force`.
    """
    if not manifest.exists():
        return dict.fromkeys(splits)
    learnt = read_json(manifest)
    counts: dict[str, int | None] = {}
    for name, split in splits.items():
        asked = merge_stretches(sources.records(name, split))
        with understanding(str(manifest), "run the same train command again, which writes it"):
            shared = {dataset: _shown_again(asked, seen) for dataset, seen in learnt.items()}
        counts[name] = len(set().union(*shared.values()))
        for dataset, seen in shared.items():
            if seen and not force:
                raise UserError(
                    f"{name}, split {split}: {len(seen)} of its {len(asked)} videos show "
                    f"what the model was trained on in {dataset}, such as {seen[0]!r} "
                    f"({manifest}); choose another split, or --force, which marks the report"
                )
    return counts


def _shown_again(asked: Stretches, learnt: Stretches) -> list[str]:
    """The videos of which some moment is in both."""
    return sorted(
        video
        for video in asked.keys() & learnt.keys()
        if any(
            start < seen_stop and seen_start < stop
            for start, stop in asked[video]
            for seen_start, seen_stop in learnt[video]
        )
    )
