"""What is said about a planned run: the object that `plan --json` prints."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from jaxtune.core.tree import flatten
from jaxtune.models.attention_backends import backend
from jaxtune.models.config import ModelConfig
from jaxtune.models.decoder import abstract_params
from jaxtune.parallel.mesh import AXES, batch_shards
from jaxtune.peft.method import TRAINED
from jaxtune.planning import chips, collectives, compile, flops, memory, roofline, sampling
from jaxtune.recipes import build
from jaxtune.recipes.assemble import Parts
from jaxtune.recipes.base import BASE
from jaxtune.recipes.plans.draft import Draft
from jaxtune.recipes.plans.sampling import of_iteration
from jaxtune.recipes.reference import adapters_off
from jaxtune.recipes.retention.replay_mixing import replayed_rows
from jaxtune.recipes.scores import chunk_bytes


def report(draft: Draft, quick: bool = False) -> dict[str, Any]:
    """Returns the printed object of a Draft; see `planning.compile.compile_step` for `quick`."""
    program, target, length = draft.program, draft.target, draft.length
    mesh, chip, config = target.mesh, target.chip, draft.config
    model = program.parts.config
    per_device, estimate = analyse(draft)
    compiled = None
    total = per_device["total"]
    if target.compiled:
        compiled = compile.compile_step(program.step, program.abstract_arguments(), mesh, quick)
        total = compiled.total_bytes
    usable = chips.usable_bytes(chip)
    drawn = of_iteration(draft, per_device)
    peak = total if drawn is None else max(total, drawn["bytes_per_device"])
    fits = peak <= usable and (compiled is None or compiled.fits)
    seconds = dict(estimate.seconds)
    if compiled is not None and compiled.collectives is not None:
        seconds |= link_seconds(compiled, chip, mesh)
    binding = max(seconds, key=seconds.get)
    step_seconds = seconds[binding]
    run_seconds = None
    if length.steps is not None:
        run_seconds = length.steps * step_seconds
        if drawn is not None:
            run_seconds += math.ceil(length.steps / drawn["steps"]) * drawn["seconds"]
    cost = None
    if run_seconds is not None and chip.price is not None:
        cost = run_seconds / 3600 * chip.price * mesh.size
    slots = work_of(program).batch_size * config.data.seq_len
    operations = step_flops(program)
    result = {
        "parameters": program.parts.counts() | {"groups": groups(program.parts)},
        "tokens_per_step": slots,
        "flops_per_step": operations,
        "flops_per_token": operations // slots,
        "bytes_per_device": per_device
        | {"kv_cache": sampling.cache_bytes(model, mesh, 1, config.data.seq_len)},
        "hbm_bytes_per_device": chip.hbm_bytes,
        "usable_bytes_per_device": usable,
        "headroom_bytes": usable - peak,
        "fits": fits,
        "step_seconds": step_seconds,
        "run_seconds": run_seconds,
        "cost_usd": cost,
        "binding_limit": binding if fits else roofline.CAPACITY,
        "seconds": seconds,
        "steps": length.steps,
        "tokens": length.tokens,
        "length_from": length.source,
        "devices": {"asked": target.text, "chip": chip.name, "count": mesh.size},
        "mesh": {axis: mesh.shape[axis] for axis in AXES},
        "attention": str(program.attention),
        "price": {
            "usd_per_device_hour": chip.price,
            "source": chip.price_source,
            "date": chips.DATE,
        },
    }
    if drawn is not None:
        result["sampling"] = drawn
    if compiled is not None:
        result["compiled"] = compiled_object(compiled, estimate, program.parts)
    return result


def analyse(
    draft: Draft, grad_accum: int | None = None
) -> tuple[dict[str, int], roofline.Estimate]:
    """Returns (bytes of one device, least times) of a Draft, from shapes alone.

    Args:
        draft: the config on its devices.
        grad_accum: in place of the config's.
    """
    program, mesh = draft.program, draft.target.mesh
    parts, work = program.parts, work_of(program)
    if grad_accum is not None:
        work = dataclasses.replace(work, grad_accum=grad_accum)
    _, frozen = parts.split(parts.shapes)
    per_device = memory.bytes_per_device(work, program.layout, frozen)
    if program.objective.keeps_start(program.config):
        # A copy of what is trained, as it was before the first step.
        for name in ("weights", "total"):
            per_device[name] += per_device["trainable"]
    width = memory.bits(parts.config.dtype) / 8
    trained = parts.counts()["trainable"]
    blocks = memory.block_bytes(work, mesh) * parts.config.num_layers * work.grad_accum
    rows = math.ceil(work.batch_size / (work.grad_accum * batch_shards(mesh)))
    sizes = roofline.Sizes(
        flops=step_flops(program),
        weights=parts.counts()["total"] * width,
        trained=trained * width,
        updated=sum(per_device[name] for name in ("trainable", "optimizer", "gradients")),
        activations=blocks,
        rows=rows * work.seq_len / mesh.shape["sequence"] * parts.config.hidden_size * width,
        layers=parts.config.num_layers,
        passes=3 if parts.config.remat == "block" else 2,
        grad_accum=work.grad_accum,
    )
    return per_device, roofline.estimate(roofline.traffic(sizes, mesh), draft.target.chip, mesh)


def work_of(program: build.Plan) -> memory.Work:
    """Returns what the step of a run computes on."""
    config, parts = program.config, program.parts
    return memory.Work(
        parts.config,
        parts.method,
        config.batch_size + replayed_rows(config),
        config.grad_accum,
        config.data.seq_len,
        None if replayed_rows(config) else head_tokens(program),
        stores_scores=stores_scores(parts.config),
        logits_bytes=chunk_bytes(
            parts.config, parts.split(parts.shapes)[0], batch_shards(program.mesh)
        ),
        quantized=any(memory.bits(leaf.dtype) <= 8 for leaf in jax.tree.leaves(parts.shapes)),
    )


def head_tokens(program: build.Plan) -> int | None:
    """Returns of how many tokens of a row the loss makes logits; None: of all, or not known."""
    if program.mesh.shape["sequence"] > 1:
        return None
    return program.objective.head_tokens(program.config, program.rows)


def stores_scores(model: ModelConfig) -> bool:
    """Tells whether the model's attention writes its [T, T] scores to memory."""
    return backend(model.attention, cached=False).reads_mask


