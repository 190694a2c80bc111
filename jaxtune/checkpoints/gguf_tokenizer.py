"""A tokenizer as GGUF's `tokenizer.ggml.*` fields."""

from __future__ import annotations

import json
import re
from typing import Any

from jaxtune.core.errors import RequestError
from jaxtune.data.tokenizer import Tokenizer

# `tokenizer.ggml.token_type` (llama.cpp, llama_token_type)
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
GPT2_SPLIT = "gpt-2"
# The split before byte-level BPE, by the name under which llama.cpp knows it.
_CASES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    _CASES + r"\p{N}{1,3}" + _REST: "llama-bpe",
    _CASES + r"\p{N}" + _REST: "qwen2",
}


def add_tokenizer(writer: Any, tokenizer: Tokenizer, vocab_size: int) -> None:
    """Writes vocabulary, merges, special tokens and chat template.

    Args:
        writer: a gguf.GGUFWriter.
        tokenizer: byte-level BPE, or BPE over SentencePiece's pieces.
        vocab_size: rows of the embedding; ids beyond the tokenizer's are unused tokens.

    Raises:
        RequestError: a kind of tokenizer that llama.cpp would read otherwise.
    """
    spec = json.loads(tokenizer.hf.backend_tokenizer.to_str())
    model = spec["model"]
    if model.get("type") != "BPE":
        raise RequestError(
            f"a tokenizer of type {model.get('type')!r} cannot be written as GGUF; only BPE can",
            key="format",
        )
    pieces = bool(model.get("byte_fallback"))
    tokens, types = vocabulary(spec, tokenizer, vocab_size, pieces)
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    if pieces:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_add_space_prefix(adds_space(spec))
        scores = scores_of(merges)
        writer.add_token_list(tokens)
        writer.add_token_scores([scores.get(token, 0.0) for token in tokens])
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(split_name(spec.get("pre_tokenizer")))
        writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(merge) for merge in merges])
    hf = tokenizer.hf
    if hf.bos_token_id is not None:
        writer.add_bos_token_id(hf.bos_token_id)
    if tokenizer.eos_id is not None:
        writer.add_eos_token_id(tokenizer.eos_id)
    if hf.unk_token_id is not None:
        writer.add_unk_token_id(hf.unk_token_id)
    if hf.pad_token_id is not None:
        writer.add_pad_token_id(hf.pad_token_id)
    writer.add_add_bos_token(tokenizer.adds_bos)
    writer.add_add_eos_token(False)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def vocabulary(
    spec: dict[str, Any], tokenizer: Tokenizer, vocab_size: int, pieces: bool
) -> tuple[list[str], list[int]]:
    """Returns (texts, types) of all ids."""
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [UNUSED] * vocab_size
    for token, i in spec["model"]["vocab"].items():
        byte = pieces and re.fullmatch(r"<0x[0-9A-F]{2}>", token) is not None
        tokens[i], types[i] = token, BYTE if byte else NORMAL
    for added in spec.get("added_tokens") or []:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    unknown = tokenizer.hf.unk_token_id
    if unknown is not None and pieces:
        types[unknown] = UNKNOWN
    return tokens, types


def scores_of(merges: list[tuple[str, ...]]) -> dict[str, float]:
    """Returns a score for each merged piece: llama.cpp joins the pair with the highest first."""
    scores: dict[str, float] = {}
    for rank, merge in enumerate(merges):
        scores.setdefault("".join(merge), float(-rank - 1))
    return scores


def adds_space(spec: dict[str, Any]) -> bool:
    """Tells whether text is read as if a space stood before it."""
    normalizer, split = spec.get("normalizer") or {}, spec.get("pre_tokenizer") or {}
    steps = normalizer.get("normalizers", [normalizer]) + split.get("pretokenizers", [split])
    return any(
        step.get("type") == "Prepend"
        or (step.get("type") == "Metaspace" and step.get("prepend_scheme") != "never")
        for step in steps
    )


def split_name(split: dict[str, Any] | None) -> str:
    """Returns the name of the split before byte-level BPE.

    Raises:
        RequestError: llama.cpp has no name for it that is known here.
    """
    steps = (split or {}).get("pretokenizers", [split or {}])
    patterns = [step["pattern"].get("Regex") for step in steps if step.get("type") == "Split"]
    if len(patterns) == 1 and patterns[0] in SPLITS:
        return SPLITS[patterns[0]]
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return GPT2_SPLIT
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    raise RequestError(
        f"the tokenizer splits text by {patterns or kinds}, which has no name in GGUF known here",
        key="format",
    )
