"""Tokenizers: loaded from a local directory, with the few facts that rendering needs."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from jaxtune.core.errors import RequestError
from jaxtune.data.template import Endings, probe_endings, read_template
from jaxtune.data.tokenizer_files import KINDS, find_tokenizer_file, load_converted

_FAST_CLASSES = {"PreTrainedTokenizerFast", "TokenizersBackend"}


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A transformers tokenizer and the model's own end-of-sequence ids.

    Attributes:
        hf: the transformers tokenizer; it gives character offsets.
        config_eos: ids named by generation_config.json and config.json beside it.
    """

    hf: Any
    config_eos: tuple[int, ...] = ()

    @property
    def bos_id(self) -> int | None:
        """Id of the beginning-of-sequence token, or None."""
        return self.hf.bos_token_id

    @cached_property
    def eos_id(self) -> int | None:
        """Id that ends a document or a completion, or None."""
        if self.hf.eos_token_id is not None:
            return self.hf.eos_token_id
        return self.config_eos[0] if self.config_eos else None

    @cached_property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids at which generation stops: end of sequence, and the template's turn terminator."""
        ids = [] if self.eos_id is None else [self.eos_id]
        ids += self.config_eos
        if self.chat_template:
            terminator = self.encode(self.endings.last.strip(), special=False)
            if len(terminator) == 1:
                ids += terminator
        return tuple(dict.fromkeys(ids))

    @property
    def pad_id(self) -> int:
        """Id for padding; masks never depend on it, so any id would do."""
        for candidate in (self.hf.pad_token_id, self.eos_id):
            if candidate is not None:
                return candidate
        return 0

    @property
    def pad_apart(self) -> int | None:
        """Id of a special token that no text ends with, or None.

        Transformers' classifiers read their score in front of the padding, which they tell by its
        id: padding with EOS would make them pass over the EOS.
        """
        ends = {self.eos_id, *self.encode(self.endings.last.strip(), special=False)[-1:]}
        ends.add(self.hf.unk_token_id)
        candidates = (self.hf.pad_token_id, self.bos_id, *sorted(self.special_ids))
        return next((one for one in candidates if one is not None and one not in ends), None)

    @cached_property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included: every id is below it."""
        return max(len(self.hf), max(self.hf.get_vocab().values(), default=-1) + 1)

    @cached_property
    def adds_bos(self) -> bool:
        """Whether `encode` puts the beginning-of-sequence token first."""
        ids = self.encode("a")
        return self.bos_id is not None and ids[:1] == [self.bos_id]

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of the special tokens."""
        return frozenset(self.hf.all_special_ids)

    @property
    def chat_template(self) -> str | None:
        """The Jinja text that renders conversations, or None."""
        template = self.hf.chat_template
        if isinstance(template, dict):
            return template.get("default") or next(iter(template.values()), None)
        return template or None

    @cached_property
    def endings(self) -> Endings:
        """How the chat template closes assistant turns."""
        return probe_endings(self.hf) if self.chat_template else Endings()

    @property
    def turn_end(self) -> str:
        """Text that closes an assistant turn: the template's terminator, or EOS; "" if none."""
        return self.endings.last.strip() or self.hf.eos_token or ""

    def vocabulary(self) -> dict[str, int]:
        """Returns {token: id}, added tokens included."""
        return self.hf.get_vocab()

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Returns the ids of `text`, with BOS (and what else the tokenizer adds) if `special`.

        Raises:
            RequestError: the text holds half of a surrogate pair, which is no character.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RequestError(f"the text {text[:40]!r} holds half of a surrogate pair") from error
        return self.hf(text, add_special_tokens=special, verbose=False)["input_ids"]

    def encode_with_offsets(
        self, texts: Sequence[str], special: bool = True
    ) -> tuple[list[list[int]], list[list[tuple[int, int]]]]:
        """Returns the ids of each text and, for each token, its characters [start, end)."""
        out = self.hf(
            list(texts), add_special_tokens=special, return_offsets_mapping=True, verbose=False
        )
        return out["input_ids"], out["offset_mapping"]

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """Returns the text of `ids`, with special tokens unless `skip_special`."""
        return self.hf.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def with_template(self, template: str | os.PathLike[str]) -> Tokenizer:
        """Returns a tokenizer with another chat template: a Jinja text, or the path of one.

        Raises:
            RequestError: there is no such file, or it is not valid Jinja.
        """
        text = read_template(template)
        hf = copy.deepcopy(self.hf)
        hf.chat_template = text
        return replace(self, hf=hf)

    def with_tokens(self, tokens: Sequence[str], key: str | None = None) -> Tokenizer:
        """Returns a tokenizer with further tokens, whose ids follow the others.

        Args:
            tokens: texts that become one token each, wherever they stand.
            key: of the config, for messages.

        Raises:
            RequestError: the tokenizer has one of them.
        """
        from tokenizers import AddedToken

        known = self.hf.get_vocab()
        for token in tokens:
            if token in known:
                raise RequestError(f"{token!r} is a token already, id {known[token]}", key=key)
        hf = copy.deepcopy(self.hf)
        hf.add_tokens([AddedToken(token, normalized=False) for token in tokens])
        return replace(self, hf=hf)

    def with_padding(self, pad_id: int) -> Tokenizer:
        """Returns a tokenizer that pads with the token of this id."""
        hf = copy.deepcopy(self.hf)
        hf.pad_token = hf.convert_ids_to_tokens(pad_id)
        return replace(self, hf=hf)

    def fingerprint(self) -> str:
        """Returns a hash of vocabulary, rules, special tokens and template, in hexadecimal."""
        state = json.loads(self.hf.backend_tokenizer.to_str())
        # transformers sets these two per call; they are no part of what the tokenizer is.
        state.pop("padding", None)
        state.pop("truncation", None)
        state = [state, self.chat_template, self.hf.bos_token, self.hf.eos_token]
        text = json.dumps(state, sort_keys=True, ensure_ascii=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes tokenizer.json, its config and the chat template into `directory`."""
        self.hf.save_pretrained(os.fspath(directory))


def load_tokenizer(
    directory: str | os.PathLike[str], template: str | os.PathLike[str] | None = None
) -> Tokenizer:
    """Loads the tokenizer of a directory, never from the network.

    Args:
        directory: holds tokenizer.json, a SentencePiece model (tokenizer.model), a tiktoken file
            (Llama 3's tokenizer.model, or one with an encoding's name), or GPT-2's vocab.json
            and merges.txt; tokenizer_config.json beside it holds.
        template: replaces the chat template: a Jinja text, or the path of one.

    Raises:
        RequestError: the directory or its tokenizer is missing or damaged.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise RequestError("no such tokenizer directory", where=directory)
    config = _read_json(directory / "tokenizer_config.json")
    path = find_tokenizer_file(directory)
    if path is None:
        raise RequestError(f"the directory holds no {KINDS}", where=directory)
    if path.suffix == ".json":
        _read_json(path)
    try:
        hf = _load(path, config)
    except RequestError:
        raise
    except Exception as error:  # any class of the tokenizers' Rust or Python code: report it
        first = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise RequestError(f"cannot load the tokenizer: {first[0]}", where=directory) from error
    if not getattr(hf, "is_fast", False):
        raise RequestError(
            "the tokenizer gives no character offsets; save it with tokenizer.json first",
            where=directory,
        )
    tokenizer = Tokenizer(hf, _config_eos(directory))
    return tokenizer if template is None else tokenizer.with_template(template)


def _load(path: Path, config: dict[str, Any]) -> Any:
    directory, name = path.parent, config.get("tokenizer_class", "")
    described = bool(config) or (directory / "config.json").exists()
    if path.name == "tokenizer.json" and (name in _FAST_CLASSES or not described):
        # The generic class; AutoTokenizer would choose it too, after importing the model zoo.
        from transformers import PreTrainedTokenizerFast

        if config:
            return PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True)
        return PreTrainedTokenizerFast(tokenizer_file=os.fspath(path))
    if path.name == "tokenizer.json" or (path.name == "vocab.json" and described):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False, use_fast=True
        )
    return load_converted(path, config)


def _config_eos(directory: Path) -> tuple[int, ...]:
    ids: list[int] = []
    for name in ("generation_config.json", "config.json"):
        value = _read_json(directory / name).get("eos_token_id")
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, int) and not isinstance(item, bool) and item >= 0:
                ids.append(item)
    return tuple(dict.fromkeys(ids))


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # also text that is not UTF-8, and deep nesting
        line = getattr(error, "lineno", 1)
        raise RequestError("not valid JSON", where=f"{path}:{line}") from error
    if not isinstance(value, dict):
        raise RequestError("not a JSON object", where=path)
    return value
