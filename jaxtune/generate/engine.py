"""Batched generation: one compiled prefill, one compiled decode loop over a key-value cache."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.core.errors import RequestError
from jaxtune.core.tree import Tree
from jaxtune.generate import sampling
from jaxtune.generate.limits import bucket, check_tokens
from jaxtune.generate.placement import mesh_of, spread_cache
from jaxtune.generate.stops import StopCheck
from jaxtune.models import decoder
from jaxtune.models.config import ModelConfig
from jaxtune.parallel.rules import constrain
from jaxtune.peft.method import Method

# Tokens decoded between two looks at the text, when there are stop strings.
CHUNK = 16
LEAST_PROMPT, LEAST_NEW, LEAST_EOS = 16, 16, 4
EMPTY = -1  # in the output: nothing written, or behind the row's end


class Settings(NamedTuple):
    """What may differ from call to call without compiling anew.

    Attributes:
        temperature, top_p, top_k: runtime scalars; see `sampling.sample`.
        keys: uint32 [B, 2], the data of a random key for each row.
        eos_ids: int32 [E]; -1 where there is none.
        first: int32 [B], tokens that each row was given before.
    """

    temperature: np.ndarray
    top_p: np.ndarray
    top_k: np.ndarray
    keys: np.ndarray
    eos_ids: np.ndarray
    first: np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Progress:
    """A batch of rows in the middle of being written.

    Attributes:
        cache: keys and values of what was read and written.
        last: int32 [B], the newest token of each row, not yet in the cache.
        positions: int32 [B], where `last` stands in its row.
        done: bool [B].
        step: int32 scalar, tokens written to each row that is not done.
        out: int32 [B, N], the new ids; EMPTY from the row's end on.
    """

    cache: decoder.Cache
    last: jax.Array
    positions: jax.Array
    done: jax.Array
    step: jax.Array
    out: jax.Array


def generate(
    config: ModelConfig,
    method: Method,
    params: Tree,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    eos_ids: Sequence[int] = (),
    stop_check: StopCheck | None = None,
    first_row: int = 0,
) -> list[list[int]]:
    """Continues each prompt.

    A row is a function of its prompt, its number and the settings, not of the rows beside it.

    Args:
        config, method, params: the model; sharded parameters are used where they lie.
        prompts: token ids of each row, of any lengths, not empty.
        max_new_tokens: the most tokens to write to a row.
        temperature, top_p, top_k: see `sampling.sample`; temperature 0 is greedy.
        seed: of the random draws; a row's draws come from (seed, row number, step).
        eos_ids: ids that end a row.
        stop_check: called with a row's new ids every few tokens; see `stops.stop_at`.
        first_row: the number of the first prompt, for a caller that splits a list into batches.

    Returns:
        The new ids of each row: without the prompt, without the eos that ended it, and cut to
        the length that `stop_check` gave.

    Raises:
        RequestError: no prompt, an empty prompt, an id outside the vocabulary, more tokens than
            the model has positions, or a setting out of range.
    """
    check_request(config, method, prompts, max_new_tokens, temperature, top_p, top_k)
    rows = bucket(len(prompts), 1)
    eos = np.full(bucket(len(eos_ids), LEAST_EOS), EMPTY, np.int32)
    eos[: len(eos_ids)] = eos_ids
    settings = Settings(
        np.float32(temperature),
        np.float32(top_p),
        np.int32(min(top_k, config.vocab_size)),
        np.asarray(jax.random.key_data(sampling.row_keys(seed, first_row, rows))),
        eos,
        np.zeros(rows, np.int32),
    )
    written: list[list[int]] = [[] for _ in prompts]
    ended = np.zeros(len(prompts), bool)
    with mesh_of(params):
        while not np.all(ended):
            settings.first[: len(prompts)] = [len(new) for new in written]
            whole = [[*prompt, *new] for prompt, new in zip(prompts, written, strict=True)]
            rooms = [
                min(max_new_tokens - len(new), _room(config, method, len(row)))
                for row, new in zip(whole, written, strict=True)
            ]
            run = Stretch(whole, written, rooms, ended, settings, stop_check)
            written, ended = _write(config, method, params, run)
            ended = ended | [len(new) >= max_new_tokens for new in written]
    return written


@dataclasses.dataclass(frozen=True)
class Stretch:
    """What one prefill and the decoding behind it are asked for.

    Attributes:
        rows: token ids of each row so far.
        written: those of them that are new.
        rooms: how many tokens each row may be given.
        ended: bool [B], rows that get none.
        settings, stop_check: of the whole call.
    """

    rows: list[list[int]]
    written: list[list[int]]
    rooms: list[int]
    ended: np.ndarray
    settings: Settings
    stop_check: StopCheck | None


def _room(config: ModelConfig, method: Method, length: int) -> int:
    """How many tokens can follow `length` before LongRoPE's factors change.

    What is in the cache was computed with the old ones, so that all of it is then read anew, as
    transformers does for Phi-3.
    """
    length += method.num_virtual + method.position_offset
    ropes = [kind.rope for kind in config.kinds if kind.rope and kind.rope.scaling == "longrope"]
    return min(
        (r.original_context - length + 1 for r in ropes if r.original_context >= length),
        default=config.max_context,
    )


def _write(
    config: ModelConfig, method: Method, params: Tree, run: Stretch
) -> tuple[list[list[int]], np.ndarray]:
    """Returns the rows' new ids, what was written before included, and bool [B], which ended."""
    settings, most = run.settings, max(np.asarray(run.rooms)[~run.ended])
    read = left_padded(method, run.rows, len(settings.first))
    prefill, decode = _programs(config, method)
    ended = np.zeros(len(settings.first), bool)
    ended[: len(run.rows)] = run.ended
    progress = prefill(params, *read, bucket(int(most), LEAST_NEW))
    written, steps = list(run.written), 0
    while steps < most and not np.all(np.asarray(progress.done) | ended):
        steps = most if run.stop_check is None else min(steps + CHUNK, most)
        progress = decode(params, progress, settings, np.int32(steps), ended)
        out = np.asarray(progress.out)[: len(run.rows)]
        for row in np.flatnonzero(~ended[: len(run.rows)]).tolist():
            given = out[row][out[row] != EMPTY][: run.rooms[row]].tolist()
            written[row] = run.written[row] + given
            ended[row] = len(given) < min(steps, run.rooms[row])  # an eos came
            keep = None if run.stop_check is None else run.stop_check(written[row])
            if keep is not None:
                written[row], ended[row] = written[row][:keep], True
    return written, ended[: len(run.rows)]


