"""The manuals of the five `coin_*` datasets."""

HOME = "https://coin-dataset.github.io (annotations: https://github.com/coin-dataset/annotations)"

_PAGE = """\
# {name}

{what}
One of the five questions about COIN that VideoLLM-online asks. VideoLLM-MoD answers {score}% right.

## Where to get it
{home}.
The licence is for research. The `download_videos.py` of the annotations fetches the videos.

## Files
`COIN.json`, as published:

    {{"database": {{
      "LtRSn-ntcLY": {{                              the YouTube id
        "class": "ReplaceCDDriveWithSSD",           the task
        "subset": "training",                       or "testing"
        "start": 56.64, "end": 85.71,               seconds; the part that shows the task
        "annotation": [                             the steps in order
          {{"id": "212", "segment": [60.0, 69.0], "label": "take out the laptop CD drive"}},
          {{"id": "216", "segment": [71.0, 82.0], "label": "insert the hard disk tray ..."}}],
        "duration": 131.03, "video_url": "...", "recipe_type": 131}},
      ...}}}}

A video is found in the features by its YouTube id, whatever folder it was encoded from. COIN has
11,827 videos of 180 tasks, 9,030 of them for training and 2,797 for testing. Many have left YouTube
(19% of a sample in 2026), so give the number of records with every accuracy.

## Records
Splits: `train`, `test`.

{records}

    User: {question}
    [the frames of the clip]
    Assistant: {answer}

The first and the last frame are those at or after the beginning and the end of the clip. All
silence is learnt. Names begin with a capital and end with a full stop; the rest is in lower case,
acronyms too, as upstream writes them. A clip of more than `max_frames` frames is shown with a
stride.

The target is `{{"labels": [...]}}`: what the answer says, in order. The labels of the dataset are
those of the whole file, whatever is encoded, in alphabetical order.

## Dropped
One annotation is one {unit}.
- "unknown video", "ambiguous video", "no frames": what the features lack.
- "unknown subset", "duplicate id": an entry that is in neither split, or comes a second time.
- "unordered times": a clip that ends before it begins.
- "outside the video": a clip that begins after the features end. Upstream shows their last frame.
{dropped}- Fields that are missing, mistyped, empty, too long, or hold `<v>` or half of a surrogate
  pair.

## Why others got 10% instead of 63%
Users of the code of VideoLLM-online (showlab/videollm-online) got 10.3 for steps, 12.9 for next
steps, 0.7 for tasks, 18.0 and 19.4 for procedures (its issue 41; issue 26 is alike). Which cause it
was is confirmed nowhere that we found. What the issues and the code show:
- The model had not converged: so the author in issue 26, who advises a lower learning rate or more
  epochs until the training loss is in the hundredths. 0.7% of 180 tasks is what guessing gives. No
  dataset can prevent that; look at the training loss first.
- The released checkpoint never saw COIN. Evaluated as it is, it names 5% of the tasks (notes in
  S4AI-CornellTech/videollm-online, on 40 videos).
- At first, the padding of gathered answers was decoded as token 0, "!" in Llama 3, and compared
  with the labels as a part of the answer, and answers were paired with samples by their order of
  arrival (comments in `compute_metrics` of data/coin/benchmarks.py, where it is corrected; issue 41
  has the percentages of that later version). Here every record carries the labels of its answer.
- The labels were those of the videos that happened to be encoded, so that the accuracy was one
  among fewer classes, and videos without features went missing in silence. Here the labels are
  those of the whole file, and what is missing is counted.
"""

_STEPS = (
    '- "no next step": the last step of a video, which nothing follows.\n'
    '- "unusable next step": a step of the answer was dropped.\n'
    '- "unordered steps": a next step that begins earlier. Upstream asks nevertheless.\n'
)
_PROCEDURE = (
    "One per step that another follows; the answer lists the next ones, five at most, on numbered\n"
    "lines. When there is one, it has no number, and the question asks for the next action."
)
_LIST = "1. Jack up the car.\n    2. Remove the tire."


def _page(**texts: str) -> str:
    return _PAGE.format(home=HOME, **texts)


STEP = _page(
    name="coin_step",
    what="Which step a clip shows.",
    score="63.4",
    records="One per step.",
    question="What is the action in the video? Format your answer concisely. No extra text output.",
    answer="Take out the laptop cd drive.",
    unit="step",
    dropped="",
)

NEXT = _page(
    name="coin_next",
    what="Which step comes after the one that a clip shows.",
    score="49.7",
    records="One per step that another follows.",
    question=(
        "What is the next action for the video? Format your answer concisely. No extra text\n"
        "    output."
    ),
    answer="Take out the laptop cd drive.",
    unit="step",
    dropped=_STEPS,
)

TASK = _page(
    name="coin_task",
    what="Which of the 180 tasks a video is about.",
    score="92.8",
    records="One per video, about the part from `start` to `end`.",
    question=(
        "What is the overall activity in the video? Format your answer concisely. No extra text\n"
        "    output."
    ),
    answer="Replace cd drive with ssd.",
    unit="video",
    dropped="",
)

PROCEDURE = _page(
    name="coin_procedure",
    what="Which steps, up to five, come after the one that a clip shows.",
    score="49.8",
    records=_PROCEDURE,
    question=(
        "What is the next 2 actions for the video? Format your answer concisely, listing each\n"
        "    action on a new line with a number prefix. No extra text output."
    ),
    answer=_LIST,
    unit="step",
    dropped=_STEPS,
)

PROCEDURE_GOAL = _page(
    name="coin_procedure_goal",
    what="Which steps, up to five, come after the one that a clip shows, when the task is told.",
    score="53.3",
    records=_PROCEDURE,
    question=(
        "To change car tire, what is the next 2 actions for the video? Format your answer\n"
        "    concisely, listing each action on a new line with a number prefix. No extra text\n"
        "    output."
    ),
    answer=_LIST,
    unit="step",
    dropped=_STEPS,
)
