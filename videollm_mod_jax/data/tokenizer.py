"""Any Hugging Face `tokenizer.json` that encodes a live dialogue as it encodes a whole one."""

import contextlib
import json
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from videollm_mod_jax.data import dialogue, files
from videollm_mod_jax.errors import UserError, shown

BOS, EOS = "<|begin_of_text|>", "<|eot_id|>"
# Words, digits and marks with the space before them, and line ends one by one: no merge reaches
# across the seams of the dialogue.
_BPE_PATTERN = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]|\n|[^\S\n]+"


class Encoding(NamedTuple):
    """Token ids (n,) int32 and the character span of each token (n, 2) int32, half open.

    Tokens that are parts of one character all carry that character's span.
    """

    ids: np.ndarray
    offsets: np.ndarray


class Tokenizer:
    """Text to token ids and back, with the placeholder `<v>` known at run time only.

    Attributes:
      bos: text of the token that begins a sequence, "" when there is none.
      eos: text of the token that ends an answer.
      eos_id: its id.
      interval_id: id of the token `,` between two frames, by which the model stays silent.
      placeholder_id: id of `<v>` in an `Encoding`; it is not in the vocabulary of the model.
      vocab_size: one more than the largest id, without the placeholder.
    """

    def __init__(self, definition: str, bos: str, eos: str, source: str = "tokenizer"):
        """Wraps a tokenizer.

        Args:
          definition: the content of a `tokenizer.json`.
          bos: text of the token that begins a sequence, "" for none.
          eos: text of the token that ends an answer.
          source: what error messages call it.

        Raises:
          UserError: the definition cannot be read, bos, eos or the interval is not one token, or a
            dialogue in pieces has other ids than the same dialogue as a whole.
        """
        self._definition = definition
        self.bos, self.eos = bos, eos
        with _refused(source):
            self._read(bos, eos, source)
            self._check_pieces(source)

    def _read(self, bos: str, eos: str, source: str) -> None:
        adapted = json.dumps(without_prefix_space(json.loads(self._definition)))
        self._tokenizer = tokenizers.Tokenizer.from_str(adapted)
        placeholder = tokenizers.AddedToken(dialogue.PLACEHOLDER, special=True, normalized=False)
        known = self._tokenizer.get_vocab()
        known.pop(dialogue.PLACEHOLDER, None)
        self.vocab_size = max(known.values(), default=0) + 1
        for name, token in (("bos", bos), ("eos", eos)):
            if token and token not in known:
                raise UserError(f"{source}: {name} {token!r} is not a token of its vocabulary")
        self._tokenizer.add_special_tokens(
            [placeholder]
            + [tokenizers.AddedToken(t, special=True, normalized=False) for t in (bos, eos) if t]
        )
        # Templates are ours, and exact spans are needed: some post-processors trim the spaces.
        self._tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
        self.eos_id = known[eos]
        self.placeholder_id = self._tokenizer.token_to_id(dialogue.PLACEHOLDER)
        interval = self.encode(dialogue.PLACEHOLDER + dialogue.INTERVAL + dialogue.PLACEHOLDER).ids
        if len(interval) != 3:
            raise UserError(
                f"{source}: the interval {dialogue.INTERVAL!r} between two frames: expected one "
                f"token, found {len(interval) - 2}; use another tokenizer"
            )
        self.interval_id = int(interval[1])

    @classmethod
    def load(
        cls, path: str | os.PathLike, bos: str | None = None, eos: str | None = None
    ) -> "Tokenizer":
        """Reads a `tokenizer.json`, and bos and eos from the `tokenizer_config.json` beside it.

        Args:
          path: the file, or a directory that holds it.
          bos: overrides the config's `bos_token` ("" for none).
          eos: overrides the config's `eos_token`.

        Raises:
          UserError: a missing or unreadable file, no eos, or what `__init__` refuses.
        """
        path = pathlib.Path(path)
        path = path / "tokenizer.json" if path.is_dir() else path
        config = {}
        beside = path.with_name("tokenizer_config.json")
        if not path.is_file():
            raise UserError(f"{path}: cannot read the tokenizer: there is no such file")
        files.read_json_object(path)  # which says in one line what is wrong with it
        definition = path.read_text(encoding="utf-8-sig")
        if beside.is_file():
            config = files.read_json_object(beside)
        bos = _token_text(config, "bos_token", beside) if bos is None else bos
        eos = _token_text(config, "eos_token", beside) if eos is None else eos
        if not eos:
            raise UserError(
                f"{path}: the tokenizer has no eos token; write the token that ends an answer as "
                f"'eos_token' in {beside.name} beside it"
            )
        return cls(definition, bos, eos, source=str(path))

    def check_rows(self, rows: int, where: str, remedy: str) -> None:
        """Checks that a model has a row of embeddings for every token, special and added ones too.

        An id beyond the last row would silently take another row.

        Args:
          rows: of the model's embeddings.
          where: the model or its source, for the message.
          remedy: what helps, for the message.

        Raises:
          UserError: a token has no row; the first one is named.
        """
        if self.vocab_size <= rows:
            return
        ids = self._tokenizer.get_vocab()
        ids.pop(dialogue.PLACEHOLDER, None)
        beyond = sorted((i, token) for token, i in ids.items() if i >= rows)
        others = f" (and {len(beyond) - 1} more)" if len(beyond) > 1 else ""
        raise UserError(
            f"{where}: its tokenizer has the token {shown(beyond[0][1])} with the id "
            f"{beyond[0][0]}{others}; its embeddings have {rows} rows, for smaller ids: {remedy}"
        )

    def save(self, directory: str | os.PathLike) -> None:
        """Writes `tokenizer.json` (as it was read) and `tokenizer_config.json` for `load`."""
        config = json.dumps({"bos_token": self.bos, "eos_token": self.eos}, indent=2)
        contents = {"tokenizer.json": self._definition, "tokenizer_config.json": config}
        for name, content in contents.items():
            with files.written_aside(pathlib.Path(directory) / name) as aside:
                aside.write_text(content, encoding="utf-8")

    def encode(self, text: str) -> Encoding:
        """Encodes a text; nothing is added to it."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return Encoding(
            np.array(encoding.ids, np.int32), np.array(encoding.offsets, np.int32).reshape(-1, 2)
        )

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens such as eos."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def _check_pieces(self, source: str) -> None:
        """Compares what a live session encodes, piece by piece, with the whole text's ids."""
        whole = self.encode("".join(text for text, _ in _probe_pieces(self.bos, self.eos))).ids
        at = 0
        for text, answered in _probe_pieces(self.bos, self.eos):
            if answered:  # the model says it, token by token; nothing encodes it alone
                at += 1 + int(np.argmax(whole[at:] == self.eos_id))
                continue
            ids = self.encode(text).ids
            if not np.array_equal(whole[at : at + len(ids)], ids):
                raise UserError(
                    f"{source}: the piece {text!r} encoded alone differs from the same text inside "
                    "a dialogue, so a live session would not match training; use another tokenizer"
                )
            at += len(ids)


