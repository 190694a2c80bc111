"""Logits, log-probabilities and scores of given tokens, padded on either side or not at all."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.core.errors import RequestError
from jaxtune.core.tree import Tree
from jaxtune.generate.limits import bucket, check_tokens
from jaxtune.generate.placement import mesh_of
from jaxtune.models import decoder
from jaxtune.models.config import ModelConfig
from jaxtune.objectives.logprobs import token_scores
from jaxtune.peft.method import Method

LEAST, STRIDE = 16, 64


class Layout(NamedTuple):
    """Rows packed to the left, and the way back.

    Attributes:
        batch: model batch [B, S]: virtual tokens, then the real ones, then padding.
        ids: int32 [B, S], the caller's ids, in the caller's columns.
        real: bool [B, S], which of them are real.
        places: int32 [B, S], the packed column of each real token; 0 elsewhere.
    """

    batch: dict[str, np.ndarray]
    ids: np.ndarray
    real: np.ndarray
    places: np.ndarray


def logits(
    config: ModelConfig, method: Method, params: Tree, ids: Any, mask: Any = None
) -> jax.Array:
    """Returns float32 [B, T, V]: at each real token, the logits of the next; 0 at padding.

    A row's logits depend on its real tokens alone: left and right padding give the same bits.

    Args:
        config, method, params: the model.
        ids: int [B, T].
        mask: [B, T], 1 at real tokens and 0 at padding; None: all are real.

    Raises:
        RequestError: shapes or types that do not fit, an id outside the vocabulary, or more
            tokens than the model has positions.
    """
    layout = arrange(config, method, ids, mask)
    with mesh_of(params):
        return _programs(config, method)[0](params, layout)[:, : np.shape(ids)[1]]


def logprobs(
    config: ModelConfig, method: Method, params: Tree, ids: Any, mask: Any = None
) -> jax.Array:
    """Returns float32 [B, T-1]: ln p(token t+1 | the real tokens up to t).

    0 where token t+1 is padding or the first real token of its row. Logits are made in chunks of
    tokens, never [B, T, V] at once.

    Args and errors: as `logits`.
    """
    layout = arrange(config, method, ids, mask)
    with mesh_of(params):
        return _programs(config, method)[1](params, layout)[:, 1 : np.shape(ids)[1]]


def scores(
    config: ModelConfig, method: Method, params: Tree, ids: Any, mask: Any = None
) -> jax.Array:
    """Returns float32 [B]: the score at each row's last real token, of a model with a score head.

    Args and errors: as `logits`; also a row without a real token.
    """
    layout = arrange(config, method, ids, mask)
    if not layout.real.any(axis=1).all():
        raise RequestError("a row has no token to score", key="mask")
    with mesh_of(params):
        return _programs(config, method)[2](params, layout)


def arrange(config: ModelConfig, method: Method, ids: Any, mask: Any = None) -> Layout:
    """Packs each row's real tokens to the left, behind the method's virtual tokens.

    Arguments and errors are those of `logits`. S is rounded up, so that few shapes are compiled.
    """
    ids, real = checked(config, method, ids, mask)
    lead, (rows, width) = method.num_virtual, ids.shape
    counts = real.sum(axis=1)
    slots = rounded(max(width, lead + int(counts.max())))
    held = Layout(
        {},
        np.zeros((rows, slots), np.int32),
        np.zeros((rows, slots), bool),
        np.zeros((rows, slots), np.int32),
    )
    held.ids[:, :width], held.real[:, :width] = ids, real
    held.places[:, :width] = np.where(real, lead + np.cumsum(real, axis=1) - 1, 0)
    columns = np.arange(slots, dtype=np.int32)
    inside = columns < np.where(counts > 0, lead + counts, 0)[:, None]
    packed = np.zeros((rows, slots), np.int32)
    row, column = np.nonzero(held.real)
    packed[row, held.places[row, column]] = held.ids[row, column]
    held.batch.update(
        input_ids=packed,
        segment_ids=inside.astype(np.int32),
        positions=np.where(inside, columns, 0).astype(np.int32),
    )
    if lead:
        held.batch["virtual"] = np.where(inside & (columns < lead), columns, -1).astype(np.int32)
    return held


def padded(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Returns (ids int32 [n, T], mask int32 [n, T]) of rows of ids, padded on the right."""
    ids, mask = np.zeros((2, len(rows), max(map(len, rows), default=0)), np.int32)
    for number, row in enumerate(rows):
        ids[number, : len(row)], mask[number, : len(row)] = row, 1
    return ids, mask


def checked(
    config: ModelConfig, method: Method, ids: Any, mask: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (ids int32 [B, T], real bool [B, T]), or raises what `logits` names."""
    try:
        ids = np.asarray(ids)
    except ValueError as error:
        raise RequestError("rows differ in length; pad them and give a mask", key="ids") from error
    if ids.ndim != 2 or not ids.size or not np.issubdtype(ids.dtype, np.integer):
        raise RequestError(f"must be integers [B, T], not {ids.dtype} {list(ids.shape)}", key="ids")
    real = np.ones(ids.shape, bool) if mask is None else np.asarray(mask) != 0
    if real.shape != ids.shape:
        raise RequestError(
            f"has shape {list(real.shape)}, the ids have {list(ids.shape)}", key="mask"
        )
    check_tokens(config, method, [row[kept] for row, kept in zip(ids, real, strict=True)])
    return ids.astype(np.int32), real


def rounded(width: int) -> int:
    """Returns the width to compile for: a power of two up to STRIDE, multiples of STRIDE beyond.

    >>> rounded(5), rounded(33), rounded(130)
    (16, 64, 192)
    """
    return bucket(width, LEAST) if width <= STRIDE else -(-width // STRIDE) * STRIDE


@functools.cache
def _programs(config: ModelConfig, method: Method) -> tuple[Callable, Callable, Callable]:
    """Returns the jitted functions behind `logits`, `logprobs` and `scores`."""

    def hidden_at(params, layout: Layout, places):
        hidden = decoder.hidden_states(config, method, params, layout.batch).states
        return jnp.take_along_axis(hidden, places[..., None], axis=1)

    @jax.jit
    def all_logits(params, layout: Layout):
        found = decoder.logits(config, method, params, hidden_at(params, layout, layout.places))
        return jnp.where(layout.real[..., None], found, 0.0)

    @jax.jit
    def all_logprobs(params, layout: Layout):
        # Padding's place 0 becomes -1: any column will do, its value is masked below.
        hidden = hidden_at(params, layout, jnp.maximum(layout.places - 1, 0))
        head = functools.partial(decoder.logits, config, method, params)
        found = token_scores(head, hidden, layout.ids, config.vocab_size).logprobs
        follows = layout.real & (layout.places > method.num_virtual)
        return jnp.where(follows, found, 0.0)

    @jax.jit
    def last_scores(params, layout: Layout):
        last = jnp.max(layout.places, axis=1, keepdims=True)
        return decoder.scores(config, method, params, hidden_at(params, layout, last))[:, 0]

    return all_logits, all_logprobs, last_scores
