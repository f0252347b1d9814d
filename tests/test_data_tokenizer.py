"""Tokenizers from files: what is accepted, what is refused, and that pieces equal the whole."""

import json
import pickle

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from videollm_mod_jax.data import dialogue
from videollm_mod_jax.data.dialogue import Assistant, Stream, System, User
from videollm_mod_jax.data.tokenizer import (
    BOS,
    EOS,
    Tokenizer,
    train_bpe,
    without_prefix_space,
)
from videollm_mod_jax.errors import UserError

# The pre-tokenizer of Llama 3: it keeps ".\n\n" together, so the opening runs into what follows it.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CORPUS = ["Watch.\n\n[", "]\nAssistant: A cat.", "]\nUser: How many?\nAssistant: Two.\n\n["] * 20
CONVERSATION = (
    System("Watch."),
    Stream(3),
    Assistant("A cat."),
    Stream(1, learn=0),
    User("How many?"),
    Assistant("Two."),
    User("Where?"),
    Assistant("Here."),
    Stream(2),
    Assistant("Done."),
)


def definition(pre_tokenizer=None, normalizer=None, post_processor=None):
    bpe = tokenizers.Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        ([pre_tokenizer] if pre_tokenizer else []) + [byte_level]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(CORPUS, trainer)
    if normalizer:
        bpe.normalizer = normalizer
    if post_processor:
        bpe.post_processor = post_processor
    return bpe.to_str()


def llama2(**changes):
    """A SentencePiece BPE as transformers writes it: spaces are letters, other bytes fall back."""
    bpe = tokenizers.Tokenizer(models.BPE())
    # SentencePiece learns no piece that reaches into the next word or line.
    words = pre_tokenizers.Split("▁", "merged_with_next")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split("\n", "removed"), words])
    trainer = trainers.BpeTrainer(
        vocab_size=120, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    bpe.train_from_iterator([line.replace(" ", "▁") for line in CORPUS], trainer)
    written = json.loads(bpe.to_str())
    vocab = written["model"]["vocab"]
    vocab |= {f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)}
    written["model"] |= {"byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True}
    space = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    steps = [space, {"type": "ByteFallback"}, {"type": "Fuse"}, strip]
    written["decoder"] = {"type": "Sequence", "decoders": steps}
    return json.dumps(written | {"pre_tokenizer": None, "normalizer": None} | changes)


PREPEND = {"type": "Prepend", "prepend": "▁"}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": {"type": "Sequence", "normalizers": [PREPEND, REPLACE]}},
        {"pre_tokenizer": METASPACE},
    ],
    ids=["normalizer", "pre-tokenizer"],
)
def test_a_tokenizer_of_llama_2_encodes_pieces_as_it_encodes_the_whole(changes):
    tokenizer = Tokenizer(llama2(**changes), "<s>", "</s>")
    text = "]\nAssistant: A cat."
    ids = tokenizer.encode(text).ids
    # Nothing is put in front: the same letters are the same tokens wherever they stand.
    assert list(ids) == [t for part in ("]", "\n", text[2:]) for t in tokenizer.encode(part).ids]
    assert tokenizer.decode(tokenizer.encode(" A cat.").ids) == "A cat."
    assert tokenizer.interval_id == tokenizer.encode(",").ids[0]


def test_the_prefix_space_is_taken_out_of_a_definition_as_drawn():
    sequence = {"type": "Sequence", "normalizers": [PREPEND, REPLACE]}
    assert without_prefix_space({"normalizer": sequence, "model": {"merges": [PREPEND]}}) == {
        "normalizer": {"type": "Sequence", "normalizers": [REPLACE]},
        "model": {"merges": [PREPEND]},
    }
    found = without_prefix_space({"pre_tokenizer": METASPACE})
    assert found == {"pre_tokenizer": METASPACE | {"prepend_scheme": "never"}}


def llama3():
    split = pre_tokenizers.Split(tokenizers.Regex(LLAMA3), "isolated")
    return definition(split, post_processor=processors.ByteLevel(trim_offsets=True))


def live_pieces(tokenizer):
    """CONVERSATION as a live session meets it, each answer without the prompt before it."""
    frame = "<v>" * 2
    yield dialogue.opening("Watch.", tokenizer.bos) + dialogue.STREAM_OPEN
    yield from (frame, dialogue.INTERVAL, frame, dialogue.INTERVAL, frame)
    yield from (dialogue.ANSWER_PROMPT, " A cat." + tokenizer.eos)
    yield from (dialogue.STREAM_OPEN, frame)
    yield from (dialogue.question_prompt("How many?", True), " Two." + tokenizer.eos)
    yield from (dialogue.question_prompt("Where?", False), " Here." + tokenizer.eos)
    yield from (dialogue.STREAM_OPEN, frame, dialogue.INTERVAL, frame)
    yield from (dialogue.ANSWER_PROMPT, " Done." + tokenizer.eos)


@pytest.mark.parametrize(
    "make", [lambda: train_bpe(CORPUS, 300), lambda: Tokenizer(llama3(), BOS, EOS)]
)
def test_pieces_of_a_live_session_equal_the_whole(make):
    tokenizer = make()
    text = dialogue.render(CONVERSATION, 2, tokenizer.bos, tokenizer.eos).text
    pieces = list(live_pieces(tokenizer))
    assert "".join(pieces) == text
    ids = [i for piece in pieces for i in tokenizer.encode(piece).ids.tolist()]
    assert ids == tokenizer.encode(text).ids.tolist()


