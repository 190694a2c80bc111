"""Samples of prompts, several of each: a queue of rows over a fixed number of slots."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from jaxtune.core.errors import RequestError
from jaxtune.core.tree import Tree
from jaxtune.generate import sampling
from jaxtune.generate.limits import bucket, check_tokens
from jaxtune.generate.placement import mesh_of
from jaxtune.generate.slots import (
    EMPTY,
    STRETCH,
    Entry,
    Settings,
    left_padded,
    programs,
    prompt_width,
)
from jaxtune.generate.stops import StopCheck
from jaxtune.models.config import ModelConfig
from jaxtune.peft.method import Method

# Tokens written between two looks at the text, when there are stop strings.
CHUNK = 16
LEAST_NEW, LEAST_EOS = 16, 4
# While samples wait, decoding pauses when this part of the slots is free, and fills it.
PARTS = 8


class Sample(NamedTuple):
    """What was written behind a prompt.

    Attributes:
        ids: the new token ids as they were drawn, the eos that ended them included.
        logprobs: float32, ln p of each id under the model with the temperature applied, before
            top-k and top-p narrow the choice; with temperature 0, that of temperature 1.
        finished: an eos or a stop string ended it; False: it was cut at the most tokens.
    """

    ids: list[int]
    logprobs: list[float]
    finished: bool


@dataclasses.dataclass
class Row:
    """A sample in the making.

    Attributes:
        number: of the sample; its random draws come from (seed, number, tokens before).
        prompt: the ids that it follows.
        ids, logprobs, finished: see `Sample`.
    """

    number: int
    prompt: tuple[int, ...]
    ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    finished: bool = False

    @property
    def whole(self) -> tuple[int, ...]:
        """The prompt and what is written so far."""
        return (*self.prompt, *self.ids)


@dataclasses.dataclass(frozen=True)
class Task:
    """What all rows share.

    Attributes:
        config, method, params: the model.
        settings: of the draws.
        keys: uint32 [n, 2], the data of each sample's random key.
        max_new_tokens: the most tokens of a sample.
        eos_ids, stop_check: what ends a sample.
        slots: the most rows that are written side by side.
    """

    config: ModelConfig
    method: Method
    params: Tree
    settings: Settings
    keys: np.ndarray
    max_new_tokens: int
    eos_ids: frozenset[int]
    stop_check: StopCheck | None
    slots: int


def sample(
    config: ModelConfig,
    method: Method,
    params: Tree,
    prompts: Sequence[Sequence[int]],
    count: int = 1,
    *,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    eos_ids: Sequence[int] = (),
    stop_check: StopCheck | None = None,
    first_row: int = 0,
    slots: int = 64,
) -> list[list[Sample]]:
    """Returns samples of each prompt, [prompt][count].

    A sample is a function of its prompt, its number and the settings, not of what is drawn beside
    it. A prompt is read once for all of its samples, and a slot whose sample has ended takes the
    next one that waits. On several processes, each makes the same call and gets all samples.

    Args:
        config, method, params: the model; sharded parameters are used where they lie.
        prompts: token ids of each, of any lengths, not empty.
        count: samples of each; those of prompt i have the numbers i · count … (i + 1) · count - 1.
        max_new_tokens: the most tokens of a sample.
        temperature, top_p, top_k: see `sampling.sample`; temperature 0 is greedy.
        seed: of the random draws; a token's comes from (seed, sample number, tokens before it).
        eos_ids: ids that end a sample.
        stop_check: called with a sample's ids every few tokens; see `stops.stop_at`.
        first_row: the number of the first sample, for a caller that splits a list.
        slots: the most samples that are written side by side; the cache has so many rows.

    Raises:
        RequestError: no prompt, an empty prompt, an id outside the vocabulary, more tokens than
            the model has positions, or a setting out of range.
    """
    check_request(config, method, prompts, max_new_tokens, temperature, top_p, top_k)
    for key, value in (("count", count), ("slots", slots)):
        if value < 1:
            raise RequestError(f"{value!r} is not at least 1", key=key)
    eos = np.full(bucket(len(eos_ids), LEAST_EOS), EMPTY, np.int32)
    eos[: len(eos_ids)] = eos_ids
    total = len(prompts) * count
    keys = sampling.row_keys(seed, first_row, bucket(total, 1))
    task = Task(
        config,
        method,
        params,
        Settings(
            np.float32(temperature),
            np.float32(top_p),
            np.int32(min(top_k, config.vocab_size)),
            eos,
        ),
        np.asarray(jax.random.key_data(keys)),
        max_new_tokens,
        frozenset(eos_ids),
        stop_check,
        slots,
    )
    rows = [Row(n, tuple(map(int, prompts[n // count]))) for n in range(total)]
    waiting = rows
    with mesh_of(params):
        while waiting:
            waiting = write(task, waiting)
    samples = [Sample(row.ids, row.logprobs, row.finished) for row in rows]
    return [samples[start : start + count] for start in range(0, total, count)]


def write(task: Task, rows: Sequence[Row]) -> list[Row]:
    """Writes to the rows; returns those that must be read anew before they go on."""
    groups: dict[tuple[int, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(row.whole, []).append(row)
    prompts = list(groups)
    queue = collections.deque((n, row) for n, same in enumerate(groups.values()) for row in same)
    run = programs(task.config, task.method)
    width = prompt_width(task.method, prompts)
    count = min(bucket(len(rows), 1), task.slots)
    part = max(1, count // PARTS)
    each = max(1, len(rows) // len(prompts))
    bank = min(bucket(-(-count // each), 1), bucket(len(prompts), 1))  # prompts read together
    limits = {row.number: limit(task, row) for row in rows}
    longest = max(limits[row.number] - len(row.ids) for row in rows)
    slots = run.start(count, width, bucket(longest, LEAST_NEW))
    steps = np.int32(STRETCH if task.stop_check is None else CHUNK)
    held: list[Row | None] = [None] * count
    ended, anew, base = np.zeros(count, bool), [], -bank
    while queue or any(held):
        free = collections.deque(slot for slot in range(count) if held[slot] is None)
        while queue and free:
            if queue[0][0] >= base + bank:
                base = queue[0][0]
                some = left_padded(task.method, prompts[base : base + bank], bank, width)
                cache = run.read(task.params, some)
            entering = []
            while queue and free and len(entering) < part and queue[0][0] < base + bank:
                (number, row), slot = queue.popleft(), free.popleft()
                entering.append((slot, number - base, row))
                held[slot], ended[slot] = row, False
            slots = run.enter(slots, cache, entry(task, entering, limits, count, part))
        enough = np.int32(part if queue else count)
        written = run.decode(task.params, slots, task.settings, steps, enough, ended)
        slots, ids, logprobs = written.slots, np.asarray(written.ids), np.asarray(written.logprobs)
        for slot, row in enumerate(held):
            if row is None:
                continue
            extend(task, row, ids[slot], logprobs[slot])
            if row.finished or len(row.ids) == limits[row.number]:
                held[slot], ended[slot] = None, True
                if not row.finished and len(row.ids) < task.max_new_tokens:
                    anew.append(row)
    return anew


def limit(task: Task, row: Row) -> int:
    """Returns how many ids a row may have before it is over or LongRoPE's factors change.

    What is in the cache was computed with the old ones, so that all of it is then read anew, as
    transformers does for Phi-3.
    """
    length = len(row.whole) + task.method.num_virtual + task.method.position_offset
    ropes = [k.rope for k in task.config.kinds if k.rope and k.rope.scaling == "longrope"]
    changes = [r.original_context - length + 1 for r in ropes if r.original_context >= length]
    return min([task.max_new_tokens, *(len(row.ids) + more for more in changes)])


def entry(
    task: Task,
    entering: Sequence[tuple[int, int, Row]],
    limits: Mapping[int, int],
    count: int,
    part: int,
) -> Entry:
    """Returns the Entry, padded to `part`, of (slot, row of the prompts' cache, row)."""
    fields = [np.zeros(part, np.int32) for _ in range(6)]
    found = Entry(*fields, np.zeros((part, 2), np.uint32))
    found.slots[:] = count
    lead = task.method.num_virtual
    for place, (slot, source, row) in enumerate(entering):
        found.slots[place], found.sources[place] = slot, source
        found.last[place] = row.whole[-1]
        found.positions[place] = lead + len(row.whole) - 1
        found.given[place], found.limits[place] = len(row.ids), limits[row.number]
        found.keys[place] = task.keys[row.number]
    return found


def extend(task: Task, row: Row, ids: np.ndarray, logprobs: np.ndarray) -> None:
    """Adds what a stretch of decoding wrote to a row, up to where a stop string ends it."""
    new = int(np.sum(ids != EMPTY))
    row.ids += ids[:new].tolist()
    row.logprobs += logprobs[:new].tolist()
    ended = row.ids[-1] in task.eos_ids
    keep = None
    if task.stop_check is not None:
        keep = task.stop_check(row.ids[:-1] if ended else row.ids)
    if keep is not None:
        del row.ids[keep:], row.logprobs[keep:]
    row.finished = ended or keep is not None


def check_request(
    config: ModelConfig,
    method: Method,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
) -> None:
    """Raises RequestError for what `sample` cannot do, naming the argument and its value."""
    if not len(prompts):
        raise RequestError("there is no prompt to continue", key="prompts")
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise RequestError(
                f"prompt {number} is empty; begin it with the BOS token", key="prompts"
            )
    for key, value, valid, fine in (
        ("max_new_tokens", max_new_tokens, "at least 1", max_new_tokens >= 1),
        ("temperature", temperature, "0 (greedy) or more", 0 <= temperature < float("inf")),
        ("top_p", top_p, "above 0 and at most 1", 0 < top_p <= 1),
        ("top_k", top_k, "0 (off) or more", top_k >= 0),
    ):
        if not fine:
            raise RequestError(f"{value!r} is not {valid}", key=key)
    check_tokens(config, method, prompts, max_new_tokens)
