"""What the sources of data must agree with: formats, objective, template, tokenizer."""

from __future__ import annotations

import collections
import pathlib
import re
from typing import Any

from jaxtune.core.errors import RequestError
from jaxtune.recipes.schema.formats import NOT_GIVEN, check_formats, check_overlong

Values = dict[str, Any]

_CHAT_FORMATS = ("chat", "instruction", "preference", "unpaired", "ranked", "stepwise", "prompt")
_TRAINS_ALL = ("text", "tokens")


def apply(values: Values) -> None:
    """Checks the sources of data, and names those of held-out data."""
    train, held_out = values["data.train"], values["data.eval"]
    if not train:
        raise RequestError("is empty: give at least one {source, format}", key="data.train")
    for section, entries in (("train", train), ("eval", held_out)):
        for i, entry in enumerate(entries):
            if entry["source"].startswith("text:") and entry["format"] != "text":
                raise RequestError(
                    f"{entry['format']!r} cannot be read from {entry['source']!r}: a text: source "
                    "is one document, of format 'text'",
                    key=f"data.{section}[{i}].format",
                )
    if values["objective.name"] == "pretrain":
        for i, entry in enumerate(train):
            if entry["format"] not in _TRAINS_ALL:
                raise RequestError(
                    f"{entry['format']!r} contradicts objective.name = 'pretrain', which trains on "
                    "every token: use format 'text' or 'tokens', or objective.name = 'sft'",
                    key=f"data.train[{i}].format",
                )
    check_formats(values["objective.name"], "train", train)
    check_formats(values["objective.name"], "eval", held_out)
    if values["objective.name"] == "kto" and values["data.packing"]:
        raise RequestError(
            "contradicts objective.name = 'kto': each row is matched with one of another prompt",
            key="data.packing",
        )
    check_overlong(values["objective.name"], values["data.overlong"])
    formats = {entry["format"] for entry in (*train, *held_out)}
    if values.get("objective.centering") and formats != {"preference"}:
        raise RequestError(
            f"is for pairs, of format 'preference'; here are {sorted(formats)}",
            key="objective.centering",
        )
    if values["data.template"] is not None and not formats & set(_CHAT_FORMATS):
        raise RequestError(
            f"is used only by the formats that hold messages; here are {sorted(formats)}",
            key="data.template",
        )
    texts = {e["format"] for e in (*train, *held_out) if e["source"] != NOT_GIVEN} - {"tokens"}
    if values["model.path"] is None and values["model.tokenizer"] is None and texts:
        raise RequestError(
            f"missing: model.preset = {values['model.preset']!r} brings no tokenizer, and format "
            f"{min(texts)!r} needs one",
            key="model.tokenizer",
        )
    virtual = values.get("peft.num_tokens", 0)
    if values["peft.method"] == "prompt" and virtual >= values["data.seq_len"]:
        raise RequestError(
            f"{virtual} virtual tokens leave no room in data.seq_len = {values['data.seq_len']}",
            key="peft.num_tokens",
        )
    values["data.eval"] = _named(held_out, "data.eval")
    for key in ("retention.data", "retention.tasks"):
        values[key] = _named(values[key], key)


def _named(entries: tuple[dict[str, Any], ...], key: str) -> tuple[dict[str, Any], ...]:
    """Names each evaluation source: the given name, the file's stem, or stem-index."""
    stems = [entry["name"] or _stem(entry["source"]) for entry in entries]
    counts = collections.Counter(stems)
    named, seen = [], set()
    for i, (entry, stem) in enumerate(zip(entries, stems, strict=True)):
        name = stem if entry["name"] or counts[stem] == 1 else f"{stem}-{i}"
        if not re.fullmatch(r"[\w.-]+", name):
            raise RequestError(
                f"expected letters, digits, '_', '-' and '.'; got {name!r}",
                key=f"{key}[{i}].name",
            )
        if name in seen:
            raise RequestError(f"{name!r} is taken", key=f"{key}[{i}].name")
        seen.add(name)
        named.append({**entry, "name": name})
    return tuple(named)


def _stem(source: str) -> str:
    kind, _, rest = source.partition(":")
    if kind == "tfds":
        name, *_, split = rest.split(":")
        text = f"{pathlib.PurePath(name).name}-{split}"
    else:
        text = pathlib.PurePath(rest).name.partition(".")[0]
    return re.sub(r"[^\w.-]+", "-", text) or "eval"
