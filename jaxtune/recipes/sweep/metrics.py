"""Which metrics a config's run will have, known before it runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from jaxtune.recipes.build import build
from jaxtune.training.step import BAD_LEAF

# Numbers of `summary.json` and of a row of metrics that do not come out of the step.
COUNTS = ("step", "tokens", "trained_tokens", "steps_without_targets")
TIMES = ("tokens_per_second", "step_seconds", "wall_seconds", "session_seconds")


def metric_names(config: Mapping[str, Any]) -> set[str]:
    """Returns the names that `summary.json` will have; the run is built, but no weight is read.

    Raises:
        RequestError: what the config asks for cannot be had.
    """
    plan = build(config)
    with jax.set_mesh(plan.mesh):
        state, frozen, batch = plan.abstract_arguments()
        _, report = jax.eval_shape(plan.step, state, frozen, batch)
        names = {*COUNTS, *TIMES, *report} - {BAD_LEAF}
        names |= plan.objective.metrics(plan)
        if plan.texts is not None:
            names |= plan.texts.names()
    return names
