"""Which videos of Ego4D are for training, which for validation and which for testing.

Narrations cover every video, also those on which other benchmarks of Ego4D are evaluated. The rule
of VideoLLM-online (showlab/videollm-online, `Ego4DNarrationStream.get_annos` of
data/ego4d/narration.py) keeps these out of training:

    in BENCHMARK_val.json of any benchmark                     ->  validation
    else in BENCHMARK_test_unannotated.json of any benchmark   ->  test
    else                                                       ->  train

and where the lists exist that it writes, they are the rule.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from videollm_mod_jax.data.annotations import FieldError, shown, text_field
from videollm_mod_jax.data.builders.json_members import array_members
from videollm_mod_jax.errors import UserError

SPLITS = ("train", "validation", "test")

BENCHMARKS = {
    "goalstep": "videos",
    "fho_lta": "clips",
    "nlq": "videos",
    "moments": "videos",
    "av": "videos",
    "fho_oscc-pnr": "clips",
    "fho_sta": "annotations",
    "vq": "videos",
}
"""The benchmarks that the rule looks at, and the field of their files that lists what they use."""

LISTS = {
    "train": "narration_stream_video_uids_train.json",
    "validation": "narration_stream_video_uids_val.json",
    "test": "narration_stream_video_uids_test.json",
}
"""Files that say which videos are in a split: each an array of their names."""

GROUPS = "goalstep_video_groups.tsv"

PAGE = f"""\
Splits: `train`, `validation`, `test`.

A video that another benchmark of Ego4D validates on is in `validation`, one that it tests on in
`test`, all others in `train`. That takes sixteen more files of the same download, all of them:
`BENCHMARK_val.json` and `BENCHMARK_test_unannotated.json` for

    {" ".join(BENCHMARKS)}

(and `{GROUPS}` of github.com/facebookresearch/ego4d-goalstep, if the files of
goalstep name groups of videos, `grp-...`). An error says which are missing: nothing is trained on
unawares.

Whoever has not got them, or wants another rule, writes lists of video names, as json arrays:

    {LISTS["train"]}
    {LISTS["validation"]}
    {LISTS["test"]}

If any of the three is there, only they count, and a video in none of them is dropped. It takes no
more than the first to train on a few videos of one's own in this layout.
"""


@dataclasses.dataclass(frozen=True)
class VideoSplits:
    """The split of every video.

    Attributes:
      named: split of the videos that a file names.
      others: split of all others, None for none.
    """

    named: Mapping[str, str]
    others: str | None

    def of(self, video: str) -> str | None:
        """The split of a video, None if it is in none."""
        return self.named.get(video, self.others)


def read_splits(directory: Path) -> VideoSplits:
    """Reads the lists in a directory, or else applies the rule to the files of the benchmarks.

    Raises:
      UserError: neither is complete, a file cannot be used, or a video is in two lists.
    """
    if any((directory / name).exists() for name in LISTS.values()):
        return _from_lists(directory)
    wanted = {
        split: {f"{name}_{suffix}.json": key for name, key in BENCHMARKS.items()}
        for split, suffix in (("test", "test_unannotated"), ("validation", "val"))
    }
    missing = [
        name for files in wanted.values() for name in files if not (directory / name).exists()
    ]
    if missing:
        raise UserError(
            f"{directory}: cannot tell which videos must not be trained on: {', '.join(missing)} "
            "missing; download all annotations of Ego4D, or name the training videos in "
            f"{LISTS['train']} (a json array) and the others in {LISTS['validation']} and "
            f"{LISTS['test']}"
        )
    # Validation last: a video that some benchmark validates and another tests on is validation.
    named = {
        video: split
        for split, files in wanted.items()
        for name, key in files.items()
        for video in _videos(directory / name, key)
    }
    return VideoSplits(named, others="train")


def _from_lists(directory: Path) -> VideoSplits:
    named: dict[str, str] = {}
    for split, name in LISTS.items():
        path = directory / name
        for video in array_members(path) if path.exists() else ():
            if not isinstance(video, str):
                raise UserError(f"{path}: expected an array of video names, found {shown(video)}")
            if named.setdefault(video, split) != split:
                raise UserError(
                    f"{path}: video {shown(video)} is also in {LISTS[named[video]]}; leave it in "
                    "one of them"
                )
    return VideoSplits(named, others=None)


def _videos(path: Path, key: str) -> Iterator[str]:
    """Names of the videos that a benchmark uses, those of a group one by one."""
    for i, entry in enumerate(array_members(path, key)):
        try:
            video = text_field(entry, "video_uid", f"{path}: {key}: entry {i}")
        except FieldError as error:
            raise UserError(f"{error}; download the file again") from error
        if video.startswith("grp-"):
            yield from _group(path, video)
        yield video


def _group(path: Path, group: str) -> list[str]:
    """The videos of a group: grp-X is the row whose `video_group` begins with X.

    ```
    university<tab>video_group
    utokyo<tab>['X', 'Y']                group "grp-X"  ->  X, Y
    ```
    """
    table = path.parent / GROUPS
    try:
        lines = table.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: {group} is a group of videos, and {table} cannot be read ({error}); "
            "download it from data/ of github.com/facebookresearch/ego4d-goalstep"
        ) from error
    for row in (re.findall("'([^']+)'", line) for line in lines):
        if row and row[0] == group.removeprefix("grp-"):
            return row
    raise UserError(f"{table}: expected a row that begins with {group[4:]}, found none")
