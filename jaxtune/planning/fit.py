"""Which settings of a run to compare, and which of them is the best."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

# A plan without a compiler may miss this share of the memory.
RESERVE = 0.1
REMAT = ("none", "dots", "block")
# Bytes of a frozen weight: 8 bits and a scale a column; 4 bits and a float32 scale for 64 weights.
QUANTIZED = {"int8": 1.0, "nf4": 0.5 + 4 / 64}
MOST_TENSOR = 8


@dataclasses.dataclass(frozen=True)
class Setting:
    """What may be changed without changing what is learned.

    Attributes:
        data, fsdp, tensor: sizes of the mesh's axes.
        grad_accum: micro-batches of a step; the global batch stays.
        remat: what the backward pass computes again.
        quantize: storage of frozen weights; it changes their values a little.
    """

    data: int
    fsdp: int
    tensor: int
    grad_accum: int
    remat: str
    quantize: str = "none"


@dataclasses.dataclass(frozen=True)
class Trial:
    """A setting with what it needs: bytes of one device, and seconds of each resource."""

    setting: Setting
    total_bytes: int
    seconds: dict[str, float]

    @property
    def rank(self) -> tuple:
        """Smaller is better: the slowest resource, then all together, then the simpler setting."""
        s = self.setting
        return (
            round(max(self.seconds.values()), 9),
            s.quantize != "none",
            round(sum(self.seconds.values()), 9),
            s.tensor,
            s.grad_accum,
            REMAT.index(s.remat),
        )


def settings(
    devices: int, batch_size: int, num_kv_heads: int, quantize: Iterable[str] = ("none",)
) -> Iterator[Setting]:
    """Yields every setting in which each device has whole rows and heads.

    >>> len(list(settings(4, 8, 2)))
    36
    """
    for tensor in divisors(devices):
        if tensor > MOST_TENSOR or num_kv_heads % tensor:
            continue
        for fsdp in divisors(devices // tensor):
            data = devices // tensor // fsdp
            if batch_size % (data * fsdp):
                continue
            for accum in divisors(batch_size // (data * fsdp)):
                for remat in REMAT:
                    for kind in quantize:
                        yield Setting(data, fsdp, tensor, accum, remat, kind)


def divisors(number: int) -> list[int]:
    """Returns the divisors of a number.

    >>> divisors(12)
    [1, 2, 3, 4, 6, 12]
    """
    return [n for n in range(1, number + 1) if number % n == 0]


def ranked(trials: Iterable[Trial], usable_bytes: int) -> list[Trial]:
    """Returns the trials that fit with a reserve, the fastest first."""
    room = usable_bytes * (1 - RESERVE)
    return sorted((t for t in trials if t.total_bytes <= room), key=lambda t: t.rank)


def lines(setting: Setting) -> list[str]:
    """Returns the lines of a config file that make a setting."""
    out = [
        f'config.mesh = {{"data": {setting.data}, "fsdp": {setting.fsdp}, '
        f'"tensor": {setting.tensor}}}',
        f"config.grad_accum = {setting.grad_accum}",
        f'config.model.remat = "{setting.remat}"',
    ]
    if setting.quantize != "none":
        out.append(f'config.model.quantize = "{setting.quantize}"')
    return out
