"""What an iteration of reinforcement learning samples: tokens, memory of the cache, least time.

The sampler writes a token to each of its rows at a time (`generate.slots`), and each time it reads
the weights and the cache once: memory traffic bounds it, unless very many rows are written side by
side. As in `roofline`, a resource is taken to be busy without a gap, so that times are bounds;
tokens are counted as if every sample were as long as it may be.
"""

from __future__ import annotations

import dataclasses
import math

from jax.sharding import AbstractMesh, Mesh, NamedSharding

from jaxtune.core.tree import Tree, flatten
from jaxtune.generate.limits import bucket
from jaxtune.generate.sampler import LEAST_NEW
from jaxtune.generate.slots import LEAST_PROMPT
from jaxtune.models.config import ModelConfig
from jaxtune.parallel.mesh import AXES
from jaxtune.parallel.rules import spec
from jaxtune.planning import flops, memory
from jaxtune.planning.chips import Chip
from jaxtune.planning.roofline import Estimate, Traffic, estimate

CACHE_AXES = ("layers", "batch", "kv_heads", None, "head")  # of `generate.placement.spread_cache`


@dataclasses.dataclass(frozen=True)
class Draw:
    """What an iteration draws.

    Attributes:
        prompts, samples: how many, and of each.
        prompt_tokens: of the longest prompt, virtual ones included.
        new_tokens: the most of a sample.
        slots: the most samples that are written side by side.
    """

    prompts: int
    samples: int
    prompt_tokens: int
    new_tokens: int
    slots: int

    @property
    def count(self) -> int:
        """Samples of an iteration."""
        return self.prompts * self.samples

    @property
    def rows(self) -> int:
        """Samples written side by side."""
        return min(bucket(self.count, 1), self.slots)

    @property
    def prompt_columns(self) -> int:
        """Columns of the cache for the prompts, all but the last token of each."""
        return bucket(self.prompt_tokens - 1, LEAST_PROMPT)

    @property
    def columns(self) -> int:
        """Columns of the cache."""
        return self.prompt_columns + bucket(self.new_tokens, LEAST_NEW)

    @property
    def bank(self) -> int:
        """Prompts that are read together, each for all of its samples."""
        return min(bucket(-(-self.rows // self.samples), 1), bucket(self.prompts, 1))

    @property
    def steps(self) -> int:
        """Tokens written one after the other, where all samples are as long as they may be."""
        return -(-self.count // self.rows) * self.new_tokens


def cache_bytes(config: ModelConfig, mesh: Mesh | AbstractMesh, rows: int, columns: int) -> int:
    """Returns the bytes of one device's keys and values of so many rows."""
    shape = (config.num_layers, rows, config.num_kv_heads, columns, config.head_dim)
    local = NamedSharding(mesh, spec(CACHE_AXES, shape, mesh)).shard_shape(shape)
    return 2 * math.prod(local) * memory.bits(config.dtype) // 8


def held_bytes(config: ModelConfig, mesh: Mesh | AbstractMesh, draw: Draw) -> int:
    """Returns what one device keeps of samples while they are written, prompts being read too."""
    written = cache_bytes(config, mesh, draw.rows, draw.columns)
    return written + cache_bytes(config, mesh, draw.bank, draw.prompt_columns)


def decoding(
    config: ModelConfig, shapes: Tree, mesh: Mesh | AbstractMesh, chip: Chip, draw: Draw
) -> Estimate:
    """Returns the least seconds of writing all samples of an iteration.

    Each token's step reads the weights of a device once, gathered from the devices that share
    them where they are spread (written and read once more), and all columns of the cache; of
    experts, those that as many rows can choose.

    Args:
        config, shapes: the model and its parameters, unquantised.
        mesh, chip: the devices.
        draw: what is drawn.
    """
    n = {axis: mesh.shape[axis] for axis in AXES}
    width = memory.bits(config.dtype) / 8
    read = width * sum(
        leaf.size * chosen_share(config, path, draw.rows) for path, leaf in flatten(shapes).items()
    )
    whole = read / (n["tensor"] * n["expert"])
    spread = n["fsdp"] * n["sequence"]
    states = draw.rows * config.hidden_size * width * config.num_layers
    attention = 4 * config.num_heads * config.head_dim * draw.columns * config.num_layers
    operations = draw.rows * (forward_flops(config, shapes) + attention)
    step = Traffic(
        operations / math.prod(n.values()),
        whole * (3 if spread > 1 else 1) + cache_bytes(config, mesh, draw.rows, draw.columns),
        {
            "data": 0.0,
            "fsdp": whole * (spread - 1) / spread,
            "tensor": 2 * 2 * states * (n["tensor"] - 1) / n["tensor"],
            "sequence": 0.0,
            "expert": 2 * states * (n["expert"] - 1) / n["expert"],
        },
    )
    return estimate(scaled(step, draw.steps), chip, mesh)


def scoring(
    config: ModelConfig,
    shapes: Tree,
    mesh: Mesh | AbstractMesh,
    chip: Chip,
    rows: int,
    seq_len: int,
    passes: int,
) -> float:
    """Returns the least seconds of forward passes over whole rows, as compute bounds them."""
    pairs = seq_len * (seq_len + 1) // 2 * config.num_layers
    attention = 4 * config.num_heads * config.head_dim * pairs
    operations = passes * rows * (seq_len * forward_flops(config, shapes) + attention)
    return operations / mesh.size / chip.flops


def forward_flops(config: ModelConfig, shapes: Tree) -> int:
    """Returns the operations of one token's products with all weights."""
    return sum(flops.weight_flops(config, path, leaf) for path, leaf in flatten(shapes).items())


def chosen_share(config: ModelConfig, path: str, rows: int) -> float:
    """Returns the share of a parameter that a step of so many tokens reads, at most."""
    if path == "embed/embedding" and not config.tie_embeddings:
        return 0.0  # looked up
    if "/experts/" not in path:
        return 1.0
    return min(1.0, rows * config.experts.per_token / config.experts.count)


def scaled(work: Traffic, times: int) -> Traffic:
    """Returns the traffic of a program that runs so often."""
    sent = {axis: size * times for axis, size in work.sent.items()}
    return Traffic(work.flops * times, work.hbm_bytes * times, sent)
