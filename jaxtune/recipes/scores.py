"""Log-probabilities of a batch's tokens under a model: what every objective starts from."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.core.tree import Tree
from jaxtune.models import decoder
from jaxtune.models.config import ModelConfig
from jaxtune.objectives.chunks import in_chunks
from jaxtune.objectives.logprobs import LOGITS_BYTES, Scores, token_scores
from jaxtune.parallel.sequence import balanced, sequence_shards, zigzag
from jaxtune.peft.method import Method

SPREAD_HEAD = 4  # times LOGITS_BYTES: about a thousand tokens of a vocabulary of 128k
# What the model reads of a token at its own place; all else belongs to the token as a target.
INPUTS = ("input_ids", "segment_ids", "positions", "virtual", "branches")


class Predictions(NamedTuple):
    """What a model says of a batch; all arrays [B, T] stand at the places that predict.

    Attributes:
        scores: of the targets.
        batch: the batch's target-side arrays, such as `loss_mask`, and the `targets` themselves;
            0 at the last place, which predicts nothing. With rows spread over devices the places
            stand in another order, and with shared prompts at the targets' own places, the same
            for all arrays.
        hidden: [B, T, D], what the logits are made of.
        balance: load-balancing loss of each row, float32 [B]; None without experts.
    """

    scores: Scores
    batch: dict[str, jax.Array]
    hidden: jax.Array
    balance: jax.Array | None


def target_side(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Returns a batch's arrays, those of tokens as targets moved to the places that predict them.

    `targets` int32 is new: the token that comes next. Where completions share a prompt (`branches`)
    one place predicts several, and nothing moves; see `predicting_places`.

    >>> import jax.numpy as jnp
    >>> batch = {"input_ids": jnp.array([[5, 6, 7]]), "loss_mask": jnp.array([[0.0, 1.0, 1.0]])}
    >>> {name: array.tolist() for name, array in target_side(batch).items()}
    {'input_ids': [[5, 6, 7]], 'loss_mask': [[1.0, 1.0, 0.0]], 'targets': [[6, 7, 0]]}
    """

    if "branches" in batch:
        return batch | {"targets": batch["input_ids"]}

    def moved(array: jax.Array) -> jax.Array:
        return jnp.pad(array[:, 1:], ((0, 0), (0, 1), *((0, 0),) * (array.ndim - 2)))

    kept = {n: array if n in INPUTS else moved(array) for n, array in batch.items()}
    return kept | {"targets": moved(batch["input_ids"])}


def at_targets(values: jax.Array, branched: bool = False) -> jax.Array:
    """Returns values [B, T, …] of `Predictions` at the tokens' own places; 0 at a row's first.

    Args:
        values: one of the arrays of a `Predictions`.
        branched: whether its batch has `branches`.
    """
    if branched:
        return values
    shards = sequence_shards()
    if shards > 1:
        values = values[:, np.argsort(zigzag(values.shape[1], shards))]
    return jnp.pad(values[:, :-1], ((0, 0), (1, 0), *((0, 0),) * (values.ndim - 2)))


def predicting_places(branches: jax.Array) -> jax.Array:
    """Returns the place that predicts the token at each place, int32 [B, T].

    It is the one before, but for the first token of a completion, which follows its prompt. The
    first place of a row predicts itself; its token is no target.

    >>> import jax.numpy as jnp
    >>> predicting_places(jnp.array([[0, 0, 1, 1, 2, 2, 0, 1]])).tolist()
    [[0, 0, 1, 2, 1, 4, 5, 6]]
    """
    here = jnp.broadcast_to(jnp.arange(branches.shape[1]), branches.shape)
    prompt = jax.lax.cummax(jnp.where(branches == 0, here, 0), axis=1)
    before = jnp.maximum(here - 1, 0)
    begins = (branches > 0) & (branches != jnp.take_along_axis(branches, before, axis=1))
    return jnp.where(begins, prompt, before)


def predicting_states(
    config: ModelConfig,
    method: Method,
    params: Tree,
    inputs: dict[str, jax.Array],
    key: jax.Array | None = None,
) -> decoder.Hidden:
    """Returns the Hidden of a batch's `INPUTS`, its states at the places of `Predictions`."""
    hidden = decoder.hidden_states(config, method, params, inputs, key=key)
    if "branches" not in inputs:
        return hidden
    places = predicting_places(inputs["branches"])
    return hidden._replace(states=jnp.take_along_axis(hidden.states, places[:, :, None], axis=1))


