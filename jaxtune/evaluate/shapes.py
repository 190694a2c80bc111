"""Which shapes to compile for rows of many lengths: few programs, little padding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

LEAST = 16
# The most programs for one list of requests.
PROGRAMS = 8
# Compiling a program takes about as long as this many floating-point operations.
COMPILING = {"cpu": 8e10}
OTHER_COMPILING = 1e14


class Costs(NamedTuple):
    """What a model spends: floating-point operations.

    Attributes:
        token: for a token, without attention.
        key: for a token and a key that it attends to.
        place: for the logits of a token.
    """

    token: float
    key: float
    place: float


class Shape(NamedTuple):
    """The shape of a row: a stem, and tips that each continue it.

    Attributes:
        stem: tokens of the stem.
        tips: number of tips; 0 for a row that is a stem only.
        width: tokens of a tip; without tips, the number of places that are scored.
    """

    stem: int
    tips: int
    width: int

    @property
    def tokens(self) -> int:
        """Tokens that a row computes, padding included."""
        return self.stem + self.tips * self.width

    def work(self, costs: Costs) -> float:
        """Returns the floating-point operations of a row."""
        scored = max(self.tips, 1) * self.width
        keys = self.stem**2 + self.tips * self.width * (self.stem + self.width)
        return self.tokens * costs.token + keys * costs.key + scored * costs.place


def step(count: int) -> int:
    """Returns the least of 16, 32, 48, 64, 96, 128, 192, 256, 384, … that is ≥ `count`.

    >>> [step(n) for n in (1, 17, 40, 65, 100, 300, 512)]
    [16, 32, 48, 96, 128, 384, 512]
    """
    power = max(LEAST, 1 << max(count - 1, 0).bit_length())
    between = power * 3 // 4
    return between if between >= max(count, 2 * LEAST) else power


def joined(one: Shape, other: Shape) -> Shape:
    """Returns the least shape that holds both."""
    return Shape(*map(max, one, other))


def merged(counts: Mapping[Shape, int], costs: Costs, compiling: float) -> dict[Shape, Shape]:
    """Returns {shape: the shape that it is computed in}.

    Joins the two shapes that cost least to join, while there are more than PROGRAMS or the padding
    costs less than compiling would. Rows with tips and rows without are different programs.

    Args:
        counts: number of rows of each shape.
        costs: of the model.
        compiling: floating-point operations that take as long as compiling a program.
    """
    members = {shape: (shape,) for shape in counts}
    rows = dict(counts)
    work = {shape: shape.work(costs) for shape in counts}

    def price(one: Shape, other: Shape) -> float:
        big = joined(one, other).work(costs)
        return rows[one] * (big - work[one]) + rows[other] * (big - work[other])

    ordered = sorted(counts)
    prices = {
        (one, other): price(one, other)
        for index, one in enumerate(ordered)
        for other in ordered[index + 1 :]
        if bool(one.tips) == bool(other.tips)
    }
    while prices:
        one, other = min(prices, key=prices.__getitem__)
        if prices[one, other] > compiling and len(rows) <= PROGRAMS:
            break
        big = joined(one, other)
        total, parts = rows.pop(one) + rows.pop(other), members.pop(one) + members.pop(other)
        rows[big] = rows.get(big, 0) + total
        members[big] = members.get(big, ()) + parts
        work[big] = big.work(costs)
        prices = {pair: cost for pair, cost in prices.items() if not {one, other, big} & {*pair}}
        same = (shape for shape in rows if shape != big and bool(shape.tips) == bool(big.tips))
        prices |= {(big, shape): price(big, shape) for shape in same}
    return {small: big for big, parts in members.items() for small in parts}
