"""Log-likelihoods of continuations: each distinct context is computed once, in few programs."""

from __future__ import annotations

import collections
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxtune.core.errors import RequestError
from jaxtune.core.tree import Tree, flatten
from jaxtune.evaluate.shapes import COMPILING, OTHER_COMPILING, Costs, Shape, merged, step
from jaxtune.generate.placement import spread_cache
from jaxtune.models import decoder
from jaxtune.models.cache import Cache, empty_cache
from jaxtune.models.config import ModelConfig
from jaxtune.objectives.logprobs import Scores, token_scores
from jaxtune.parallel.batches import global_batch
from jaxtune.parallel.mesh import batch_shards
from jaxtune.parallel.rules import constrain
from jaxtune.peft.method import Method

# Tokens to a batch, padding included, unless the caller says how many rows. A processor's caches
# hold little; an accelerator wants large products.
TOKENS = {"cpu": 2048}
OTHER_TOKENS = 32768
# Batches on their way to the device while the host prepares the next. A processor runs as many at
# a time as it has cores.
AHEAD = max(3, os.cpu_count() or 1)


class Request(NamedTuple):
    """A context, not empty, and the continuation to be scored, not empty; token ids."""

    context: Sequence[int]
    continuation: Sequence[int]


class Score(NamedTuple):
    """Of a continuation: its log-likelihood in nats; whether each token was the likeliest."""

    logprob: float
    greedy: bool


@dataclasses.dataclass(frozen=True)
class Row:
    """A stem with the tips that continue it, or a stem alone with its scored tokens.

    Attributes:
        stem: tokens that are read first.
        tips: continuations; the last token of the stem is read with each of them.
        asked: for each score that the row gives, (first place, targets, indices of the requests).
            The target k is predicted at first place + k: of the stem, or of the tip.
    """

    stem: tuple[int, ...]
    tips: tuple[tuple[int, ...], ...]
    asked: tuple[tuple[int, tuple[int, ...], tuple[int, ...]], ...]

    @property
    def shape(self) -> Shape:
        """The shape to compile for."""
        if self.tips:
            width = step(max(map(len, self.tips)))
            return Shape(step(len(self.stem) - 1), len(self.tips), width)
        return Shape(step(len(self.stem)), 0, step(sum(len(t) for _, t, _ in self.asked)))


def score(
    config: ModelConfig,
    method: Method,
    params: Tree,
    mesh: Mesh,
    requests: Sequence[Request],
    *,
    max_length: int | None = None,
    rows: int | None = None,
    progress: Callable[[int], Any] = lambda count: None,
) -> list[Score]:
    """Returns ln p(continuation | context) of each request, in their order.

    A context and continuation of more than `max_length` + 1 tokens lose their first ones, as in
    lm-evaluation-harness: the last token is never read.

    Args:
        config, method, params: the model.
        mesh: where the parameters lie; rows are spread over its batch axes.
        requests: token ids, BOS included where there is one.
        max_length: tokens that the model reads at a time; by default all that it has positions for.
        rows: rows to a batch; does not change the result.
        progress: is told how many requests were answered since it was last called.

    Raises:
        RequestError: an empty context or continuation, a continuation that is too long, or an id
            outside the vocabulary.
    """
    limit = positions(config, method)
    limit = limit if max_length is None else min(limit, max_length)
    found: list[Score | None] = [None] * len(requests)
    costs, backend = spending(config, method), jax.default_backend()
    planned = plan(config, requests, limit, costs)
    shapes = merged(
        collections.Counter(row.shape for row in planned),
        costs,
        COMPILING.get(backend, OTHER_COMPILING),
    )
    pending: collections.deque = collections.deque()

    def collect() -> None:
        batch, scores = pending.popleft()
        logprobs, correct = (np.asarray(x) for x in scores)
        answered = 0
        for _, at, _, indices in entries(batch):
            result = Score(float(logprobs[at].astype(np.float64).sum()), bool(correct[at].all()))
            for request in indices:
                found[request] = result
            answered += len(indices)
        progress(answered)

    run = _programs(config, method, batch_shards(mesh))
    with jax.set_mesh(mesh):
        for shape, batch, count in batches(planned, shapes, mesh, rows):
            arrays = filled(method, shape, batch, count)
            pending.append((batch, run[bool(shape.tips)](params, global_batch(arrays, mesh))))
            if len(pending) > AHEAD:
                collect()
        while pending:
            collect()
    return found


