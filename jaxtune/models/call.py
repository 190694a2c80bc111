"""What the layers of one forward pass share: where tokens stand, masks, angles."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxtune.models.attention import Span, Where, visible
from jaxtune.models.attention_backends import backend
from jaxtune.models.config import ModelConfig
from jaxtune.models.rope import angles


@dataclasses.dataclass(frozen=True)
class Call:
    """What the layers of one forward pass share; one entry for each kind of layer where stacked.

    Attributes:
        queries, keys: where the new tokens and all tokens stand.
        windows: of each kind.
        masks: bool [kinds, B, T, S], or None for a back end that does without.
        angles: float32 [kinds, 2, B, T, 1, R / 2] of the new tokens, or None without rotation.
        key_angles: the same of all keys [.., B, S, ..], where angles follow the segment's length
            and cached keys therefore wait for their rotation; else None.
        length: the cache's, or None without one.
        kind: the layer's, an index that may be traced; None before a layer is chosen.
    """

    queries: Span
    keys: Span
    windows: tuple[int | None, ...]
    masks: jax.Array | None
    angles: jax.Array | None
    key_angles: jax.Array | None
    length: jax.Array | None
    kind: jax.Array | int | None = None

    def of(self, kind: jax.Array) -> Call:
        """Returns what a layer of one kind reads."""
        if len(self.windows) == 1:
            kind = 0  # a slice that is known costs nothing
        stacked = {
            name: None if array is None else array[kind]
            for name in ("masks", "angles", "key_angles")
            for array in (getattr(self, name),)
        }
        return dataclasses.replace(self, **stacked, kind=kind)

    @property
    def real(self) -> jax.Array:
        """bool [B, T], False for padding."""
        return self.queries.segment_ids > 0

    def attended(self, attend: Callable[[Where], jax.Array]) -> jax.Array:
        """Returns attend(where) of a layer, with its window known while the program is made."""
        if self.masks is not None:
            return attend(Where(self.queries, self.keys, None, self.masks))
        distinct = list(dict.fromkeys(self.windows))
        ways = [Where(self.queries, self.keys, window) for window in distinct]
        if len(ways) == 1:
            return attend(ways[0])
        number = jnp.asarray([distinct.index(window) for window in self.windows])[self.kind]
        return jax.lax.switch(number, [functools.partial(attend, way) for way in ways])


def shared_by_layers(
    config: ModelConfig, queries: Span, keys: Span, length, branches: jax.Array | None = None
) -> Call:
    """Returns where tokens stand, with the masks and angles of each kind of layer.

    Raises:
        ValueError: the model, its attention or a cache cannot tell branches apart.
    """
    c = config
    windows = tuple(kind.window for kind in c.kinds)
    masks = None
    reads_mask = backend(c.attention, length is not None).reads_mask
    if branches is not None and (length is not None or not reads_mask or c.follows_length):
        raise ValueError(
            "completions that share a prompt need attention by a mask, no cache, and angles that "
            f"do not follow a segment's length; attention is {c.attention!r}"
        )
    if reads_mask:
        masks = jnp.stack([visible(queries, keys, window, branches) for window in windows])
    if not c.rotary_width:
        return Call(queries, keys, windows, masks, None, None, length)

    def turned(span: Span):
        lengths = segment_lengths(span, keys) if c.follows_length else None
        return jnp.stack(
            [angles(k.rope, c.head_dim, c.rotary_width, span.positions, lengths) for k in c.kinds]
        )

    late = turned(keys) if c.follows_length else None
    return Call(queries, keys, windows, masks, turned(queries), late, length)


def segment_lengths(queries: Span, keys: Span) -> jax.Array:
    """Returns how long the segment of each query is so far, int32 [B, T]."""
    same = queries.segment_ids[:, :, None] == keys.segment_ids[:, None, :]
    return jnp.max(jnp.where(same, keys.positions[:, None, :] + 1, 0), axis=2)
