"""Damaged annotations of any dataset: a named error or a counted drop, never anything else.

Every kind of damage is done to every dataset's small source, at several places of its files.
"""

import json
import random

import pyarrow
import pytest

from tests import tiny_sources
from tests.damage import TABLES, TO_BYTES, TO_VALUES, places, read_tree
from videollm_mod_jax.data.annotations import Report, Source
from videollm_mod_jax.data.builders import counting, registry
from videollm_mod_jax.errors import UserError

PLACES = 6  # per dataset and kind of damage

# After these there may be fewer annotations, without one being lost.
FEWER = {"value empty list", "value empty object", "key absent", "value of a neighbour"}


class Damaged:
    """The small source of a dataset, which is damaged and restored again and again."""

    def __init__(self, name, directory):
        self.dataset = registry.DATASETS[name]
        self.directory = directory
        self.videos = tiny_sources.SOURCES[name](directory)
        self.files = sorted(path for path in directory.rglob("*") if path.is_file())
        self.contents = {path: path.read_bytes() for path in self.files}
        self.report = self.read()
        assert self.report is not None
        assert self.report.kept

    def restore(self, path):
        if path.is_dir():
            path.rmdir()
        path.write_bytes(self.contents[path])

    def read(self):
        """The report of reading all; None after an error that names what is wrong in one line."""
        report = Report()
        source = Source(self.directory, self.videos, 1200, report)
        try:
            parsed = self.dataset.read(source)
            records = [record for split in parsed.splits.values() for record in split]
        except UserError as error:
            message = str(error)
            assert "\n" not in message
            assert len(message) < 1000
            assert any(path.name in message for path in (*self.files, self.directory)), message
            return None
        for record in records:
            counting.check_record(record, self.videos)
            json.dumps(record.target)
        assert len({record.id for record in records}) == len(records)
        assert sum(bool(record.turns) for record in records) == len(records)
        for example in (example for of in report.examples.values() for example in of):
            assert len(example) < 1000
            assert any(path.name in example for path in self.files), example
        return report


@pytest.fixture(scope="module", params=sorted(registry.DATASETS))
def damaged(request, tmp_path_factory):
    return Damaged(request.param, tmp_path_factory.mktemp(request.param))


def test_there_is_a_small_source_of_every_dataset():
    assert set(tiny_sources.SOURCES) == set(registry.DATASETS)


def test_there_are_more_than_fifty_kinds_of_damage():
    assert len(TO_BYTES) + len(TO_VALUES) >= 50


@pytest.mark.parametrize("kind", TO_BYTES)
def test_damaged_bytes_are_an_error_or_counted(damaged, kind):
    rng = random.Random(kind)
    for _ in range(PLACES):
        path = rng.choice(damaged.files)
        try:
            path.write_bytes(TO_BYTES[kind](damaged.contents[path], rng))
            damaged.read()
        finally:
            damaged.restore(path)


@pytest.mark.parametrize("instead", ["nothing", "a directory"])
def test_a_missing_file_is_an_error_or_counted(damaged, instead):
    for path in damaged.files:
        try:
            path.unlink()
            if instead == "a directory":
                path.mkdir()
            damaged.read()
        finally:
            damaged.restore(path)


@pytest.mark.parametrize("kind", TO_VALUES)
def test_damaged_values_are_an_error_or_counted(damaged, kind):
    rng = random.Random(kind)
    for _ in range(PLACES):
        path = rng.choice(damaged.files)
        tree, write = read_tree(path)
        found = places(tree)
        if path.suffix in TABLES:  # whose cells are damaged here; a blank line is nothing
            found = ((row, key) for row, key in found if row is not tree)
        parent, key = rng.choice(list(found))
        TO_VALUES[kind](parent, key, rng)
        try:
            write(tree)
        except (pyarrow.ArrowException, AttributeError, TypeError, OverflowError, UnicodeError):
            assert path.suffix == ".parquet"
            continue  # such a file cannot hold it
        try:
            report = damaged.read()
        finally:
            damaged.restore(path)
        if report is not None and kind not in FEWER:
            counted = report.dropped - damaged.report.dropped
            assert report.kept >= damaged.report.kept or counted, f"{path.name}: {key!r}"
