"""Plays a video to a trained model, which narrates it and answers questions as it goes.

    python -m videollm_mod_jax.stream --checkpoint runs/digits --video clip.mp4 \\
        --ask "4.5: How many digits so far?" --out narrated.mp4
"""

import argparse
import collections
import contextlib
import dataclasses
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import av
import numpy as np

from videollm_mod_jax import cli
from videollm_mod_jax.data.times import TIME, parse_time
from videollm_mod_jax.data.video import Frame, location, read_video, video_writer
from videollm_mod_jax.errors import UserError, shown
from videollm_mod_jax.models import VideoLLMConfig, full_computation
from videollm_mod_jax.models.flops import kv_cache_bytes
from videollm_mod_jax.streaming.ahead import DEPTH, ahead
from videollm_mod_jax.streaming.int8 import quantize
from videollm_mod_jax.streaming.kept import describe_kept, draw_kept, routed_layers
from videollm_mod_jax.streaming.narrate import Caption, draw_narration
from videollm_mod_jax.streaming.recording import check_recordings, check_video
from videollm_mod_jax.streaming.session import StreamingSession
from videollm_mod_jax.training.checkpoint import LoadedModel, load_model


@dataclasses.dataclass(frozen=True)
class Question:
    """A question of the user, at a time in seconds."""

    time: float
    text: str


_ASK = re.compile(rf"\s*(?P<time>{TIME})\s*:(?P<question>.*)", re.DOTALL | re.ASCII)


def parse_question(text: str) -> Question:
    """Reads `--ask`: a time, a colon and a question.

    ```
    12.5: How many?       12.5 s           0:03: How many?      3 s
    1:02:03: And now?     3723 s           7:30 is it?          7 s, "30 is it?": no second colon
    ```

    Raises:
      UserError: no time, or no question.
    """
    match = _ASK.fullmatch(text)
    if match is None or not match["question"].strip():
        raise UserError(
            f'--ask is {shown(text)}; expected "SECONDS: QUESTION", such as "12.5: How many so '
            'far?"; a time may be m:ss or h:mm:ss as well'
        )
    return Question(parse_time(match["time"]), match["question"].strip())


def narrate(
    session: StreamingSession,
    frames: Iterable[Frame],
    questions: Sequence[Question],
    fps: float,
    say: Callable[[Caption], None],
    waits: list[float],
) -> Iterator[tuple[Frame, tuple[Caption, ...]]]:
    """Shows all frames, and puts every question before the first frame at or after its time.

    Args:
      session: a fresh one.
      frames: in the order of time, encoded or not.
      questions: in any order.
      fps: at which the frames were sampled.
      say: called with everything that the model says, as it says it.
      waits: gets the seconds that each frame was waited for.

    Yields:
      Every frame with all that was said up to it. What is asked behind the last frame is said with
      it.

    Raises:
      UserError: a question after the end of the video.
    """
    waiting = sorted(questions, key=lambda question: question.time)
    captions: list[Caption] = []

    def add(caption: Caption) -> None:
        captions.append(caption)
        say(caption)

    def ask_until(end: float) -> None:
        while waiting and waiting[0].time <= end:
            question = waiting.pop(0)
            answer = session.ask(question.text, question.time)
            add(Caption(time=answer.time, text=answer.text, question=question.text))

    last = None
    for frame in _timed(frames, waits):
        if last is not None:
            yield last, tuple(captions)
        ask_until(frame.time)
        if answer := session.see(frame):
            add(Caption(time=answer.time, text=answer.text, question=None))
        last = frame
    end = last.time + 1 / fps
    ask_until(end)
    yield last, tuple(captions)
    # Behind the last frame, which is kept.
    if waiting:
        _refuse_after(waiting[-1].time, end)


def _timed(frames: Iterable[Frame], waits: list[float]) -> Iterator[Frame]:
    iterator = iter(frames)
    while True:
        began = time.perf_counter()
        frame = next(iterator, None)
        if frame is None:
            return
        waits.append(time.perf_counter() - began)
        yield frame


