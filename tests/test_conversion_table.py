"""The table's mechanics against coordinates written out by hand, and its messages."""

import itertools

import numpy as np
import pytest

from videollm_mod_jax.conversion.table import Entry, Rule, Table, check_shape, join, match
from videollm_mod_jax.errors import UserError

# Shapes of a variable (of one layer of it) and the ways in which its axes can lie in the tensor.
MOVES = [
    *[((), None), ((4,), None), ((3, 4), None), ((3, 4), (1, 0))],
    *[((2, 3, 4, 5), axes) for axes in ((2, 3, 1, 0), (3, 0, 2, 1), (0, 1, 2, 3))],
]
COMBINATIONS = [
    (shape, axes, part, squeeze, row)
    for (shape, axes), part, squeeze, row in itertools.product(
        MOVES, [(0, 1), (1, 3)], [False, True], [None, 2]
    )
    if part == (0, 1) or shape
]


def element(entry, index, extent):
    """Where in the tensor a variable's element lies, from the definitions of the fields."""
    place = list(index)
    if entry.axes is not None:
        for ours, theirs in enumerate(entry.axes):
            place[theirs] = index[ours]
    if entry.part[1] > 1:
        place[0] += entry.part[0] * extent
    return (0, *place) if entry.squeeze else tuple(place)


@pytest.mark.parametrize(("shape", "axes", "part", "squeeze", "row"), COMBINATIONS)
def test_axes_parts_and_rows_are_where_they_are_said_to_be(shape, axes, part, squeeze, row):
    rng = np.random.default_rng(0)
    entry = Entry("theirs", "ours", axes, part, squeeze, row)
    whole = shape if row is None else (5, *shape)
    tensor = rng.normal(size=entry.source_shape(whole))
    block = entry.to_target(tensor)
    assert block.shape == shape
    extent = tensor.shape[1 if squeeze else 0] // part[1] if shape else 0
    for index in np.ndindex(shape):
        assert block[index] == tensor[element(entry, index, extent)]
    # Back: one part of the tensor, with its axes in place.
    parts = [
        Entry("theirs", "ours", axes, (p, part[1]), squeeze, row).from_target(
            Entry("theirs", "ours", axes, (p, part[1]), squeeze, row).to_target(tensor)
        )
        for p in range(part[1])
    ]
    restored = np.concatenate(parts, axis=1 if squeeze else 0) if shape else parts[0]
    np.testing.assert_array_equal(restored, tensor)
    for _ in range(10):
        ends = [np.sort(rng.choice(n + 1, 2, replace=False)) for n in shape]
        index = tuple(slice(int(a), int(b)) for a, b in ends)
        source = tensor[entry.source_index(index, whole)]
        alone = Entry("theirs", "ours", axes, (0, 1), squeeze, row)
        np.testing.assert_array_equal(alone.to_target(source), block[index])


def test_source_index_is_the_drawn_one():
    entry = Entry("theirs", "ours", (1, 0), (1, 3), False, None)
    index = entry.source_index((slice(0, 2), slice(1, 3)), (4, 4))
    assert index == (slice(5, 7), slice(0, 2))


def test_open_slices_mean_the_whole_axis():
    entry = Entry("theirs", "ours", (1, 0), (0, 1), False, None)
    assert entry.source_index((slice(None), slice(2, None)), (4, 6)) == (slice(2, 6), slice(0, 4))


def test_rules_give_the_drawn_entries():
    q = Rule(
        source="layers.{i}.self_attn.q_proj.weight",
        target="decoder/layer_{i}/block/attention/q/kernel",
        axes=(1, 0),
        layers=(0, 1),
    )
    assert [(e.source, e.target, e.row) for e in q.entries()] == [
        ("layers.0.self_attn.q_proj.weight", "decoder/layer_0/block/attention/q/kernel", None),
        ("layers.1.self_attn.q_proj.weight", "decoder/layer_1/block/attention/q/kernel", None),
    ]
    fc1 = Rule(
        source="encoder.layers.{i}.mlp.fc1.weight",
        target="vision/blocks/mlp/fc1/kernel",
        axes=(1, 0),
        layers=(4, 5),
    )
    assert [(e.source, e.target, e.row) for e in fc1.entries()] == [
        ("encoder.layers.4.mlp.fc1.weight", "vision/blocks/mlp/fc1/kernel", 0),
        ("encoder.layers.5.mlp.fc1.weight", "vision/blocks/mlp/fc1/kernel", 1),
    ]
    k = Rule(
        source="head.attention.in_proj_weight",
        target="vision/head/attention/k/kernel",
        axes=(1, 0),
        part=(1, 3),
    )
    packed = np.arange(3 * 4 * 4).reshape(12, 4)
    (entry,) = k.entries()
    np.testing.assert_array_equal(entry.to_target(packed), packed[4:8].T)


