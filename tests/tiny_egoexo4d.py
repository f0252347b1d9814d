"""Small keystep annotations of Ego-Exo4D in the published layout."""

import copy
import json

from videollm_mod_jax.data.annotations import Videos


def segment(start, end, number, name, essential=True):
    """A segment as Ego-Exo4D publishes it."""
    return {
        "start_time": start,
        "end_time": end,
        "step_id": 31,
        "step_name": name,
        "step_description": f"{name} on the table",
        "is_essential": essential,
        "step_unique_id": number,
    }


def take(uid, name, segments):
    """A take as Ego-Exo4D publishes it."""
    return {
        "take_uid": uid,
        "take_name": name,
        "scenario": "Covid-19 Rapid Antigen Test",
        "annotation_meta": {"annotator_id": 5792777457490871, "job_id": 6534429029945912},
        "segments": segments,
    }


COVID, BIKE = "77cd56fc-6b68-4c7f-814b-81545484dd2d", "13f01c79-5bfd-42f5-90ce-ee350aa1c3ad"
TRAIN = {
    COVID: take(
        COVID,
        "georgiatech_covid_07_6",
        [
            segment(0.85598, 2.20377, 843, "Unbox package"),
            segment(2.204, 4.61153, 824, "Read the  instructions", essential=False),
            segment(5.0, 5.5, 818, "Check the expiration date"),
        ],
    )
}
VALIDATION = {BIKE: take(BIKE, "cmu_bike14_4", [segment(0.2, 0.4, 1567, "Stir the mixture")])}
CLASSES = (
    "label_id,step_unique_id,step_name,scenario_name\n"
    "0,1567,Stir the mixture,cooking\n"
    "1,824,Read the instructions,health\n"
    "35,843,Unbox package,health\n"
)
SEGMENTS = 4
VIDEOS = Videos(
    2.0,
    {
        "georgiatech_covid_07_6/frame_aligned_videos/downscaled/448/aria02_214-1": 12,
        "georgiatech_covid_07_6/frame_aligned_videos/downscaled/448/aria02_1201-1": 12,
        "georgiatech_covid_07_6/frame_aligned_videos/downscaled/448/cam01": 12,
        "cmu_bike14_4/frame_aligned_videos/downscaled/448/aria01_214-1": 9,
    },
)


def train():
    """A copy of the takes of the training split, to change."""
    return copy.deepcopy(TRAIN)


def write(directory, takes, classes=CLASSES):
    """Writes takes of the training split, and all the rest, as a source directory."""
    (directory / "keystep_benchmark").mkdir(parents=True, exist_ok=True)
    for file, annotations in (("train", takes), ("val", VALIDATION)):
        content = {"annotations": annotations, "taxonomy": {}, "vocabulary": {"818": "..."}}
        (directory / f"keystep_{file}.json").write_text(json.dumps(content), encoding="utf-8")
    (directory / "keystep_benchmark" / "label_mapping.csv").write_text(classes, encoding="utf-8")


def small_source(directory):
    """Writes the source directory; gives the videos whose features are stored."""
    write(directory, TRAIN)
    return VIDEOS