def predictions(
    config: ModelConfig,
    method: Method,
    params: Tree,
    batch: dict[str, jax.Array],
    key: jax.Array | None = None,
    *,
    shards: int = 1,
    logits_bytes: int = LOGITS_BYTES,
    most: int | None = None,
) -> Predictions:
    """Returns the Predictions of a model on a batch, without the [B, T, V] logits.

    Args:
        config, method, params: the model.
        batch: arrays [B, T]; see `data.batches`.
        key: dropout key, or None.
        shards: over how many devices the rows are spread.
        logits_bytes: see `token_scores`.
        most: a number that the targets of a row never exceed (its `loss_mask` is not 0 there). The
            head then runs on so many tokens a row, and scores elsewhere are 0; of a row with more
            targets they are NaN. None: on all tokens.
    """
    batch = balanced(target_side(batch))
    inputs = {name: batch.pop(name) for name in INPUTS if name in batch}
    hidden = predicting_states(config, method, params, inputs, key)
    trained = None if most is None else batch["loss_mask"] > 0
    places = head_places(trained, most)
    scores = token_scores(
        functools.partial(decoder.logits, config, method, params, key=key),
        at_places(hidden.states, places),
        at_places(batch["targets"], places),
        config.vocab_size,
        logits_bytes=logits_bytes,
        shards=shards,
        pieces=sequence_shards(),
    )
    if places is not None:
        scores = Scores(
            put_back(scores.logprobs, trained),
            put_back(scores.correct.astype(jnp.float32), trained) > 0,
        )
    return Predictions(scores, batch, hidden.states, hidden.balance)


def head_places(chosen: jax.Array | None, most: int | None) -> jax.Array | None:
    """Returns the places that the head is to run on, int32 [B, most]; None: on all.

    Args:
        chosen: bool [B, T], where scores are wanted; unused where `most` is None.
        most: a number that those of a row never exceed; None: not known.
    """
    if most is None or most >= chosen.shape[1] or sequence_shards() > 1:
        return None
    return first_places(chosen, most)


def first_places(chosen: jax.Array, count: int) -> jax.Array:
    """Returns int32 [B, count], the places where `chosen` bool [B, T] holds, in order, then others.

    >>> import jax.numpy as jnp
    >>> first_places(jnp.array([[False, True, False, True]]), 3).tolist()
    [[1, 3, 0]]
    """
    return jnp.argsort(~chosen, axis=1, stable=True)[:, :count].astype(jnp.int32)


def at_places(values: jax.Array, places: jax.Array | None) -> jax.Array:
    """Returns values [B, T, …] at places [B, M], or all of them where that is None."""
    if places is None:
        return values
    index = places.reshape(*places.shape, *(1,) * (values.ndim - 2))
    return jnp.take_along_axis(values, index, axis=1)


def put_back(values: jax.Array, chosen: jax.Array) -> jax.Array:
    """Returns float32 [B, T]: values [B, M] at the places of `first_places`, 0 elsewhere.

    A row in which `chosen` holds at more than M places is NaN there: no value may be lost unseen.

    >>> import jax.numpy as jnp
    >>> put_back(jnp.array([[5.0, 6.0, 7.0]]), jnp.array([[False, True, False, True]])).tolist()
    [[0.0, 5.0, 0.0, 6.0]]
    """
    rank = jnp.cumsum(chosen, axis=1) - 1
    found = jnp.take_along_axis(values, jnp.clip(rank, 0, values.shape[1] - 1), axis=1)
    fits = jnp.sum(chosen, axis=1, keepdims=True) <= values.shape[1]
    return jnp.where(chosen, jnp.where(fits, found, jnp.nan), 0.0)


def most_likely(
    config: ModelConfig,
    method: Method,
    top_k: int,
    temperature: float,
    params: Tree,
    batch: dict[str, jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """Returns (ids int32, log-probabilities float32) [B, T, K] of each token's likeliest rivals.

    They stand at the tokens' own places.

    Args:
        config, method, params: the model.
        top_k: K.
        temperature: divides the logits.
        batch: arrays [B, T].
    """
    inputs = balanced({name: batch[name] for name in INPUTS if name in batch})
    states = predicting_states(config, method, params, inputs).states
    head = functools.partial(decoder.logits, config, method, params)

    def piece(hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
        logprobs = jax.nn.log_softmax(head(hidden) / temperature, axis=-1)
        values, ids = jax.lax.top_k(logprobs, top_k)
        return ids.astype(jnp.int32), values

    ids, logprobs = in_chunks(piece, states, config.vocab_size)
    return at_targets(ids), at_targets(logprobs)


def chunk_bytes(config: ModelConfig, trainable: Tree, shards: int) -> int:
    """Returns the most bytes of logits that the loss makes at a time on a device.

    A trained head that is spread over devices is gathered, and its gradient is summed, once in
    every chunk: there are fewer and larger ones, so that products hide the transfers.

    Args:
        config: the model.
        trainable: the trained parameters, None elsewhere; arrays or shapes.
        shards: over how many devices the rows of a batch are spread.
    """
    node, leaf = decoder.head_path(config)
    spread = shards > 1 and trainable.get(node, {}).get(leaf) is not None
    return SPREAD_HEAD * LOGITS_BYTES if spread else LOGITS_BYTES
