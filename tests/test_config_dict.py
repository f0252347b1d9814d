"""Ranges of numbers, and that every field of every config has one and keeps it."""

import dataclasses
import importlib
import math
import pkgutil
import sys
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import pytest

import videollm_mod_jax
from videollm_mod_jax.benchmarking.streaming import StreamSettings
from videollm_mod_jax.config_dict import COUNT, Checked, Interval, build
from videollm_mod_jax.data.augment import Disturbance
from videollm_mod_jax.data.builders.counting import Split
from videollm_mod_jax.data.builders.stored import Description
from videollm_mod_jax.data.example import Budget
from videollm_mod_jax.data.feature_index import FeatureMeta, Place, ShardIndex
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.evaluation.answers import Decoding
from videollm_mod_jax.experiment import Experiment, plain
from videollm_mod_jax.models import Execution
from videollm_mod_jax.models.config import RopeScaling
from videollm_mod_jax.studying.config import StudyConfig
from videollm_mod_jax.studying.workers import Devices
from videollm_mod_jax.training.checkpoint import Dialogue
from videollm_mod_jax.training.metrics import Written

for _module in pkgutil.walk_packages(videollm_mod_jax.__path__, "videollm_mod_jax."):
    if not _module.name.endswith("__main__"):
        importlib.import_module(_module.name)


def config_file(name):
    sys.path.insert(0, str(Path(__file__).parent.parent / "configs"))
    try:
        return plain(importlib.import_module(name).get_config())
    finally:
        del sys.path[0]


@pytest.fixture(scope="module")
def examples():
    """A valid instance of every config, by its class."""
    digits, study = config_file("digits"), config_file("study_digits")
    digits["model"]["decoder"]["rope_scaling"] = dataclasses.asdict(
        RopeScaling(
            kind="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_positions=8192,
        )
    )
    digits["model"]["routing"] |= {"insertion": [1, 3], "keep_ratio": [0.2, 0.2, 0.2, 0.2]}
    found = {}

    def collect(instance):
        found.setdefault(type(instance), instance)
        for field in dataclasses.fields(instance):
            value = getattr(instance, field.name)
            values = value.values() if isinstance(value, Mapping) else [value]
            for inner in values:
                if isinstance(inner, Checked):
                    collect(inner)

    collect(Experiment.from_table(digits))
    collect(build(StudyConfig, study["study"], "study"))
    collect(Budget(frames=4, text_tokens=10, labels=5))
    collect(Disturbance(probability=0.1, window=2))
    collect(Dialogue(system="Watch."))
    collect(Execution())
    collect(Decoding(max_new_tokens=8, temperature=0.5, samples=2, seed=0))
    collect(Written(lines=3, sha256="a"))
    collect(FeatureMeta(features_per_frame=3, width=4, fps=2.0, resolution=48, tower="a"))
    collect(ShardIndex(records=1, videos={"a": Place(record=0, frames=3)}, bad={}))
    split = Split(records=1, videos=1, frames=2, turns=2)
    collect(split)
    collect(
        Description(
            name="a",
            benchmark="stream",
            labels=(),
            fps=2.0,
            max_frames=3,
            splits={"train": split},
            sha256={},
        )
    )
    collect(Devices(platform="cpu", ids=(0,), seconds=1.5, workers=1))
    collect(StreamSettings(minutes=(1.0,), fps=2.0, streams=(1,), new_tokens=2, rounds=1, warmup=1))
    return found


def configs(cls=Checked):
    own = [c for c in cls.__subclasses__() if c.__module__.startswith("videollm_mod_jax.")]
    return [found for c in own for found in (c, *configs(c))]


