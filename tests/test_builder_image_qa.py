"""`image_qa_gqa`, `image_qa_scienceqa`, `image_qa_pope`, `image_qa_mme`: questions about images."""

import json

import pytest

from tests import tiny_qa
from videollm_mod_jax.data.annotations import frame_range
from videollm_mod_jax.errors import UserError


def parse(name, directory, frames):
    report, splits = tiny_qa.parse(f"image_qa_{name}", directory, frames)
    return report, splits


def test_gqa_asks_for_a_word_and_takes_the_image_of_its_own_folder(tmp_path):
    report, splits = parse("gqa", tmp_path, tiny_qa.write_gqa(tmp_path))
    assert (report.kept, report.dropped) == (2, {})
    assert [(r.id, r.video) for r in splits["test"]] == [
        ("201307251", "gqa/images/n161313"),
        ("201640614", "gqa/images/235859"),
    ]
    assert tiny_qa.rendered(splits["test"][0]) == (
        "<s>Watch.\n\n[<v>]"
        "\nUser: Is it overcast?\nAnswer the question using a single word or phrase."
        "\nAssistant: no</s>",
        ["Assistant: no</s>"],
    )
    assert list(frame_range(splits["test"][0], tiny_qa.FPS)) == [0]


def test_gqa_counts_a_question_whose_id_is_damaged(tmp_path):
    frames = tiny_qa.write_gqa(tmp_path)
    question = {"question": "Is it overcast?", "imageId": "n161313", "answer": "no"}
    path = tmp_path / "testdev_balanced_questions.json"
    tiny_qa.write_json(path, {"\ud800": question, "1": question})
    report, splits = parse("gqa", tmp_path, frames)
    assert [r.id for r in splits["test"]] == ["1"]
    assert (report.kept, report.dropped) == (1, {"not Unicode": 1})


def test_scienceqa_puts_the_prompt_of_llava_and_keeps_problems_with_images(tmp_path):
    report, splits = parse("scienceqa", tmp_path, tiny_qa.write_scienceqa(tmp_path))
    assert {split: [r.id for r in records] for split, records in splits.items()} == {
        "train": ["train/1"],
        "validation": [],
        "test": ["test/4"],
    }
    assert (report.kept, report.dropped) == (2, {"no image": 1})
    assert report.examples["no image"] == ["problems.json: '5': the problem has none"]
    assert tiny_qa.rendered(splits["train"][0])[0] == (
        "<s>Watch.\n\n[<v>]"
        "\nUser: Context: N/A"
        "\nQuestion: Which of these states is farthest north?"
        "\nOptions: (A) West Virginia (B) Louisiana (C) Arizona (D) Oklahoma"
        "\nAnswer with the option's letter from the given choices directly."
        "\nAssistant: A</s>"
    )
    assert splits["train"][0].target == {
        "options": ["West Virginia", "Louisiana", "Arizona", "Oklahoma"],
        "subject": "social science",
    }


def test_scienceqa_shortens_double_spaces_as_the_script_of_llava_does(tmp_path):
    _, splits = parse("scienceqa", tmp_path, tiny_qa.write_scienceqa(tmp_path))
    assert splits["test"][0].turns[0].text == (
        "Context: Two magnets.\nQuestion: Which is true?\nOptions: (A) this one (B) that one"
        "\nAnswer with the option's letter from the given choices directly."
    )
    assert splits["test"][0].turns[1].text == "B"


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ({"answer": 4}, "unknown answer"),
        ({"answer": -1}, "unknown answer"),
        ({"answer": "0"}, "wrong type"),
        ({"choices": ["one"]}, "bad choices"),
        ({"choices": list("abcdef")}, "bad choices"),
        ({"choices": ["one", ""]}, "bad choices"),
        ({"choices": ["one", 2]}, "bad choices"),
        ({"choices": ["one", "<v>"]}, "reserved text"),
        ({"choices": ["one", "\udfff"]}, "not Unicode"),
        ({"hint": None}, "wrong type"),
        ({"hint": "<v>"}, "reserved text"),
        ({"question": "\n"}, "empty text"),
        ({"image": 3}, "wrong type"),
        ({"image": "other.png"}, "unknown video"),
    ],
)
def test_a_damaged_problem_is_dropped_and_the_others_are_kept(tmp_path, damage, reason):
    frames = tiny_qa.write_scienceqa(tmp_path)
    good = tiny_qa.SCIENCEQA_PROBLEM
    tiny_qa.write_json(tmp_path / "problems.json", {"1": good, "4": good | damage})
    tiny_qa.write_json(
        tmp_path / "pid_splits.json", {"train": ["1", "1", "9", ["1"]], "val": [], "test": ["4"]}
    )
    report, splits = parse("scienceqa", tmp_path, frames)
    assert [r.id for records in splits.values() for r in records] == ["train/1"]
    assert (report.kept, report.dropped) == (
        1,
        {"duplicate id": 1, "unknown problem": 2, reason: 1},
    )


def test_scienceqa_without_a_split_says_so(tmp_path):
    tiny_qa.write_scienceqa(tmp_path)
    tiny_qa.write_json(tmp_path / "pid_splits.json", {"train": [], "test": []})
    with pytest.raises(UserError, match=r"pid_splits\.json: field 'val': expected a list"):
        parse("scienceqa", tmp_path, {})


