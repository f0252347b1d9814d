"""Where numbers go while training: a jsonl file, TensorBoard, a picture of the loss, a trace.

Of several processes, the first writes; the numbers are sums over all of them.
"""

import dataclasses
import hashlib
import itertools
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import rich.console
import rich.progress

from videollm_mod_jax.config_dict import COUNT_OR_NONE, Checked
from videollm_mod_jax.console import make_console
from videollm_mod_jax.data import files
from videollm_mod_jax.errors import UserError, shown
from videollm_mod_jax.training import distributed
from videollm_mod_jax.training.losses import Sums

METRICS_FILE = "metrics.jsonl"
VALIDATION = "validation_"
"""Begins the names of what was validated, in lines of their own."""
CURVE_FILE = "loss.png"
PROFILE = "profile"

_WARM_UP = 3
"""Updates that compile or fill queues, and so say nothing about a step."""


def means(sums: Mapping[str, tuple[Any, Any]]) -> dict[str, float]:
    """Divides fetched (sum, weight) pairs; a quantity of weight 0 is not known and left out."""
    return {name: float(total) / float(weight) for name, (total, weight) in sums.items() if weight}


def check_finite(step: int, values: Mapping[str, float]) -> None:
    """Raises FloatingPointError that names the step and every value that is not finite."""
    bad = {name: value for name, value in values.items() if not math.isfinite(value)}
    if bad:
        listed = ", ".join(f"{name} = {value}" for name, value in bad.items())
        raise FloatingPointError(f"step {step}: not finite: {listed}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Written(Checked):
    """What a `metrics.jsonl` held when a checkpoint was saved.

    Attributes:
      lines: how many.
      sha256: of all of them.
    """

    lines: COUNT_OR_NONE
    sha256: str


class Writer:
    """Appends metrics to `metrics.jsonl` and to a TensorBoard event file of a run's directory.

    ```
    {"step": 200, "loss": 1.31, "language_loss": 1.62, ..., "learning_rate": 0.0002}
    {"step": 200, "validation_loss": 1.35, "validation_language_loss": 1.7, ...}
    ```

    The jsonl file holds nothing that depends on the clock, so that a run that was killed and
    resumed leaves the very file of an uninterrupted one.
    """

    def __init__(self, directory: str | os.PathLike[str], done: int):
        """Opens the files, dropping what an interrupted run wrote after update `done`.

        Raises:
          UserError: a line before that is damaged.
        """
        path = Path(directory) / METRICS_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = _keep_until(path, done)
        self._lines, self._digest = kept.count(b"\n"), hashlib.sha256(kept)
        self._file = path.open("ab")
        # Here, since it imports PyTorch where that is installed: seconds for every command.
        import tensorboardX

        self._events = tensorboardX.SummaryWriter(str(directory), purge_step=done + 1)

    def write(self, step: int, values: Mapping[str, float], *, events: Mapping[str, float]) -> None:
        """Writes one line; on return a kill of this process cannot lose it.

        Args:
          step: number of the update, from 1.
          values: go to both files.
          events: go to TensorBoard only (speeds and times).
        """
        line = json.dumps({"step": step, **values}).encode() + b"\n"
        self._lines += 1
        self._digest.update(line)
        self._file.write(line)
        # Out of this process, where a kill cannot reach it.
        self._file.flush()
        for name, value in {**values, **events}.items():
            self._events.add_scalar(name, value, step)

    def written(self) -> Written:
        """Has the system write the lines to the disk; returns what tells them from others."""
        os.fsync(self._file.fileno())
        return Written(lines=self._lines, sha256=self._digest.hexdigest())

    def close(self) -> None:
        """Closes the files."""
        self._file.close()
        self._events.close()


class Log:
    """The metric files and the progress bar of a run; one step behind the device.

    A context manager. A step is fetched when the next one was dispatched, so that the device never
    waits for the host.
    """

    def __init__(
        self, directory: Path, done: int, steps: int, log_every: int, before: Written | None = None
    ):
        """Goes on after update `done` of `steps`, with a line every `log_every` updates.

        Args:
          directory: of the run.
          done: updates so far.
          steps: updates in all.
          log_every: updates from line to line.
          before: what the checkpoint of update `done` says of the lines so far, which is compared.
            None compares nothing.

        Raises:
          UserError: see `Writer`.
        """
        self._steps, self._log_every = steps, log_every
        self._writer = Writer(directory, done) if distributed.is_lead() else None
        self._console = make_console(stderr=True, quiet=not distributed.is_lead())
        if self._writer and before not in (None, now := self._writer.written()):
            # Nothing that is learnt depends on them.
            self._console.print(
                f"warning: {directory / METRICS_FILE} is not what it was at update {done}: it has "
                f"{now.lines} of {before.lines} lines, or others. Training goes on; restore the "
                "file from a copy before, or the loss curve will lack them.",
                soft_wrap=True,
            )
        self._progress = rich.progress.Progress(
            rich.progress.TextColumn("training"),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TextColumn("{task.fields[state]}", markup=False),
            rich.progress.TimeRemainingColumn(),
            console=self._console,
        )
        self._task = self._progress.add_task(
            "training", total=steps, completed=done, state="compiling"
        )
        self._waiting: tuple[int, Sums] | None = None
        self._first: tuple[int, float] | None = None

    def __enter__(self) -> "Log":
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()
        if self._writer:
            self._writer.close()

    def record(self, step: int, sums: Sums) -> None:
        """Notes a step that was dispatched; writes the one before it.

        Raises:
          FloatingPointError: a value of the step before is not finite.
        """
        before, self._waiting = self._waiting, (step, sums)
        if before is not None:
            self._write(*before)

    def catch_up(self) -> None:
        """Waits for the last step and writes it as well."""
        if self._waiting is not None:
            self._write(*self._waiting)
        self._waiting = None

    def written(self) -> Written | None:
        """Returns what a checkpoint says of the lines so far, which are on the disk then.

        None in all processes but the first, which writes no lines and no such words.
        """
        return self._writer.written() if self._writer else None

    def validated(self, step: int, values: Mapping[str, float]) -> None:
        """Writes what was validated after update `step`, which `catch_up` has written.

        Raises:
          FloatingPointError: a value is not finite.
        """
        values = {f"{VALIDATION}{name}": value for name, value in values.items()}
        check_finite(step, values)
        if self._writer:
            self._writer.write(step, values, events={})
        loss = values[f"{VALIDATION}loss"]
        self._console.print(
            f"step {step} of {self._steps}: validation loss {loss:.3f}", highlight=False
        )

    def _write(self, step: int, sums: Sums) -> None:
        values = means(jax.device_get(sums))
        check_finite(step, values)
        if not self._writer:
            return
        events, state = {}, f"loss {values.get('loss', 0.0):.3f}"
        # The first step compiles, and says nothing about speed.
        if self._first is None:
            self._first = (step, time.monotonic())
        else:
            first, start = self._first
            speed = (step - first) / (time.monotonic() - start)
            events, state = {"steps_per_second": speed}, f"{state}, {speed:.2f} steps/s"
        if step % self._log_every == 0 or step == self._steps:
            self._writer.write(step, values, events=events)
        self._progress.update(self._task, completed=step, state=state)
        # A bar is drawn on terminals only; a log file gets twenty lines.
        if not self._console.is_terminal and step % max(1, self._steps // 20) == 0:
            self._console.print(f"step {step} of {self._steps}: {state}", highlight=False)


class Profile:
    """Traces a few updates of a run for TensorBoard or xprof; a context manager.

    ```
    DIR/profile/plugins/profile/<time>/<host>.xplane.pb
    ```
    """

    def __init__(self, directory: Path, done: int, steps: int):
        """Will trace `steps` updates, some after update `done`; none if 0."""
        self._path = directory / PROFILE
        self._first = done + 1 + _WARM_UP
        self._end = self._first + (steps if distributed.is_lead() else 0)
        self._running = False

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._running:
            jax.profiler.stop_trace()

    def before(self, step: int, state: Any) -> None:
        """Starts or ends the trace, if it is time; call it before every update of `state`."""
        if self._first == self._end or step not in (self._first, self._end):
            return
        # The device is behind; a trace holds whole updates.
        jax.block_until_ready(state)
        if step == self._first:
            jax.profiler.start_trace(str(self._path))
        else:
            jax.profiler.stop_trace()
        self._running = step == self._first


def read_metrics(directory: str | os.PathLike[str]) -> list[dict[str, float]]:
    """The lines of a run's `metrics.jsonl` that updates left, in the order of their steps."""
    return [line for line in _read_lines(directory) if f"{VALIDATION}loss" not in line]


def read_validation(directory: str | os.PathLike[str]) -> list[dict[str, float]]:
    """The lines of a run's `metrics.jsonl` that validations left, in the order of their steps."""
    return [line for line in _read_lines(directory) if f"{VALIDATION}loss" in line]


def _read_lines(directory: str | os.PathLike[str]) -> list[dict[str, float]]:
    return [values for _, values in _lines(Path(directory) / METRICS_FILE)]


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, float]]]:
    """Yields the lines of a metrics file and what they say, but a last one that a kill cut short.

    Raises:
      UserError: the file cannot be read, or a line holds no metrics.
    """
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            return
        values = files.parse_json(line, f"{path}: line {number}")
        if not _are_metrics(values):
            raise UserError(
                f"{path}: line {number} is {shown(values)}; expected numbers by name, and the "
                "update as `step`: restore the file from a copy, or remove the line"
            )
        yield line, values


