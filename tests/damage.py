"""Damage of every kind to files: to their bytes, or to one value of what they hold."""

import copy
import csv
import gzip
import io
import json
import math
import struct

import pyarrow
from pyarrow import parquet

TABLES = {".csv": ",", ".txt": "\t"}


def insert(content, rng, new):
    place = rng.randrange(len(content) + 1)
    return content[:place] + new + content[place:]


def lines(content, rng, change):
    split = content.splitlines(keepends=True)
    change(split, rng)
    return b"".join(split)


# Damage to the bytes of a file: bytes and a random generator to other bytes.
TO_BYTES = {
    "empty file": lambda content, rng: b"",
    "blank file": lambda content, rng: b" \n\n",
    "cut in its beginning": lambda content, rng: content[: rng.randrange(1, 10)],
    "cut anywhere": lambda content, rng: content[: rng.randrange(len(content))],
    "cut before its end": lambda content, rng: content[: -rng.randrange(1, 5)],
    "cut at its front": lambda content, rng: content[rng.randrange(1, len(content)) :],
    "byte order mark": lambda content, rng: b"\xef\xbb\xbf" + content,
    "utf-16": lambda content, rng: content.decode("latin-1").encode("utf-16"),
    "invalid utf-8": lambda content, rng: insert(content, rng, b"\xff"),
    "half a character": lambda content, rng: insert(content, rng, b"\xe2\x82"),
    "nul": lambda content, rng: insert(content, rng, b"\0"),
    "other byte": lambda content, rng: insert(content[:-1], rng, bytes([rng.randrange(256)])),
    "open quote": lambda content, rng: insert(content, rng, b'"'),
    "open bracket": lambda content, rng: insert(content, rng, b"["),
    "separator": lambda content, rng: insert(content, rng, b","),
    "line end": lambda content, rng: insert(content, rng, b"\n"),
    "compressed": lambda content, rng: gzip.compress(content),
    "twice": lambda content, rng: content * 2,
    "null": lambda content, rng: b"null",
    "number": lambda content, rng: b"42",
    "text": lambda content, rng: b'"text"',
    "list": lambda content, rng: b"[]",
    "object": lambda content, rng: b"{}",
    "list of null": lambda content, rng: b"[null, null]",
    "object of null": lambda content, rng: b'{"a": null, "videos": null, "annotations": null}',
    "deep lists": lambda content, rng: b"[" * 200_000,
    "deep objects": lambda content, rng: b'{"a":' * 200_000,
    "web page": lambda content, rng: b"<!DOCTYPE html>\n<html><body>404</body></html>\n",
    "line missing": lambda content, rng: lines(
        content, rng, lambda of, rng: of.pop(rng.randrange(len(of)))
    ),
    "lines shuffled": lambda content, rng: lines(content, rng, lambda of, rng: rng.shuffle(of)),
}


def rename(parent, key):
    if isinstance(parent, dict):
        parent[f"{key}x"] = parent.pop(key)


def wrap(value):
    return lambda parent, key, rng: parent.__setitem__(key, value(parent[key]))


def put(value):
    return lambda parent, key, rng: parent.__setitem__(key, copy.deepcopy(value))


def swap(parent, key, rng):
    other = rng.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
    parent[key], parent[other] = parent[other], parent[key]


def shuffle(parent, key, rng):
    if isinstance(parent[key], list):
        rng.shuffle(parent[key])


def repeat(parent, key, rng):
    if isinstance(parent[key], list):
        parent[key] *= 2
    elif isinstance(parent[key], dict) and parent[key]:
        first = next(iter(parent[key]))
        parent[key][f"{first} again"] = copy.deepcopy(parent[key][first])


def times(factor, more=0):
    def change(value):
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return value * factor + more if number else value

    return wrap(change)


# Damage to a value inside a file: its container, its key there and a random generator.
TO_VALUES = {
    "value null": put(None),
    "value true": put(True),
    "value zero": put(0),
    "value negative": put(-1),
    "value fraction": put(0.5),
    "value large": put(1e308),
    "value larger than a float": put(10**400),
    "value of more digits than Python reads": put("DIGITS"),
    "value nan": put(math.nan),
    "value infinite": put(math.inf),
    "value minus infinity": put(-math.inf),
    "value empty text": put(""),
    "value blank": put(" \n\t"),
    "value other text": put("what?"),
    "value number as text": put("3"),
    "value time as text": put("-1:77"),
    "value nan as text": put("nan"),
    "value huge text": put("x" * 200_000),
    "value half a surrogate pair": put("a \ud83d b"),
    "value placeholder": put("a <v> b"),
    "value nul": put("a\0b"),
    "value dialogue": put("a\nUser: b\nAssistant: c"),
    "value path": put("../../etc/passwd"),
    "value empty list": put([]),
    "value empty object": put({}),
    "value list of null": put([None]),
    "value nested lists": put([[[[]]]]),
    "value nested objects": put({"a": {"a": {"a": None}}}),
    "value in a list": wrap(lambda value: [value]),
    "value in an object": wrap(lambda value: {"value": value}),
    "value as text": wrap(lambda value: json.dumps(value)),
    "value opposite": times(-1),
    "value a million more": times(1, 1_000_000),
    "value a thousandth": times(0.001),
    "value of a neighbour": swap,
    "key renamed": lambda parent, key, rng: rename(parent, key),
    "key absent": lambda parent, key, rng: parent.__delitem__(key),
    "elements repeated": repeat,
    "elements shuffled": shuffle,
}


def read_tree(path):
    """The values of a file in a list, and what writes such a list."""
    content = path.read_bytes()
    if path.suffix == ".parquet":

        def to_parquet(tree):
            parquet.write_table(pyarrow.Table.from_pylist(tree), path)

        return parquet.read_table(path).to_pylist(), to_parquet
    if path.suffix == ".safetensors":
        (length,) = struct.unpack("<Q", content[:8])

        def to_safetensors(tree):
            header = json.dumps(tree[0]).encode()
            path.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])

        return [json.loads(content[8 : 8 + length])], to_safetensors
    text = content.decode()
    if path.suffix in TABLES:
        delimiter = TABLES[path.suffix]

        def to_table(tree):
            out = io.StringIO(newline="")
            csv.writer(out, delimiter=delimiter).writerows(tree)
            path.write_bytes(out.getvalue().encode(errors="surrogatepass"))

        return list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)), to_table
    try:
        tree, end = [json.loads(text)], ""
    except ValueError:
        tree, end = [json.loads(line) for line in text.splitlines()], "\n"

    def to_json(tree):
        text = "".join(json.dumps(value) + end for value in tree)
        path.write_text(text.replace('"DIGITS"', "9" * 5000))

    return tree, to_json


def places(tree):
    """Container and key of every value below a list or object."""
    keys = list(tree) if isinstance(tree, dict) else range(len(tree))
    for key in keys:
        yield tree, key
        if isinstance(tree[key], (list, dict)):
            yield from places(tree[key])
