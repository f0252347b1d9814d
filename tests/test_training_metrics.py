"""The metric files: cut on resume, finite, drawn."""

import math

import pytest
from PIL import Image

from videollm_mod_jax.errors import UserError
from videollm_mod_jax.training import metrics


def write(directory, done, steps):
    writer = metrics.Writer(directory, done)
    for step in steps:
        values = {"language_loss": 3.0 / step, "stream_loss": 1.0 / step}
        writer.write(step, values, events={"steps_per_second": 1.0})
    writer.close()


def test_validation_has_lines_of_its_own(tmp_path):
    writer = metrics.Writer(tmp_path, 0)
    writer.write(2, {"loss": 0.5}, events={})
    writer.write(2, {"validation_loss": 0.7}, events={})
    writer.write(3, {"loss": 0.4}, events={})
    writer.close()
    assert metrics.read_metrics(tmp_path) == [{"step": 2, "loss": 0.5}, {"step": 3, "loss": 0.4}]
    assert metrics.read_validation(tmp_path) == [{"step": 2, "validation_loss": 0.7}]
    # A run that goes on after update 2 has validated it.
    metrics.Writer(tmp_path, 2).close()
    assert metrics.read_metrics(tmp_path) == [{"step": 2, "loss": 0.5}]
    assert metrics.read_validation(tmp_path) == [{"step": 2, "validation_loss": 0.7}]


@pytest.mark.parametrize("done", [0, 5, 7])
def test_resuming_leaves_the_file_of_an_uninterrupted_run(tmp_path, done):
    write(tmp_path / "whole", 0, range(1, 11))
    write(tmp_path / "cut", 0, range(1, 8))
    path = tmp_path / "cut" / metrics.METRICS_FILE
    path.write_text(path.read_text() + '{"step": 8, "langua')  # killed in mid-line
    write(tmp_path / "cut", done, range(done + 1, 11))
    assert path.read_bytes() == (tmp_path / "whole" / metrics.METRICS_FILE).read_bytes()


def test_every_line_is_on_disk_at_once(tmp_path):
    writer = metrics.Writer(tmp_path, 0)
    writer.write(1, {"loss": 0.5}, events={})
    assert metrics.read_metrics(tmp_path) == [{"step": 1, "loss": 0.5}]
    writer.close()


DAMAGE = ["nonsense", '{"step": 2, "step": 3}', "[" * 10**5, '{"loss": 1.0}', '{"step": true}', "3"]


@pytest.mark.parametrize("damage", [*DAMAGE, '{"step": 2, "loss": "low"}', '{"step": 2, "a": NaN}'])
def test_a_damaged_line_is_named(tmp_path, damage):
    write(tmp_path, 0, (1, 2, 3))
    path = tmp_path / metrics.METRICS_FILE
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], damage, lines[2], ""]))
    for read in (lambda: metrics.read_metrics(tmp_path), lambda: metrics.Writer(tmp_path, 3)):
        with pytest.raises(UserError, match=r"metrics\.jsonl: line 2 "):
            read()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda lines: lines, None),
        (lambda lines: [*lines, '{"step": 9}\n'], None),
        (lambda lines: lines[:1] + lines[2:], "2 of 3 lines"),
        (lambda lines: [], "0 of 3 lines"),
        (lambda lines: [lines[0].replace("3.0", "4.0"), *lines[1:]], "3 of 3 lines, or others"),
    ],
)
def test_lines_that_were_lost_since_a_checkpoint_are_noticed(tmp_path, capsys, change, said):
    log = metrics.Log(tmp_path, 0, 9, 1)
    for step in (1, 2, 3):
        log.record(step, {"loss": (3.0, float(step))})
    log.catch_up()
    before = log.written()
    path = tmp_path / metrics.METRICS_FILE
    path.write_text("".join(change(path.read_text().splitlines(keepends=True))))
    capsys.readouterr()
    assert (metrics.Log(tmp_path, 3, 9, 1, before).written() == before) == (said is None)
    shown = capsys.readouterr().err
    assert said in shown if said else not shown


def test_a_value_that_is_not_finite_raises_naming_the_step():
    with pytest.raises(FloatingPointError, match=r"step 17: not finite: loss = nan"):
        metrics.check_finite(17, {"loss": math.nan, "gradient_norm": 1.0})
    metrics.check_finite(17, {"loss": 0.0})


def test_means_leave_out_what_was_not_observed():
    assert metrics.means({"a": (3.0, 2.0), "b": (0.0, 0.0)}) == {"a": 1.5}


def test_running_mean_example():
    assert metrics.running_mean((4, 2, 6, 0), 2) == [4, 3, 4, 3]


def test_the_curve_shows_validation(tmp_path):
    write(tmp_path, 0, range(1, 9))
    without = metrics.draw_loss_curve(tmp_path).read_bytes()
    writer = metrics.Writer(tmp_path, 8)
    # A validation may hold labels of one kind only.
    writer.write(8, {"validation_loss": 0.7, "validation_stream_loss": 0.7}, events={})
    writer.close()
    assert metrics.draw_loss_curve(tmp_path).read_bytes() != without


def test_the_curve_is_a_picture(tmp_path):
    write(tmp_path, 0, range(1, 60))
    with Image.open(metrics.draw_loss_curve(tmp_path)) as image:
        colours = image.convert("RGB").getcolors(maxcolors=1 << 20)
        assert image.size == (960, 540)
        assert len(colours) > 50