def test_a_table_groups_parts_and_layers_in_their_order():
    table = Table(
        rules=(
            *[Rule(source="qkv", target=name, part=(p, 2)) for p, name in ((1, "k"), (0, "q"))],
            Rule(source="b.{i}", target="stack", layers=(3, 4)),
        )
    )
    assert [entry.target for entry in table.by_source()["qkv"]] == ["q", "k"]
    assert [entry.source for entry in table.by_target()["stack"]] == ["b.3", "b.4"]


@pytest.mark.parametrize(
    "rules",
    [
        (Rule(source="a", target="x"), Rule(source="a", target="y")),
        (Rule(source="a", target="x"), Rule(source="b", target="x")),
        (
            Rule(source="a", target="x", part=(0, 2)),
            Rule(source="a", target="y", part=(0, 2)),
        ),
    ],
)
def test_a_table_uses_and_fills_everything_once(rules):
    with pytest.raises(ValueError, match="2 times"):
        Table(rules=rules)
    with pytest.raises(ValueError, match="2 times"):
        join(*[Table(rules=(rule,)) for rule in rules])


TABLE = Table(
    rules=(
        Rule(source="model.embed.weight", target="embedding"),
        Rule(source="layers.{i}.norm.weight", target="layer_{i}/scale", layers=(0, 1)),
    ),
    same={"lm_head.weight": "model.embed.weight"},
    buffers={"position_ids": lambda: np.arange(3)},
    left_out={r"text_model\..*": "has no place"},
)
NAMES = ("model.embed.weight", "layers.0.norm.weight", "layers.1.norm.weight")


def test_match_sorts_names_by_what_they_are():
    found = match(
        TABLE, [*NAMES, "position_ids", "text_model.norm.weight", "lm_head.weight"], "here"
    )
    assert found.used == NAMES
    assert (found.same, found.buffers) == (("lm_head.weight",), ("position_ids",))
    assert found.left_out == ("text_model.norm.weight",)
    bare = match(TABLE, NAMES, "here")
    assert (bare.same, bare.buffers, bare.left_out) == ((), (), ())


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (NAMES[1:], ["/models/a has no tensor 'model.embed.weight'"]),
        (NAMES[:1], ["'layers.0.norm.weight' (and 1 more)"]),
        (
            ("model.embed.weights", *NAMES[1:]),
            ["no tensor 'model.embed.weight'", "the nearest is 'model.embed.weights'"],
        ),
        (
            (*NAMES, "layers.2.norm.weight"),
            ["'layers.2.norm.weight'", "no rule", "the nearest is 'layers.1.norm.weight'"],
        ),
        ((*NAMES, "model.text_model.x"), ["'model.text_model.x'"]),
    ],
)
def test_missing_and_unknown_tensors_are_named(names, words):
    with pytest.raises(UserError) as error:
        match(TABLE, names, "/models/a")
    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)


def test_a_wrong_shape_is_named_with_both_shapes():
    entry = Entry("a.weight", "a/kernel", (1, 0), (0, 1), False, None)
    check_shape(entry, (4, 6), (6, 4), "/models/a.safetensors")
    with pytest.raises(UserError, match=r"a\.safetensors: a\.weight has the shape \[4, 6\].*6, 4"):
        check_shape(entry, (4, 6), (4, 6), "/models/a.safetensors")


def test_join_keeps_what_its_tables_say():
    other = Table(rules=(Rule(source="b", target="y"),), left_out={"c": "why"})
    both = join(TABLE, other)
    assert [entry.source for entry in both.entries()] == [*NAMES, "b"]
    assert both.same == TABLE.same
    assert list(both.buffers) == ["position_ids"]
    assert both.left_out == {r"text_model\..*": "has no place", "c": "why"}