def _are_metrics(values: Any) -> bool:
    return (
        isinstance(values, dict)
        and type(values.get("step")) is int
        and all(type(value) in (int, float) for value in values.values())
    )


def draw_loss_curve(directory: str | os.PathLike[str]) -> Path:
    """Draws language and streaming loss over steps from `metrics.jsonl` to `loss.png`.

    Raw values are faint, their running mean over a twentieth of the run is bold, and validations
    are dots on a dashed line; the loss axis is logarithmic.

    Returns:
      The path of the picture.
    """
    # Imported here: matplotlib takes a second, and most verbs draw nothing.
    from matplotlib.figure import Figure

    lines, validation = read_metrics(directory), read_validation(directory)
    # A Figure without pyplot keeps no global state and needs no display.
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name, label in (("language_loss", "language"), ("stream_loss", "streaming")):
        points = [(line["step"], line[name]) for line in lines if name in line]
        if points:
            steps, values = zip(*points, strict=True)
            (raw,) = axes.plot(steps, values, alpha=0.25, linewidth=1)
            smooth = running_mean(values, window=max(1, len(values) // 20))
            axes.plot(steps, smooth, color=raw.get_color(), linewidth=2, label=label)
            dots = [
                (line["step"], line[VALIDATION + name])
                for line in validation
                if VALIDATION + name in line
            ]
            if dots:
                style = {"color": raw.get_color(), "linestyle": "--", "marker": "o", "linewidth": 1}
                axes.plot(*zip(*dots, strict=True), **style, label=f"{label}, validation")
    axes.set(xlabel="update", ylabel="cross-entropy (nats per label)", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    path = Path(directory) / CURVE_FILE
    with files.written_aside(path) as aside:
        figure.savefig(aside, dpi=120)
    return path


def running_mean(values: tuple[float, ...], window: int) -> list[float]:
    """The mean of each value and up to `window - 1` before it.

    ```
    values 4 2 6 0, window 2   ->   4 3 4 3
    ```
    """
    means_so_far = []
    for end in range(1, len(values) + 1):
        recent = values[max(0, end - window) : end]
        means_so_far.append(sum(recent) / len(recent))
    return means_so_far


def _keep_until(path: Path, done: int) -> bytes:
    """Drops lines after update `done` from a jsonl file; returns what it holds then."""
    if not path.exists():
        return b""
    lines = itertools.takewhile(lambda line: line[1]["step"] <= done, _lines(path))
    kept = b"".join(line for line, _ in lines)
    with files.written_aside(path) as aside:
        aside.write_bytes(kept)
    return kept
