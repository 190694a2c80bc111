"""The declared parts of a decoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from jaxtune.models.rope import PLAIN, Rope


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """What layers of one model may differ in.

    Attributes:
        window: sliding-window size, how many tokens a token sees, itself included; None is all.
        rope: rotary embedding, or None for none.
    """

    window: int | None = None
    rope: Rope | None = PLAIN


@dataclasses.dataclass(frozen=True)
class Experts:
    """Routed feed-forward layers (Shazeer et al. 2017, arXiv:1701.06538).

    Attributes:
        count: experts in a layer.
        per_token: how many of them a token is sent to.
        normalise: the chosen experts' probabilities are made to sum to 1.
        router_bias, bias: biases of the router, and of each expert's projections.
    """

    count: int
    per_token: int
    normalise: bool = True
    router_bias: bool = False
    bias: bool = False

    def __post_init__(self):
        if not 1 <= self.per_token <= self.count:
            raise ValueError(f"{self.per_token} experts a token of {self.count}")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """One decoder-only transformer, as Hugging Face names its parts.

    Attributes:
        family: name of the file in `models/families` that reads and writes its checkpoints.
        norm: "rms" or "layer"; in float32.
        norm_unit_offset: the stored scale is added to 1 (Gemma).
        norm_placement: "pre" (before each sub-layer), "post" (on what it gives) or "both".
        parallel_residual: both sub-layers read the same input (GPT-J, GPT-NeoX).
        activation, gated: act(x Wg) · (x Wu) Wd, or act(x Wu) Wd when not gated.
        attention_bias: bias on q, k, v; attention_out_bias on o; mlp_bias on the MLP.
        qk_norm: RMS norm of queries and keys before rotation: "none", "head" (each head) or "full"
            (all heads together).
        learned_positions: a learned embedding of each position is added to the tokens.
        kinds, pattern: layer l is of kind `kinds[pattern[l % len(pattern)]]`.
        attention_scale: multiplies q kᵀ; None is 1 / √H.
        attention_softcap, final_softcap: c of c · tanh(x / c) on scores and logits (Gemma 2).
        attention_sinks: a learned score a head that takes weight and gives nothing (gpt-oss).
        embedding_scale, residual_scale, logits_scale: multiply the embedded tokens, what each
            sub-layer adds, and the logits (Granite, Gemma).
        experts: None for a dense MLP; `intermediate_size` is then an expert's.
        lm_head, score_head: what reads the last hidden states: logits of the next token, and a
            scalar. A reward model has the score head alone, and then nothing to tie.
        dtype: of computation, and of frozen weights.
        attention: back end, a name of `attention_backends.BACKENDS`, or "auto" where none is
            chosen yet; "heads" is faster for inference on one processor.
        remat: what the backward pass computes again: "none", "dots" (all but matrix products)
            or "block" (everything inside a block).
        quantize: how the kernels of the blocks are held: "none", "int8" or "nf4"; see
            `core.quantize`.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    family: str = "llama"
    norm: str = "rms"
    norm_eps: float = 1e-5
    norm_unit_offset: bool = False
    norm_placement: str = "pre"
    parallel_residual: bool = False
    activation: str = "silu"
    gated: bool = True
    attention_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: str = "none"
    learned_positions: bool = False
    kinds: tuple[LayerKind, ...] = (LayerKind(),)
    pattern: tuple[int, ...] = (0,)
    attention_scale: float | None = None
    attention_softcap: float | None = None
    final_softcap: float | None = None
    attention_sinks: bool = False
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logits_scale: float = 1.0
    experts: Experts | None = None
    tie_embeddings: bool = False
    lm_head: bool = True
    score_head: bool = False
    initializer_range: float = 0.02
    dtype: str = "bfloat16"
    attention: str = "auto"
    remat: str = "none"
    quantize: str = "none"

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is no multiple of {self.num_kv_heads}")
        if not self.pattern or not all(0 <= k < len(self.kinds) for k in self.pattern):
            raise ValueError(f"pattern {self.pattern} names a kind beyond {len(self.kinds)}")
        if self.tie_embeddings and not self.lm_head:
            raise ValueError("a model without lm_head has nothing to tie")
        widths = {k.rope.width(self.head_dim) for k in self.kinds if k.rope is not None}
        if len(widths) > 1:
            raise ValueError(f"layers turn different widths of a head: {sorted(widths)}")
        if any(width % 2 or not width for width in widths):
            raise ValueError(f"rotary embedding needs an even width, not {min(widths)}")

    @property
    def compute_dtype(self) -> jnp.dtype:
        """The dtype of activations."""
        return jnp.dtype(self.dtype)

    @property
    def unquantized(self) -> ModelConfig:
        """The same model with whole kernels, as files hold it."""
        return dataclasses.replace(self, quantize="none")

    @property
    def layer_kinds(self) -> tuple[int, ...]:
        """The kind of each layer, [L]."""
        return tuple(self.pattern[i % len(self.pattern)] for i in range(self.num_layers))

    @property
    def follows_length(self) -> bool:
        """Whether a layer's rotary frequencies depend on how long a segment is."""
        return any(kind.rope is not None and kind.rope.follows_length for kind in self.kinds)

    @property
    def max_context(self) -> int:
        """How many positions the model can be run at: dynamic scaling goes beyond its own."""
        ropes = [kind.rope for kind in self.kinds if kind.rope is not None]
        stretch = max((r.factor for r in ropes if r.scaling == "dynamic"), default=1.0)
        return int(self.max_position_embeddings * stretch)

    @property
    def rotary_width(self) -> int:
        """How many dimensions of a head turn; 0 if no layer has a rotary embedding."""
        return max((k.rope.width(self.head_dim) for k in self.kinds if k.rope), default=0)


def pattern_of(kinds: Sequence[LayerKind]) -> dict[str, Any]:
    """Returns `kinds` and `pattern` of a ModelConfig for a list of each layer's kind.

    >>> pattern_of([LayerKind(8), LayerKind(), LayerKind(8)])["pattern"]
    (0, 1)
    """
    distinct = tuple(dict.fromkeys(kinds))
    every = tuple(distinct.index(kind) for kind in kinds)
    for period in range(1, len(every) + 1):
        pattern = every[:period]
        if all(every[i] == pattern[i % period] for i in range(len(every))):
            return {"kinds": distinct, "pattern": pattern}
    raise ValueError("a model has at least one layer")
