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
from jaxtune.objectives.reward import CALIBRATION, calibration_error
from jaxtune.parallel.batches import Rows, global_batch
from jaxtune.training.step import Loss, terms

LOSS, CALIBRATION_ERROR = "loss", "calibration_error"


@dataclasses.dataclass(frozen=True)
class Sums:
    """What was measured on some examples, not yet divided; sums of several sources add up.

    Attributes:
        totals: {name: (sum, weight)} of the loss and the objective's metrics, in float64; of a loss
            of several terms, each as `loss/NAME`.
        tokens: trained tokens, those of a weight above 0. The weight itself may be a fraction.
        likelihood: whether the loss is nats a token, so that it has a perplexity.
    """

    totals: Mapping[str, tuple[float, float]]
    tokens: int
    likelihood: bool = True

    def __add__(self, other: Sums) -> Sums:
        names = dict.fromkeys([*self.totals, *other.totals])
        pairs = {n: (self.totals.get(n, (0, 0)), other.totals.get(n, (0, 0))) for n in names}
        added = {name: (a[0] + b[0], a[1] + b[1]) for name, (a, b) in pairs.items()}
        return Sums(added, self.tokens + other.tokens, self.likelihood and other.likelihood)

    def means(self) -> dict[str, float]:
        """Returns {"loss", other metrics, "perplexity", "tokens"}; NaN without targets.

        Of the bins of a calibration (`objectives.reward.calibration_gaps`) the error is returned.
        """
        means = {name: s / w if w else math.nan for name, (s, w) in self.totals.items()}
        if LOSS not in means:
            parts = [value for name, value in means.items() if name.startswith(f"{LOSS}/")]
            means = {LOSS: sum(parts)} | means
        known = reported(means)
        if CALIBRATION_ERROR in known:
            means[CALIBRATION_ERROR] = calibration_error(means)
        means = {name: means[name] for name in known}
        if self.likelihood:
            means["perplexity"] = perplexity(means[LOSS])
        return means | {"tokens": self.tokens}


def reported(names: Iterable[str]) -> list[str]:
    """Returns the names under which metrics are reported: the bins of a calibration as one error.

    >>> reported(["accuracy", "calibration/bin_0", "calibration/bin_1"])
    ['accuracy', 'calibration_error']
    """
    return list(dict.fromkeys(CALIBRATION_ERROR if CALIBRATION in n else n for n in names))


def loss_sums(
    step: Callable[..., tuple[Loss, dict[str, Weighted]]],
    trainable: Any,
    frozen: Any,
    batches: Iterable[dict[str, np.ndarray]],
    mesh: Mesh,
    rows: Rows | None = None,
    *,
    likelihood: bool = True,
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
        likelihood: whether the loss is nats a token.
    """
    found = []
    for host in batches:
        batch = global_batch(host, mesh, rows)
        found.append((*step(trainable, frozen, batch), targets(batch["loss_mask"])))
    totals: dict[str, tuple[float, float]] = {} if found else {LOSS: (0.0, 0.0)}
    tokens = 0
    for loss, metrics, count in jax.device_get(found):
        tokens += int(count)
        losses = terms(loss)
        named = {name if len(losses) == 1 else f"{LOSS}/{name}": v for name, v in losses.items()}
        for name, value in (named | metrics).items():
            total, weight = totals.get(name, (0.0, 0.0))
            totals[name] = (total + float(value.sum), weight + float(value.weight))
    return Sums(totals, tokens, likelihood)


@jax.jit
def targets(loss_mask: jax.Array) -> jax.Array:
    """Returns how many tokens of a global batch [B, T] are targets, int32."""
    return jnp.sum(loss_mask > 0, dtype=jnp.int32)


def perplexity(loss: float) -> float:
    """Returns exp(loss), infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf
