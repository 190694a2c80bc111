"""SentencePiece models as fast tokenizers, id for id what the sentencepiece library gives.

transformers reads these files too, but without the space that SentencePiece puts before a text,
without its folding of spaces, and with merges in the order of ids instead of scores.

Source: https://github.com/google/sentencepiece (sentencepiece_model.proto, bpe_model.cc).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtune.core.errors import RequestError

_SPACE = "▁"
_UNIGRAM, _BPE = 1, 2
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5


@dataclass(frozen=True)
class Converted:
    """A tokenizer made from another library's file.

    Attributes:
        backend: a `tokenizers.Tokenizer`.
        special: `bos_token`, `eos_token`, `unk_token`, `pad_token`, as far as the file names them.
        add_bos: whether a text begins with BOS where tokenizer_config.json does not say.
    """

    backend: Any
    special: dict[str, str]
    add_bos: bool


def convert_sentencepiece(path: Path, *, prefix_segments: bool = False) -> Converted:
    """Reads a SentencePiece model of type BPE or unigram.

    Args:
        path: the `.model` file.
        prefix_segments: puts a space before the text after each special token too, as
            transformers' Llama tokenizer did with `legacy`; else before the whole text only, if
            the model does not normalise texts.

    Raises:
        RequestError: the file is damaged or of another type.
    """
    proto = _read(path)
    trainer, rules = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type not in (_UNIGRAM, _BPE):
        raise RequestError("a SentencePiece model of words or characters is not read", where=path)
    if trainer.treat_whitespace_as_suffix or not rules.escape_whitespaces:
        raise RequestError("its handling of spaces is not read; only the usual one is", where=path)
    if any(piece.type == _UNUSED for piece in proto.pieces):
        raise RequestError("a SentencePiece model with unused pieces is not read", where=path)
    return Converted(
        _backend(proto, prefix_segments),
        _special(proto),
        add_bos=trainer.bos_id >= 0,
    )


def _read(path: Path) -> Any:
    from transformers.convert_slow_tokenizer import import_protobuf

    proto = import_protobuf().ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except Exception as error:  # protobuf's DecodeError has no public place
        raise RequestError("not a SentencePiece model", where=path) from error
    if not proto.pieces:
        raise RequestError("not a SentencePiece model: it has no pieces", where=path)
    return proto


def _special(proto: Any) -> dict[str, str]:
    trainer = proto.trainer_spec
    ids = {"bos": trainer.bos_id, "eos": trainer.eos_id, "unk": trainer.unk_id}
    ids["pad"] = trainer.pad_id
    return {
        f"{name}_token": proto.pieces[i].piece
        for name, i in ids.items()
        if 0 <= i < len(proto.pieces)
    }


def _backend(proto: Any, prefix_segments: bool) -> Any:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
    from tokenizers import pre_tokenizers as pre

    trainer, rules = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type == _BPE:
        model = models.BPE(
            {piece.piece: i for i, piece in enumerate(proto.pieces)},
            _merges(proto.pieces),
            unk_token=proto.pieces[trainer.unk_id].piece,
            fuse_unk=True,
            byte_fallback=trainer.byte_fallback,
        )
    else:
        model = models.Unigram(
            [(piece.piece, piece.score) for piece in proto.pieces],
            unk_id=trainer.unk_id,
            byte_fallback=trainer.byte_fallback,
        )
    backend = Tokenizer(model)
    backend.add_tokens(
        [
            AddedToken(piece.piece, normalized=False, special=piece.type == _CONTROL)
            for piece in proto.pieces
            if piece.type in (_CONTROL, _USER_DEFINED)
        ]
    )
    steps: list[Any] = []
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(r"\A +| +\z"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    # Where the rules remove characters, Metaspace cannot tell the beginning of a text.
    at_start = not steps and not prefix_segments
    if rules.add_dummy_prefix and not at_start:
        steps.append(normalizers.Prepend(_SPACE))
    steps.append(normalizers.Replace(" ", _SPACE))
    backend.normalizer = normalizers.Sequence(steps)
    if rules.add_dummy_prefix and at_start:
        # Metaspace alone would put no space before a text that begins with one, and SentencePiece
        # does. Spaces have become ▁ by now, so that this one is always put.
        backend.pre_tokenizer = pre.Sequence(
            [
                pre.Metaspace(" ", prepend_scheme="first", split=False),
                pre.Metaspace(_SPACE, prepend_scheme="never", split=False),
            ]
        )
    decoding = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if rules.add_dummy_prefix:
        decoding.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(decoding)
    return backend


def _merges(pieces: Any) -> list[tuple[str, str]]:
    """Returns the pairs that make each piece, pieces of a higher score first."""
    normal = {p.piece for p in pieces if p.type == _NORMAL}
    pairs = []
    for piece in sorted((p for p in pieces if p.type == _NORMAL), key=lambda p: -p.score):
        word = piece.piece
        splits = [(word[:cut], word[cut:]) for cut in range(1, len(word))]
        pairs += [split for split in splits if split[0] in normal and split[1] in normal]
    return pairs
