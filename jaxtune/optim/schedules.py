"""Learning-rate schedules, in optimizer steps."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

Schedule = Callable[[jax.Array], jax.Array]


def make_schedule(
    name: str,
    lr: float,
    total_steps: int,
    warmup_steps: int = 0,
    end_ratio: float = 0.0,
    decay_ratio: float = 0.1,
) -> Schedule:
    """Returns step (0-based int32) → learning rate (float32).

    Warm-up is linear, lr · (step + 1) / warmup_steps, so that the first step already learns and
    the last warm-up step has the full rate. After it: "constant"; "linear" or "cosine" down to
    lr · end_ratio at the last step; "wsd" (Hu et al. 2024, arXiv:2404.06395) constant, then linear
    down over the last `decay_ratio` of the run.
    """
    span = max(total_steps - warmup_steps, 1)
    decay_steps = max(math.ceil(total_steps * decay_ratio), 1)

    def shape(step: jax.Array) -> jax.Array:
        if name == "constant":
            return jnp.ones_like(step)
        if name == "wsd":
            left = (total_steps - step) / decay_steps
            return end_ratio + (1 - end_ratio) * jnp.clip(left, 0.0, 1.0)
        done = jnp.clip((step - warmup_steps) / span, 0.0, 1.0)
        fall = 0.5 * (1 + jnp.cos(jnp.pi * done)) if name == "cosine" else 1 - done
        return end_ratio + (1 - end_ratio) * fall

    def schedule(step: jax.Array) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        rise = jnp.minimum((step + 1) / max(warmup_steps, 1), 1.0)
        return jnp.float32(lr) * rise * shape(step)

    return schedule