def without_prefix_space(definition: Any) -> Any:
    """A `tokenizer.json` that puts no space in front of a text that has none.

    The tokenizers of Llama 2 and its kin begin every text as if it were a new word, which is right
    for a whole text and wrong for a piece of one.

    ```
    {"normalizer": {"type": "Sequence", "normalizers":       {"normalizer": {"type": "Sequence",
        [{"type": "Prepend", "prepend": "▁"},            ->      "normalizers": [{"type": "Replace",
         {"type": "Replace", ...}]}}                              ...}]}}
    {"pre_tokenizer": {"type": "Metaspace",              ->  {"pre_tokenizer": {"type": "Metaspace",
        "prepend_scheme": "first"}}                              "prepend_scheme": "never"}}
    ```
    """
    if isinstance(definition, list):
        return [
            without_prefix_space(item)
            for item in definition
            if not (isinstance(item, dict) and item.get("type") == "Prepend")
        ]
    if not isinstance(definition, dict):
        return definition
    if definition.get("type") == "Metaspace" and "prepend_scheme" in definition:
        return definition | {"prepend_scheme": "never"}
    if definition.get("type") == "ByteLevel" and "add_prefix_space" in definition:
        return definition | {"add_prefix_space": False}
    return {
        # The vocabulary and the merges are large, and hold no such thing.
        key: value if key == "model" else without_prefix_space(value)
        for key, value in definition.items()
    }


def _probe_pieces(bos: str, eos: str) -> list[tuple[str, bool]]:
    """A dialogue as (piece, said by the model), with every seam that a live session can have."""
    frame = dialogue.PLACEHOLDER * 2
    opening = dialogue.opening("Watch the video.", bos)
    return [
        (opening + dialogue.STREAM_OPEN, False),
        (frame, False),
        (dialogue.INTERVAL, False),
        (frame, False),
        (dialogue.ANSWER_PROMPT, False),
        (" A cat." + eos, True),
        (dialogue.STREAM_OPEN, False),
        (frame, False),
        (dialogue.question_prompt("How many?", stream_open=True), False),
        (" 2" + eos, True),
        (dialogue.question_prompt("Where", stream_open=False), False),
        (" here" + eos, True),
    ]


def train_bpe(lines: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a small byte-level BPE; the same lines give the same tokenizer, byte by byte.

    Args:
      lines: texts, such as rendered dialogues; placeholders and special tokens in them are cut out.
      vocab_size: at most this many tokens, of which 256 are the bytes and two are bos and eos.

    Raises:
      UserError: `vocab_size` has no room for the bytes and the special tokens.
    """
    if vocab_size < 258:
        raise UserError(
            f"vocab_size: expected 258 (256 bytes, bos, eos) or more, found {vocab_size}"
        )
    special = re.compile("|".join(map(re.escape, (BOS, EOS, dialogue.PLACEHOLDER))))
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_BPE_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((part for line in lines for part in special.split(line)), trainer)
    return Tokenizer(bpe.to_str(), BOS, EOS, source="trained BPE")


def _token_text(config: dict[str, Any], key: str, where: pathlib.Path) -> str:
    value = config.get(key) or ""
    text = value.get("content") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise UserError(
            f"{where}: {key} is {shown(value)}; expected a text, or {{'content': text}}"
        )
    return text


@contextlib.contextmanager
def _refused(source: str) -> Iterator[None]:
    """Turns all that the library raises for a definition that it does not take into one line."""
    try:
        yield
    except UserError:
        raise
    # The library raises bare Exceptions, and panics, which are none.
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())
        raise UserError(
            f"{source}: not a Hugging Face tokenizer.json that can be read: {reason:.200}; "
            "download it again, or save it anew with transformers"
        ) from error
