"""The notebooks run as they are, and what they display is really there."""

import base64
import io
import re
import tomllib
from pathlib import Path

import av
import jupytext
import nbformat
import numpy as np
import pytest
from PIL import Image

from tests.run_colabs import run

ROOT = Path(__file__).parents[1]
NAMES = ("quickstart", "what_mod_keeps", "finetune_your_video", "convert_llava")
"""In the order in which a newcomer wants them."""

CLIPS = {"quickstart": 1, "what_mod_keeps": 1, "finetune_your_video": 2, "convert_llava": 1}
FIGURES = {"quickstart": 1, "what_mod_keeps": 4, "finetune_your_video": 1, "convert_llava": 1}
"""How many of each are displayed at least."""


def notebook(name):
    return nbformat.read(ROOT / "colabs" / f"{name}.ipynb", as_version=4)


def displayed(cells):
    """All outputs: text, PNG pictures as arrays, and the frames of every clip."""
    texts, pictures, clips = [], [], []
    for cell in cells:
        for output in cell.get("outputs", ()):
            assert output.output_type != "error", output.get("evalue")
            texts.append(output.get("text", ""))
            data = output.get("data", {})
            texts.append(data.get("text/plain", ""))
            if "image/png" in data:
                picture = Image.open(io.BytesIO(base64.b64decode(data["image/png"])))
                pictures.append(np.asarray(picture.convert("RGB")))
            for clip in re.findall(r"data:video/mp4;base64,([\w+/=]+)", data.get("text/html", "")):
                with av.open(io.BytesIO(base64.b64decode(clip))) as container:
                    frames = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
                clips.append(frames)
    return "\n".join(texts), pictures, clips


def assert_there(name, cells):
    """Clips that decode and move, and figures that are not empty."""
    text, pictures, clips = displayed(cells)
    assert len(clips) >= CLIPS[name]
    for frames in clips:
        assert len(frames) > 3
        assert np.abs(frames[0].astype(int) - frames[-1]).max() > 50
    assert len(pictures) >= FIGURES[name]
    for picture in pictures:
        assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 20
    return text


def test_these_are_the_notebooks():
    found = {path.name for path in (ROOT / "colabs").iterdir() if path.suffix in (".py", ".ipynb")}
    assert found == {f"{name}{suffix}" for name in NAMES for suffix in (".py", ".ipynb")}
    readme = (ROOT / "README.md").read_text()
    places = [readme.index(f"colabs/{name}.ipynb") for name in NAMES]
    assert places == sorted(places)


@pytest.mark.parametrize("name", NAMES)
def test_both_forms_of_a_notebook_are_one(name):
    text = jupytext.read(ROOT / "colabs" / f"{name}.py")
    cells = [
        [(cell.cell_type, cell.source) for cell in form.cells] for form in (text, notebook(name))
    ]
    assert cells[0] == cells[1], "jupytext --sync makes them one again"


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_says_where_it_runs_and_for_how_long(name):
    first = notebook(name).cells[0].source
    with open(ROOT / "pyproject.toml", "rb") as file:
        repository = tomllib.load(file)["project"]["urls"]["Repository"]
    github = repository.removeprefix("https://github.com/")
    opens = f"https://colab.research.google.com/github/{github}/blob/main/colabs/{name}.ipynb"
    assert f"({opens})" in first
    assert re.search(
        r"\*\*Runtime\*\*: .*\d+\s+(minutes|seconds).* on\s+2\s+CPU\s+cores", first, re.DOTALL
    )
    assert f'"{repository}"' in "".join(cell.source for cell in notebook(name).cells)


@pytest.mark.parametrize("name", NAMES)
def test_the_outputs_of_a_full_run_are_stored(name):
    path = ROOT / "colabs" / f"{name}.ipynb"
    assert path.stat().st_size < 1_000_000
    assert_there(name, notebook(name).cells)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_from_top_to_bottom(name, tmp_path, monkeypatch):
    monkeypatch.setenv("VIDEOLLM_COLAB_SMALL", "1")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    book = run(name, tmp_path, timeout=600)
    text = assert_there(name, book.cells)
    for words in {
        "quickstart": ("after training", "GFLOPs", "frames/s"),
        "what_mod_keeps": ("Fluency", "ms per frame", "layer 1 keeps 2 of 10 tokens"),
        "finetune_your_video": ("right, word for word", "full computation", "frames/s"),
        "convert_llava": ("equal",),
    }[name]:
        assert words in text