def step_flops(program: build.Plan) -> int:
    """Returns the operations of a step over all devices, with those of a reference or teacher."""
    parts, config = program.parts, program.config
    length, replayed = config.data.seq_len, replayed_rows(config)
    params, base = (abstract_params(parts.config.unquantized, m) for m in (parts.method, BASE))
    kind = {"skips_masked": not stores_scores(parts.config)}
    few = kind | {"head_tokens": head_tokens(program)}
    chunked = memory.chunks_logits(work_of(program), program.mesh)

    def trained(rows: int, how: dict[str, Any]) -> int:
        return flops.step_flops(
            parts.config, parts.labels, params, rows, length, **how, chunked_head=chunked
        )

    found = trained(config.batch_size, few)
    if replayed:
        found += trained(replayed, kind)
        if config.retention.replay_kl:
            found += flops.forward_flops(parts.config, base, replayed, length, **kind)
    referred = program.objective.at_start is not None
    if referred and adapters_off(parts, config.peft.get("init_from")):
        found += flops.forward_flops(parts.config, base, config.batch_size, length, **few)
    if parts.teacher is not None:
        theirs = abstract_params(parts.teacher.unquantized, BASE)
        found += flops.forward_flops(parts.teacher, theirs, config.batch_size, length, **kind)
    return found


def groups(parts: Parts) -> dict[str, dict[str, int]]:
    """Returns {group: {"total", "trainable"}} of the parameters, such as `blocks/attn`."""
    found: dict[str, dict[str, int]] = {}
    kinds = flatten(parts.labels)
    for path, leaf in flatten(parts.shapes).items():
        names = path.split("/")
        group = "/".join(names[:2] if names[0] == "blocks" else names[:1])
        row = found.setdefault(group, {"total": 0, "trainable": 0})
        row["total"] += leaf.size
        row["trainable"] += leaf.size * (kinds[path] == TRAINED)
    return found


def link_seconds(
    compiled: compile.Compiled, chip: chips.Chip, mesh: Mesh | AbstractMesh
) -> dict[str, float]:
    """Returns the seconds that the program's own collectives take on the links."""
    sent = sum(c.link_bytes * c.runs for c in compiled.collectives)
    return {roofline.LINKS: sent / chip.link_rate} if mesh.size > 1 else {}


def compiled_object(
    compiled: compile.Compiled, estimate: roofline.Estimate, parts: Parts
) -> dict[str, Any]:
    """Returns what the compiler said, for the printed object."""
    optimal = compiled.optimal_seconds
    found = compiled.collectives or ()
    largest = collectives.largest(found)
    frozen = collectives.gradient_collectives(found, frozen_shapes(parts))
    return {
        "argument_bytes": compiled.argument_bytes,
        "temp_bytes": compiled.temp_bytes,
        "total_bytes": compiled.total_bytes,
        "compile_seconds": compiled.compile_seconds,
        "collectives": collectives.summary(found) if compiled.fits else None,
        "flops_per_device": compiled.flops,
        "uncounted_loops": compiled.uncounted_loops,
        "optimal_seconds": optimal if roofline.plausible(optimal, estimate.step_seconds) else None,
        "frozen_gradient_collectives": len(frozen),
        "largest_collective": None
        if largest is None
        else {"kind": largest.kind, "bytes": largest.bytes, "of": list(largest.parameters)},
    }


def frozen_shapes(parts: Parts) -> list[tuple[int, ...]]:
    """Returns the shapes of the frozen weights, of one layer where they are stacked.

    Those that a trained weight has too are left out.
    """
    found: dict[bool, set[tuple[int, ...]]] = {True: set(), False: set()}
    kinds, places = flatten(parts.labels), flatten(parts.shardings)
    for path, leaf in flatten(parts.shapes).items():
        stacked = path.startswith("blocks/")
        for dims in (leaf.shape, places[path].shard_shape(leaf.shape)):
            found[kinds[path] == TRAINED].add(collectives.squeezed(dims[1:] if stacked else dims))
    return sorted(found[False] - found[True])
