"""Which files a feature store is made of, and which of them each of its shards holds."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from videollm_mod_jax.config_dict import build
from videollm_mod_jax.data import files
from videollm_mod_jax.data.feature_index import FeatureMeta
from videollm_mod_jax.errors import UserError

PLAN = "sources.json"


@dataclass(frozen=True)
class EncodingPlan:
    """What is encoded, and how it is divided; PLAN in the directory of the store.

    Attributes:
      meta: what the videos share.
      sources: by name of the video, in order: its file relative to the directory of the videos, and
        the file's size in bytes.
      shards: the numbers of the videos that each shard holds.
    """

    meta: FeatureMeta
    sources: Mapping[str, tuple[str, int]]
    shards: Sequence[range]

    def names(self, shard: int) -> list[str]:
        """The names of a shard's videos."""
        return list(self.sources)[slice(self.shards[shard].start, self.shards[shard].stop)]

    def write(self, directory: Path) -> None:
        """Writes the plan into the directory of a store."""
        table = {
            "meta": dataclasses.asdict(self.meta),
            "sources": self.sources,
            "shards": [[shard.start, shard.stop] for shard in self.shards],
        }
        with files.written_aside(directory / PLAN) as aside:
            aside.write_text(json.dumps(table) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, directory: Path) -> "EncodingPlan":
        """Reads the plan of a store.

        Raises:
          UserError: there is none, or it is damaged.
        """
        try:
            table = files.read_json(directory / PLAN)
            return cls(
                build(FeatureMeta, table["meta"], "meta"),
                {name: (file, size) for name, (file, size) in table["sources"].items()},
                [range(start, stop) for start, stop in table["shards"]],
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{directory} exists and holds no features of a folder of videos (no valid "
                f"{PLAN}); remove it or write elsewhere"
            ) from error

    def check(
        self, meta: FeatureMeta, sources: Mapping[str, tuple[str, int]], directory: Path
    ) -> None:
        """Refuses to take this plan for another task.

        Args:
          meta: of the task.
          sources: of the task.
          directory: where this plan is.

        Raises:
          UserError: a field of `meta` differs, or a video is new, gone or of another size.
        """
        begin_anew = "remove it to encode all videos again, or write elsewhere"
        for field, found in dataclasses.asdict(self.meta).items():
            if found != getattr(meta, field):
                raise UserError(
                    f"{directory}: field '{field}': expected {getattr(meta, field)}, found "
                    f"{found}; {begin_anew}"
                )
        names = sorted(self.sources.keys() | sources.keys())
        changed = [name for name in names if self.sources.get(name) != sources.get(name)]
        if changed:
            before, now = (_shown(one.get(changed[0])) for one in (self.sources, sources))
            more = f" ({len(changed) - 1} more differ)" if changed[1:] else ""
            raise UserError(
                f"{directory} is of other videos: {changed[0]} was {before}, is {now}{more}; "
                f"{begin_anew}"
            )


def _shown(source: tuple[str, int] | None) -> str:
    return "not there" if source is None else f"{source[0]} of {source[1]} bytes"


def sources_of(videos: Mapping[str, Path], directory: Path) -> dict[str, tuple[str, int]]:
    """The files of videos as a plan names them.

    Args:
      videos: paths by name, below `directory`.
      directory: of the videos.
    """
    return {
        name: (path.relative_to(directory).as_posix(), os.stat(path).st_size)
        for name, path in videos.items()
    }
