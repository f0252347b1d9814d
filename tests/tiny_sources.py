"""A small valid source of every dataset, in its published layout, by name of the dataset."""

from collections.abc import Callable, Mapping
from pathlib import Path

from tests import tiny_coin, tiny_ego4d, tiny_egoexo4d, tiny_qa
from videollm_mod_jax.data.annotations import Videos
from videollm_mod_jax.data.builders import coin

OWN_CSV = """\
video,time,role,text,split
kitchen,3.5,,The person opens the fridge.,
kitchen,0:06,user,What is in the pan?,
kitchen,0:06,assistant,"Two eggs, sunny side up.",
monday/street.mp4,1.2,assistant,A bus stops.,validation
kitchen,9,assistant,"It says ""done"".",train
monday/street,0:00:04.25,assistant,It leaves.,validation
"""


def own(directory: Path) -> Videos:
    """Two videos of 10 and 6 seconds at 2 fps, one of them with a question."""
    (directory / "annotations.csv").write_text(OWN_CSV)
    return Videos(2.0, {"kitchen": 20, "monday/street": 12})


def _framed(write: Callable[[Path], Mapping[str, int]]) -> Callable[[Path], Videos]:
    return lambda directory: Videos(tiny_qa.FPS, write(directory))


SOURCES: Mapping[str, Callable[[Path], Videos]] = {
    **tiny_ego4d.SOURCES,
    **dict.fromkeys((dataset.name for dataset in coin.DATASETS), tiny_coin.small_source),
    "egoexo4d_keystep": tiny_egoexo4d.small_source,
    **{name: _framed(write) for name, write in tiny_qa.WRITERS.items()},
    "own": own,
}
"""Each writes a source into an empty directory and returns the videos that it is about."""
