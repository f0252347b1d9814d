"""Anybody's videos go the whole way: encode, prepare, train, evaluate, stream."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from tests import tiny, tiny_stream
from videollm_mod_jax import encode, evaluate, prepare, stream
from videollm_mod_jax.data.video import write_video
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.models import VideoLLM, init_variables
from videollm_mod_jax.train import train
from videollm_mod_jax.training.checkpoint import save_model

ROOT = Path(__file__).parents[1]

FRAMES = 12
COLOURS = {"red": (220, 40, 30), "green": (30, 200, 60), "blue": (40, 60, 230)}
# What is shown from which frame on, and so what is said at its time.
SCENES = {
    "morning/one": {0: "red", 3: "green", 8: "blue"},
    "morning/two": {0: "blue", 5: "red", 7: "green"},
}


def said(scenes):
    """What should be said, with the seconds."""
    return [(start / 2, f"It turns {colour}.") for start, colour in scenes.items()]


def film(path, scenes):
    """A clip at 8 frames per second, four of which make one of the model's."""
    colours, pictures = iter([]), []
    for f in range(FRAMES * 4):
        colours = COLOURS[[c for start, c in scenes.items() if start * 4 <= f][-1]]
        picture = np.zeros((48, 64, 3), np.uint8)
        picture[8:40, 8 + f % 16 : 40 + f % 16] = colours
        pictures.append(picture)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, iter(pictures), 8.0)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A folder of videos, a table, and a model to start from."""
    root = tmp_path_factory.mktemp("own")
    lines = ["video,time,text"]
    for name, scenes in SCENES.items():
        film(root / "videos" / f"{name}.mp4", scenes)
        lines += [f"{name},{time},{text}" for time, text in said(scenes)]
    (root / "notes").mkdir()
    (root / "notes" / "annotations.csv").write_text("\n".join(lines) + "\n")
    words = tiny_stream.tokenizer()
    vision = dataclasses.replace(tiny.VISION, image_size=24, patch_size=8, pool=(3, 3))
    decoder = dataclasses.replace(tiny.DECODER, vocab_size=words.vocab_size)
    config = dataclasses.replace(tiny.CONFIG, decoder=decoder, vision=vision)
    save_model(
        root / "model", config, init_variables(VideoLLM(config), jax.random.key(0)), words, ""
    )
    return root


def own_config(places):
    """configs/own.py for these videos."""
    spec = importlib.util.spec_from_file_location("own", ROOT / "configs" / "own.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(str(places / "model"))
    config.data.sources.own.update(
        records=str(places / "datasets" / "own"), features=str(places / "features")
    )
    config.data.update(frames=FRAMES, text_tokens=128, labels=112)
    config.training.update(steps=250, checkpoint_every=250, log_every=50)
    config.training.update(scan=False, remat=False)
    return config


@pytest.fixture(scope="module")
def run(places):
    """The videos encoded, the table prepared, and a model that knows them by heart."""
    folders = {name: str(places / name) for name in ("model", "videos", "features", "notes")}
    command = ["--checkpoint", folders["model"], "--videos", folders["videos"]]
    assert encode.main([*command, "--out", folders["features"], "--workers", "1"]) == 0
    command = ["--dataset", "own", "--source", folders["notes"], "--features", folders["features"]]
    assert prepare.main([*command, "--out", str(places / "datasets"), "--max-frames", "12"]) == 0
    train(own_config(places), places / "run")
    return places / "run"


@pytest.mark.parametrize("name", SCENES)
def test_every_narration_is_said_at_its_time(run, places, name, capsys):
    video = str(places / "videos" / f"{name}.mp4")
    assert stream.main(["--checkpoint", str(run), "--video", video]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = [line.strip() for line in lines if "It turns" in line]
    assert found == [f"{time:.1f} s  {text}" for time, text in said(SCENES[name])]


def test_the_evaluation_agrees_and_says_that_it_asked_what_was_learnt(run, tmp_path):
    command = ["--checkpoint", str(run), "--split", "train", "--out", str(tmp_path / "out")]
    assert evaluate.main(command) == 2
    assert evaluate.main([*command, "--force"]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())["benchmarks"]["own"]
    assert report["trained_on"] == 2
    forced, alone = (report["parts"][p]["scores"] for p in ("teacher-forced", "self-conditioned"))
    assert forced["time_diff"] == 0
    assert forced["lm_correctness"] == forced["fluency"] == 1
    assert alone["f1"] == alone["f1_in_window"] == 1


def test_a_checkpoint_is_chosen_by_its_update_or_by_its_loss(run, places, capsys):
    command = ["--checkpoint", str(run), "--video", str(places / "videos" / "morning" / "one.mp4")]
    assert stream.main([*command, "--step", "250"]) == 0
    assert "It turns" in capsys.readouterr().out
    for step, message in (
        ("best", "no checkpoint with a validation loss"),
        ("7", "no checkpoint of update 7; it has 250"),
        ("last", "--step is 'last'; expected the number of an update, or best"),
    ):
        assert stream.main([*command, "--step", step]) == 2
        assert message in capsys.readouterr().err
        assert evaluate.main(["--checkpoint", str(run), "--step", step]) == 2
        assert message in capsys.readouterr().err


def test_a_run_whose_data_changed_is_refused(run, places):
    (run / "trained_on.json").write_text('{"own": {"morning/one": [[0.0, 6.0]]}}')
    with pytest.raises(UserError, match="the run began with other records than there are now"):
        train(own_config(places), run)
