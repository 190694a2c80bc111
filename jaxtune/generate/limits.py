"""What a model can be asked to read and write, checked before anything runs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxtune.core.errors import RequestError
from jaxtune.models.config import ModelConfig
from jaxtune.peft.method import Method


def bucket(count: int, least: int) -> int:
    """Returns the power of two ≥ `count` and ≥ `least` (itself one): few shapes to compile.

    >>> bucket(5, 8), bucket(9, 8)
    (8, 16)
    """
    return max(least, 1 << max(count - 1, 0).bit_length())


def check_tokens(
    config: ModelConfig,
    method: Method,
    rows: Sequence[Sequence[int] | np.ndarray],
    max_new_tokens: int = 0,
) -> None:
    """Checks that each row's ids are in the vocabulary and fit the model's positions.

    Args:
        config, method: the model.
        rows: token ids of each row.
        max_new_tokens: tokens to be written behind each row.

    Raises:
        RequestError: an id outside [0, V), or a row that with its virtual tokens, prefix and new
            tokens needs more than `config.max_context` positions.
    """
    lead, limit = method.num_virtual + method.position_offset, config.max_context
    for number, row in enumerate(rows):
        ids = np.asarray(row)
        if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
            raise RequestError(f"row {number} must be a list of token ids, not {row!r:.60}")
        if ids.size and not 0 <= ids.min() <= ids.max() < config.vocab_size:
            worst = ids.min() if ids.min() < 0 else ids.max()
            raise RequestError(
                f"token id {worst} in row {number} is outside the vocabulary of "
                f"{config.vocab_size} ids"
            )
        if lead + ids.size + max_new_tokens > limit:
            virtual = f" + {lead} of {method.name} tuning" if lead else ""
            new = f" + {max_new_tokens} new" if max_new_tokens else ""
            raise RequestError(
                f"row {number} needs {ids.size}{virtual}{new} = "
                f"{lead + ids.size + max_new_tokens} positions; the model has {limit} "
                "(max_position_embeddings)",
                key="max_new_tokens" if new else None,
            )
