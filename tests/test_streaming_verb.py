"""`stream` narrates a file from one directory, and refuses bad input with one line."""

import re
import shutil

import numpy as np
import pytest

from tests import tiny_stream
from tests.ended import status_of
from videollm_mod_jax import stream
from videollm_mod_jax.data.times import parse_time
from videollm_mod_jax.data.video import Frame, read_video, write_video
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.streaming.narrate import Caption, draw_narration
from videollm_mod_jax.streaming.session import Answer
from videollm_mod_jax.training.checkpoint import save_model

SECONDS = 3


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A checkpoint and a video of three seconds."""
    directory = tmp_path_factory.mktemp("run")
    model = tiny_stream.loaded_model(silence=0.2)
    save_model(directory / "model", model.config, model.variables, model.tokenizer, model.system)
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (SECONDS * 4, 18, 24, 3), dtype=np.uint8)
    write_video(directory / "clip.mp4", frames, fps=4)
    return directory


def command(run, *more):
    return [
        *("--checkpoint", str(run / "model"), "--video", str(run / "clip.mp4")),
        *("--max-frames", "6", "--max-text-tokens", "256", "--max-new-tokens", "12"),
        *more,
    ]


def test_narrates_answers_and_reports(run, tmp_path, capsys):
    out = tmp_path / "narrated.mp4"
    status = stream.main(
        command(run, "--ask", "1.2: How many?", "--ask", "2.9: And now?", "--out", str(out))
    )
    printed = capsys.readouterr()
    assert status == 0, printed.err
    lines = printed.out.splitlines()
    asked = [i for i, line in enumerate(lines) if "User:" in line]
    assert [lines[i].split() for i in asked] == [
        ["1.2", "s", "User:", "How", "many?"],
        ["2.9", "s", "User:", "And", "now?"],
    ]
    assert all(re.match(r" +(1\.2|2\.9) s", lines[i + 1]) for i in asked)
    assert "6 frames at" in printed.out
    for part in ("decode", "encode", "prefill", "generate", "total"):
        assert re.search(rf"^  {part} +[\d.]+ +[\d.]+", printed.out, re.MULTILINE), part
    assert re.search(r"cache: [\d,]+ bytes per frame", printed.out)
    frames = list(read_video(out, fps=2))
    assert [frame.time for frame in frames] == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]
    assert frames[0].image.shape[1] >= 384
    assert list(tmp_path.iterdir()) == [out]


def test_streams_a_model_of_8_bit_weights(run, monkeypatch):
    seen = []
    monkeypatch.setattr(stream, "StreamingSession", lambda model, **_: seen.append(model) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        stream.main(command(run, "--int8"))
    assert seen[0].variables["params"]["lm_head"]["kernel"].qvalue.dtype == np.int8
    monkeypatch.undo()
    assert stream.main(command(run, "--int8")) == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--ask", "9: Late?"], "the question at 9 s comes after the end of the video"),
        (["--ask", "How many?"], 'expected "SECONDS: QUESTION"'),
        (["--ask", "-1: How many?"], 'expected "SECONDS: QUESTION"'),
        (["--ask", "1:"], 'expected "SECONDS: QUESTION"'),
        (["--fps", "0"], "--fps is '0'; expected"),
        (["--video", "missing.mp4"], "missing.mp4"),
        (["--checkpoint", "nowhere"], "nowhere"),
        (["--silence-threshold", "3"], "--silence-threshold is '3'; expected a number in [0, 1]"),
        (["--out", "narrated.gif"], "--out is narrated.gif; expected a file that ends in .mp4,"),
        (["--show-routing", "x.webm"], "--show-routing is x.webm; expected a file that ends in"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(run, tmp_path, capsys, more, message):
    out = tmp_path / "narrated.mp4"
    assert status_of(stream.main, command(run, "--out", str(out), *more)) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert not printed.out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["the same", "a link", "a hard link"])
def test_the_video_that_is_read_is_not_written_over(run, tmp_path, capsys, kind):
    clip, out = tmp_path / "clip.mp4", tmp_path / "out.mp4"
    shutil.copy(run / "clip.mp4", clip)
    if kind == "the same":
        out = clip
    elif kind == "a link":
        out.symlink_to(clip)
    else:
        out.hardlink_to(clip)
    status = stream.main(command(run, "--video", str(clip), "--out", str(out)))
    assert status == 2
    assert f"--out is {out}, which is the video that is read" in capsys.readouterr().err
    assert clip.read_bytes() == (run / "clip.mp4").read_bytes()
    other = tmp_path / "other.mp4"
    both = command(run, "--out", str(other), "--show-routing", str(other))
    assert stream.main(both) == 2
    assert f"--show-routing is {other}, which is --out as well" in capsys.readouterr().err
    assert not other.exists()


def test_a_wrong_file_is_refused_before_a_model_is_loaded(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(stream, "load_model", lambda *_, **__: 1 / 0)
    (tmp_path / "text.mp4").write_text("no video")
    for video in ("missing.mp4", str(tmp_path), str(tmp_path / "text.mp4")):
        assert stream.main(command(run, "--video", video)) == 2
        assert capsys.readouterr().err.startswith(f"error: {video}: cannot read the video: ")


def test_what_was_narrated_before_the_context_was_full_is_kept(run, tmp_path, capsys):
    out = tmp_path / "narrated.mp4"
    assert stream.main(command(run, "--fps", "8", "--out", str(out))) == 2
    printed = capsys.readouterr()
    assert "max_frames = 6" in printed.err
    # The seventh frame, at 0.75 s, is the first that has no room.
    assert printed.out.splitlines()[-1] == f"wrote {out}, up to 0.6 s"
    assert [frame.time for frame in read_video(out, fps=8)] == [k / 8 for k in range(6)]
    assert list(tmp_path.iterdir()) == [out]


def test_what_was_narrated_before_an_interruption_is_kept(run, tmp_path, capsys, monkeypatch):
    seen = []

    def interrupted(image, time, said):
        seen.append(time)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return draw_narration(image, time, said)

    monkeypatch.setattr(stream, "draw_narration", interrupted)
    out = tmp_path / "narrated.mp4"
    assert stream.main(command(run, "--out", str(out))) == 130
    assert f"wrote {out}, up to 1.0 s" in capsys.readouterr().out
    assert [frame.time for frame in read_video(out, fps=2)] == [0.0, 0.5, 1.0]


def test_a_question_behind_the_last_frame_keeps_it():
    narrated = stream.narrate(
        FakeSession(),
        [Frame(time, None) for time in (0.0, 0.5)],
        [stream.parse_question("9: Late?")],
        2.0,
        lambda caption: None,
        [],
    )
    assert [next(narrated)[0].time for _ in range(2)] == [0.0, 0.5]
    with pytest.raises(UserError, match="the question at 9 s comes after the end"):
        next(narrated)


def test_the_drawn_times_and_questions():
    for text, seconds in (
        ("12.5", 12.5), ("0:03", 3), ("2:05.5", 125.5), ("1:00:00,250", 3600.25),
    ):  # fmt: skip
        assert parse_time(text) == seconds
    for text in ("3:5", "1:75", "-1", "nan", "1:2:3:4", "", "1e3", "٣"):
        with pytest.raises(ValueError, match="is no time; expected seconds, m:ss or h:mm:ss"):
            parse_time(text)
    for text, seconds, question in (
        ("12.5: How many?", 12.5, "How many?"),
        ("0:03: How many?", 3, "How many?"),
        ("1:02:03: And now?", 3723, "And now?"),
        ("7:30 is it?", 7, "30 is it?"),
        ("4: 几个?", 4, "几个?"),
    ):
        assert stream.parse_question(text) == stream.Question(seconds, question)


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as exit_info:
        stream.main(["--help"])
    assert exit_info.value.code == 0
    assert "12.5: How many digits so far?" in " ".join(capsys.readouterr().out.split())


class FakeSession:
    """Speaks at one second, and answers questions with their own text."""

    def __init__(self):
        self.order = []

    def see(self, frame):
        self.order.append(frame.time)
        return Answer(frame.time, "One second.") if frame.time == 1.0 else None

    def ask(self, question, time):
        self.order.append(question)
        return Answer(time, question.upper())


def narrated(session, questions, times=(0.0, 0.5, 1.0, 1.5)):
    frames = [Frame(time, np.zeros((4, 4, 3), np.uint8)) for time in times]
    questions = [stream.parse_question(text) for text in questions]
    said = []
    shown = stream.narrate(session, frames, questions, 2.0, said.append, [])
    return [(frame.time, [c.text for c in captions]) for frame, captions in shown], said


def test_a_question_comes_before_the_first_frame_at_or_after_its_time():
    session = FakeSession()
    shown, said = narrated(session, ["1.75: d", "0: a", "1.0: c", "0.6: b"])
    assert session.order == ["a", 0.0, 0.5, "b", "c", 1.0, 1.5, "d"]
    assert shown == [
        (0.0, ["A"]),
        (0.5, ["A"]),
        (1.0, ["A", "B", "C", "One second."]),
        (1.5, ["A", "B", "C", "One second.", "D"]),
    ]
    assert said[1] == Caption(time=0.6, text="B", question="b")
    assert said[3] == Caption(time=1.0, text="One second.", question=None)


def test_a_question_after_the_last_frame_of_a_stream_without_length_is_refused():
    with pytest.raises(UserError, match="the question at 9 s comes after the end"):
        narrated(FakeSession(), ["9: late"])


def test_a_question_may_hold_colons():
    assert stream.parse_question(" 2.5 :At 1:30, what? ") == stream.Question(2.5, "At 1:30, what?")


def test_pictures_of_a_narration_share_one_even_size_and_stay_legible():
    picture = np.full((47, 61, 3), 90, np.uint8)
    long = Caption(time=0.0, text="word " * 400, question=None)
    empty = draw_narration(picture, 0.0, [])
    full = draw_narration(picture, 99.5, [long, long])
    assert empty.shape == full.shape
    assert empty.shape[0] % 2 == empty.shape[1] % 2 == 0
    assert empty.shape[1] >= 384
    scale = 7  # the whole factor that brings 61 pixels to 384 or more
    assert (full[: 47 * scale, : 61 * scale] == 90).all()
    panel = full[47 * scale :]
    assert (panel.max(axis=2) > 250).any()  # white text
    assert not (panel[:, -4:].max(axis=2) > 100).any()  # none of it cut by the edge


def test_the_last_answer_stays_until_the_next():
    picture = np.zeros((48, 48, 3), np.uint8)
    first = Caption(time=0.0, text="A seven.", question=None)
    second = Caption(time=1.0, text="Two.", question="How many?")
    shown = draw_narration(picture, 0.0, [first])
    np.testing.assert_array_equal(shown, draw_narration(picture, 0.0, [first]))
    blue = [
        (image[..., 2].astype(int) - image[..., 0] > 80).any()
        for image in (shown, draw_narration(picture, 0.0, [first, second]))
    ]
    assert blue == [False, True]  # only a question is blue