def check_request(
    config: ModelConfig,
    method: Method,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
) -> None:
    """Raises RequestError for what `generate` cannot do, naming the argument and its value."""
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


def left_padded(method: Method, prompts: Sequence[Sequence[int]], rows: int) -> Prompts:
    """Returns the prompts with the last token that is read ahead in the last column of each row.

    So every row writes its next token to the same cache slot. Virtual tokens stand directly before
    the first real one. The last token is held back: the decode loop begins by reading it, so that
    the head and the sampling are in one program only.
    """
    lead = method.num_virtual
    lengths, last = np.zeros(rows, np.int32), np.full(rows, EMPTY, np.int32)
    lengths[: len(prompts)] = [lead + len(prompt) - 1 for prompt in prompts]
    last[: len(prompts)] = [prompt[-1] for prompt in prompts]
    width = bucket(int(lengths.max()), LEAST_PROMPT)
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


def pinned(progress: Progress) -> Progress:
    """Returns the progress laid out alike before and after each program, where a mesh is set.

    What the host reads is whole on every device.
    """
    return dataclasses.replace(
        progress,
        cache=spread_cache(progress.cache),
        last=constrain(progress.last, "batch"),
        positions=constrain(progress.positions, "batch"),
        done=constrain(progress.done, None),
        out=constrain(progress.out, None, None),
    )


@functools.cache
def _programs(config: ModelConfig, method: Method) -> tuple[Callable, Callable]:
    """Returns (prefill, decode), compiled once for each shape of batch, prompt and output."""

    @functools.partial(jax.jit, static_argnums=4)
    def prefill(params, batch, last, lengths, new):
        rows, width = batch["input_ids"].shape
        cache = spread_cache(decoder.empty_cache(config, rows, width + new))
        if config.follows_length:  # it is one token longer than what is read here
            at = lengths + method.position_offset
            segments = cache.segment_ids.at[:, width].set(last != EMPTY)
            places = cache.positions.at[:, width].set(at)
            cache = dataclasses.replace(cache, segment_ids=segments, positions=places)
        cache = decoder.hidden_states(config, method, params, batch, cache=cache).cache
        out = jnp.full((rows, new), EMPTY, jnp.int32)
        zero = jnp.zeros((), jnp.int32)
        return pinned(Progress(cache, last, lengths, last == EMPTY, zero, out))

    @functools.partial(jax.jit, donate_argnums=1)
    def decode(params, progress, settings, until, ended):
        def unfinished(p: Progress):
            return (p.step < until) & ~jnp.all(p.done)

        def advance(p: Progress):
            batch = {
                "input_ids": jnp.maximum(p.last, 0)[:, None],
                "segment_ids": jnp.where(p.done, 0, 1)[:, None],
                "positions": p.positions[:, None],
            }
            if method.num_virtual:
                batch["virtual"] = jnp.full_like(batch["input_ids"], -1)
            found = decoder.hidden_states(config, method, params, batch, cache=p.cache)
            scores = decoder.logits(config, method, params, found.states[:, 0])
            keys = sampling.step_keys(
                jax.random.wrap_key_data(settings.keys), settings.first + p.step
            )
            ids = sampling.sample(
                scores, keys, settings.temperature, settings.top_k, settings.top_p
            )
            done = p.done | jnp.any(ids[:, None] == settings.eos_ids, axis=1)
            out = p.out.at[:, p.step].set(jnp.where(done, EMPTY, ids))
            return Progress(found.cache, ids, p.positions + 1, done, p.step + 1, out)

        start = dataclasses.replace(progress, done=progress.done | ended)
        return pinned(jax.lax.while_loop(unfinished, advance, start))

    return prefill, decode
