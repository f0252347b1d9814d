"""A small Ego4D: annotation files in the layouts of the downloads, for videos a to e at 2 fps."""

import json

from videollm_mod_jax.data.annotations import Report, Source, Videos
from videollm_mod_jax.data.builders import ego4d_goalstep, ego4d_lta, ego4d_narration, ego4d_splits

VIDEOS = Videos(fps=2.0, frames={"a": 20, "b": 20, "c": 20, "d": 20, "e": 400})


def source_of(directory, videos=VIDEOS, max_frames=1200):
    return Source(directory, videos, max_frames, Report())


def write(path, value):
    path.write_text(json.dumps(value))


def write_benchmarks(directory, validation=("b",), test=("c",)):
    """The sixteen files that say what other benchmarks use; nlq names the videos."""
    for name, key in ego4d_splits.BENCHMARKS.items():
        for suffix, videos in (("val", validation), ("test_unannotated", test)):
            entries = [{"video_uid": video, "split": suffix} for video in videos]
            value = {"version": "1.0", key: entries if name == "nlq" else []}
            write(directory / f"{name}_{suffix}.json", value)


def narration(time, text, group="g1"):
    """As all_narrations_redacted.json has it."""
    return {
        "time": time,
        "text": text,
        "is_summary": False,
        "_clip_time_start": 0,
        "_clip_time_end": 0,
        "annotator": "4130600123644721",
        "_annotation_uid": group,
    }


def narrated(*narrations):
    return {"status": "complete", "narrations": list(narrations), "summaries": []}


def write_narration(directory):
    """`ego4d_narration`: a trains, b validates, c tests."""
    write_benchmarks(directory)
    videos = {
        "a": narrated(
            narration(3.4, "#C C closes the fridge."),
            narration(1.2, "#C C opens the fridge #unsure"),
            narration(2.0, "#O A man X walks around,"),
            narration(5.2, "#C C sings", "g2"),
        ),
        "b": narrated(narration(0.0, "#C C looks around"), narration(0.4, "#C C sits down")),
        "c": narrated(narration(1.0, "#C C stands up")),
    }
    write(directory / "all_narrations_redacted.json", {"_map_errs": [{}], "videos": videos})
    return VIDEOS


def passed(time, text, group="g1"):
    """As narration.json has it."""
    return {
        "timestamp_sec": time,
        "timestamp_frame": round(time * 30),
        "_unmapped_timestamp_sec": time,
        "narration_text": text,
        "annotation_uid": group,
    }


def write_narration_passes(directory):
    """The narrations of `write_narration` in the other layout."""
    write_benchmarks(directory)
    a = [
        passed(3.4, "#C C closes the fridge."),
        passed(1.2, "#C C opens the fridge #unsure"),
        passed(2.0, "#O A man X walks around,"),
    ]
    b = [passed(0.0, "#C C looks around"), passed(0.4, "#C C sits down")]
    value = {
        "a": {
            "narration_pass_1": {"narrations": a, "summaries": []},
            "narration_pass_2": {"narrations": [passed(5.2, "#C C sings", "g2")], "summaries": []},
            "status": "complete",
        },
        "b": {"narration_pass_2": {"narrations": b, "summaries": []}, "status": "complete"},
        "c": {
            "narration_pass_1": {"narrations": [passed(1.0, "#C C stands up")], "summaries": []},
            "status": "complete",
        },
        "d": {"status": "redacted"},
    }
    write(directory / "narration.json", value)
    return VIDEOS


def write_refined(directory):
    """`ego4d_refined_narration`."""
    train = {
        "a": {"g1": [{"time": 1.2, "text": "You open the fridge."}, {"time": 2.0, "text": "Ok."}]},
        "b": {"g9": [{"time": 1.0, "text": "You look around."}]},
    }
    validation = {"b": {"g1": [{"time": 0.0, "text": "You look around."}]}}
    write(directory / "refined_narration_stream_train.json", train)
    write(directory / "refined_narration_stream_val.json", validation)
    return VIDEOS


def said(role, time, content):
    return {"role": role, "content": content, "time": time}


def write_goalstep(directory):
    """`ego4d_goalstep_chat`: a trains, b validates."""
    write_benchmarks(directory)
    dialogues = [
        {
            "video_uid": "a",
            "conversation": [
                said("user", 2.3, "What next?"),
                said("assistant", 2.3, "Cut the onion."),
                said("assistant", 4.1, "Now fry it."),
                said("user", 5.6, "..."),
                said("assistant", 7.0, "Well done."),
            ],
            "duration": 4.7,
        },
        {
            "video_uid": "b",
            "conversation": [said("user", 1.0, "Hello?"), said("assistant", 1.0, "Hello!")],
            "duration": 0.0,
        },
    ]
    write(directory / ego4d_goalstep.FILE, dialogues)
    return VIDEOS


VERBS = ["take_(pick,_grab,_get)", "turn_off", "put_(place,_leave,_drop)"]
NOUNS = ["dough", "pot_(planter)", "nut_(food)"]


def action(index, video="e", clip="clip-1", labels=True, start=None):
    start = 4.0 * index + 0.7 if start is None else start
    entry = {
        "video_uid": video,
        "clip_uid": clip,
        "clip_parent_start_sec": 10.0,
        "clip_parent_end_sec": 190.0,
        "interval_start_sec": 10.0,
        "interval_end_sec": 190.0,
        "action_clip_start_sec": start,
        "action_clip_end_sec": start + 8.0,
        "clip_id": 7,
        "action_idx": index,
    }
    if labels:
        verb, noun = index % 3, index // 3 % 3
        entry |= {"verb": VERBS[verb], "noun": NOUNS[noun], "verb_label": verb, "noun_label": noun}
    return entry


def write_actions(directory, split, actions):
    value = {"version": "v2", "split": split, "clips": actions}
    write(directory / ego4d_lta.FILES[split], value)


def write_lta(directory):
    """`ego4d_lta`: two runs train, one validates, one tests."""
    write(directory / ego4d_lta.TAXONOMY, {"verbs": VERBS, "nouns": NOUNS})
    write_actions(directory, "train", [action(i) for i in reversed(range(29))])
    write_actions(directory, "validation", [action(i, clip="clip-2") for i in range(28)])
    tests = [action(i, clip="clip-3", labels=False) for i in range(28)]
    write_actions(directory, "test", tests)
    return VIDEOS


SOURCES = {
    "ego4d_narration": write_narration,
    "ego4d_refined_narration": write_refined,
    "ego4d_goalstep_chat": write_goalstep,
    "ego4d_lta": write_lta,
}
"""What writes a small source of each dataset into a directory, and gives the videos it is of."""

READ = {
    dataset.name: dataset.read
    for module in (ego4d_narration, ego4d_goalstep, ego4d_lta)
    for dataset in module.DATASETS
}


def read_all(name, source):
    """The records of every split."""
    return {split: list(records) for split, records in READ[name](source).splits.items()}
