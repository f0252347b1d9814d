"""The page of every dataset says the same things in the same words."""

import re

import pytest

from tests import tiny_sources
from videollm_mod_jax.data.annotations import Report, Source
from videollm_mod_jax.data.builders.registry import DATASETS

SPLITS = ("train", "validation", "test")


@pytest.mark.parametrize("name", DATASETS)
def test_the_page_names_the_splits_in_one_line(name, tmp_path):
    (named,) = re.findall(r"^Splits: (.*)\.$", DATASETS[name].page, re.MULTILINE)
    videos = tiny_sources.SOURCES[name](tmp_path)
    found = DATASETS[name].read(Source(tmp_path, videos, 100, Report())).splits
    named = [split.strip("`") for split in named.split(", ")]
    assert named == [split for split in SPLITS if split in named]
    # A split is left out where a source lacks its files, as some of the small ones do.
    assert [split for split in named if split in found] == list(found)


@pytest.mark.parametrize("name", DATASETS)
def test_the_page_says_what_becomes_of_long_stretches(name):
    assert "`max_frames`" in DATASETS[name].page or name.startswith("image_qa_")


@pytest.mark.parametrize("name", DATASETS)
def test_the_page_says_that_some_texts_are_reserved(name):
    assert "`<v>`" in DATASETS[name].page


@pytest.mark.parametrize("name", DATASETS)
def test_the_page_fits_a_terminal(name):
    lines = [line for line in DATASETS[name].page.split("\n") if "http" not in line]
    assert max(map(len, lines)) <= 100
