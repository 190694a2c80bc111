"""What accelerators can do and cost: one table, with its date and sources.

Compute, memory and links are the makers' figures. Prices are list prices on demand, without
commitments; they differ by region, change often, and `--price` replaces them.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path

from jaxtune.core.errors import RequestError, nearest

DATE = "2026-11-27"
GB, TB, GIB = 1e9, 1e12, 2**30

_TPU_DOCS = "https://docs.cloud.google.com/tpu/docs/"
# catalogs/v8/gcp/vms.csv at commit 006059e0f18acb1341e22a27751e9f80df6ba92f, dollars an hour on
# demand: v5litepod-256 307.20, v5p-8 (4 chips) 16.80, v6e-1 2.70.
_SKYPILOT = "https://github.com/skypilot-org/skypilot-catalog (us-central1, read 2026-11-27)"
# No list that could be read in 2026 has v4. None has a price of TPU7x.
_V4_PRICE = (
    "of August 2022, quoted in https://www.infer-pub.com/questions/1114 (read 2026-11-27); "
    "see https://cloud.google.com/tpu/pricing"
)
# catalogs/v8/nebius/vms.csv at commit 0082b0435f3912ae4c566856b272455cc78f4f61: 28.00 for 8.
_NEBIUS = "Nebius, in https://github.com/skypilot-org/skypilot-catalog (8 GPUs, read 2026-11-27)"
_LAMBDA = "https://lambda.ai/instances (8 GPUs, read 2026-09-20)"
_RUNPOD = "https://www.runpod.io/pricing"


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator, as JAX counts devices.

    Attributes:
        name: as `--devices` and `--topology` write it.
        flops: peak dense bfloat16 operations a second.
        hbm_bytes: memory.
        hbm_rate: bytes a second from memory.
        link_rate: bytes a second that a device sends to its neighbours while it receives as many:
            ICI or NVLink, all links together, one direction; PCIe where there is neither.
        net_rate: bytes a second between slices or machines: a device's share of the network.
        group: how many devices the fast links join at most.
        price: US dollars an hour of one device, or None where no list price was found.
        specification, price_source: where the figures are from.
        kinds: what JAX calls the device.
    """

    name: str
    flops: float
    hbm_bytes: int
    hbm_rate: float
    link_rate: float
    net_rate: float
    group: int
    price: float | None
    specification: str
    price_source: str | None
    kinds: tuple[str, ...] = ()


def _tpu(name, tflops, gib, rate, ici, net_gbit, pod, price, source, page, kinds) -> Chip:
    """`ici` in GB/s is both directions, as the pages have it; `net_gbit` is a chip's share."""
    return Chip(
        name,
        tflops * 1e12,
        int(gib * GIB),
        rate * GB,
        ici / 2 * GB,
        net_gbit / 8 * GB,
        pod,
        price,
        _TPU_DOCS + page,
        source,
        kinds,
    )


def _gpu(name, tflops, gb, rate, nvlink, net_gbit, price, page, price_source, kinds) -> Chip:
    """`nvlink` in GB/s is both directions; `net_gbit` is the network card of one GPU."""
    return Chip(
        name,
        tflops * 1e12,
        int(gb * GB),
        rate * GB,
        nvlink / 2 * GB,
        net_gbit / 8 * GB,
        8,
        price,
        page,
        price_source,
        kinds,
    )


_NVIDIA = "https://www.nvidia.com/en-us/data-center/"
CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        _tpu("v4", 275, 32, 1228, 600, 50, 4096, 3.22, _V4_PRICE, "v4", ("TPU v4",)),
        _tpu("v5e", 197, 16, 819, 400, 25, 256, 1.20, _SKYPILOT, "v5e", ("TPU v5 lite", "TPU v5e")),
        _tpu("v5p", 459, 95, 2765, 1200, 50, 8960, 4.20, _SKYPILOT, "tpu7x", ("TPU v5", "TPU v5p")),
        _tpu(
            "v6e",
            918,
            32,
            1638,
            800,
            100,
            256,
            2.70,
            _SKYPILOT,
            "tpu7x",
            ("TPU v6 lite", "TPU v6e"),
        ),
        # A chip is two devices, each with half of everything.
        _tpu("tpu7x", 2307 / 2, 96, 7380 / 2, 600, 50, 18432, None, None, "tpu7x", ("TPU7x",)),
        _gpu(
            "A100-40",
            312,
            40,
            1555,
            600,
            200,
            1.99,
            _NVIDIA + "a100",
            _LAMBDA,
            ("NVIDIA A100-SXM4-40GB",),
        ),
        _gpu(
            "A100-80",
            312,
            80,
            2039,
            600,
            200,
            2.79,
            _NVIDIA + "a100",
            _LAMBDA,
            ("NVIDIA A100-SXM4-80GB",),
        ),
        _gpu(
            "H100",
            989,
            80,
            3350,
            900,
            400,
            3.99,
            _NVIDIA + "h100",
            _LAMBDA,
            ("NVIDIA H100 80GB HBM3",),
        ),
        _gpu("H200", 989, 141, 4800, 900, 400, 3.50, _NVIDIA + "h200", _NEBIUS, ("NVIDIA H200",)),
        _gpu(
            "B200",
            2250,
            180,
            8000,
            1800,
            400,
            6.69,
            _NVIDIA + "dgx-b200",
            _LAMBDA,
            ("NVIDIA B200",),
        ),
        # No NVLink: PCIe 4.0 x16, 32 GB/s each way.
        _gpu(
            "RTX4090",
            165,
            24,
            1008,
            64,
            10,
            0.69,
            "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf",
            _RUNPOD,
            ("NVIDIA GeForce RTX 4090",),
        ),
    )
}
# The names that people also use.
ALIASES = {
    "v5litepod": "v5e",
    "v5lite": "v5e",
    "v6lite": "v6e",
    "trillium": "v6e",
    "v7x": "tpu7x",
    "ironwood": "tpu7x",
    "a100": "A100-80",
    "4090": "RTX4090",
}


