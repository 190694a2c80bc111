"""What the renderer makes of rows: the one that training uses, so that its view is the true one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxtune.core.errors import RequestError
from jaxtune.data.chat import Draft, Rendered, encode_drafts, render_prompt
from jaxtune.data.fit import room_of, truncated
from jaxtune.data.formats import Example, Tokens
from jaxtune.data.preferences import Alternatives, Prompt, Steps
from jaxtune.data.sides import drafts_of, joined
from jaxtune.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Verdict:
    """What became of a row.

    Attributes:
        tokens: its length; -1 if it could not be rendered.
        kept_targets: targets within the first `seq_len` tokens.
        targets: all of them.
        faults: {kind: detail}.
    """

    tokens: int
    targets: int
    kept_targets: int
    faults: dict[str, str]


def judge(
    examples: Sequence[Example | None], tokenizer: Tokenizer | None, seq_len: int | None
) -> list[Verdict | None]:
    """Renders examples and looks at the ids and masks that training would get.

    Args:
        examples: as `formats.parse` reads them; None gives None.
        tokenizer: of the model; without one only examples of ids are judged.
        seq_len: for what a cut would leave, or None.
    """
    out: list[Verdict | None] = [None] * len(examples)
    drafts: list[Draft] = []
    places: list[tuple[int, int, int]] = []  # (example, first draft, end)
    for at, example in enumerate(examples):
        if isinstance(example, Tokens):
            out[at] = _judge_ids(_rendered_tokens(example), tokenizer, seq_len, True)
        elif example is not None and tokenizer is not None:
            try:
                if isinstance(example, Prompt):
                    out[at] = Verdict(len(_prompt_ids(example, tokenizer)), 0, 0, {})
                    continue
                made = drafts_of(example, tokenizer)
            except RequestError as error:
                out[at] = _refused(error)
                continue
            places.append((at, len(drafts), len(drafts) + len(made)))
            drafts += made
    if drafts:
        rendered = _encode(drafts, tokenizer)
        for at, first, end in places:
            out[at] = _judge_sides(
                examples[at], drafts[first:end], rendered[first:end], tokenizer, seq_len
            )
    return out


def _refused(error: RequestError) -> Verdict:
    return Verdict(-1, 0, 0, {"template_refused": error.message})


def _prompt_ids(example: Prompt, tokenizer: Tokenizer) -> list[int]:
    if isinstance(example.prompt, str):
        return tokenizer.encode(example.prompt)
    return render_prompt(example.prompt, tokenizer, example.tools or None)


def _judge_sides(
    example: Example,
    drafts: list[Draft],
    sides: list[Rendered | Verdict],
    tokenizer: Tokenizer,
    seq_len: int | None,
) -> Verdict:
    """Judges each text that an example is tokenised from; its length is that of all in a row."""
    faults: dict[str, str] = {}
    whole = None
    for side in sides:
        if isinstance(side, Verdict):
            return side
        whole = _judge_ids(side, tokenizer, seq_len, False)
        faults |= whole.faults
    if isinstance(example, Steps):  # what is judged is where steps end, not that an answer does
        faults.pop("missing_terminator", None)
    if not isinstance(example, Alternatives | Steps):
        return whole
    try:
        item = joined(example, drafts, sides)
    except RequestError as error:
        return Verdict(-1, 0, 0, faults or {"template_refused": error.message})
    size = room_of(item, False, 0)
    left = item
    if seq_len and size > seq_len:  # the model's positions are not known here
        left = truncated(item, seq_len, seq_len, False, 0)
    kept = 0 if left is None else int(np.count_nonzero(left.mask))
    return Verdict(size, int(np.count_nonzero(item.mask)), kept, faults)


def _encode(drafts: list[Draft], tokenizer: Tokenizer) -> list[Rendered | Verdict]:
    try:
        return list(encode_drafts(drafts, tokenizer))
    except RequestError as error:
        if len(drafts) == 1:
            return [_refused(error)]
        return [found for item in drafts for found in _encode([item], tokenizer)]


def _rendered_tokens(example: Tokens) -> Rendered:
    ids = np.array(example.input_ids, np.int64)
    mask = np.ones(len(ids)) if example.loss_mask is None else np.array(example.loss_mask)
    mask[:1] = 0.0
    return Rendered(ids, mask, np.zeros(len(ids), np.uint8))


def _judge_ids(
    item: Rendered, tokenizer: Tokenizer | None, seq_len: int | None, given: bool
) -> Verdict:
    ids, trained = item.ids, item.mask > 0
    faults: dict[str, str] = {}
    if not trained.any():
        faults["no_target"] = f"none of {len(ids)} tokens"
    if tokenizer is not None:
        bos = tokenizer.bos_id
        if bos is not None and len(ids) > 1 and ids[0] == ids[1] == bos:
            faults["doubled_bos"] = f"id {bos} twice at the start"
        if given and (ids.min() < 0 or ids.max() >= tokenizer.vocab_size):
            faults["malformed"] = f"ids beyond the vocabulary of {tokenizer.vocab_size}"
        elif trained.any():
            faults.update(_unended(ids, trained, tokenizer, given))
    kept = int(np.count_nonzero(trained[:seq_len])) if seq_len else 0
    return Verdict(len(ids), int(np.count_nonzero(trained)), kept, faults)


def _unended(
    ids: np.ndarray, trained: np.ndarray, tokenizer: Tokenizer, given: bool
) -> dict[str, str]:
    """Looks at the last token of each run of targets.

    Where a template closes inner turns with nothing, only the last turn can have a terminator.
    """
    ends = terminator_ids(tokenizer)
    if not ends:
        return {}
    last = np.flatnonzero(trained & ~np.append(trained[1:], False))
    if not given and not (tokenizer.chat_template and tokenizer.endings.inner):
        last = last[-1:]
    open_ends = [at for at in last if int(ids[at]) not in ends]
    if not open_ends:
        return {}
    at = int(open_ends[0])
    after = int(ids[at + 1]) if at + 1 < len(ids) else None
    if after in ends:
        return {"missing_terminator": f"the terminator at token {at + 1} is masked"}
    return {"missing_terminator": f"token {at}, the last target, is id {int(ids[at])}"}


def terminator_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Returns the ids that may end a trained turn: EOS, the template's, and closing specials."""
    ids = set(tokenizer.eos_ids)
    if tokenizer.chat_template:
        for text in (tokenizer.endings.last, tokenizer.endings.inner):
            ids.update(tokenizer.encode(text.strip(), special=False)[-1:] if text.strip() else ())
        ids |= tokenizer.special_ids - {tokenizer.bos_id}
    return frozenset(ids)
