"""Weight-name tables: which tensor of a file is which parameter, read in both directions."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Part:
    """Which of a fused tensor's outputs are ours: `size` from `start` on, of every `period`.

    GPT-2's q is 0:D of 3D; GPT-NeoX's q is 0:H of every 3H; gpt-oss's gates are every second.
    """

    start: int
    size: int
    period: int

    def whole(self, width: int) -> int:
        """Returns the fused tensor's width, of which `width` outputs are ours."""
        return width // self.size * self.period

    def places(self, start: int, stop: int) -> np.ndarray:
        """Returns where our outputs start:stop stand in the fused tensor, int [stop - start]."""
        ours = np.arange(start, stop)
        return ours // self.size * self.period + self.start + ours % self.size


@dataclasses.dataclass(frozen=True)
class Weight:
    """One tensor of a checkpoint, or one a layer (and expert), and the parameter that it is.

    A row counts only for a model that has the parameter: biases and an untied head are rows like
    the others. Rows with the same name are parts of one fused tensor.

    Attributes:
        name: the tensor's name; `{}` stands for the layer's number, a second one for the expert's.
        path: the parameter's path. A name with `{}` belongs to a leaf [L, ...].
        transpose: the file holds [..., out, in] where the parameter is [..., in, out].
        part: of the tensor's outputs, where it is fused with others.
    """

    name: str
    path: str
    transpose: bool = False
    part: Part | None = None

    @property
    def stacked(self) -> int:
        """How many leading dimensions of the parameter are spread over tensors of their own."""
        return self.name.count("{}")

    def names(self, shape: Sequence[int]) -> tuple[str, ...]:
        """Returns the tensor names of a parameter of this shape, in the order of its layers.

        >>> Weight("h.{}.mlp.weight", "blocks/mlp/up_proj/kernel").names((2, 4, 8))
        ('h.0.mlp.weight', 'h.1.mlp.weight')
        """
        return tuple(self.name.format(*place) for place in self.indices(shape))

    def indices(self, shape: Sequence[int]) -> list[tuple[int, ...]]:
        """Returns the parameter's index of each of `names`: (), (layer,) or (layer, expert)."""
        return list(itertools.product(*map(range, shape[: self.stacked])))

    def tensor_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Returns the shape of one tensor in the file, for a parameter of this shape."""
        *lead, width = shape[self.stacked :]
        one = (*lead, width if self.part is None else self.part.whole(width))
        return (*one[:-2], one[-1], one[-2]) if self.transpose else one

    def turned(self, one: np.ndarray) -> np.ndarray:
        """Returns the file's outputs as the parameter has them, or the parameter's as the file."""
        return np.swapaxes(one, -1, -2) if self.transpose else one


def rows(table: Sequence[Weight], shapes: Mapping[str, Any]) -> dict[str, Weight]:
    """Returns {path: row} for every parameter of a model.

    Args:
        table: a family's rows.
        shapes: {path: leaf} of the model's parameters, as `core.tree.flatten` gives it.

    Raises:
        ValueError: a parameter that no row covers; the family cannot hold the model.
    """
    by_path = {weight.path: weight for weight in table}
    homeless = [path for path in shapes if path not in by_path]
    if homeless:
        raise ValueError(f"the family has no tensor for parameter {homeless[0]!r}")
    return {path: by_path[path] for path in shapes}
