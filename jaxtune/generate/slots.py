"""Rows that are written side by side, each from its own start: the programs behind `sampler`.

A cache has W columns for the prompts and N for what is written. All rows write to one column at a
time, around and around the N: a row that began later finds the columns of its predecessor empty
(segment 0), and no row lives longer than N tokens. Which keys a token sees follows from segments
and positions alone, so the order of columns means nothing.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.core.tree import Tree
from jaxtune.generate import sampling
from jaxtune.generate.limits import bucket
from jaxtune.generate.placement import spread_cache
from jaxtune.models import decoder
from jaxtune.models.cache import Cache, empty_cache
from jaxtune.models.config import ModelConfig
from jaxtune.parallel.rules import constrain
from jaxtune.peft.method import Method

LEAST_PROMPT = 16
EMPTY = -1  # no token: nothing was written
STRETCH = 64  # the most steps that one call of `Programs.decode` takes


class Settings(NamedTuple):
    """What may differ from call to call without compiling anew.

    Attributes:
        temperature, top_p, top_k: scalars; see `sampling.sample`.
        eos_ids: int32 [E]; EMPTY where there is none.
    """

    temperature: np.ndarray
    top_p: np.ndarray
    top_k: np.ndarray
    eos_ids: np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """B rows in the middle of being written.

    Attributes:
        cache: keys and values of what was read and written; `length` is the next column.
        first: int32 scalar, W: the first column behind the prompts'.
        last: int32 [B], the newest token of each row, not yet in the cache.
        positions: int32 [B], where `last` stands in its row.
        given: int32 [B], tokens that the row was given since its prompt, in earlier slots too.
        limits: int32 [B], how many it may be given in all.
        keys: uint32 [B, 2], the data of its random key.
        done: bool [B], rows that are over, or were never begun.
    """

    cache: Cache
    first: jax.Array
    last: jax.Array
    positions: jax.Array
    given: jax.Array
    limits: jax.Array
    keys: jax.Array
    done: jax.Array


class Entry(NamedTuple):
    """Rows to put into slots, M of them; the other fields are those of `Slots`.

    Attributes:
        slots: int32 [M], which; B for none.
        sources: int32 [M], the row of the prompts' cache that each begins with.
    """

    slots: np.ndarray
    sources: np.ndarray
    last: np.ndarray
    positions: np.ndarray
    given: np.ndarray
    limits: np.ndarray
    keys: np.ndarray


class Written(NamedTuple):
    """What `Programs.decode` gives.

    Attributes:
        slots: the rows as they stand.
        ids: int32 [B, STRETCH], the new ids of each row; EMPTY behind the last.
        logprobs: float32 [B, STRETCH], of them; see `sampling.Drawn`.
    """

    slots: Slots
    ids: jax.Array
    logprobs: jax.Array


class Prompts(NamedTuple):
    """Prompts side by side.

    Attributes:
        batch: model batch [B, T] of all but each prompt's last token.
        last: int32 [B], that last token; EMPTY in the rows past the prompts.
        lengths: int32 [B], where it stands: the tokens before it, virtual ones included.
    """

    batch: dict[str, np.ndarray]
    last: np.ndarray
    lengths: np.ndarray


def left_padded(
    method: Method, prompts: Sequence[Sequence[int]], rows: int, width: int | None = None
) -> Prompts:
    """Returns the prompts with the last token that is read ahead in the last column of each row.

    Virtual tokens stand directly before the first real one. The last token is held back: the
    decode loop begins by reading it, so that the head and the sampling are in one program only.

    Args:
        method: how the model was adapted.
        prompts: token ids, of any lengths, not empty.
        rows: B, at least as many as prompts.
        width: T; None: `prompt_width` of these prompts.
    """
    lead = method.num_virtual
    lengths, last = np.zeros(rows, np.int32), np.full(rows, EMPTY, np.int32)
    lengths[: len(prompts)] = [lead + len(prompt) - 1 for prompt in prompts]
    last[: len(prompts)] = [prompt[-1] for prompt in prompts]
    width = prompt_width(method, prompts) if width is None else width
    places = np.arange(width, dtype=np.int32) - (width - lengths[:, None])
    real = places >= 0
    batch = {
        "input_ids": np.zeros((rows, width), np.int32),
        "segment_ids": real.astype(np.int32),
        "positions": np.where(real, places, 0).astype(np.int32),
    }
    for row, prompt in enumerate(prompts):
        batch["input_ids"][row, width + 1 - len(prompt) :] = prompt[:-1]
    if lead:
        batch["virtual"] = np.where(real & (places < lead), places, -1).astype(np.int32)
    return Prompts(batch, last, lengths)


def prompt_width(method: Method, prompts: Sequence[Sequence[int]]) -> int:
    """Returns the columns that these prompts need, rounded up so that few shapes are compiled."""
    return bucket(method.num_virtual + max(map(len, prompts)) - 1, LEAST_PROMPT)


def pinned(slots: Slots) -> Slots:
    """Returns the rows laid out alike before and after each program, where a mesh is set."""
    rows = {
        name: constrain(getattr(slots, name), "batch")
        for name in ("last", "positions", "given", "limits")
    }
    return dataclasses.replace(
        slots,
        cache=spread_cache(slots.cache),
        keys=constrain(slots.keys, "batch", None),
        done=constrain(slots.done, None),
        **rows,
    )


class Programs(NamedTuple):
    """The compiled functions of a model.

    Attributes:
        read: (params, Prompts) → Cache [.., R, W, ..] of the prompts but their last tokens.
        start: (B, W, N) → Slots without a row.
        enter: (Slots, Cache, Entry) → Slots with those rows begun. Takes over the slots' memory.
        decode: (params, Slots, Settings, steps, enough, ended [B]) → Written, after `steps` tokens
            to each row, or as soon as `enough` rows are over. Rows that `ended` names are ended
            first. Takes over the slots' memory.
    """

    read: Any
    start: Any
    enter: Any
    decode: Any


@functools.cache
def programs(config: ModelConfig, method: Method) -> Programs:
    """Returns the programs of a model, each compiled once for each shape."""

    @jax.jit
    def read(params: Tree, prompts: Prompts) -> Cache:
        rows, width = prompts.batch["input_ids"].shape
        # Where frequencies follow the length, the row is one token longer than what is read here.
        ahead = 1 if config.follows_length else 0
        cache = spread_cache(empty_cache(config, rows, width + ahead))
        if ahead:
            at = prompts.lengths + method.position_offset
            segments = cache.segment_ids.at[:, width].set(prompts.last != EMPTY)
            places = cache.positions.at[:, width].set(at)
            cache = dataclasses.replace(cache, segment_ids=segments, positions=places)
        cache = decoder.hidden_states(config, method, params, prompts.batch, cache=cache).cache
        return spread_cache(
            Cache(
                cache.keys[:, :, :, :width],
                cache.values[:, :, :, :width],
                cache.segment_ids[:, :width],
                cache.positions[:, :width],
                cache.length,
            )
        )

    @functools.partial(jax.jit, static_argnums=(0, 1, 2))
    def start(rows: int, width: int, new: int) -> Slots:
        cache = empty_cache(config, rows, width + new)
        cache = dataclasses.replace(cache, length=jnp.int32(width))
        zeros = jnp.zeros(rows, jnp.int32)
        keys = jnp.zeros((rows, 2), jnp.uint32)
        first, done = jnp.int32(width), jnp.ones(rows, bool)
        return pinned(Slots(cache, first, zeros, zeros, zeros, zeros, keys, done))

    @functools.partial(jax.jit, donate_argnums=0)
    def enter(slots: Slots, prompts: Cache, entry: Entry) -> Slots:
        at, width, held = entry.slots, prompts.keys.shape[3], slots.cache

        def put(array, value):
            return array.at[at].set(value, mode="drop")

        def prompt_columns(array, read):
            return array.at[:, at, :, :width].set(read[:, entry.sources], mode="drop")

        def all_columns(array, read):
            new = array.shape[1] - width
            return put(array, jnp.pad(read[entry.sources], ((0, 0), (0, new))))

        cache = Cache(
            prompt_columns(held.keys, prompts.keys),
            prompt_columns(held.values, prompts.values),
            all_columns(held.segment_ids, prompts.segment_ids),
            all_columns(held.positions, prompts.positions),
            held.length,
        )
        names = ("last", "positions", "given", "limits", "keys")
        rows = {name: put(getattr(slots, name), getattr(entry, name)) for name in names}
        return pinned(Slots(cache, slots.first, done=put(slots.done, False), **rows))

    @functools.partial(jax.jit, donate_argnums=1)
    def decode(params: Tree, slots: Slots, settings: Settings, steps, enough, ended) -> Written:
        def unfinished(state):
            step, written = state
            return (step < steps) & (jnp.sum(written.slots.done) < enough)

        def advance(state):
            step, (held, ids, logprobs) = state
            drawn, cache = next_tokens(held)
            new = jnp.where(held.done, EMPTY, drawn.ids)
            given = held.given + 1
            over = jnp.any(new[:, None] == settings.eos_ids, axis=1) | (given >= held.limits)
            held = dataclasses.replace(
                held,
                cache=cache,
                last=drawn.ids,
                positions=held.positions + 1,
                given=given,
                done=held.done | over,
            )
            ids = ids.at[:, step].set(new)
            return step + 1, Written(held, ids, logprobs.at[:, step].set(drawn.logprobs))

        def next_tokens(held: Slots) -> tuple[sampling.Drawn, Cache]:
            batch = {
                "input_ids": held.last[:, None],
                "segment_ids": jnp.where(held.done, 0, 1)[:, None],
                "positions": held.positions[:, None],
            }
            if method.num_virtual:
                batch["virtual"] = jnp.full_like(batch["input_ids"], -1)
            found = decoder.hidden_states(config, method, params, batch, cache=held.cache)
            logits = decoder.logits(config, method, params, found.states[:, 0])
            keys = sampling.step_keys(jax.random.wrap_key_data(held.keys), held.given)
            drawn = sampling.sample(
                logits, keys, settings.temperature, settings.top_k, settings.top_p
            )
            column = found.cache.length
            column = jnp.where(column == held.cache.segment_ids.shape[1], held.first, column)
            return drawn, dataclasses.replace(found.cache, length=column)

        shape = (slots.done.size, STRETCH)
        written = Written(
            dataclasses.replace(slots, done=slots.done | ended),
            jnp.full(shape, EMPTY, jnp.int32),
            jnp.zeros(shape, jnp.float32),
        )
        written = jax.lax.while_loop(unfinished, advance, (jnp.int32(0), written))[1]
        return Written(
            pinned(written.slots),
            constrain(written.ids, None, None),
            constrain(written.logprobs, None, None),
        )

    return Programs(read, start, enter, decode)