@pytest.mark.parametrize("file", ["problems.json", "pid_splits.json"])
def test_scienceqa_refuses_names_that_come_twice(tmp_path, file):
    frames = tiny_qa.write_scienceqa(tmp_path)
    text = (tmp_path / file).read_text()
    name = next(iter(json.loads(text)))
    (tmp_path / file).write_text(f'{text[:-1]}, "{name}": []}}')
    with pytest.raises(UserError, match=rf"{file}: the name '{name}' comes twice"):
        parse("scienceqa", tmp_path, frames)


def test_pope_reads_one_object_per_line_of_each_split(tmp_path):
    report, splits = parse("pope", tmp_path, tiny_qa.write_pope(tmp_path))
    assert (report.kept, report.dropped) == (2, {})
    assert [(r.id, r.turns[1].text, r.target) for r in splits["test"]] == [
        ("random/1", "yes", {"split": "random"}),
        ("adversarial/1", "no", {"split": "adversarial"}),
    ]
    assert tiny_qa.rendered(splits["test"][0]) == (
        "<s>Watch.\n\n[<v>]"
        "\nUser: Is there a snowboard in the image?"
        "\nAnswer the question using a single word or phrase."
        "\nAssistant: yes</s>",
        ["Assistant: yes</s>"],
    )


QUESTION = {
    "question_id": 2,
    "image": "COCO_val2014_000000310196.jpg",
    "text": "Is there a dog in the image?",
    "label": "no",
}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"question_id": 2, "ima', "not json"),
        ("[" * 100_000, "not json"),
        (json.dumps(QUESTION)[:-1] + ', "label": "yes"}', "not json"),
        ("7", "not an object"),
        (json.dumps(QUESTION | {"label": "maybe"}), "unknown label"),
        (json.dumps(QUESTION | {"question_id": 1}), "duplicate id"),
        (json.dumps(QUESTION | {"image": "COCO_val2014_000000000001.jpg"}), "unknown video"),
        (json.dumps(QUESTION | {"question_id": float("nan")}), "wrong type"),
    ],
)
def test_a_damaged_line_is_dropped_and_the_others_are_kept(tmp_path, line, reason):
    frames = tiny_qa.write_pope(tmp_path)
    path = tmp_path / "coco_pope_random.json"
    tiny_qa.write_lines(path, [path.read_text().strip(), "", line, json.dumps(QUESTION)])
    report, splits = parse("pope", tmp_path, frames)
    assert [r.id for r in splits["test"]] == ["random/1", "random/2", "adversarial/1"]
    assert (report.kept, report.dropped) == (3, {reason: 1})
    assert report.examples[reason][0].startswith("coco_pope_random.json: line 3")


def test_pope_names_a_file_that_is_not_text(tmp_path):
    frames = tiny_qa.write_pope(tmp_path)
    (tmp_path / "coco_pope_random.json").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"coco_pope_random\.json cannot be read: it is not UTF-8"):
        parse("pope", tmp_path, frames)


def test_mme_finds_images_beside_the_questions_or_in_their_own_folder(tmp_path):
    report, splits = parse("mme", tmp_path, tiny_qa.write_mme(tmp_path))
    assert (report.kept, report.dropped) == (4, {})
    assert [(r.id, r.video, r.turns[1].text, r.target) for r in splits["test"][1:3]] == [
        (
            "existence/000000006040/2",
            "existence/000000006040",
            "No",
            {"task": "existence", "image": "000000006040"},
        ),
        (
            "artwork/14777/1",
            "artwork/images/14777",
            "Yes",
            {"task": "artwork", "image": "14777"},
        ),
    ]


def test_mme_puts_the_instruction_of_llava_in_place_of_its_own(tmp_path):
    _, splits = parse("mme", tmp_path, tiny_qa.write_mme(tmp_path))
    assert tiny_qa.rendered(splits["test"][2]) == (
        "<s>Watch.\n\n[<v>]"
        "\nUser: Is this artwork titled eve?"
        "\nAnswer the question using a single word or phrase."
        "\nAssistant: Yes</s>",
        ["Assistant: Yes</s>"],
    )


@pytest.mark.parametrize(
    ("lines", "dropped"),
    [
        (["Is it? Please answer yes or no.\tYes"], {"unpaired question": 1}),
        (["Is it?\tYes", "Is it not?\tperhaps"], {"bad line": 1, "unpaired question": 1}),
        (["Is it?\tYes", "Is it not? No"], {"bad line": 1, "unpaired question": 1}),
        (["Is it?\tYes", "Please answer yes or no.\tNo"], {"bad line": 1, "unpaired question": 1}),
        (["a?\tYes", "b?\tNo", "c?\tNo"], {"unpaired question": 3}),
    ],
)
def test_the_questions_of_an_image_are_kept_only_as_a_pair(tmp_path, lines, dropped):
    frames = tiny_qa.write_mme(tmp_path)
    tiny_qa.write_lines(tmp_path / "existence" / "000000006040.txt", lines)
    report, splits = parse("mme", tmp_path, frames)
    assert [r.target["task"] for r in splits["test"]] == ["artwork", "artwork"]
    assert (report.kept, report.dropped) == (2, dropped)
    assert report.examples["unpaired question"][0].startswith("existence: 000000006040.txt: line 1")