def find(name: str, key: str = "--devices") -> Chip:
    """Returns the chip of a name, whatever its case, with or without hyphens.

    Raises:
        RequestError: the table has no such chip.
    """

    def plain(text: str) -> str:
        return re.sub(r"[\s_\-]|gb$", "", text.lower())

    known = {plain(n): chip for n, chip in CHIPS.items()}
    known |= {plain(alias): CHIPS[n] for alias, n in ALIASES.items()}
    known |= {plain(kind): chip for chip in CHIPS.values() for kind in chip.kinds}
    chip = known.get(plain(name))
    if chip is None:
        raise RequestError(
            f"unknown chip {name!r}{nearest(name, CHIPS)}; the table has {', '.join(CHIPS)}",
            key=key,
        )
    return chip


def usable_bytes(chip: Chip) -> int:
    """Returns the memory that a program may use: the runtime keeps a little of it.

    TPU programs are refused beyond all but 256 MiB; CUDA's context and libraries take about 1 GiB.
    """
    return chip.hbm_bytes - (GIB // 4 if platform(chip) == "tpu" else GIB)


def platform(chip: Chip) -> str:
    """Returns what JAX calls the platform of a chip of the table: "tpu" or "gpu"."""
    return "tpu" if chip.kinds and chip.kinds[0].startswith("TPU") else "gpu"


def of_device_kind(kind: str) -> Chip | None:
    """Returns the chip that JAX calls `device.device_kind`, or None."""
    return next((chip for chip in CHIPS.values() if kind in chip.kinds), None)


def unknown(kind: str) -> Chip:
    """Returns a chip of which only the name is known."""
    return Chip(kind, math.inf, 0, math.inf, math.inf, math.inf, 1, None, "unknown", None)


def parse_devices(text: str) -> tuple[int, Chip]:
    """Returns (count, chip) of `8xH100`, `H100` or `16xv5e`.

    Raises:
        RequestError: with what would be valid.
    """
    match = re.fullmatch(r"(?:(\d+)\s*[x×*]\s*)?(.+)", text.strip())
    count = int(match[1] or 1) if match else 0
    if count < 1:
        raise RequestError(f"expected COUNTxCHIP, such as 8xH100; got {text!r}", key="--devices")
    return count, find(match[2])


def with_price(chip: Chip, price: str | float | None) -> Chip:
    """Returns the chip at another price.

    Args:
        chip: of the table.
        price: US dollars an hour of one device; or a JSON or YAML file {chip name: price}; None
            leaves the list price.

    Raises:
        RequestError: no price can be read from it.
    """
    if price is None:
        return chip
    try:
        value, source = float(price), "--price"
    except ValueError:
        value, source = _from_file(Path(price), chip), str(price)
    if not 0 <= value < float("inf"):
        raise RequestError(f"expected US dollars an hour of a device; got {price}", key="--price")
    return dataclasses.replace(chip, price=value, price_source=source)


def _from_file(path: Path, chip: Chip) -> float:
    if not path.is_file():
        raise RequestError(
            "expected US dollars an hour of a device, or a file {chip: price}; there is no such "
            f"file as {path}",
            key="--price",
        )
    text = path.read_text(encoding="utf-8")
    try:
        if path.suffix == ".json":
            table = json.loads(text)
        else:
            import yaml

            table = yaml.safe_load(text)
    except ValueError as error:
        raise RequestError(f"is not JSON: {error}", key="--price", where=path) from None
    except Exception as error:
        raise RequestError(f"is not YAML: {error}", key="--price", where=path) from None
    if not isinstance(table, dict):
        raise RequestError("expected {chip: price}", key="--price", where=path)
    prices = {find(str(name), "--price").name: value for name, value in table.items()}
    if not isinstance(prices.get(chip.name), int | float):
        raise RequestError(f"has no price of {chip.name}", key="--price", where=path)
    return float(prices[chip.name])
