"""The processes that look at rows."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune.data.doctor import contamination, texts
from jaxtune.data.doctor.chunk import Chunk
from jaxtune.data.doctor.examine import Context, examine, row_text
from jaxtune.data.doctor.ngrams import characters, jaccard
from jaxtune.data.doctor.rows import Rows, Span
from jaxtune.data.doctor.settings import Settings
from jaxtune.data.tokenizer import Tokenizer, load_tokenizer

Task = tuple[int, Span]
# Rows as (input, span), and pairs of places in that list.
PairTask = tuple[list[Task], list[tuple[int, int]]]
Map = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]

_CONTEXT: Context | None = None


def make_context(
    settings: Settings, rows: tuple[Rows, ...], index: contamination.Index | None
) -> Context:
    """Loads what a process needs.

    Raises:
        RequestError: the tokenizer or the template cannot be loaded.
    """
    tokenizer = open_tokenizer(settings)
    special = tokenizer.hf.all_special_tokens if tokenizer is not None else texts.KNOWN_SPECIAL
    words = None
    if settings.words:
        listed = "|".join(re.escape(w) for w in sorted(settings.words, key=len, reverse=True))
        words = re.compile(rf"(?<!\w)(?:{listed})(?!\w)", re.IGNORECASE)
    groups = {
        word.lower(): (axis, group)
        for axis, members in settings.groups.items()
        for group, words_of in members.items()
        for word in words_of
    }
    special = [*special, *texts.KNOWN_SPECIAL]
    return Context(settings, rows, tokenizer, index, texts.special_pattern(special), words, groups)


def open_tokenizer(settings: Settings) -> Tokenizer | None:
    """Loads the tokenizer of a model directory, or of a run's workdir, which keeps its own."""
    if settings.tokenizer is None:
        return None
    directory = Path(settings.tokenizer)
    own = directory / "tokenizer"
    return load_tokenizer(own if own.is_dir() else directory, settings.template)


def look(task: Task) -> Chunk:
    """Examines a span, in a process that `working` began."""
    return examine(_CONTEXT, *task)


def compare(task: PairTask) -> list[float]:
    """Returns the Jaccard similarity of each pair of rows, from their words."""
    places, pairs = task
    hashes, starts = characters([row_text(_CONTEXT, *place) for place in places])
    sets = [np.unique(hashes[a:b]) for a, b in itertools.pairwise(starts)]
    return [jaccard(sets[left], sets[right]) for left, right in pairs]


@contextlib.contextmanager
def working(context: Context) -> Iterator[Map]:
    """Yields a map over tasks that keeps their order, in `settings.workers` processes."""
    global _CONTEXT
    if context.settings.workers == 1:
        _CONTEXT = context
        try:
            yield map
        finally:
            _CONTEXT = None
        return
    # Spawned: threads of the tokenizer and of NumPy do not survive a fork.
    made = multiprocessing.get_context("spawn")
    with (
        _quiet_threads(),
        made.Pool(
            context.settings.workers, _begin, (context.settings, context.rows, context.index)
        ) as pool,
    ):
        yield pool.imap


@contextlib.contextmanager
def _quiet_threads() -> Iterator[None]:
    """One thread a process: the processes are the parallelism."""
    names = (
        "TOKENIZERS_PARALLELISM",
        "OMP_NUM_THREADS",
        "OPENBLAS_NUM_THREADS",
        "RAYON_NUM_THREADS",
    )
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict(zip(names, ("false", "1", "1", "1"), strict=True)))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _begin(settings: Settings, rows: tuple[Rows, ...], index: contamination.Index | None) -> None:
    global _CONTEXT
    _CONTEXT = make_context(settings, rows, index)
