"""Loss, perplexity and accuracy on held-out examples."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxtune.core.weighted import Weighted
from jaxtune.parallel.batches import Rows, global_batch


@dataclasses.dataclass(frozen=True)
class Sums:
    """What was measured on some examples, not yet divided; sums of several sources add up.

    Attributes:
        totals: {name: (sum, weight)} of the loss and the objective's metrics, in float64.
        tokens: trained tokens, those of a weight above 0. The weight itself may be a fraction.
    """

    totals: Mapping[str, tuple[float, float]]
    tokens: int

    def __add__(self, other: Sums) -> Sums:
        names = dict.fromkeys([*self.totals, *other.totals])
        pairs = {n: (self.totals.get(n, (0, 0)), other.totals.get(n, (0, 0))) for n in names}
        added = {name: (a[0] + b[0], a[1] + b[1]) for name, (a, b) in pairs.items()}
        return Sums(added, self.tokens + other.tokens)

    def means(self) -> dict[str, float]:
        """Returns {"loss", other metrics, "perplexity", "tokens"}; NaN without targets."""
        means = {name: s / w if w else math.nan for name, (s, w) in self.totals.items()}
        return means | {"perplexity": perplexity(means["loss"]), "tokens": self.tokens}


def loss_sums(
    step: Callable[..., tuple[Weighted, dict[str, Weighted]]],
    trainable: Any,
    frozen: Any,
    batches: Iterable[dict[str, np.ndarray]],
    mesh: Mesh,
    rows: Rows | None = None,
) -> Sums:
    """Returns the Sums over all targets of the batches.

    Sums and weights are added up over the batches and divided once, in float64, so that the result
    does not depend on the batch size or the padding (CORRECTNESS C3).

    Args:
        step: jitted (trainable, frozen, batch) → (loss, metrics) as sums.
        trainable, frozen: the parameters.
        batches: host batches.
        mesh: the mesh.
        rows: which rows of each batch the host batches hold; None: all.
    """
    found = []
    for host in batches:
        batch = global_batch(host, mesh, rows)
        found.append((*step(trainable, frozen, batch), targets(batch["loss_mask"])))
    totals: dict[str, tuple[float, float]] = {"loss": (0.0, 0.0)}
    tokens = 0
    for loss, metrics, count in jax.device_get(found):
        tokens += int(count)
        for name, value in {"loss": loss, **metrics}.items():
            total, weight = totals.get(name, (0.0, 0.0))
            totals[name] = (total + float(value.sum), weight + float(value.weight))
    return Sums(totals, tokens)


@jax.jit
def targets(loss_mask: jax.Array) -> jax.Array:
    """Returns how many tokens of a global batch [B, T] are targets, int32."""
    return jnp.sum(loss_mask > 0, dtype=jnp.int32)


def perplexity(loss: float) -> float:
    """Returns exp(loss), infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf
