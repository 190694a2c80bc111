"""What one process looks for in one span of rows."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxtune.core.errors import RequestError
from jaxtune.data.doctor import answers, contamination, minhash, ngrams, pii, texts, topics
from jaxtune.data.doctor.chunk import Chunk, new_chunk
from jaxtune.data.doctor.groups import Named
from jaxtune.data.doctor.kinds import BIT
from jaxtune.data.doctor.language import language
from jaxtune.data.doctor.pii import Match
from jaxtune.data.doctor.rendering import Verdict, judge
from jaxtune.data.doctor.rows import Fault, Rows, Span
from jaxtune.data.doctor.settings import Settings
from jaxtune.data.doctor.tally import Tally
from jaxtune.data.doctor.view import View, loose_view, view
from jaxtune.data.formats import Example, Tokens, parse
from jaxtune.data.tokenizer import Tokenizer

_AROUND = 40
_LABEL_LENGTH, _OPENING_WORDS = 40, 4
# Read by formats, so that they are no metadata of the row.
_FORMAT_FIELDS = {
    "messages", "conversations", "tools", "system", "prompt", "completion", "instruction", "input",
    "output", "text", "input_ids", "loss_mask", "chosen", "rejected", "completions", "answer",
}  # fmt: skip
# What `formats.parse` says, by the kind of fault that it is.
_FAULTS = (
    (re.compile("nothing to train on|is empty behind"), "empty_target"),
    (re.compile("are equal"), "same_pair"),
    (re.compile("must come first|must follow|last message must be|has role|is from"), "role_order"),
)


@dataclass(frozen=True)
class Context:
    """What a process has at hand.

    Attributes:
        settings: the request.
        rows: of each input.
        tokenizer: or None.
        index: of the evaluation sets, or None.
        special: pattern of special tokens in words.
        words: pattern of the user's word list, or None.
        groups: {word: (axis, group)}.
    """

    settings: Settings
    rows: tuple[Rows, ...]
    tokenizer: Tokenizer | None
    index: contamination.Index | None
    special: re.Pattern[str] | None
    words: re.Pattern[str] | None
    groups: Mapping[str, tuple[str, str]]

    def sampled(self, number: int, row: int) -> bool:
        """Tells whether a row of an input is one of those whose topic is looked for."""
        before = sum(rows.size for rows in self.rows[:number])
        return topics.sampled(before + row, sum(rows.size for rows in self.rows))


def examine(context: Context, number: int, span: Span) -> Chunk:
    """Looks at every row of a span of an input."""
    settings = context.settings
    most = settings.kept_examples
    out = new_chunk(number, span)
    views: list[View | None] = []
    examples: list[Example | None] = []
    for at, (_, record) in enumerate(context.rows[number].read(span)):
        shown, example = _read(context, out, at, record, settings.inputs[number].format)
        views.append(shown)
        examples.append(example)
    for at, shown in enumerate(views):
        if shown is not None:
            _look(context, out, at, shown, examples[at])
    verdicts = judge(
        _to_render(context, out, number, examples), context.tokenizer, settings.seq_len
    )
    # Documents are cut into windows, so that none is too long.
    longest = None if settings.inputs[number].format == "text" else settings.seq_len
    for at, verdict in enumerate(verdicts):
        if verdict is not None:
            _note(out, at, verdict, longest, most)
    _sign(out, views, examples, settings.near)
    if context.index is not None:
        plain = [ngrams.words_only(v.everything()) if v else "" for v in views]
        for hit in contamination.search(context.index, plain):
            out.items.setdefault(hit.kind, []).append((hit.text, hit.item))
            out.flag(
                hit.kind,
                hit.text,
                context.index.told(hit),
                most,
                excerpt(views[hit.text].body(), 0, 0),
            )
    return out


def _read(
    context: Context, out: Chunk, at: int, record: Any, format: str
) -> tuple[View | None, Example | None]:
    most = context.settings.kept_examples
    if isinstance(record, Fault):
        out.flag(record.kind, at, record.message, most, excerpt(record.text, 0, 0))
        return None, None
    _count_fields(out.tally, record)
    try:
        example = parse(record, format, chat=True)
    except RequestError as error:
        kind = next((k for pattern, k in _FAULTS if pattern.search(error.message)), "malformed")
        shown = loose_view(record)
        out.flag(kind, at, error.message, most, excerpt(shown.prompt, 0, 0))
        return shown, None
    shown = view(example)
    if isinstance(example, Tokens) and context.tokenizer is not None:
        shown = _decoded(example, context.tokenizer)
    if context.tokenizer is not None and not context.tokenizer.chat_template:
        example = parse(record, format)
    return shown, example


def _decoded(example: Tokens, tokenizer: Tokenizer) -> View:
    ids = [i for i in example.input_ids if 0 <= i < tokenizer.vocab_size]
    mask = example.loss_mask or (1.0,) * len(example.input_ids)
    prompt = next((at for at, weight in enumerate(mask) if weight), 0)
    parts = (ids[:prompt], ids[prompt:])
    before, after = (tokenizer.decode(part, skip_special=True) for part in parts)
    return View(before, (after,), tokens=True)


def _to_render(
    context: Context, out: Chunk, number: int, examples: list[Example | None]
) -> list[Example | None]:
    broken = out.flags & np.uint64(BIT["lone_surrogate"]) != 0
    return [None if broken[at] else example for at, example in enumerate(examples)]


def _note(out: Chunk, at: int, verdict: Verdict, seq_len: int | None, most: int) -> None:
    out.tokens[at], out.targets[at] = verdict.tokens, verdict.targets
    for kind, detail in verdict.faults.items():
        out.flag(kind, at, detail, most)
    if seq_len is not None and verdict.tokens > seq_len:
        out.flag("overlong", at, f"{verdict.tokens} tokens", most)
        if verdict.targets and not verdict.kept_targets:
            out.flag("target_lost", at, f"the first target is beyond {seq_len} tokens", most)


def _look(context: Context, out: Chunk, at: int, shown: View, example: Example | None) -> None:
    """Everything that is seen in the words of one row."""
    most, tally = context.settings.kept_examples, out.tally
    whole = shown.everything()
    body, answer = shown.body(), shown.answer
    out.characters[at] = len(whole)
    for match in _matches(context, whole, shown.tokens):
        out.flag(
            match.kind, at, _detail(whole, match), most, excerpt(whole, match.start, match.end)
        )
    refuses = False
    for match in answers.phrases(answer):
        refuses |= match.kind == "refusal"
        text = excerpt(answer, match.start, match.end)
        out.flag(match.kind, at, _detail(answer, match), most, text)
    odd = answers.odd_turns(shown.roles) if example is not None else ""
    if odd:
        out.flag("turn_order", at, odd, most, " ".join(shown.roles[:12]))
    code = language(body)
    out.languages[at] = code
    tally.languages[code] += 1
    if example is None:  # its prompt and answer are not told apart
        return
    if isinstance(example, Tokens):
        out.exact[at] = ngrams.digest(repr((example.input_ids, example.loss_mask)))
    else:
        parts = (
            shown.system, shown.prompt, *shown.answers, "\0", *shown.rejected, shown.label or "",
        )  # fmt: skip
        out.exact[at] = ngrams.digest("\0".join(part.strip() for part in parts))
    words = frozenset(ngrams.words_only(body).split())
    tally.terms.update(words)
    if context.sampled(out.input, out.first + at):
        out.samples.append(words)
    asked = shown.asked()
    if asked is not None:
        question, said = (ngrams.digest(ngrams.squeezed(text)) for text in asked)
        out.prompt[at], out.answer[at] = question, said
        _count_answer(tally, shown)
        _count_groups(context, out, at, shown, refuses)


def _matches(context: Context, text: str, tokens: bool) -> Iterator[Match]:
    """Yields the first match of each kind that a pattern finds."""
    seen = set()
    for match in (*texts.damage(text), *pii.find(text)):
        if match.kind not in seen:
            seen.add(match.kind)
            yield match
    patterns = (("special_token", None if tokens else context.special), ("toxic", context.words))
    for kind, pattern in patterns:
        found = pattern.search(text) if pattern is not None else None
        if found:
            yield Match(kind, *found.span())


def _detail(text: str, match: Match) -> str:
    words = text[match.start : match.end]
    if match.kind in ("control_character", "lone_surrogate", "replacement_character"):
        return f"U+{ord(words[0]):04X}"
    return pii.mask(words)[:60]


def excerpt(text: str, start: int, end: int) -> str:
    """Returns the words around a place on one line, personal data masked."""
    before, after = text[max(0, start - 400) : start], text[end : end + 400]
    masked = (
        pii.mask(before)[-_AROUND:]
        + pii.mask(text[start:end])[:80]
        + pii.mask(after)[: 2 * _AROUND]
    )
    clean = masked.encode("utf-8", "replace").decode("utf-8")
    return " ".join(texts.CONTROL.sub("·", clean).split())


def _count_fields(tally: Tally, record: Mapping[str, Any]) -> None:
    for name, value in record.items():
        if (
            isinstance(value, str)
            and name not in _FORMAT_FIELDS
            and 0 < len(value) <= _LABEL_LENGTH
        ):
            counts = tally.fields.setdefault(name, type(tally.labels)())
            counts[value] += 1


def _count_answer(tally: Tally, shown: View) -> None:
    answer = shown.answer
    words = answer.split(None, _OPENING_WORDS)
    tally.openings[" ".join(words[:_OPENING_WORDS])[:80]] += 1
    label = answer.strip()
    if shown.label is not None:
        tally.labels[shown.label] += 1
    elif len(label) <= _LABEL_LENGTH and len(words) <= _OPENING_WORDS and "\n" not in label:
        tally.labels[label] += 1
    else:
        tally.long_answers += 1


def _count_groups(context: Context, out: Chunk, at: int, shown: View, refuses: bool) -> None:
    words = ngrams.words_only(shown.prompt).split()
    named: dict[str, set[str]] = {}
    for word in words:
        if word in context.groups:
            axis, group = context.groups[word]
            named.setdefault(axis, set()).add(group)
    for axis, groups in named.items():
        if len(groups) != 1:
            continue
        (group,) = groups
        length = len(shown.answer.split())
        opened = [f"<{axis}>" if context.groups.get(w, ("",))[0] == axis else w for w in words]
        key = ngrams.digest(" ".join(opened))
        out.answers.append(Named(axis, group, key, int(out.answer[at]), length, refuses))


def _sign(
    out: Chunk, views: list[View | None], examples: list[Example | None], near: float
) -> None:
    bodies = [
        near_text(v, e) if v and e is not None else "" for v, e in zip(views, examples, strict=True)
    ]
    out.signed = np.array([bool(body) for body in bodies])
    out.bands = np.zeros((len(bodies), minhash.SIZE // minhash.rows_a_band(near)), np.uint32)
    out.low = np.zeros((len(bodies), minhash.SIZE), np.uint8)
    if out.signed.any():
        signed = minhash.signatures([body for body in bodies if body], near)
        out.bands[out.signed], out.low[out.signed] = signed


def near_text(shown: View, example: Example) -> str:
    """Returns the text whose 5-grams say how near two rows are."""
    if isinstance(example, Tokens):
        return "".join(chr(i) for i in example.input_ids if 0 <= i < 0x110000)
    return ngrams.squeezed(shown.body())


def row_text(context: Context, number: int, span: Span) -> str:
    """Returns the text of one row as it was signed."""
    ((_, record),) = context.rows[number].read(span)
    example = parse(record, context.settings.inputs[number].format, chat=True)
    return near_text(view(example), example)
