"""What a plan says of the sampling of an objective that samples."""

from __future__ import annotations

from typing import Any

from jaxtune.models.decoder import abstract_params
from jaxtune.planning import sampling
from jaxtune.planning.sampling import Draw
from jaxtune.recipes.plans.draft import Draft
from jaxtune.recipes.schema.rules_online import NAMES


def of_iteration(draft: Draft, per_device: dict[str, int]) -> dict[str, Any] | None:
    """Returns the object `sampling` of a plan; None for an objective that samples nothing.

    Rounds of `dynamic_sampling` and evaluations are not counted. A server's time and memory are its
    own: what is then left is the trainer's pass over the samples.

    Args:
        draft: the config on its devices.
        per_device: bytes of one device while a step runs; see `memory.bytes_per_device`.
    """
    config, program, target = draft.config, draft.program, draft.target
    o = config.objective
    if o.name not in NAMES:
        return None
    model, mesh, chip = program.parts.config, target.mesh, target.chip
    shapes = abstract_params(model.unquantized, program.parts.method)
    draw = draw_of(draft)
    rows = draw.count
    seen = sampling.scoring(
        model, shapes, mesh, chip, rows, config.data.seq_len, 2 if o.kl_coef else 1
    )
    resident = sum(per_device[name] for name in ("weights", "trainable", "optimizer"))
    told: dict[str, Any] = {
        "engine": o.engine,
        "samples": rows,
        "tokens": rows * draw.new_tokens,
        "steps": o.epochs * rows // config.batch_size,
        "scoring_seconds": seen,
    }
    if o.engine != "local":
        return told | {"bytes_per_device": resident, "seconds": seen}
    read = sampling.scoring(model, shapes, mesh, chip, draw.prompts, draw.prompt_tokens, 1)
    decoded = sampling.decoding(model, shapes, mesh, chip, draw)
    cache = sampling.held_bytes(model, mesh, draw)
    return told | {
        "rows": draw.rows,
        "kv_cache_bytes": cache,
        "bytes_per_device": resident + cache,
        "decode_steps": draw.steps,
        "decode_seconds": decoded.step_seconds,
        "binding_limit": decoded.binding,
        "prefill_seconds": read,
        "seconds": decoded.step_seconds + read + seen,
    }


def draw_of(draft: Draft) -> Draw:
    """Returns what an iteration draws; prompts are as long as the longest, or as they may be."""
    config, stream = draft.config, draft.length.data.stream
    o, lead = config.objective, draft.program.parts.method.num_virtual
    if stream is not None:
        longest = stream.longest
    else:
        longest = config.data.max_prompt or config.data.seq_len - o.max_new_tokens - lead
    return Draw(o.prompts, o.samples, lead + longest, o.max_new_tokens, o.get("slots", 1))
