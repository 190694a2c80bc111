"""Config → what draws the samples of a run."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxtune.parallel import processes
from jaxtune.rl.engine import Engine, Sampling
from jaxtune.rl.http import Server
from jaxtune.rl.local_engine import LocalEngine
from jaxtune.rl.openai_engine import OpenAIEngine


def open_engine(plan: Any) -> Engine:
    """Returns the engine of a run, the same one each time it is asked for."""
    kept = plan.data.kept
    if "engine" not in kept:
        kept["engine"] = ENGINES[plan.config.objective.engine](plan)
    return kept["engine"]


def local(plan: Any) -> Engine:
    """Returns the sampler on the training mesh."""
    o, parts = plan.config.objective, plan.parts
    return LocalEngine(parts.config, parts.method, plan.base.tokenizer.decode, o.slots)


def openai(plan: Any) -> Engine:
    """Returns the client of a server; what it loads has a name that no other run has."""
    o, parts = plan.config.objective, plan.parts
    own = processes.gather("name of the engine", uuid.uuid4().hex[:8])[0]
    return OpenAIEngine(
        parts.config,
        parts.method,
        Server(o.server),
        o.server_model,
        Path(o.server_directory),
        tempered=o.server_tempered,
        name=f"jaxtune-{own}",
    )


# (plan) → engine
ENGINES: dict[str, Callable[[Any], Engine]] = {"local": local, "openai": openai}


def sampling_of(plan: Any, temperature: float) -> Sampling:
    """Returns how a run samples, at a temperature."""
    o = plan.config.objective
    return Sampling(
        max_new_tokens=o.max_new_tokens,
        temperature=temperature,
        top_p=o.top_p,
        top_k=o.top_k,
        eos_ids=plan.base.tokenizer.eos_ids,
        stop=o.stop,
    )
