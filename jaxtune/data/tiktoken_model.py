"""tiktoken's files as fast tokenizers: ranks as base64 lines, without the tiktoken library.

Such a file holds byte strings and their ranks, but neither the pattern that splits a text nor the
special tokens; these are known here by the file's name.
"""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import Any

from jaxtune.core.errors import RequestError
from jaxtune.data.sentencepiece_model import Converted

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + _REST
_QWEN = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + _REST
_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_O200K = "|".join(
    (
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    )
)

# Of Meta's Llama 3 and 3.1: 256 tokens after the ranks.
_LLAMA3_SPECIAL = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>", "<|finetune_right_pad_id|>", "<|reserved_special_token_2|>",
    "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(3, 248)),
)  # fmt: skip
_QWEN_SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)),
)  # fmt: skip
_FIM = {f"<|fim_{part}|>": 100258 + i for i, part in enumerate(("prefix", "middle", "suffix"))}

# File name: pattern, special tokens (in the order of their ids after the ranks, or with their
# ids), BOS, EOS. Among the files called .model, only Llama 3's are tiktoken's.
_ENCODINGS: dict[str, tuple[str, Any, str | None, str]] = {
    "*.model": (_LLAMA3, _LLAMA3_SPECIAL, "<|begin_of_text|>", "<|end_of_text|>"),
    "qwen.tiktoken": (_QWEN, _QWEN_SPECIAL, None, "<|endoftext|>"),
    "r50k_base.tiktoken": (_GPT2, {"<|endoftext|>": 50256}, None, "<|endoftext|>"),
    "cl100k_base.tiktoken": (
        _LLAMA3, {"<|endoftext|>": 100257, **_FIM, "<|endofprompt|>": 100276}, None,
        "<|endoftext|>",
    ),
    "o200k_base.tiktoken": (
        _O200K, {"<|endoftext|>": 199999, "<|endofprompt|>": 200018}, None, "<|endoftext|>",
    ),
}  # fmt: skip


def is_tiktoken(path: Path) -> bool:
    """Tells whether a file begins with a line of base64, a space and a number."""
    with path.open("rb") as file:
        return _parse(file.readline(4096)) is not None


def convert_tiktoken(path: Path, *, own_special: bool = True) -> Converted:
    """Reads a tiktoken file whose name is known: Llama 3's tokenizer.model, or an encoding's.

    Args:
        path: the file.
        own_special: adds the encoding's special tokens; not where tokenizer_config.json has them.

    Raises:
        RequestError: a line is damaged, or nothing says how the encoding splits a text.
    """
    known = [name for name in _ENCODINGS if path.match(name)]
    if not known:
        raise RequestError(
            "a tiktoken file does not say how a text is split; it is known by the names "
            + ", ".join(_ENCODINGS),
            where=path,
        )
    pattern, special, bos, eos = _ENCODINGS[known[0]]
    ranks = _read(path)
    backend = _backend(ranks, pattern)
    if not own_special:
        return Converted(backend, {}, add_bos=False)
    if not isinstance(special, dict):
        special = {token: len(ranks) + i for i, token in enumerate(special)}
    add_special(backend, special)
    names = {"bos_token": bos, "eos_token": eos}
    return Converted(backend, {k: v for k, v in names.items() if v}, add_bos=bos is not None)


def add_special(backend: Any, special: dict[str, int]) -> None:
    """Adds special tokens at given ids; ids between them get placeholders."""
    from tokenizers import AddedToken

    by_id = {i: token for token, i in special.items()}
    first = backend.get_vocab_size()
    tokens = [by_id.get(i, f"<|reserved_token_{i}|>") for i in range(first, max(by_id) + 1)]
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in tokens])


def _parse(line: bytes) -> tuple[bytes, int] | None:
    token, _, rank = line.strip().partition(b" ")
    try:
        return base64.b64decode(token, validate=True), int(rank)
    except (binascii.Error, ValueError):
        return None


def _read(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        entry = _parse(line)
        if entry is None or not entry[0]:
            raise RequestError("not a line of base64 and a rank", where=f"{path}:{number}")
        ranks[entry[0]] = entry[1]
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise RequestError(f"its ranks are not 0..{len(ranks) - 1}", where=path)
    missing = [b for b in range(256) if bytes([b]) not in ranks]
    if missing:
        raise RequestError(f"no rank for the byte 0x{missing[0]:02x}", where=path)
    return ranks


def _backend(ranks: dict[bytes, int], pattern: str) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, processors
    from tokenizers import pre_tokenizers as pre

    letters = byte_letters()
    names = {token: "".join(letters[b] for b in token) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        splits = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        merges += [(names[a], names[b]) for a, b in splits if a in ranks and b in ranks]
    model = models.BPE({names[t]: i for t, i in ranks.items()}, merges, ignore_merges=True)
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre.Sequence(
        [pre.Split(Regex(pattern), "isolated"), pre.ByteLevel(False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return backend


def byte_letters() -> list[str]:
    """Returns the character that stands for each byte in GPT-2's byte-level vocabularies."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in shown]
    return [chr(b) if b in shown else chr(256 + hidden.index(b)) for b in range(256)]
