"""Small sources of the question answering datasets, in the layouts in which they are published."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from videollm_mod_jax.data import dialogue
from videollm_mod_jax.data.annotations import Record, Report, Source, Videos
from videollm_mod_jax.data.builders import image_qa, llava_instruct, video_qa, videomme

DATASETS = {
    dataset.name: dataset
    for module in (llava_instruct, video_qa, videomme, image_qa)
    for dataset in module.DATASETS
}
FPS = 2.0


def parse(
    name: str, directory: Path, frames: Mapping[str, int], max_frames: int = 4
) -> tuple[Report, dict[str, list[Record]]]:
    """The report and the records of a source whose videos have these numbers of frames."""
    report = Report()
    parsed = DATASETS[name].read(Source(directory, Videos(FPS, frames), max_frames, report))
    return report, {split: list(records) for split, records in parsed.splits.items()}


def rendered(record: Record) -> tuple[str, list[str]]:
    """The text of a record with one token per frame, and what of it is learnt."""
    conversation = dialogue.conversation_of(record, FPS, "Watch.")
    whole = dialogue.render(conversation, 1, "<s>", "</s>")
    return whole.text, [whole.text[start:stop] for start, stop in whole.learn_ranges]


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def write_lines(path: Path, rows: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")


def said(*texts: str) -> list[dict[str, str]]:
    """A conversation of LLaVA's layout."""
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


LLAVA_SAMPLES = [
    {
        "id": "000000033471",
        "image": "coco/train2017/000000033471.jpg",
        "conversations": said(
            "<image>\nWhat are the colors of the bus?",
            "The bus is white and red.",
            "What feature can be seen on the back?",
            "An advertisement.",
        ),
    },
    {
        "id": "000000033471",
        "video": "academic_source/Charades/RW587.mp4",
        "conversations": said("What happens?\n<image>", "A man cooks."),
    },
    {"id": "i6IyJda_0", "model": "", "conversations": said("How to tell?", "In 3 points.")},
]


def write_llava_instruct(directory: Path) -> dict[str, int]:
    write_json(directory / "llava_v1_5_mix665k.json", LLAVA_SAMPLES)
    write_json(
        directory / "VideoInstruct100K.json",
        [{"q": "What is he doing?", "a": "He skis.", "video_id": "v_k_ZXmr8pmrs"}],
    )
    return {
        "coco/train2017/000000033471": 1,
        "academic_source/Charades/RW587": 10,
        "v_k_ZXmr8pmrs": 2,
    }


MSVD_QUESTION = {
    "id": 37348,
    "video_id": 1301,
    "question": "what is a man doing?",
    "answer": "cook",
}


def write_msvd(directory: Path) -> dict[str, int]:
    write_json(directory / "test_qa.json", [MSVD_QUESTION])
    write_json(
        directory / "train_qa.json",
        [{"id": 0, "video_id": 1, "question": "who pours liquid?", "answer": "someone"}],
    )
    write_lines(directory / "youtube_mapping.txt", ["-4wsuPCjDBc_5_15 vid1", "x1_0_3 vid1301"])
    return {"YouTubeClips/-4wsuPCjDBc_5_15": 3, "YouTubeClips/x1_0_3": 4}


def write_msrvtt(directory: Path) -> dict[str, int]:
    question = {"id": 158581, "video_id": 6513, "question": "what is cooked?", "answer": "fish"}
    write_json(directory / "val_qa.json", [question | {"category_id": 14}])
    write_json(
        directory / "test_q.json",
        [{"video_name": "video7010", "question": "what is a person doing?", "question_id": "0"}],
    )
    write_json(directory / "test_a.json", [{"answer": "talk", "question_id": "0"}])
    return {"video6513": 5, "video7010": 2}


def write_activitynet(directory: Path) -> dict[str, int]:
    questions, answers = [], []
    for number, (asked, answer, kind) in enumerate(
        [("is the athlete wearing trousers", "yes", 3), ("does the athlete jump", "no", 0)], 1
    ):
        identity = f"v_1QIUV7WYKXg_{number}"
        questions.append({"video_name": "1QIUV7WYKXg", "question": asked, "question_id": identity})
        answers.append({"answer": answer, "type": kind, "question_id": identity})
    write_json(directory / "test_q.json", questions)
    # The pairs go by question_id, not by place.
    write_json(directory / "test_a.json", answers[::-1])
    return {"v_1QIUV7WYKXg": 9}


VIDEOMME_ROWS = [
    {
        "video_id": "001",
        "duration": "short",
        "domain": "Knowledge",
        "sub_category": "Humanity & History",
        "url": "https://www.youtube.com/watch?v=fFjv93ACGo8",
        "videoID": "fFjv93ACGo8",
        "question_id": "001-1",
        "task_type": "Counting Problem",
        "question": "How many red socks are above the fireplace?",
        "options": ["A. 1.", "B. 4.", "C. 2.", "D. 3."],
        "answer": "D",
    },
    {
        "video_id": "601",
        "duration": "long",
        "domain": "Multilingual",
        "sub_category": "Multilingual",
        "url": "https://www.youtube.com/watch?v=N1cdUjctp-8",
        "videoID": "N1cdUjctp-8",
        "question_id": "601-1",
        "task_type": "Action Reasoning",
        "question": "What comes last?",
        "options": ["A. A song.", "B. A dance.", "C. A speech.", "D. Nothing."],
        "answer": "A",
    },
]
VIDEOMME_FRAMES = {"data/fFjv93ACGo8": 3, "data/N1cdUjctp-8": 7200}


