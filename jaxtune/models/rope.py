"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864) with its published scalings."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

SCALINGS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


@dataclasses.dataclass(frozen=True)
class Rope:
    """A rotary embedding.

    Attributes:
        theta: base of the frequencies.
        fraction: share of each head's dimensions that turns, the first ones.
        scaling: "default", "linear" (frequencies / factor), "dynamic" (a base that grows with the
            length: NTK-aware), "llama3" (Llama 3.1 report, arXiv:2407.21783), "yarn" (Peng et al.
            2023, arXiv:2309.00071) or "longrope" (Ding et al. 2024, arXiv:2402.13753), each as
            transformers computes it.
        factor: by how much the context was stretched.
        low_freq_factor, high_freq_factor: llama3's band, in turns over the original context.
        original_context: positions before stretching; of llama3, yarn, longrope and dynamic.
        beta_fast, beta_slow, truncate: yarn's band, in turns, and whether its ends are whole.
        magnitude: what multiplies cosine and sine: yarn's and longrope's attention factor.
        short_factors, long_factors: longrope's divisor of each frequency, for lengths up to the
            original context and beyond.
    """

    theta: float = 10000.0
    fraction: float = 1.0
    scaling: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    magnitude: float = 1.0
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    def __post_init__(self):
        if self.scaling not in SCALINGS:
            raise ValueError(f"rope scaling {self.scaling!r} is none of {', '.join(SCALINGS)}")

    @property
    def follows_length(self) -> bool:
        """Whether the frequencies depend on how long a segment is."""
        return self.scaling in ("dynamic", "longrope")

    def width(self, head_dim: int) -> int:
        """Returns how many dimensions of a head turn."""
        return int(head_dim * self.fraction)

    def frequencies(self, head_dim: int, length: int = 0) -> np.ndarray:
        """Returns the angle a position of each pair in a segment of `length`, float64 [R / 2]."""
        width = self.width(head_dim)
        theta = self.theta
        if self.scaling == "dynamic":
            stretch = max(length, self.original_context) / self.original_context
            grown = self.factor * stretch - (self.factor - 1)
            theta = theta * grown ** (width / (width - 2))
        plain = theta ** (-np.arange(0, width, 2, dtype=np.float64) / width)
        if self.scaling == "linear":
            return plain / self.factor
        if self.scaling == "llama3":
            turns = self.original_context * plain / (2 * math.pi)
            low, high = self.low_freq_factor, self.high_freq_factor
            return _blend(plain, self.factor, np.clip((turns - low) / (high - low), 0.0, 1.0))
        if self.scaling == "yarn":
            return _blend(plain, self.factor, self._yarn_kept(width))
        if self.scaling == "longrope":
            long = length > self.original_context
            return plain / np.asarray(self.long_factors if long else self.short_factors)
        return plain

    def _yarn_kept(self, width: int) -> np.ndarray:
        """Returns by how much each of yarn's frequencies keeps its own value, [R / 2]."""

        def place(turns: float) -> float:  # of the pair that makes so many over the context
            ratio = self.original_context / (turns * 2 * math.pi)
            return width * math.log(ratio) / (2 * math.log(self.theta))

        low, high = place(self.beta_fast), place(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        high = high + 0.001 if low == high else high
        return 1 - np.clip((np.arange(width // 2) - low) / (high - low), 0.0, 1.0)

    def traced_frequencies(self, head_dim: int, lengths: jax.Array) -> jax.Array:
        """Returns `frequencies` for each of `lengths` int32 [...], float32 [..., R / 2]."""
        if self.scaling == "longrope":
            short, long = (self.frequencies(head_dim, n) for n in (0, self.original_context + 1))
            beyond = (lengths > self.original_context)[..., None]
            return jnp.where(beyond, jnp.float32(long), jnp.float32(short))
        if self.scaling == "dynamic":
            width = self.width(head_dim)
            stretch = jnp.maximum(lengths, self.original_context) / self.original_context
            grown = self.factor * stretch - (self.factor - 1)
            theta = self.theta * grown ** (width / (width - 2))
            powers = jnp.arange(0, width, 2, dtype=jnp.float32) / width
            return theta[..., None] ** -powers
        return jnp.asarray(self.frequencies(head_dim), jnp.float32)


PLAIN = Rope()


def _blend(plain: np.ndarray, factor: float, kept: np.ndarray) -> np.ndarray:
    return (1 - kept) * plain / factor + kept * plain


def angles(
    rope: Rope | None, head_dim: int, width: int, positions: jax.Array, lengths: jax.Array | None
) -> jax.Array:
    """Returns cosine and sine of the angles, float32 [2, B, T, 1, R / 2].

    Args:
        rope: the embedding; None leaves heads as they are.
        head_dim: H.
        width: R, how many dimensions turn in the layers that do turn.
        positions: int32 [B, T].
        lengths: int32 [B, T], of the segment of each token; read where `rope.follows_length`.
    """
    if rope is None:
        still = jnp.ones((*positions.shape, 1, width // 2), jnp.float32)
        return jnp.stack([still, jnp.zeros_like(still)])
    frequencies = rope.traced_frequencies(head_dim, lengths)
    if frequencies.ndim > 1:
        frequencies = frequencies[:, :, None]
    turned = positions[..., None, None].astype(jnp.float32) * frequencies
    return jnp.stack([jnp.cos(turned), jnp.sin(turned)]) * rope.magnitude


def rotate(x: jax.Array, angles: jax.Array | None) -> jax.Array:
    """Returns x [B, T, N, H], of whose first R dimensions the pairs (i, i + R/2) are turned."""
    if angles is None:
        return x
    cos, sin = angles
    width = 2 * cos.shape[-1]
    turning = x[..., :width].astype(jnp.float32)
    first, second = jnp.split(turning, 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    if width == x.shape[-1]:
        return turned.astype(x.dtype)
    return jnp.concatenate([turned.astype(x.dtype), x[..., width:]], axis=-1)
