"""Operations of a compiled program's matrix products."""

from __future__ import annotations

import math
import re

from jaxtune.planning.hlo import Instruction, Module, shapes_of


def flops(module: Module) -> int:
    """Returns the operations of a program's matrix products, each as often as it runs.

    Two for each product of elements; TPU programs have convolutions for them. What a kernel of its
    own computes (a custom call) is not counted.
    """
    total = 0
    for name, body in module.computations.items():
        runs = module.executions[name]
        for i in body.values():
            if runs and i.opcode in ("dot", "convolution"):
                total += runs * _product_flops(i, body)
    return total


def _product_flops(i: Instruction, body: dict[str, Instruction]) -> int:
    """Two for each product of elements of a matrix product, written as dot or convolution."""
    (_, result), *_ = shapes_of(i.type)
    if i.opcode == "dot":
        (_, left), *_ = shapes_of(body[i.operands[0]].type)
        summed = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.rest)
        depth = math.prod(left[int(n)] for n in summed[1].split(",") if n) if summed else 1
        return 2 * math.prod(result) * depth
    (_, left), *_ = shapes_of(body[i.operands[0]].type)
    (_, kernel), *_ = shapes_of(body[i.operands[1]].type)
    ours, theirs, out = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.rest).groups()
    products = kernel[theirs.index("i")]
    for label, size in zip(out, result, strict=True):
        if label in "bf":
            products *= size
        else:  # TPU programs write batches of matrix products as windows that hardly overlap
            sizes = (left[ours.index(label)], kernel[theirs.index(label)], size)
            products *= _taps(*sizes, _window(i.rest, int(label)))
    return 2 * products


def _window(attributes: str, dimension: int) -> dict[str, int]:
    """Returns stride, padding before, and both dilations of one dimension of a convolution."""
    text = re.search(r"window=\{([^}]*)\}", attributes)
    fields = dict(part.split("=") for part in text[1].split()) if text else {}

    def at(name: str, default: str) -> str:
        return fields[name].split("x")[dimension] if name in fields else default

    return {
        "stride": int(at("stride", "1")),
        "pad": int(at("pad", "0_0").split("_")[0]),
        "dilation": int(at("lhs_dilate", "1")),
        "spread": int(at("rhs_dilate", "1")),
    }


def _taps(inputs: int, taps: int, outputs: int, window: dict[str, int]) -> int:
    """Returns how many pairs of output and kernel element meet an input that is no filling."""
    count = 0
    for place in range(outputs):
        for tap in range(taps):
            at = place * window["stride"] + tap * window["spread"] - window["pad"]
            count += 0 <= at <= (inputs - 1) * window["dilation"] and not at % window["dilation"]
    return count
