"""A small `COIN.json` in the published layout."""

import copy
import json

from videollm_mod_jax.data.annotations import Videos


def entry(name, task, subset, start, end, steps):
    """An entry as COIN publishes it; steps are (start, end, label)."""
    return {
        "duration": end + 1.0,
        "class": task,
        "video_url": f"https://www.youtube.com/embed/{name}",
        "start": start,
        "annotation": [
            {"id": str(200 + i), "segment": [begin, stop], "label": text}
            for i, (begin, stop, text) in enumerate(steps)
        ],
        "subset": subset,
        "end": end,
        "recipe_type": 131,
    }


TIRE = ("unscrew the screw", "jack up the car", "remove the tire", "put on the tire")
DATABASE = {
    "LtRSn-ntcLY": entry(
        "LtRSn-ntcLY",
        "ReplaceCDDriveWithSSD",
        "training",
        1.2,
        3.0,
        [(1.2, 2.0, "take out the laptop CD drive"), (2.5, 3.0, "insert the hard disk tray")],
    ),
    "-paper_0001": entry(
        "-paper_0001",
        "CutAndRestoreRopeTrick",
        "training",
        0.0,
        4.0,
        [(0.5, 1.5, "process (crop, fold) paper")],
    ),
    "tire_000001": entry(
        "tire_000001",
        "ChangeCarTire",
        "testing",
        0.0,
        8.0,
        [(float(i), i + 0.5, TIRE[i % 4]) for i in range(7)],
    ),
}
VIDEOS = Videos(2.0, {"131/LtRSn-ntcLY": 7, "12/-paper_0001": 8, "13/tire_000001": 16})
STEPS = sum(len(one["annotation"]) for one in DATABASE.values())


def database():
    """A copy of the entries, to change."""
    return copy.deepcopy(DATABASE)


def write(directory, entries):
    """Writes entries as a source directory."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "COIN.json").write_text(json.dumps({"database": entries}), encoding="utf-8")


def small_source(directory):
    """Writes the source directory; gives the videos whose features are stored."""
    write(directory, DATABASE)
    return VIDEOS