def positions(config: ModelConfig, method: Method) -> int:
    """Returns how many tokens the model reads at a time, beside the method's virtual ones."""
    return config.max_context - method.num_virtual - method.position_offset


def spending(config: ModelConfig, method: Method) -> Costs:
    """Returns the model's costs; of experts, all count."""
    shapes = flatten(decoder.abstract_params(config.unquantized, method))
    sizes = {path: leaf.size for path, leaf in shapes.items()}
    blocks = sum(count for path, count in sizes.items() if path.startswith("blocks/"))
    attended = config.num_layers * config.num_heads * config.head_dim
    return Costs(2.0 * blocks, 4.0 * attended, 2.0 * config.hidden_size * config.vocab_size)


def plan(config: ModelConfig, requests: Sequence[Request], limit: int, costs: Costs) -> list[Row]:
    """Returns the rows that answer all requests, equal contexts together."""
    asked: dict[tuple[int, ...], dict[tuple[int, ...], list[int]]] = {}
    for number, (context, continuation) in enumerate(requests):
        if not len(context) or not 0 < len(continuation) <= limit:
            raise RequestError(
                f"request {number} has {len(context)} tokens of context and {len(continuation)} "
                f"to score; it needs at least one of each, and at most {limit} to score"
            )
        whole = (*context, *continuation)[-(limit + 1) :]
        if min(whole) < 0 or max(whole) >= config.vocab_size:
            raise RequestError(
                f"request {number} has a token id outside the vocabulary of {config.vocab_size}"
            )
        start = len(whole) - len(continuation)
        asked.setdefault(whole[:start], {}).setdefault(whole[start:], []).append(number)
    # Where angles follow the length of the whole row, a context is not the same in two rows.
    shared = not config.follows_length
    found = []
    for stem, tips in asked.items():
        apart = rows_apart(stem, tips)
        if shared and len(stem) > 1 and max(map(len, tips)) > 1 and len(tips) > 1:
            branches = tuple((0, tip, tuple(numbers)) for tip, numbers in tips.items())
            together = Row(stem, tuple(tips), branches)
            if together.shape.work(costs) < sum(row.shape.work(costs) for row in apart):
                apart = [together]
        found += apart
    return found


def rows_apart(stem: tuple[int, ...], tips: Mapping[tuple[int, ...], list[int]]) -> list[Row]:
    """Returns rows without tips; continuations of one token need one row together."""
    last = len(stem) - 1
    single = {tip: tuple(numbers) for tip, numbers in tips.items() if len(tip) == 1}
    longer = {tip: tuple(numbers) for tip, numbers in tips.items() if len(tip) > 1}
    rows = [Row(stem, (), tuple((last, t, n) for t, n in single.items()))] if single else []
    alone = [Row(stem + tip[:-1], (), ((last, tip, n),)) for tip, n in longer.items()]
    return rows + alone


