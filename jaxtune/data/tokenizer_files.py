"""Which file of a directory is its tokenizer, and how the kinds without tokenizer.json load."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtune.core.errors import RequestError
from jaxtune.data.sentencepiece_model import Converted, convert_sentencepiece
from jaxtune.data.tiktoken_model import add_special, convert_tiktoken, is_tiktoken

KINDS = "tokenizer.json, tokenizer.model, *.tiktoken, or vocab.json with merges.txt"
_GPT2_NAMES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
_MODEL_NAMES = (
    "tokenizer.model", "sentencepiece.bpe.model", "sentencepiece.model", "spiece.model",
)  # fmt: skip
# Files that transformers reads beside tokenizer.json.
_BESIDE = ("special_tokens_map.json", "chat_template.jinja", "chat_template.json")
# Keys of tokenizer_config.json that belong to the class that the file was made for.
_OF_THE_CLASS = (
    "tokenizer_class", "auto_map", "backend", "legacy", "sp_model_kwargs", "vocab_file",
    "tokenizer_file", "add_prefix_space",
)  # fmt: skip


def find_tokenizer_file(directory: Path) -> Path | None:
    """Returns the file that a directory's tokenizer is made from, or None.

    tokenizer.json comes first, then SentencePiece and tiktoken models, then GPT-2's two files (the
    vocabulary is returned). A `.model` file of another name counts if it is the only one.

    Raises:
        RequestError: there are several such files and none has a usual name.
    """
    for name in ("tokenizer.json", *_MODEL_NAMES):
        if (directory / name).is_file():
            return directory / name
    others = sorted({*directory.glob("*.tiktoken"), *directory.glob("*.model*")})
    others = [path for path in others if path.is_file()]
    if len(others) > 1:
        names = ", ".join(path.name for path in others)
        raise RequestError(
            f"several tokenizers: {names}; name one tokenizer.model", where=directory
        )
    if others:
        return others[0]
    for vocabulary, merges in _GPT2_NAMES:
        if (directory / vocabulary).is_file() and (directory / merges).is_file():
            return directory / vocabulary
    return None


def load_converted(path: Path, config: Mapping[str, Any]) -> Any:
    """Returns a transformers fast tokenizer of a SentencePiece, tiktoken or GPT-2 file.

    Args:
        path: as `find_tokenizer_file` gives it.
        config: tokenizer_config.json; its special tokens, chat template and `add_bos_token` hold.

    Raises:
        RequestError: the file is damaged, or the config's ids are not the file's.
    """
    added = _added_tokens(path.parent, config)
    if path.suffix == ".json":
        converted = _convert_gpt2(path)
    elif is_tiktoken(path):
        converted = convert_tiktoken(path, own_special=not added)
    else:
        converted = convert_sentencepiece(path, prefix_segments=config.get("legacy") is True)
    hf = _wrap(converted, path.parent, config, added)
    for token, i in added.items():
        if hf.convert_tokens_to_ids(token) != i:
            raise RequestError(
                f"{token!r} is {hf.convert_tokens_to_ids(token)} in {path.name}, but "
                f"tokenizer_config.json says {i}",
                where=path.parent,
            )
    return hf


def _added_tokens(directory: Path, config: Mapping[str, Any]) -> dict[str, int]:
    """Returns the ids of tokens that the config, or added_tokens.json, adds to the file's."""
    added: dict[str, int] = {}
    extra = directory / "added_tokens.json"
    if extra.is_file():
        added |= json.loads(extra.read_text(encoding="utf-8"))
    for i, token in (config.get("added_tokens_decoder") or {}).items():
        added[token["content"]] = int(i)
    return added


def _wrap(
    converted: Converted, directory: Path, config: Mapping[str, Any], added: Mapping[str, int]
) -> Any:
    from transformers import PreTrainedTokenizerFast

    backend = converted.backend
    new = {token: i for token, i in added.items() if i >= backend.get_vocab_size()}
    if new:
        add_special(backend, new)
    settings: dict[str, Any] = dict(converted.special)
    settings |= {"add_bos_token": converted.add_bos, "add_eos_token": False}
    settings["clean_up_tokenization_spaces"] = False
    for key, value in config.items():
        if key not in _OF_THE_CLASS:
            written_out = key.endswith("_token") and isinstance(value, dict)
            settings[key] = value["content"] if written_out else value
    _add_ends(backend, settings)
    # transformers reads a config's many spellings of special tokens only from a directory.
    with tempfile.TemporaryDirectory() as aside:
        for name in _BESIDE:
            if (directory / name).is_file():
                shutil.copy(directory / name, aside)
        backend.save(os.fspath(Path(aside) / "tokenizer.json"))
        text = json.dumps(settings | {"tokenizer_class": "PreTrainedTokenizerFast"})
        (Path(aside) / "tokenizer_config.json").write_text(text, encoding="utf-8")
        hf = PreTrainedTokenizerFast.from_pretrained(aside, local_files_only=True)
    hf.name_or_path = os.fspath(directory)
    return hf


def _add_ends(backend: Any, settings: Mapping[str, Any]) -> None:
    """Makes the backend put BOS and EOS around texts where the settings say so."""
    from tokenizers import processors

    ends: dict[str, tuple[str, int]] = {}
    for name in ("bos", "eos"):
        token = settings.get(f"{name}_token")
        i = None if token is None else backend.token_to_id(token)
        if settings.get(f"add_{name}_token") and i is not None:
            ends[name] = (token, i)
    if ends:
        begin, end = ([ends[name][0]] if name in ends else [] for name in ("bos", "eos"))
        backend.post_processor = processors.TemplateProcessing(
            single=[*begin, "$A", *end], special_tokens=list(dict(ends.values()).items())
        )


def _convert_gpt2(vocabulary: Path) -> Converted:
    """Reads GPT-2's vocabulary and merges, as published by OpenAI or by Hugging Face."""
    from tokenizers import Tokenizer, decoders, models, processors
    from tokenizers import pre_tokenizers as pre

    merges = vocabulary.with_name(dict(_GPT2_NAMES)[vocabulary.name])
    lines = merges.read_text(encoding="utf-8").splitlines()
    pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    words = json.loads(vocabulary.read_text(encoding="utf-8"))
    backend = Tokenizer(models.BPE(words, pairs))
    backend.pre_tokenizer = pre.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    end = "<|endoftext|>"
    if end not in words:
        return Converted(backend, {}, add_bos=False)
    backend.add_special_tokens([end])
    return Converted(backend, {"bos_token": end, "eos_token": end}, add_bos=False)
