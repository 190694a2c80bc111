"""What a model is evaluated on: sources, as token rows and as questions."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from jaxtune.core.errors import RequestError
from jaxtune.data.columns import BRANCHED
from jaxtune.data.questions import Question, read_questions
from jaxtune.data.shares import SharedStore, tokenize_shared
from jaxtune.data.sources import open_source
from jaxtune.data.token_store import TokenStore
from jaxtune.data.tokenizer import Tokenizer
from jaxtune.recipes.data import positions_left
from jaxtune.recipes.language_model import LanguageModel
from jaxtune.recipes.objectives import OBJECTIVES
from jaxtune.recipes.schema.formats import FORMATS_OF

PAIRS = "preference"  # the format of data with two completions of each prompt
ANY_LENGTH = 2**31 - 1  # of rows that hold several texts


@dataclasses.dataclass(frozen=True)
class Entry:
    """A source to evaluate on.

    Attributes:
        name: of its figures.
        source, format: what and where its records are.
        key: named in errors.
        seq_len: tokens a row; None: as many as the longest example needs.
        overlong: what happens to a longer example.
        by: a field of the records that parts them; None: they stay together.
    """

    name: str
    source: str
    format: str
    key: str
    seq_len: int | None = None
    overlong: str = "error"
    by: str | None = None


def entries_of(
    run: Any,
    data: str | None,
    format: str | None,
    seq_len: int | None,
    by: str | None,
) -> tuple[Entry, ...]:
    """Returns the source that was named, else those of a run's `data.eval`.

    Args:
        run: resolved config, or None for a model that no run made.
        data, format, seq_len, by: as given; None: the run's.

    Raises:
        RequestError: there is nothing to evaluate on.
    """
    if data is not None:
        return (Entry(data, data, format, "--data", seq_len, by=by),)
    if run is not None and OBJECTIVES[run.objective.name].held_out is None:
        raise RequestError(
            f"a run of {run.objective.name} measures rewards while it trains (eval/reward); for a "
            "loss give --data and --format",
            key="--data",
        )
    if run is None or not run.data.eval:
        raise RequestError("the run has no data.eval; give --data and --format", key="--data")
    length, overlong = run.data.seq_len, run.data.overlong
    return tuple(
        Entry(entry.name, entry.source, entry.format, "data.eval", length, overlong, by or entry.by)
        for entry in run.data.eval
    )


def open_one(lm: LanguageModel, entry: Entry) -> TokenStore | SharedStore:
    """Returns the tokenised source; without `seq_len`, rows may be as long as the model allows.

    Raises:
        RequestError: a record that cannot be read, or a format without a loss to measure.
    """
    key, format = entry.key, entry.format
    if lm.tokenizer is None and format != "tokens":
        raise RequestError(f"format {format!r} needs a tokenizer", where=lm.source)
    scorer = not lm.config.lm_head
    known = FORMATS_OF["reward"] if scorer else (*FORMATS_OF["sft"], PAIRS)
    if format not in known:
        reads = "a reward model reads" if scorer else "what has a loss to measure is"
        raise RequestError(
            f"{format!r} cannot be measured: {reads} {', '.join(known)}",
            key="--format" if key.startswith("--") else f"{key}.format",
        )
    context = positions_left(lm.config, lm.method)
    longest = ANY_LENGTH if format in BRANCHED else context
    count = jax.process_count()
    return tokenize_shared(
        open_source(entry.source, key=key, lazily=count > 1),
        format,
        lm.tokenizer,
        count=count,
        index=jax.process_index(),
        seq_len=longest if entry.seq_len is None else entry.seq_len,
        overlong=entry.overlong,
        num_virtual=lm.method.num_virtual,
        vocab_size=lm.config.vocab_size,
        key=key,
        context=context,
    )


def questions_of(
    entry: Entry,
    tokenizer: Tokenizer | None,
    num_virtual: int = 0,
    limit: int | None = None,
) -> list[Question]:
    """Returns the records of a source as questions.

    Where longer examples than `seq_len` are not an error, they are left out.

    Args:
        entry: the source.
        tokenizer: of the model.
        num_virtual: slots of prompt tuning, which count towards `seq_len`.
        limit: the first so many records.

    Raises:
        RequestError: no tokenizer, a format without answers, or a record without one.
    """
    if tokenizer is None:
        raise RequestError("answers are text and need a tokenizer", key=entry.key)
    source = open_source(entry.source, key=entry.key)
    found = read_questions(source, entry.format, tokenizer, limit=limit, by=entry.by, key=entry.key)
    if entry.overlong != "error" and entry.seq_len is not None:
        room = entry.seq_len - num_virtual
        found = [q for q in found if sum(map(len, q.answered(q.wanted, tokenizer))) <= room]
    if not found:
        raise RequestError("no example is left to evaluate", key=entry.key)
    return found