def test_the_opening_alone_would_differ():
    """Why the opening is one piece with what follows it."""
    tokenizer = Tokenizer(llama3(), BOS, EOS)
    apart = [*tokenizer.encode("Watch.\n").ids, *tokenizer.encode("\n[").ids]
    assert apart != tokenizer.encode("Watch.\n\n[").ids.tolist()


def test_a_tokenizer_that_merges_across_a_seam_is_refused():
    with pytest.raises(UserError, match=r"mine: the piece '.*Assistant:' encoded alone differs"):
        Tokenizer(definition(), BOS, EOS, source="mine")


def test_an_interval_of_two_tokens_is_refused():
    split = pre_tokenizers.Split(tokenizers.Regex(LLAMA3), "isolated")
    doubled = definition(split, normalizer=normalizers.Replace(",", ".;"))
    with pytest.raises(UserError, match=r"the interval ',' .* expected one token, found 2"):
        Tokenizer(doubled, BOS, EOS)


def test_interval_and_eos_are_what_a_dialogue_contains():
    tokenizer = train_bpe(CORPUS, 300)
    assert tokenizer.decode([tokenizer.interval_id]) == ","
    ids = tokenizer.encode(f"<v>,<v>]{EOS}").ids.tolist()
    assert ids[0] == ids[2] == tokenizer.placeholder_id
    assert ids[1] == tokenizer.interval_id
    assert ids[-1] == tokenizer.eos_id


def test_the_placeholder_is_not_in_the_vocabulary():
    tokenizer = train_bpe(CORPUS, 300)
    assert tokenizer.placeholder_id == tokenizer.vocab_size
    assert max(tokenizer.encode("".join(CORPUS) + EOS).ids) < tokenizer.vocab_size


def test_offsets_are_exact_and_shared_by_the_parts_of_a_character():
    for tokenizer in (train_bpe(CORPUS, 258), Tokenizer(llama3(), BOS, EOS)):
        text = "Watch é [x 字"
        ids, offsets = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        covered = [len(tokenizer.decode([i])) for i in ids]
        assert len(covered) == len(offsets)
        spans = [tuple(span) for span in offsets.tolist()]
        assert spans.count((len(text) - 1, len(text))) == 3  # the three bytes of the last one
        # No character is skipped, the spaces that post-processors like to trim included.
        assert sorted({i for a, b in spans for i in range(a, b)}) == list(range(len(text)))


@pytest.mark.parametrize("eos", [EOS, {"content": EOS, "special": True}])
def test_eos_is_found_beside_the_file(tmp_path, eos):
    (tmp_path / "tokenizer.json").write_text(llama3())
    config = {"bos_token": None, "eos_token": eos}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        tokenizer = Tokenizer.load(path)
        assert (tokenizer.bos, tokenizer.eos) == ("", EOS)
    assert Tokenizer.load(tmp_path, bos=BOS).bos == BOS


def test_a_tokenizer_without_eos_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text(llama3())
    with pytest.raises(UserError, match=r"tokenizer\.json: the tokenizer has no eos token"):
        Tokenizer.load(tmp_path)
    with pytest.raises(UserError, match="eos '</s>' is not a token"):
        Tokenizer.load(tmp_path, eos="</s>")
    assert Tokenizer.load(tmp_path, eos=EOS).eos == EOS


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer\.json: cannot read"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="not a Hugging Face"):
        Tokenizer.load(tmp_path, eos=EOS)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer_config\.json is not json"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    "config", ["[]", '"a"', '{"eos_token": ["a"]}', '{"eos_token": {"content": 3}}', "[" * 10**5]
)
def test_a_config_of_another_shape_is_one_line(tmp_path, config):
    train_bpe(CORPUS, 300).save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(config)
    with pytest.raises(UserError, match=r"tokenizer_config\.json"):
        Tokenizer.load(tmp_path)


def test_training_is_deterministic_and_saving_loses_nothing(tmp_path):
    for name in "ab":
        train_bpe(CORPUS, 300).save(tmp_path / name)
    files = ("tokenizer.json", "tokenizer_config.json")
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == sorted(files)
    text = "".join(CORPUS)
    loaded = Tokenizer.load(tmp_path / "a")
    for tokenizer in (loaded, pickle.loads(pickle.dumps(loaded))):
        assert (
            tokenizer.encode(text).ids.tolist() == train_bpe(CORPUS, 300).encode(text).ids.tolist()
        )
        assert (tokenizer.bos, tokenizer.eos) == (BOS, EOS)


def test_training_needs_room_for_the_bytes():
    with pytest.raises(UserError, match="vocab_size: expected 258"):
        train_bpe(CORPUS, 257)


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("tokenizer.json", "[]", "expected an object"),
        ("tokenizer.json", "{}", "not a Hugging Face tokenizer.json"),
        ("tokenizer.json", '{"model": {"type": "BPE", "vocab": {}, "merges": []}}', "not a token"),
        ("tokenizer_config.json", "[]", "expected an object"),
        ("tokenizer_config.json", '{"eos_token": 3}', "eos_token is 3; expected a text"),
        ("tokenizer_config.json", '{"eos_token": {"text": "a"}}', "eos_token is {'text': 'a'}"),
        ("tokenizer_config.json", "{}", "write the token that ends an answer as 'eos_token' in"),
    ],
)
def test_files_of_other_shapes_are_one_line(tmp_path, file, content, words):
    train_bpe(["a cat"] * 4, 300).save(tmp_path)
    (tmp_path / file).write_text(content)
    with pytest.raises(UserError) as error:
        Tokenizer.load(tmp_path)
    message = str(error.value)
    assert words in message
    assert file in message
    assert "\n" not in message
