"""MME's scores equal cases worked by hand."""

import pytest

from videollm_mod_jax.evaluation.mme import (
    COGNITION,
    PERCEPTION,
    MmeAnswer,
    MmeTask,
    mme_scores,
    yes_no_or_other,
)


def image(task, name, marks, truths=("yes", "no")):
    """The two answers about an image: "r" right, "w" wrong, "o" neither yes nor no."""
    opposite = {"yes": "no", "no": "yes"}
    return [
        MmeAnswer(
            task=task,
            image=name,
            truth=truth,
            prediction={"r": truth, "w": opposite[truth], "o": "other"}[mark],
        )
        for mark, truth in zip(marks, truths, strict=True)
    ]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        # The drawn ones.
        ("Yes.", "yes"),
        ("No, it is.", "no"),
        ("not sure", "no"),
        ("It is a dog", "other"),
        ("YES", "yes"),
        (" \nno", "no"),
        ("yesno", "yes"),
        ("I say no", "other"),
        ("", "other"),
    ],
)
def test_what_an_answer_says(text, says):
    assert yes_no_or_other(text) == says


def test_drawn_score():
    scores = mme_scores(image("count", "1.jpg", "rr") + image("count", "2.jpg", "rw"))
    assert scores.tasks == {"count": MmeTask(accuracy=0.75, accuracy_plus=0.5, other=0.0)}
    assert scores.tasks["count"].score == 125
    assert scores.perception is None
    assert scores.cognition is None


def test_neither_yes_nor_no_is_wrong_and_counted():
    task = mme_scores(image("OCR", "1", "ro") + image("OCR", "2", "oo")).tasks["OCR"]
    assert task == MmeTask(accuracy=0.25, accuracy_plus=0.0, other=0.75)


def test_an_image_is_of_its_task_and_its_questions_need_not_be_neighbours():
    first, second = image("scene", "1", "rr"), image("scene", "2", "ww")
    mixed = [first[0], second[0], first[1], second[1], *image("color", "1", "rr")]
    scores = mme_scores(mixed)
    assert scores.tasks["scene"].accuracy_plus == 0.5
    assert scores.tasks["color"].score == 200


def test_totals():
    answers = [a for task in PERCEPTION for a in image(task, "1", "rr")]
    answers += [a for task in COGNITION[:-1] for a in image(task, "1", "rr")]
    scores = mme_scores(answers)
    assert scores.perception == 2000
    assert scores.cognition is None
    scores = mme_scores(answers + image(COGNITION[-1], "1", "rw"))
    assert scores.cognition == 650
    assert tuple(scores.tasks) == PERCEPTION + COGNITION


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="dogs/1: unknown task"):
        mme_scores(image("dogs", "1", "rr"))
    with pytest.raises(ValueError, match="count/1: 1 questions; expected 2"):
        mme_scores(image("count", "1", "rr")[:1])
    with pytest.raises(ValueError, match="count/1: 4 questions; expected 2"):
        mme_scores(image("count", "1", "rr") * 2)
    with pytest.raises(ValueError, match="prediction 'Yes'; expected"):
        mme_scores([MmeAnswer(task="count", image="1", truth="yes", prediction="Yes")])
    with pytest.raises(ValueError, match="truth 'other', prediction 'yes'"):
        mme_scores([MmeAnswer(task="count", image="1", truth="other", prediction="yes")])
    with pytest.raises(ValueError, match="without answers"):
        mme_scores([])