def report(
    session: StreamingSession, model: LoadedModel, waits: Sequence[float], seconds: float
) -> str:
    """The speed of a stream: frames per second, latencies per frame by part, cache bytes.

    ```
    36 frames at 61.3 frames/s
    ms waited           p50      p95
      decode            0.1      0.4   decoding and the vision tower run ahead
      encode            0.2      0.9
      prefill           3.1      4.0
      generate         21.0     28.3   over the 6 frames with an answer
      total             3.4     26.1
    ```

    Args:
      session: that has seen them.
      model: of it.
      waits: seconds that each frame was waited for.
      seconds: that all of it took by the clock, drawing and writing included.
    """
    timings = session.timings
    parts_ms = {"decode": 1e3 * np.array(waits)} | {
        part: 1e3 * np.array([getattr(timing, part) for timing in timings])
        for part in ("encode", "prefill", "generate")
    }
    parts_ms["total"] = np.sum(list(parts_ms.values()), axis=0)
    answers_ms = parts_ms["generate"][parts_ms["generate"] > 0]
    parts_ms["generate"] = answers_ms if len(answers_ms) else np.zeros(1)
    lines = [
        f"{len(timings)} frames at {len(timings) / seconds:.1f} frames/s",
        f"{'ms waited':<14}{'p50':>9}{'p95':>9}",
    ]
    for part, ms in parts_ms.items():
        p50, p95 = np.percentile(ms, (50, 95))
        note = f"   over the {len(answers_ms)} frames with an answer" if part == "generate" else ""
        lines.append(f"  {part:<12}{p50:>9.1f}{p95:>9.1f}{note}")
    mine = session.cache_bytes_per_frame
    dense = dataclasses.replace(model.config, routing=full_computation())
    share = mine / kv_cache_bytes(dense, 1, 1, dense.dtype)
    lines.append(
        f"cache: {mine:,} bytes per frame with its interval token, {share:.2f} of what the model "
        "would need without routing"
    )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    arguments = _parser().parse_args(argv)
    return cli.report_user_errors(lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> None:
    questions = [parse_question(text) for text in arguments.ask]
    if not arguments.fps > 0:
        raise UserError(f"--fps is {arguments.fps:g}; expected more than 0")
    check_recordings(
        arguments.video, {"--out": arguments.out, "--show-routing": arguments.show_routing}
    )
    check_video(arguments.video, arguments.fps)
    if questions:
        _check_questions(questions, arguments.video, arguments.fps)
    step = cli.chosen_step(arguments.checkpoint, arguments.step)
    model = load_model(arguments.checkpoint, step=step, verify=arguments.verify)
    if arguments.show_routing is not None:
        routed_layers(model.config)
    if arguments.int8:
        model = quantize(model)
    session = StreamingSession(
        model,
        silence_threshold=arguments.silence_threshold,
        max_frames=arguments.max_frames,
        max_text_tokens=arguments.max_text_tokens,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        system=arguments.system,
        request=arguments.request,
        seed=arguments.seed,
    )
    began = time.perf_counter()
    waits = _play(session, model.config, questions, arguments)
    print(report(session, model, waits, time.perf_counter() - began))
    if arguments.show_routing is not None:
        print(describe_kept(session.kept_tokens(), model.config))
    for file in (arguments.out, arguments.show_routing):
        if file is not None:
            print(f"wrote {file}")


def _play(
    session: StreamingSession,
    config: VideoLLMConfig,
    questions: Sequence[Question],
    arguments: argparse.Namespace,
) -> list[float]:
    """Shows the video and writes what is asked for; the seconds that each frame was waited for.

    Three threads: frames are decoded and encoded, the model sees them, pictures are drawn and
    compressed. What ends it early, Ctrl-C or a damaged video, leaves what was narrated until then
    in files that play.
    """
    waits: list[float] = []
    with contextlib.ExitStack() as threads:
        frames = session.encode_ahead(read_video(arguments.video, arguments.fps))
        threads.enter_context(contextlib.closing(frames))
        narrated = narrate(session, frames, questions, arguments.fps, _say, waits)
        out, show_routing = arguments.out, arguments.show_routing
        if out is None and show_routing is None:
            collections.deque(narrated, maxlen=0)
            return waits
        # Read in the thread of the model, before it sees the next frame.
        seen = (
            (frame, said, session.kept_tokens(first=-1)[:, 0] if show_routing else None)
            for frame, said in narrated
        )
        seen = threads.enter_context(contextlib.closing(ahead(seen, DEPTH)))
        write, write_routing = (
            file and threads.enter_context(video_writer(file, arguments.fps))
            for file in (out, show_routing)
        )
        written, early = None, None
        try:
            for frame, said, kept_LN in seen:
                if write:
                    write(draw_narration(frame.image, frame.time, said))
                if write_routing:
                    picture = draw_kept(frame.image, kept_LN, config)
                    write_routing(draw_narration(picture, frame.time, said))
                written = frame.time
        except (UserError, KeyboardInterrupt) as error:
            if written is None:
                raise
            early = error
    if early is not None:
        for file in filter(None, (out, show_routing)):
            print(f"wrote {file}, up to {written:.1f} s", flush=True)
        raise early
    return waits


def _check_questions(questions: Sequence[Question], video: str, fps: float) -> None:
    """Refuses a question after the end before anything is loaded, if the file knows its length."""
    try:
        with av.open(location(video)) as container:
            length = container.duration
    except av.FFmpegError:
        return  # read_video says what is wrong
    if length is not None:
        _refuse_after(
            max((q.time for q in questions), default=0.0), length / av.time_base + 1 / fps
        )


def _refuse_after(time: float, end: float) -> None:
    if time > end:
        raise UserError(
            f"--ask: the question at {time:g} s comes after the end of the video, {end:g} s; ask "
            "earlier"
        )


def _say(caption: Caption) -> None:
    if caption.question is not None:
        print(f"{caption.time:8.1f} s  User: {caption.question}")
    print(f"{caption.time:8.1f} s  {caption.text}", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="python -m videollm_mod_jax.stream",
        description="Plays a video to a trained model, frame by frame. The model speaks when it "
        "chooses to, and answers your questions at their times; then its speed is reported.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="what train or convert wrote")
    cli.add_step_argument(parser)
    cli.add_int8_argument(parser)
    cli.add_verify_argument(add)
    add("--video", required=True, metavar="FILE", help="any file or URL that FFmpeg reads")
    add("--fps", type=cli.number("[1e-3, 1000]"), default=2.0,
        help="frames per second that the model sees; take the "
        "rate of its training")  # fmt: skip
    add("--ask", action="append", default=[], metavar='"TIME: QUESTION"', help="ask in "
        'mid-stream, such as "12.5: How many digits so far?"; the time may be m:ss or h:mm:ss as '
        "well; may be repeated")  # fmt: skip
    add("--out", metavar="FILE.mp4", help="write the video with its narration drawn below it")
    add("--show-routing", metavar="FILE.mp4", help="write the video with the patches of every "
        "frame that its routed layers keep")  # fmt: skip
    add("--silence-threshold", type=cli.number("[0, 1]"), metavar="P",
        help="speak where the probability of "
        "silence is below P in [0, 1]; by default where silence is not the likeliest")  # fmt: skip
    add(
        "--temperature",
        type=cli.number("[0, 1000]"),
        default=0.0,
        help="0 is greedy; more samples answers",
    )
    add("--seed", type=cli.whole_number("[0, 2**31)"), default=0, help="of sampling")
    add(
        "--max-frames",
        type=cli.whole_number("[1, 2**31)"),
        default=1200,
        help="frames that the caches have room for",
    )
    add(
        "--max-text-tokens",
        type=cli.whole_number("[1, 2**31)"),
        default=4096,
        help="text tokens that they have room for",
    )
    add("--max-new-tokens", type=cli.whole_number("[1, 2**31)"), default=64, help="longest answer")
    add("--request", metavar="TEXT", help="ask this after the first frame; models that learnt from "
        "Ego4D expect it (prepare --page ego4d_narration)")  # fmt: skip
    add("--system", help="instruction that opens the dialogue; by default that of the training")
    return parser


if __name__ == "__main__":
    cli.leave(main())
