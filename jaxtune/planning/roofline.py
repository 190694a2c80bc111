"""The least time that a step can take on given chips (Williams et al. 2009, "Roofline").

Each of three resources is taken to be busy without a gap, and all three at once: the slowest
decides. A real step is slower; what a plan gives is a bound, and which resource sets it.
"""

from __future__ import annotations

import dataclasses
import math

from jax.sharding import AbstractMesh, Mesh

from jaxtune.parallel.mesh import AXES
from jaxtune.planning.chips import Chip

COMPUTE, BANDWIDTH, LINKS, NETWORK = "compute", "memory bandwidth", "interconnect", "network"
CAPACITY = "memory capacity"


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What one device does in a step.

    Attributes:
        flops: operations.
        hbm_bytes: read from and written to its memory.
        sent: {mesh axis: bytes that it sends along the axis}.
    """

    flops: float
    hbm_bytes: float
    sent: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Seconds of each resource, and the slowest one.

    Attributes:
        seconds: {resource: seconds}.
        binding: the name of the slowest.
    """

    seconds: dict[str, float]
    binding: str

    @property
    def step_seconds(self) -> float:
        """The slowest resource's seconds."""
        return self.seconds[self.binding]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What the traffic of a step follows from; bytes unless said otherwise.

    Attributes:
        flops: of the step, over all devices.
        weights: of all parameters in the compute dtype, over all devices.
        trained: of the trained parameters in the compute dtype, over all devices.
        updated: of one device's trainables, optimizer and gradients.
        activations: of one device: what one layer's backward pass reads, times the layers and the
            micro-batches.
        rows: of the hidden states [B, T, D] of one device's micro-batch.
        layers: of the model.
        passes: forward, backward, and again where it is computed again.
        grad_accum: micro-batches.
    """

    flops: float
    weights: float
    trained: float
    updated: float
    activations: float
    rows: float
    layers: int
    passes: int
    grad_accum: int


def traffic(sizes: Sizes, mesh: Mesh | AbstractMesh) -> Traffic:
    """Returns what one device does in a step.

    Memory: every pass reads the weights once in each micro-batch, written once more where they
    are gathered; activations are written once and read twice; the optimizer reads and writes what
    it updates. Links, by ring algorithms: `fsdp`, with `sequence`, gathers the weights in every
    pass and scatters the sum of the trained ones' gradients; `data` sums gradients; `tensor` sums
    the hidden states twice a layer and pass; `sequence` passes keys and values around; `expert`
    sends tokens there and back.
    """
    n = {axis: mesh.shape[axis] for axis in AXES}
    inner = n["tensor"] * n["expert"]
    whole = sizes.weights / inner  # of the weights that one device computes with
    passes = sizes.passes * sizes.grad_accum

    def ring(size: float, devices: int) -> float:
        return size * (devices - 1) / devices

    spread = n["fsdp"] * n["sequence"]
    gathered = 1 if spread > 1 else 0
    hbm = passes * whole * (1 + 2 * gathered) + 3 * sizes.activations + 2 * sizes.updated
    states = sizes.rows * sizes.layers * passes
    trained = sizes.trained / inner
    sent = {
        "data": 2 * ring(trained / spread, n["data"]),
        "fsdp": passes * ring(whole, spread) + sizes.grad_accum * ring(trained, spread),
        "tensor": 2 * 2 * ring(states, n["tensor"]),
        "sequence": 2 * ring(states, n["sequence"]),
        "expert": 2 * ring(states, n["expert"]),
    }
    return Traffic(sizes.flops / math.prod(n.values()), hbm, sent)


def estimate(work: Traffic, chip: Chip, mesh: Mesh | AbstractMesh) -> Estimate:
    """Returns the seconds of a step on a chip.

    The axes of a mesh are laid out with the last ones innermost. An axis that reaches beyond the
    devices that fast links join goes over the network.
    """
    seconds = {COMPUTE: work.flops / chip.flops, BANDWIDTH: work.hbm_bytes / chip.hbm_rate}
    span, links, network = 1, 0.0, 0.0
    for axis in reversed(AXES):
        span *= mesh.shape[axis]
        if span > chip.group and mesh.shape[axis] > 1:
            network += work.sent[axis] / chip.net_rate
        else:
            links += work.sent[axis] / chip.link_rate
    if mesh.size > 1:
        seconds[LINKS] = links
        if mesh.size > chip.group:
            seconds[NETWORK] = network
    return Estimate(seconds, max(seconds, key=seconds.get))


def plausible(seconds: float | None, bound: float) -> bool:
    """Whether the compiler's own estimate can be true: positive, and near the bound.

    It is negative for many programs with loops, and far too small where a loop's body is counted
    once.
    """
    return seconds is not None and math.isfinite(seconds) and 0.5 * bound <= seconds <= 20 * bound
