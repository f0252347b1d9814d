"""A conversation as it happens live: what is shown, who asks when, and what should be said."""

from dataclasses import dataclass

from videollm_mod_jax.data import dialogue


@dataclass(frozen=True)
class Question:
    """What a user asks.

    Attributes:
      before: index of the frame that comes next; the number of frames behind the last one.
      text: of the question.
      reference: the true answer, None where there is none.
    """

    before: int
    text: str
    reference: str | None


@dataclass(frozen=True)
class Script:
    """A conversation as it happens live.

    Attributes:
      frames: how many are shown.
      questions: in order.
      narrations: (index of the frame after which it is said, text), in order.
    """

    frames: int
    questions: tuple[Question, ...]
    narrations: tuple[tuple[int, str], ...]


def script_of(conversation: dialogue.Conversation) -> Script:
    """Who speaks when.

    ```
    frame                 0 1 2 3 4 5
    Stream(2) Assistant   | |a                   narration (1, a)
    Stream(3) User             | | |q            question before frame 5
              Assistant              A           its reference
    Stream(1)                          |         frames 6
    ```
    """
    shown, questions, narrations = 0, [], []
    for i, message in enumerate(conversation):
        match message:
            case dialogue.Stream(num_frames):
                shown += num_frames
            case dialogue.User(text):
                follows = conversation[i + 1 : i + 2]
                answers = [m.text for m in follows if isinstance(m, dialogue.Assistant)]
                questions.append(Question(shown, text, answers[0] if answers else None))
            case dialogue.Assistant(text) if not isinstance(conversation[i - 1], dialogue.User):
                narrations.append((shown - 1, text))
    return Script(shown, tuple(questions), tuple(narrations))
