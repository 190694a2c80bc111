"""Which settings of a run to compare, and which of them is the best."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator

# A plan without a compiler may miss this share of the memory.
RESERVE = 0.1
REMAT = ("none", "dots", "block")
# Bytes of a frozen weight: 8 bits and a scale a column; 4 bits and a float32 scale for 64 weights.
QUANTIZED = {"int8": 1.0, "nf4": 0.5 + 4 / 64}
MOST_TENSOR = 8
OPTIONAL = ("sequence", "expert")  # axes that are not shown where they are 1
# Rows are spread over devices while each keeps this many tokens: below, the messages of ring
# attention are no longer hidden behind its products.
LEAST_TOKENS = 4096


@dataclasses.dataclass(frozen=True)
class Setting:
    """What may be changed without changing what is learned.

    Attributes:
        data, fsdp, tensor, sequence, expert: sizes of the mesh's axes.
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
    sequence: int = 1
    expert: int = 1

    @property
    def mesh(self) -> dict[str, int]:
        """Size of each axis of the mesh."""
        names = ("data", "fsdp", "tensor", "sequence", "expert")
        return {name: getattr(self, name) for name in names}


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
            s.tensor * s.sequence * s.expert,
            s.grad_accum,
            REMAT.index(s.remat),
        )


def settings(
    devices: int,
    batch_size: int,
    num_kv_heads: int,
    quantize: Iterable[str] = ("none",),
    sequence: Iterable[int] = (1,),
    expert: Iterable[int] = (1,),
) -> Iterator[Setting]:
    """Yields every setting in which each device has whole rows and heads, or parts of long rows.

    Args:
        devices: in all.
        batch_size: rows of a step.
        num_kv_heads: of the model.
        quantize: values to compare.
        sequence, expert: sizes of these axes to compare.

    >>> len(list(settings(4, 8, 2)))
    36
    """
    tensor = [n for n in divisors(devices) if n <= MOST_TENSOR and num_kv_heads % n == 0]
    for t, s, e in itertools.product(tensor, sequence, expert):
        if devices % (t * s * e):
            continue
        rest = devices // (t * s * e)
        for fsdp in divisors(rest):
            shards = rest * e  # of the rows of a batch
            if batch_size % shards:
                continue
            for accum, remat, kind in itertools.product(
                divisors(batch_size // shards), REMAT, quantize
            ):
                yield Setting(rest // fsdp, fsdp, t, accum, remat, kind, s, e)


def row_parts(seq_len: int, devices: int) -> list[int]:
    """Returns over how many devices a row may be spread.

    >>> row_parts(32768, 16), row_parts(2048, 16)
    ([1, 2, 4, 8], [1])
    """
    return [
        n
        for n in divisors(devices)
        if n == 1 or (seq_len % (2 * n) == 0 and seq_len // n >= LEAST_TOKENS)
    ]


def expert_parts(experts: int, devices: int) -> list[int]:
    """Returns over how many devices so many experts may be spread; 0 for a model without.

    >>> expert_parts(6, 4), expert_parts(0, 4)
    ([1, 2], [1])
    """
    return [n for n in divisors(devices) if n == 1 or (experts and experts % n == 0)]


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
    shown = {axis: n for axis, n in setting.mesh.items() if n > 1 or axis not in OPTIONAL}
    mesh = ", ".join(f'"{axis}": {size}' for axis, size in shown.items())
    out = [
        f"config.mesh = {{{mesh}}}",
        f"config.grad_accum = {setting.grad_accum}",
        f'config.model.remat = "{setting.remat}"',
    ]
    if setting.quantize != "none":
        out.append(f'config.model.quantize = "{setting.quantize}"')
    return out
