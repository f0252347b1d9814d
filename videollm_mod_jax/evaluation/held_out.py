"""Were the videos of a benchmark among those that the model was trained on?"""

from collections.abc import Mapping
from pathlib import Path

from videollm_mod_jax.data.sources import Sources
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.training.checkpoint import read_json


def count_learnt(
    manifest: Path, sources: Sources, splits: Mapping[str, str], *, force: bool
) -> dict[str, int | None]:
    """How many videos of each benchmark the model was trained on.

    A video counts whatever the dataset that it was learnt from: narrations and questions of one
    video teach the same video. It is known by its name in the feature store.

    Args:
      manifest: the videos that were learnt, by dataset, as `train` writes them.
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
        sources.records(name, split)  # refuses an unknown split
        videos = set(sources.dataset(name).videos(split))
        shared = {dataset: sorted(videos.intersection(seen)) for dataset, seen in learnt.items()}
        counts[name] = len(set().union(*shared.values()))
        for dataset, seen in shared.items():
            if seen and not force:
                raise UserError(
                    f"{name}, split {split}: {len(seen)} of its {len(videos)} videos are among "
                    f"those of {dataset} that the model was trained on, such as {seen[0]!r} "
                    f"({manifest}); choose another split, or --force, which marks the report"
                )
    return counts