def numbers(hint, intervals=()):
    """Yields (int or float, its intervals, whether in a tuple) of each number in a hint."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        yield from numbers(arguments[0], arguments[1:])
    elif origin in (typing.Union, types.UnionType):
        for option in arguments:
            yield from numbers(option)
    elif origin is tuple:
        for kind, found, _ in numbers(arguments[0]):
            yield kind, found, True
    elif hint in (int, float):
        yield hint, intervals, False


FIELDS = [
    (cls, field.name)
    for cls in configs()
    for field in dataclasses.fields(cls)
    if any(numbers(typing.get_type_hints(cls, include_extras=True)[field.name]))
]


def test_every_config_is_checked_and_tried_here(examples):
    assert len(FIELDS) > 70
    assert set(configs()) == set(examples)
    for name, module in list(sys.modules.items()):
        if name.startswith("videollm_mod_jax."):
            for cls in vars(module).values():
                # DigitsConfig is a table of TFDS; it is made of a DrawConfig.
                if type(cls) is type and cls.__name__.endswith("Config"):
                    assert issubclass(cls, Checked) or cls.__name__ == "DigitsConfig", cls


@pytest.mark.parametrize(("cls", "field"), FIELDS)
def test_every_number_has_a_range_and_keeps_it(examples, cls, field):
    hint = typing.get_type_hints(cls, include_extras=True)[field]
    valid = examples[cls]
    table = {f.name: getattr(valid, f.name) for f in dataclasses.fields(cls)}
    for kind, intervals, in_tuple in numbers(hint):
        assert len(intervals) == 1, f"{cls.__name__}.{field} has no range"
        nonsense = [math.nan, math.inf, -math.inf, 10**30, -(10**30), 10**5000, 1e300]
        nonsense += ["1", {}, True, b"1"] if kind is float else ["1", {}, True, 1.0]
        nonsense += [number for number in (0, -1, -2, -7) if number not in intervals[0]]
        for bad in nonsense:
            value = bad
            if in_tuple:
                value = (bad, *getattr(valid, field)[1:])
            elif isinstance(bad, str) and str in typing.get_args(hint):
                continue
            for make in (
                lambda value=value: build(cls, table | {field: value}, "config.part"),
                lambda value=value: dataclasses.replace(valid, **{field: value}),
            ):
                with pytest.raises(UserError, match=rf"(part|{cls.__name__})\.{field}\b") as error:
                    make()
                assert len(str(error.value)) < 500


def test_an_instance_stays_hashable_and_equal(examples):
    for cls in configs():
        valid = examples[cls]
        assert dataclasses.replace(valid) == valid
        if not any(isinstance(getattr(valid, f.name), dict) for f in dataclasses.fields(cls)):
            assert cls is Experiment or hash(valid) == hash(dataclasses.replace(valid))


@dataclasses.dataclass(frozen=True)
class Sizes(Checked):
    sizes: tuple[COUNT, ...]
    inner: Budget | None = None


def test_the_constructor_takes_what_it_keeps_and_nothing_that_looks_like_it():
    table = {"frames": 1, "text_tokens": 1, "labels": 1}
    built = build(Sizes, {"sizes": [1, 2], "inner": table}, "there")
    assert built == Sizes((1, 2), Budget(1, 1, 1))
    with pytest.raises(UserError, match=r"Sizes.sizes is \[1, 2\]; expected tuple"):
        Sizes([1, 2])
    with pytest.raises(UserError, match=r"Sizes.inner is \{"):
        Sizes((1, 2), table)
    with pytest.raises(UserError, match=r"there.sizes\[1\] is 0; expected a number in \[1, "):
        build(Sizes, {"sizes": [1, 0], "inner": None}, "there")


@pytest.mark.parametrize(
    ("text", "inside", "outside", "said"),
    [
        ("[0, 1)", [0, 0.5, 0.999], [-1e-9, 1, 2, math.nan], "a number in [0, 1)"),
        ("(0, 1]", [1e-300, 1], [0, 1.1, math.inf], "a number in (0, 1]"),
        ("[1, inf)", [1, 10**30], [0, math.inf, math.nan], "1 or more"),
        ("(0, inf)", [1e-300], [0, -1, math.inf], "more than 0"),
        ("[-1, 2**20]", [-1, 2**20], [-2, 2**20 + 1], "a number in [-1, 2**20]"),
    ],
)
def test_intervals(text, inside, outside, said):
    interval = Interval(text)
    assert all(value in interval for value in inside)
    assert not any(value in interval for value in outside)
    assert str(interval) == said
