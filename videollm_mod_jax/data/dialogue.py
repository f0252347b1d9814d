"""The dialogue of a streaming video: messages, their text, and the characters that are learnt.

The template is that of VideoLLM-online (showlab/videollm-online, models/tokenization_live.py),
which VideoLLM-MoD (arXiv 2408.16730) keeps:

    <bos>You watch a video.\\n
    \\n[<v><v>,<v><v>]
    \\nAssistant: A cat appears.<eos>
    \\n[<v><v>]
    \\nUser: How many?
    \\nAssistant: One.<eos>

with N placeholders `<v>` per frame, `,` after a frame that is followed by silence, and no other
white space than shown. The placeholder only marks where vision goes: see `data/example.py`.

When the dialogue is live, the same text arrives in pieces, each encoded alone:

    opening(system, bos) + STREAM_OPEN      before the first frame
    STREAM_OPEN                             before the first frame after an answer
    INTERVAL                                before every other frame
    ANSWER_PROMPT                           the model breaks its silence: it adds " text<eos>"
    question_prompt(question, stream_open)  a user asks: the model adds " text<eos>"

The opening is one piece with what follows it (before a question: `opening(system, bos) +
question_prompt(question, False)`), because many tokenizers make one token of the two line ends.

`data/tokenizer.py` refuses a tokenizer for which the ids of the pieces differ from the ids of the
whole text.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from videollm_mod_jax.data.annotations import PLACEHOLDER, Record, Turn, ceil_frame, frame_range
from videollm_mod_jax.errors import UserError

STREAM_OPEN = "\n["
INTERVAL = ","
STREAM_CLOSE = "]"
USER = "\nUser: "
ASSISTANT = "\nAssistant:"
ANSWER_PROMPT = STREAM_CLOSE + ASSISTANT


@dataclass(frozen=True)
class System:
    """The instruction that opens a conversation."""

    text: str


@dataclass(frozen=True)
class Stream:
    """`num_frames` consecutive frames; `learn` of the leading ones are learnt (True: all)."""

    num_frames: int
    learn: bool | int = True

    @property
    def learn_frames(self) -> int:
        """How many of the leading frames are learnt, between 0 and `num_frames`."""
        return self.num_frames if self.learn is True else min(int(self.learn), self.num_frames)


@dataclass(frozen=True)
class User:
    """A question or an instruction of the user."""

    text: str


@dataclass(frozen=True)
class Assistant:
    """What the model says; `learn` says whether it is trained to say it."""

    text: str
    learn: bool = True


Message = System | Stream | User | Assistant
Conversation = tuple[Message, ...]


@dataclass(frozen=True)
class Rendered:
    """The text of a conversation and the half-open character ranges of it that are learnt."""

    text: str
    learn_ranges: tuple[tuple[int, int], ...]


def count_frames(conversation: Conversation) -> int:
    """How many frames the streams of a conversation show."""
    return sum(message.num_frames for message in conversation if isinstance(message, Stream))


def opening(system: str, bos: str) -> str:
    """The text before everything else; encode it together with the piece that follows it."""
    return bos + system + "\n"


def question_prompt(question: str, stream_open: bool) -> str:
    """The text that puts a user's question and asks the model to answer.

        question_prompt("How many?", stream_open=True)   ->  "]\\nUser: How many?\\nAssistant:"
        question_prompt("How many?", stream_open=False)  ->   "\\nUser: How many?\\nAssistant:"

    Args:
      question: what the user asks, one line or more.
      stream_open: whether a frame (and not an answer) came last.

    Raises:
      UserError: the question is empty or contains the vision placeholder.
    """
    if not question.strip():
        raise UserError("question: expected a text, found nothing; ask something")
    _refuse_reserved(question, (PLACEHOLDER,), "question")
    return (STREAM_CLOSE if stream_open else "") + USER + question + ASSISTANT


def render(conversation: Conversation, tokens_per_frame: int, bos: str, eos: str) -> Rendered:
    """Writes a conversation as one text and finds what of it is learnt.

    Learnt are, for each learnt frame, the one separator after it (`,` between frames, `]\\n` after
    the last), and for a learnt answer `Assistant: ` + text + eos. With two tokens per frame, `^`
    below the learnt characters (line ends shown as `/`):

        (System("Hi"), Stream(2, learn=1), User("How many?"), Assistant("One."), Stream(1),
         Assistant("So.", learn=False)),  bos "<s>", eos "</s>"

        <s>Hi//[<v><v>,<v><v>]/User: How many?/Assistant: One.</s>/[<v><v>]/Assistant: So.</s>
                      ^                        ^^^^^^^^^^^^^^^^^^^        ^^

    Args:
      conversation: the messages in order.
      tokens_per_frame: N, the number of placeholders that stand for a frame.
      bos: the text of the token that begins a sequence ("" when the tokenizer has none).
      eos: the text of the token that ends an answer.

    Returns:
      The text and its learnt ranges, in order; a stream's `]\\n` is cut at the end of the text.

    Raises:
      UserError: a message contains the placeholder, bos or eos, or a stream has no frames.
    """
    reserved = tuple(token for token in (PLACEHOLDER, bos, eos) if token)
    text, ranges = "", []
    for i, message in enumerate(conversation):
        match message:
            case Stream(num_frames):
                if num_frames < 1:
                    raise UserError(f"message {i}: expected a stream of 1 frame or more, found 0")
                frame = PLACEHOLDER * tokens_per_frame
                start, step = len(text) + len(STREAM_OPEN), len(frame) + len(INTERVAL)
                text += STREAM_OPEN + INTERVAL.join([frame] * num_frames) + STREAM_CLOSE
                for f in range(message.learn_frames):
                    separator = start + f * step + len(frame)
                    width = len(INTERVAL) if f < num_frames - 1 else len(STREAM_CLOSE + "\n")
                    ranges.append((separator, separator + width))
                continue
            case System(content):
                piece = opening(content, bos if not text else "")
            case User(content):
                piece = USER + content
            case Assistant(content, learn):
                piece = f"{ASSISTANT} {content}{eos}"
                if learn:
                    ranges.append((len(text) + len("\n"), len(text) + len(piece)))
        _refuse_reserved(content, reserved, f"message {i}")
        text += piece
    return Rendered(text, tuple((a, min(b, len(text))) for a, b in ranges))


def conversation_of(record: Record, fps: float, system: str) -> Conversation:
    """Lays a record along the frames of its stretch, `annotations.frame_range(record, fps)`.

    What was said before the first frame comes before it, or with it if it is no question; an answer
    follows its question directly only if their times were the same before that. At 2 fps, for
    stretches that begin at 10 s (`|` frame, N narration, Q question, A answer):

        turns   N 11.5           ->   |10.0 |10.5 |11.0 |11.5 N |12.0
                Q 9.75  A 10.0   ->   Q |10.0 A
                Q 10.0  A 10.0   ->   Q A |10.0

    Args:
      record: of a dataset.
      fps: frames per second of the features.
      system: the instruction that opens the conversation.

    Raises:
      UserError: as `conversation_from_turns`, with the name of the record.
    """
    frames = frame_range(record, fps)
    start = frames.start / fps
    return conversation_from_turns(
        record.turns, len(frames), fps / frames.step, system, record.id, start
    )


def conversation_from_turns(
    turns: Sequence[Turn],
    num_frames: int,
    fps: float,
    system: str,
    record: str = "conversation",
    start: float = 0.0,
) -> Conversation:
    """Lays timed turns along the frames of a video, frame i being seen at start + i / fps seconds.

    A question at time q comes before the first frame with time >= q. An answer at the time of the
    question follows it directly; any other answer (a narration) at time t comes after frame
    ceil((t - start) * fps), or the first if that is below 0. Frames before a narration are all
    learnt; of frames before a question, or at the end of the video, the last is not, because
    nothing in them tells that the silence ends. At 2 fps (`|` frame, N narration at 0.5 s, Q and A
    at 1.2 s):

        turns   N 0.5   Q 1.2   A 1.2
        frames  |0.0 |0.5 N |1.0 Q A |1.5 |2.0
                Stream(2, learn=2) N, Stream(1, learn=0) Q A, Stream(2, learn=1)

    Args:
      turns: in order of time.
      num_frames: frames of the video at `fps`.
      fps: frames per second.
      system: the instruction that opens the conversation.
      record: what error messages call this video.
      start: seconds at which the first frame is seen.

    Raises:
      UserError: an unknown role, an empty text, a time that is not a number of seconds, is out of
        order, lies a frame or more before 0 or after the end of the video, or a narration whose
        frame was already narrated.
    """
    if num_frames < 1:
        raise UserError(f"{record}: expected 1 frame or more, found {num_frames}")
    messages: list[Message] = [System(system)]
    shown, asked_at, previous = 0, None, -math.inf
    for i, turn in enumerate(turns):
        text, time = _checked(turn, fps, f"{record}: turn {i}")
        if time < previous:
            raise UserError(
                f"{record}: turn {i}: field 'time': expected at least {previous:g} s, the time of "
                f"the turn before it, found {time:g} s; sort the turns"
            )
        previous = time
        frame = max(0, ceil_frame(time - start, fps))
        asked = turn.role == "user"
        answers = not asked and time == asked_at
        if frame >= num_frames + asked and not answers:
            raise UserError(
                f"{record}: turn {i}: field 'time': after the end of the video: expected at most "
                f"{start + (num_frames - 1 + asked) / fps:g} s ({num_frames} frames at {fps:g} "
                f"fps), found {time:g} s"
            )
        if not asked and not answers and frame < shown:
            raise UserError(
                f"{record}: turn {i}: field 'time': a second narration in the frame at "
                f"{start + (shown - 1) / fps:g} s (found {time:g} s at {fps:g} fps); merge them or "
                "sample more frames per second"
            )
        until = shown if answers else frame if asked else frame + 1
        if until > shown:
            new = until - shown
            messages.append(Stream(new, learn=new - 1 if asked else new))
            shown = until
        messages.append(User(text) if asked else Assistant(text, turn.learn))
        asked_at = time if asked else None
    if shown < num_frames:
        messages.append(Stream(num_frames - shown, learn=num_frames - shown - 1))
    return tuple(messages)


def _checked(turn: Turn, fps: float, where: str) -> tuple[str, float]:
    """The text, stripped, and the time of a turn whose every field is right."""
    if turn.role not in ("user", "assistant"):
        raise UserError(
            f"{where}: field 'role': expected 'user' or 'assistant', found {turn.role!r}"
        )
    if not turn.text.strip():
        raise UserError(f"{where}: field 'text': expected an annotation, found {turn.text!r}")
    if not (math.isfinite(turn.time) and turn.time * fps > -1):
        raise UserError(f"{where}: field 'time': expected seconds >= 0, found {turn.time!r}")
    return turn.text.strip(), turn.time


def _refuse_reserved(text: str, reserved: Sequence[str], where: str) -> None:
    for token in reserved:
        if token in text:
            raise UserError(f"{where}: the text contains the reserved {token!r}; remove it")
