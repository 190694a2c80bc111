"""Checkpoints between two aims: those that no other beats in both."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

PICKS = ("knee", "target", "retention")

# Ends of the names of metrics that are better when they are larger.
RISING = ("accuracy", "reward", "exact_match", "f1", "bleu", "chrf", "rouge1", "rouge2", "rougeL")

Point = tuple[float, float]  # (of the target, of what is to be retained), both to fall
Aims = tuple[str, str]  # names of the two metrics


def front(points: Mapping[int, Point]) -> list[int]:
    """Returns the steps, ascending, whose point no other point equals or beats in both aims.

    Of equal points the earliest stays.

    >>> front({1: (3.0, 1.0), 2: (2.0, 2.0), 3: (2.5, 2.0), 4: (1.0, 4.0)})
    [1, 2, 4]
    """

    def beaten(step: int, point: Point) -> bool:
        return any(
            other[0] <= point[0] and other[1] <= point[1] and (other != point or rival < step)
            for rival, other in points.items()
            if rival != step
        )

    return sorted(step for step, point in points.items() if not beaten(step, point))


def pick(points: Mapping[int, Point], how: str) -> int:
    """Returns the step of the front that is best by "target" or "retention", or at its "knee".

    The knee is the point nearest to where both aims are at their best, each measured in the span
    that it has along the front.

    Raises:
        ValueError: no points.

    >>> points = {1: (3.0, 1.0), 2: (1.2, 1.2), 3: (1.0, 3.0)}
    >>> [pick(points, how) for how in PICKS]
    [2, 3, 1]
    """
    best = {step: points[step] for step in front(points)}
    if how == "target":
        return min(best, key=lambda step: best[step])
    if how == "retention":
        return min(best, key=lambda step: best[step][::-1])
    lows = [min(point[axis] for point in best.values()) for axis in (0, 1)]
    spans = [max(point[axis] for point in best.values()) - lows[axis] or 1.0 for axis in (0, 1)]
    return min(
        best,
        key=lambda step: math.hypot(*((best[step][i] - lows[i]) / spans[i] for i in (0, 1))),
    )


def larger_is_better(metric: str) -> bool:
    """Tells whether a metric is one to raise; losses and perplexities are to fall.

    >>> larger_is_better("eval/labels/macro_f1"), larger_is_better("eval/labels/nll")
    (True, False)
    """
    return metric.endswith(RISING)


def points_of(metrics: Mapping[int, Mapping[str, float] | None], aims: Aims) -> dict[int, Point]:
    """Returns the point of each step that has both metrics; one to raise is turned round."""
    signs = [-1.0 if larger_is_better(name) else 1.0 for name in aims]
    return {
        step: tuple(sign * known[name] for sign, name in zip(signs, aims, strict=True))
        for step, known in metrics.items()
        if known is not None and all(known.get(name) is not None for name in aims)
    }


@dataclasses.dataclass(frozen=True)
class KeepFront:
    """An Orbax preservation policy: what lies on the front of two metrics stays.

    A checkpoint without either is not this policy's.
    """

    aims: Aims

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """Returns whether each checkpoint stays."""
        del context
        points = points_of({info.step: info.metrics for info in checkpoints}, self.aims)
        kept = set(front(points))
        return [info.step in kept for info in checkpoints]
