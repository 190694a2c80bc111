"""Floating-point operations of a step, from the shapes of its matrix products."""

from __future__ import annotations

import math
from typing import Any

from jaxtune.core.tree import Tree, flatten
from jaxtune.models.config import ModelConfig
from jaxtune.models.decoder import head_path
from jaxtune.peft.method import TRAINED


def step_flops(
    config: ModelConfig,
    labels: Tree,
    shapes: Tree,
    batch_size: int,
    seq_len: int,
    *,
    head_tokens: int | None = None,
    skips_masked: bool = False,
    chunked_head: bool = False,
) -> int:
    """Returns the floating-point operations of a step, over all devices.

    A product with M weights costs 2 M a token forwards, as much again for the gradient of its
    input, and as much again for the gradient of its weights where they are trained. Attention
    costs 4 N H a layer and pair of tokens forwards, twice that backwards. Of E experts a token is
    computed by k. What the backward pass computes again counts again. XLA's own count cannot be
    used: it counts the body of a loop once.

    Args:
        config: the model.
        labels: label tree of its parameters; of quantised kernels, that of their codes.
        shapes: of its parameters, unquantised.
        batch_size, seq_len: rows of a step, and tokens of a row, padding included.
        head_tokens: those of a row that logits are made of; None: all.
        skips_masked: whether attention leaves out what the mask hides, as flash kernels do.
        chunked_head: whether the loss makes its logits in chunks.
    """
    kinds = flatten(labels)
    head, _ = head_path(config)
    products = 0
    for path, leaf in flatten(shapes).items():
        # Codes are never trained.
        passes = 2 + (kinds.get(path) == TRAINED) + computed_again(config, path, chunked_head)
        here = path.startswith(f"{head}/") and head_tokens is not None
        tokens = head_tokens if here else seq_len
        products += tokens * passes * weight_flops(config, path, leaf)
    attention = attention_flops(config, seq_len, skips_masked)
    scores = 3 if config.remat == "none" else 4
    return batch_size * (products + scores * attention)


def forward_flops(
    config: ModelConfig,
    shapes: Tree,
    batch_size: int,
    seq_len: int,
    *,
    head_tokens: int | None = None,
    skips_masked: bool = False,
) -> int:
    """Returns the operations of a forward pass alone; arguments as for `step_flops`."""
    head, _ = head_path(config)
    products = 0
    for path, leaf in flatten(shapes).items():
        here = path.startswith(f"{head}/") and head_tokens is not None
        products += (head_tokens if here else seq_len) * weight_flops(config, path, leaf)
    return batch_size * (products + attention_flops(config, seq_len, skips_masked))


def attention_flops(config: ModelConfig, seq_len: int, skips_masked: bool) -> int:
    """Returns the operations of a row's attention forwards, over all layers."""
    pairs = sum(
        attention_pairs(seq_len, config.kinds[kind].window, skips_masked)
        for kind in config.layer_kinds
    )
    return 4 * config.num_heads * config.head_dim * pairs


def computed_again(config: ModelConfig, path: str, chunked_head: bool) -> bool:
    """Tells whether the backward pass computes a product of the forward pass again.

    Of a block, all but what the block ends with, which no gradient is computed from; of the head,
    where the loss is made in chunks.
    """
    if not path.startswith("blocks/"):
        return chunked_head
    last = config.norm_placement == "pre" and "/down_proj/" in path and "/experts/" not in path
    return config.remat == "block" and not last


def weight_flops(config: ModelConfig, path: str, leaf: Any) -> int:
    """Returns the operations of one token's product with a parameter; 0 if there is none.

    An embedding is looked up; only if it is also the head is it multiplied with.
    """
    product = path.endswith(("kernel", "lora/a", "lora/b"))
    if not product and not (path == "embed/embedding" and config.tie_embeddings):
        return 0
    cost = 2 * math.prod(leaf.shape)
    if "/experts/" in path:
        cost = cost * config.experts.per_token // config.experts.count
    return cost


def attention_pairs(tokens: int, window: int | None, skips_masked: bool) -> int:
    """Returns how many (query, key) pairs a row of T tokens computes in one layer.

    >>> attention_pairs(4, None, False), attention_pairs(4, None, True), attention_pairs(4, 2, True)
    (16, 10, 7)
    """
    if not skips_masked:
        return tokens * tokens
    reach = tokens if window is None else min(window, tokens)
    return reach * (reach + 1) // 2 + (tokens - reach) * reach