def batches(
    planned: Sequence[Row], shapes: Mapping[Shape, Shape], mesh: Mesh, rows: int | None
) -> Iterator[tuple[Shape, list[Row], int]]:
    """Yields (shape, rows, rows of the compiled program), long rows first.

    The number of rows of a program is a power of two times the mesh's shards.
    """
    groups: dict[Shape, list[Row]] = {}
    for row in planned:
        groups.setdefault(shapes[row.shape], []).append(row)
    shards = batch_shards(mesh)
    budget = TOKENS.get(jax.default_backend(), OTHER_TOKENS)
    for shape in sorted(groups, key=lambda s: -s.tokens):
        group = sorted(groups[shape], key=lambda row: -row.shape.tokens)
        wanted = min(rows or max(1, budget // shape.tokens), len(group))
        size = shards * (1 << max(-(-wanted // shards) - 1, 0).bit_length())
        for start in range(0, len(group), size):
            yield shape, group[start : start + size], size


def entries(batch: Sequence[Row]) -> Iterator[tuple[int, Any, tuple[int, ...], tuple[int, ...]]]:
    """Yields (row, where its scores lie, targets, requests) of each score of a batch."""
    for number, row in enumerate(batch):
        place = 0
        for branch, (_, targets, requests) in enumerate(row.asked):
            if row.tips:
                at = (number, branch, slice(0, len(targets)))
            else:
                at = (number, slice(place, place + len(targets)))
            place += len(targets)
            yield number, at, targets, requests


def filled(method: Method, shape: Shape, batch: Sequence[Row], size: int) -> dict[str, np.ndarray]:
    """Returns the arrays of a batch; each has `size` rows."""
    lead = method.num_virtual
    held = 1 if shape.tips else 0  # the stem's last token is read with the tips
    stems = np.zeros((size, lead + shape.stem), np.int32)
    lengths = np.zeros(size, np.int32)
    for number, row in enumerate(batch):
        lengths[number] = lead + len(row.stem) - held
        stems[number, lead : lengths[number]] = row.stem[: len(row.stem) - held]
    outer = (size, shape.tips, shape.width) if shape.tips else (size, shape.width)
    targets, places = np.zeros(outer, np.int32), np.zeros(outer, np.int32)
    tips, reals = np.zeros(outer, np.int32), np.zeros(outer, np.int32)
    for number, at, wanted, _ in entries(batch):
        targets[at] = wanted
        if shape.tips:
            tips[at] = (batch[number].stem[-1], *wanted[:-1])
            reals[at] = 1
    for number, row in enumerate(batch if not shape.tips else ()):
        firsts = [np.arange(len(t)) + first for first, t, _ in row.asked]
        scored = lead + np.concatenate(firsts)
        places[number, : len(scored)] = scored
    columns = np.arange(lead + shape.stem, dtype=np.int32)
    inside = columns < lengths[:, None]
    arrays = {
        "input_ids": stems,
        "segment_ids": inside.astype(np.int32),
        "positions": np.where(inside, columns, 0).astype(np.int32),
        "targets": targets,
    }
    if lead:
        arrays["virtual"] = np.where(inside & (columns < lead), columns, -1).astype(np.int32)
    if not shape.tips:
        return arrays | {"places": places}
    ahead = lengths[:, None, None] + np.arange(shape.width, dtype=np.int32)
    return arrays | {
        "tip_ids": tips,
        "tip_segments": reals,
        "tip_positions": np.where(reals, ahead, 0).astype(np.int32),
    }


@functools.cache
def _programs(config: ModelConfig, method: Method, shards: int) -> tuple[Callable, Callable]:
    """Returns the jitted (stems alone, stems with tips): arrays of `filled` → Scores."""

    def scores(params, hidden, targets) -> Scores:
        head = functools.partial(decoder.logits, config, method, params)
        return token_scores(head, hidden, targets, config.vocab_size, shards=shards)

    def whole(found: Scores) -> Scores:
        # Every process reads all of the answers.
        return Scores(*(constrain(x, *(None,) * x.ndim) for x in found))

    @jax.jit
    def alone(params, arrays) -> Scores:
        hidden = decoder.hidden_states(config, method, params, arrays).states
        chosen = jnp.take_along_axis(hidden, arrays["places"][..., None], axis=1)
        return whole(scores(params, chosen, arrays["targets"]))

    @jax.jit
    def together(params, arrays) -> Scores:
        rows, tips, width = arrays["targets"].shape
        cache = empty_cache(config, rows, arrays["input_ids"].shape[1])
        cache = decoder.hidden_states(config, method, params, arrays, cache=cache).cache
        flat = {
            name: arrays[key].reshape(rows * tips, width)
            for name, key in (
                ("input_ids", "tip_ids"),
                ("segment_ids", "tip_segments"),
                ("positions", "tip_positions"),
            )
        }
        if method.num_virtual:
            flat["virtual"] = jnp.full_like(flat["input_ids"], -1)
        cache = branched(cache, tips, width)
        hidden = decoder.hidden_states(config, method, params, flat, cache=cache).states
        found = scores(params, hidden, arrays["targets"].reshape(rows * tips, width))
        return whole(Scores(*(x.reshape(rows, tips, width) for x in found)))

    return alone, together


def branched(cache: Cache, tips: int, width: int) -> Cache:
    """Returns the cache with each row `tips` times in turn, and `width` more empty columns."""

    def spread(x: jax.Array, rows: int, columns: int) -> jax.Array:
        x = jnp.repeat(x, tips, axis=rows)
        more = [(0, 0)] * x.ndim
        more[columns] = (0, width)
        return jnp.pad(x, more)

    return spread_cache(
        dataclasses.replace(
            cache,
            keys=spread(cache.keys, 1, 3),
            values=spread(cache.values, 1, 3),
            segment_ids=spread(cache.segment_ids, 0, 1),
            positions=spread(cache.positions, 0, 1),
        )
    )
