"""Prompts with completions of other prompts, from which a divergence of policies is estimated."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

from jaxtune.core.errors import RequestError
from jaxtune.data.token_store import TokenStore

if TYPE_CHECKING:
    from jaxtune.data.shares import SharedStore


def mismatched(store: TokenStore | SharedStore, room: int, key: str | None = None) -> TokenStore:
    """Returns a store whose example i is prompt i and the completion of the next other prompt.

    Which completion that is depends on the store's order alone. What is longer than a row loses its
    end; where no room is left for a completion, the example has no target.

    Args:
        store: unpaired examples.
        room: tokens that an example may have.
        key: config key named in errors.

    Raises:
        RequestError: all prompts are one.
    """
    examples = [store.example(i) for i in range(len(store))]
    firsts = [int(np.argmax(mask > 0)) for _, mask in examples]
    prompts = [
        hashlib.blake2b(ids[:first].tobytes(), digest_size=8).digest()
        for (ids, _), first in zip(examples, firsts, strict=True)
    ]
    if len(set(prompts)) < 2:
        raise RequestError("needs examples of at least two prompts", key=key)
    parts, masks = [], []
    for i, other in enumerate(others(prompts)):
        ids = np.concatenate([examples[i][0][: firsts[i]], examples[other][0][firsts[other] :]])
        mask = np.concatenate([np.zeros(firsts[i]), examples[other][1][firsts[other] :]])
        parts.append(ids[:room])
        masks.append(mask[:room])
    names = ("example_weight", "label")
    columns = [store.example_columns(i) for i in range(len(store))]
    return TokenStore(
        ids=np.concatenate(parts).astype(np.int32),
        mask=np.concatenate(masks).astype(np.float32),
        offsets=np.cumsum([0, *map(len, parts)]).astype(np.int64),
        records=store.records,
        counts=store.counts,
        source=store.source,
        format="unpaired",
        values={n: np.array([c[n].max() for c in columns], np.float32) for n in names},
    )


def others(prompts: list[bytes]) -> list[int]:
    """Returns for each prompt the index of the next one, in a circle, that is another.

    >>> others([b"a", b"a", b"b", b"a"])
    [2, 2, 3, 2]
    """
    count = len(prompts)
    found = [0] * count
    # The last prompts of the circle look beyond its end, so it is walked twice.
    after = next(i for i in range(count) if prompts[i] != prompts[count - 1])
    for i in range(2 * count - 2, -1, -1):
        here, following = i % count, (i + 1) % count
        if prompts[here] != prompts[following]:
            after = following
        found[here] = after
    return found