def write_videomme(directory: Path) -> dict[str, int]:
    directory.mkdir(parents=True, exist_ok=True)
    table = pyarrow.Table.from_pylist(VIDEOMME_ROWS)
    parquet.write_table(table, directory / "test-00000-of-00001.parquet")
    return VIDEOMME_FRAMES


def write_videomme_json(directory: Path) -> dict[str, int]:
    write_json(directory / "videomme.json", VIDEOMME_ROWS)
    return VIDEOMME_FRAMES


def write_videomme_by_video(directory: Path) -> dict[str, int]:
    write_json(
        directory / "videomme.json",
        [
            {
                "video_id": row["video_id"],
                "duration_category": row["duration"],
                "video_category": row["domain"],
                ("video_subcategory", "video_sub_category")[i]: row["sub_category"],
                "url": row["url"],
                "questions": [
                    {
                        "question_id": row["question_id"],
                        "task_type": row["task_type"],
                        "question": row["question"],
                        "choices": row["options"],
                        "answer": row["answer"],
                    }
                ],
            }
            for i, row in enumerate(VIDEOMME_ROWS)
        ],
    )
    return VIDEOMME_FRAMES


def write_gqa(directory: Path) -> dict[str, int]:
    write_json(
        directory / "testdev_balanced_questions.json",
        {
            "201307251": {
                "question": "Is it overcast?",
                "imageId": "n161313",
                "answer": "no",
                "isBalanced": True,
                "types": {"detailed": "weatherVerify", "semantic": "global"},
            },
            "201640614": {
                "question": "Who is wearing the dress?",
                "imageId": "235859",
                "answer": "woman",
            },
        },
    )
    return {"gqa/images/n161313": 1, "gqa/images/235859": 1, "vg/VG_100K/235859": 1}


SCIENCEQA_PROBLEM = {
    "question": "Which of these states is farthest north?",
    "choices": ["West Virginia", "Louisiana", "Arizona", "Oklahoma"],
    "answer": 0,
    "hint": "",
    "image": "image.png",
    "task": "closed choice",
    "grade": "grade2",
    "subject": "social science",
    "topic": "geography",
    "category": "Geography",
    "skill": "Read a map: cardinal directions",
    "lecture": "Maps have four cardinal directions.",
    "solution": "",
    "split": "train",
}


def write_scienceqa(directory: Path) -> dict[str, int]:
    write_json(
        directory / "problems.json",
        {
            "1": SCIENCEQA_PROBLEM,
            "4": SCIENCEQA_PROBLEM
            | {
                "question": "Which  is true?",
                "choices": ["this one", "that one"],
                "answer": 1,
                "hint": "Two magnets. ",
                "subject": "natural science",
            },
            "5": SCIENCEQA_PROBLEM | {"image": None},
        },
    )
    write_json(
        directory / "pid_splits.json",
        {"train": ["1"], "val": [], "test": ["4", "5"], "minitest": ["4"]},
    )
    return {"images/train/1/image": 1, "images/test/4/image": 1}


def write_pope(directory: Path) -> dict[str, int]:
    for split, label in (("random", "yes"), ("adversarial", "no")):
        question = {
            "question_id": 1,
            "image": "COCO_val2014_000000310196.jpg",
            "text": "Is there a snowboard in the image?",
            "label": label,
        }
        write_lines(directory / f"coco_pope_{split}.json", [json.dumps(question)])
    return {"val2014/COCO_val2014_000000310196": 1}


def write_mme(directory: Path) -> dict[str, int]:
    write_lines(
        directory / "existence" / "000000006040.txt",
        [
            "Is there a pottedplant in this image? Please answer yes or no.\tYes",
            "Is there a zebra in this image? Please answer yes or no.\tNo",
        ],
    )
    write_lines(
        directory / "artwork" / "questions_answers_YN" / "14777.txt",
        [
            "Is this artwork titled eve?  Please answer yes or no.\tYes",
            "Is this artwork titled adam?  Please answer yes or no.\tNo",
        ],
    )
    return {"existence/000000006040": 1, "artwork/images/14777": 1}


# Each writes a small valid source into a directory and gives the frames of its videos.
WRITERS: dict[str, Callable[[Path], dict[str, int]]] = {
    "llava_instruct": write_llava_instruct,
    "video_qa_msvd": write_msvd,
    "video_qa_msrvtt": write_msrvtt,
    "video_qa_activitynet": write_activitynet,
    "videomme": write_videomme,
    "image_qa_gqa": write_gqa,
    "image_qa_scienceqa": write_scienceqa,
    "image_qa_pope": write_pope,
    "image_qa_mme": write_mme,
}
