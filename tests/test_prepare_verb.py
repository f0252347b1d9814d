"""`prepare` on the command line: what it prints and writes, and its exit status."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from tests import tiny_sources
from tests.ended import status_of
from videollm_mod_jax import prepare
from videollm_mod_jax.data.annotations import Report
from videollm_mod_jax.data.builders import registry
from videollm_mod_jax.data.builders.stored import open_dataset
from videollm_mod_jax.data.feature_index import FeatureMeta
from videollm_mod_jax.data.features import FeatureWriter


@pytest.fixture
def source(tmp_path):
    """The flags that name a source of `own` with two damaged rows, and its features."""
    directory, features = tmp_path / "source", tmp_path / "features"
    directory.mkdir()
    videos = tiny_sources.own(directory)
    with (directory / "annotations.csv").open("a") as table:
        table.write("kitchen,soon,,He [bold]waits[/bold].,\ngarden,1,,A dog barks.,\n")
    meta = FeatureMeta(
        features_per_frame=1, width=2, fps=videos.fps, resolution=8, tower="0123456789abcdef"
    )
    with FeatureWriter(features, meta) as writer:
        for name, frames in videos.frames.items():
            writer.add(name, np.zeros((frames, 1, 2), np.float16))
    return ["--source", f"{directory}", "--features", f"{features}"]


def test_a_source_becomes_a_dataset_and_a_report(source, tmp_path, capsys):
    out = tmp_path / "datasets"
    assert prepare.main(["--dataset", "own", *source, "--out", f"{out}"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(
        """\
6 annotations kept, 2 dropped
          1  bad time
             annotations.csv: line 8: field 'time': expected seconds, m:ss or h:mm:ss, found 'soon'
          1  unknown video
             annotations.csv: line 9: field 'video': expected a video of the features, found \
'garden'
"""
    )
    cells = [line.split("│")[1:-1] for line in printed.splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in row] for row in cells] == [
        ["train", "1", "1", "20", "4"],
        ["validation", "1", "1", "12", "2"],
    ]
    assert printed.splitlines()[-1] == f"wrote {out / 'own'}"
    stored = open_dataset(out / "own")
    assert [len(stored.records(split)) for split in stored.splits] == [1, 1]
    report = json.loads((out / "own" / "1.0.0" / "dataset.json").read_text())["report"]
    assert report["dropped"] == {"bad time": 1, "unknown video": 1}


def test_max_frames_cuts_videos(source, tmp_path):
    arguments = ["--dataset", "own", *source, "--out", f"{tmp_path}", "--max-frames", "16"]
    assert prepare.main(arguments) == 0
    stored = open_dataset(tmp_path / "own")
    assert stored.max_frames == 16
    assert [record.id for record in stored.records("train")] == ["kitchen/0-16", "kitchen/16-20"]


def test_checking_prints_the_same_and_writes_nothing(source, tmp_path, capsys):
    out = tmp_path / "datasets"
    arguments = ["--dataset", "own", *source, "--out", f"{out}"]
    assert prepare.main([*arguments, "--check"]) == 0
    checked = capsys.readouterr().out
    assert not out.exists()
    assert prepare.main(arguments) == 0
    assert capsys.readouterr().out == checked + f"wrote {out / 'own'}\n"


def test_nothing_kept_is_reported_and_status_2(source, tmp_path, capsys):
    table = tmp_path / "source" / "annotations.csv"
    table.write_text("video,time,text\nnowhere,1,x\nkitchen,-1,y\nnowhere,2,z\n")
    assert prepare.main(["--dataset", "own", *source, "--out", f"{tmp_path / 'out'}"]) == 2
    captured = capsys.readouterr()
    assert captured.out.startswith("0 annotations kept, 3 dropped\n          2  unknown video\n")
    assert captured.err == (
        f"error: {tmp_path / 'source'}: no annotation of own can be used; 3 were dropped, 2 of "
        "them for 'unknown video'\n"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--dataset": "mine"}, "there is no dataset 'mine'; known: own, ego4d_narration"),
        ({"--dataset": None}, "--dataset: missing; see --help, or --list"),
        ({"--source": None, "--features": None}, "--source and --features: missing"),
        ({"--source": "nowhere"}, "--source: there is no directory nowhere"),
        ({"--features": "nowhere"}, "nowhere: not a feature store"),
        ({"--max-frames": "0"}, "--max-frames is '0'; expected a whole number"),
        ({"--dataset": "coin_step"}, "COIN.json"),
    ],
)
def test_what_cannot_be_prepared_is_one_line_and_status_2(
    source, tmp_path, capsys, changes, message
):
    given = dict(zip(source[::2], source[1::2], strict=True))
    given = {"--dataset": "own", "--out": f"{tmp_path / 'out'}"} | given | changes
    flags = [part for pair in given.items() if pair[1] is not None for part in pair]
    assert status_of(prepare.main, flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_dataset_is_never_overwritten(source, tmp_path, capsys):
    arguments = ["--dataset", "own", *source, "--out", f"{tmp_path}"]
    assert prepare.main(arguments) == 0
    assert f"wrote {tmp_path / 'own'}\n" in capsys.readouterr().out
    # Killed after all was written, a command comes to its end when it is given again.
    assert prepare.main(arguments) == 0
    assert f"{tmp_path / 'own'} holds these records already\n" in capsys.readouterr().out
    assert prepare.main([*arguments, "--max-frames", "5"]) == 2
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .startswith(f"error: {tmp_path / 'own'}: exists already")
    )


def test_every_dataset_is_listed_and_has_a_page(capsys):
    assert prepare.main(["--list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in listed if line[0] != " "} == set(registry.DATASETS)
    for name, dataset in registry.DATASETS.items():
        assert prepare.main(["--page", name]) == 0
        assert capsys.readouterr().out == dataset.page + "\n"
    assert prepare.main(["--page", "mine"]) == 2
    assert "there is no dataset 'mine'" in capsys.readouterr().err


def test_damage_is_quoted_on_one_line_that_any_terminal_can_show(capsys):
    report = Report()
    report.drop("bad time", "a.json: é\n[red]\ud83d\x1b[31m", "found 'x'")
    prepare._print_report(report)
    assert capsys.readouterr().out.splitlines()[2] == (
        "             a.json: é\\n[red]\\ud83d\\x1b[31m: found 'x'"
    )


def test_a_reader_who_has_enough_is_no_error():
    command = [sys.executable, "-m", "videollm_mod_jax.prepare", "--page", "coin_step"]
    # What is printed waits in a buffer, as it does for a reader.
    environment = {key: os.environ[key] for key in os.environ if key != "PYTHONUNBUFFERED"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    done = subprocess.Popen(command, env=environment, **pipes)
    done.stdout.close()
    assert done.stderr.read() == b""
    assert done.wait() == 0
