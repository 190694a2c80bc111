"""Checks between keys, and the defaults that follow from other keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtune.core.errors import RequestError
from jaxtune.recipes.schema import rules_data, rules_online
from jaxtune.recipes.schema.evaluation import check_answers
from jaxtune.recipes.schema.formats import (
    FORMATS_OF,
)
from jaxtune.recipes.schema.keys import DURATION_UNITS
from jaxtune.recipes.schema.retention import BOUNDS, apply_replay, check_measured

Values = dict[str, Any]

AXES = ("data", "fsdp", "tensor", "sequence", "expert")


def apply(values: Values, given: Mapping[str, Any]) -> Values:
    """Returns the values with dependent defaults filled in.

    Args:
        values: {dotted key: checked value} of every key that applies.
        given: the keys that the user gave.

    Raises:
        RequestError: for a contradiction, with the key that is easiest to change.
    """
    values = dict(values)
    _model(values)
    _peft(values)
    rules_data.apply(values)
    _teacher(values)
    _length(values)
    _optim(values)
    _mesh(values, given)
    rules_online.apply(values, given)
    _evaluation(values, given)
    _retention(values)
    return values


def _model(values: Values) -> None:
    path, preset = values["model.path"], values["model.preset"]
    if path is None and preset is None:
        raise RequestError(
            "missing: give model.path (a Hugging Face directory or a run's workdir), or "
            "model.preset for random weights",
            key="model.path",
        )
    if path is not None and preset is not None:
        raise RequestError(
            f"contradicts model.path = {path!r}: a model is loaded or made from a preset, not both",
            key="model.preset",
        )

    quantize, train = values["model.quantize"], values["peft.train"]
    if quantize != "none" and values["peft.method"] == "full" and not train:
        raise RequestError(
            f"{quantize!r} contradicts peft.method = 'full': quantised weights are not trained; "
            "use a method that keeps them frozen, such as 'lora', or 'none'",
            key="model.quantize",
        )
    if quantize != "none" and values.get("peft.variant") == "pissa":
        raise RequestError(
            f"'pissa' contradicts model.quantize = {quantize!r}: it starts from whole weights; use "
            "'lora', 'rslora' or 'dora'",
            key="peft.variant",
        )


def _peft(values: Values) -> None:
    start = values.get("peft.init_from")
    for key in ("peft.init", "peft.init_text"):
        if start is not None and key in values:
            raise RequestError(
                f"contradicts peft.init_from = {start!r}, the prompt's start", key=key
            )


def _teacher(values: Values) -> None:
    if values["objective.name"] != "distill":
        return
    teacher, stored = values["objective.teacher"], values["objective.teacher_data"]
    if (teacher is None) == (stored is None):
        problem = "missing: give a model, or" if teacher is None else "contradicts"
        raise RequestError(
            f"{problem} objective.teacher_data, what one said on disk", key="objective.teacher"
        )
    if stored is not None and values["objective.teacher_quantize"] != "none":
        raise RequestError(
            "contradicts objective.teacher_data: no teacher is loaded",
            key="objective.teacher_quantize",
        )


def _length(values: Values) -> None:
    totals = [f"total_{unit}" for unit in DURATION_UNITS if f"total_{unit}" in values]
    if not totals:
        raise RequestError(
            "missing: give one of total_steps, total_epochs, total_examples, total_tokens",
            key="total_steps",
        )
    if len(totals) > 1:
        raise RequestError(
            f"contradicts {totals[0]}: give one of them (None takes one back)", key=totals[1]
        )
    batch, parts = values["batch_size"], values["grad_accum"]
    if batch * values["data.seq_len"] >= 2**31:
        raise RequestError(
            f"{batch} sequences of data.seq_len = {values['data.seq_len']} are more tokens than a "
            "step can count, 2147483647",
            key="batch_size",
        )
    if batch % parts:
        raise RequestError(f"{parts} does not divide batch_size = {batch}", key="grad_accum")


def _optim(values: Values) -> None:
    warmups = [key for key in values if key.startswith("optim.warmup_")]
    if len(warmups) > 1:
        raise RequestError(
            f"contradicts {warmups[0]}: give one of them (None takes one back)", key=warmups[1]
        )
    for key in warmups:
        total = f"total_{key.removeprefix('optim.warmup_')}"
        if total in values and values[key] > values[total]:
            raise RequestError(
                f"{values[key]} is longer than the run ({total} = {values[total]})", key=key
            )
    warmup, decay = values.get("optim.warmup_ratio", 0), values.get("optim.decay_ratio", 0)
    if warmup + decay > 1:
        raise RequestError(
            f"{warmup:g} leaves no room for optim.decay_ratio = {decay:g}: together they are "
            "shares of the run",
            key="optim.warmup_ratio",
        )


def _mesh(values: Values, given: Mapping[str, Any]) -> None:
    if values["mesh.slices"] == 0:
        raise RequestError(
            "expected a number of slices ≥ 1, or -1 for what the devices say; got 0",
            key="mesh.slices",
        )
    for axis in AXES:
        if values[f"mesh.{axis}"] == 0:
            raise RequestError(
                "expected a number of devices ≥ 1, or -1 for what is left; got 0",
                key=f"mesh.{axis}",
            )
    rest = [f"mesh.{axis}" for axis in AXES if values[f"mesh.{axis}"] == -1]
    if len(rest) > 1 and "mesh.fsdp" not in given:
        values["mesh.fsdp"] = (
            1  # -1 is only its default: the user gave what is left to another axis
        )
        rest.remove("mesh.fsdp")
    if len(rest) > 1:
        raise RequestError(
            f"-1 is given to {rest[0]} too: only one axis takes what is left", key=rest[1]
        )


def _evaluation(values: Values, given: Mapping[str, Any]) -> None:
    best = values["checkpoint.keep_best"]
    retained = values["retention.data"] or values["retention.tasks"]
    measured = values["data.eval"] or retained
    if not values["data.eval"] and given.get("checkpoint.keep_best") is not None:
        raise RequestError(
            "needs evaluation data, and data.eval is empty", key="checkpoint.keep_best"
        )
    if not measured:
        for key in ("eval.every_steps", "eval.batch_size"):
            if given.get(key) is not None:
                raise RequestError("needs evaluation data, and data.eval is empty", key=key)
    elif best is not None:
        if not best.startswith("eval/"):
            raise RequestError(
                f"expected a metric such as 'eval/loss'; got {best!r}", key="checkpoint.keep_best"
            )
        for key in ("eval.every_steps", "checkpoint.every_steps"):
            if values[key] is None:
                raise RequestError(f"needs {key}", key="checkpoint.keep_best")
        save, evaluate = values["checkpoint.every_steps"], values["eval.every_steps"]
        if save % evaluate:
            raise RequestError(
                f"needs an evaluation at each checkpoint: checkpoint.every_steps = {save} is no "
                f"multiple of eval.every_steps = {evaluate}",
                key="checkpoint.keep_best",
            )
    check_answers(values)
    sampled = values["objective.name"] in rules_online.NAMES
    rows = retained or (values["data.eval"] and not sampled)
    if rows and values["eval.batch_size"] is None:
        values["eval.batch_size"] = values["batch_size"]


def _retention(values: Values) -> None:
    rolls_back = values["retention.on_rise"] == "rollback"
    if values["retention.data"] and values["objective.name"] == "reward":
        raise RequestError("cannot be measured: a reward model has no logits", key="retention.data")
    for i, entry in enumerate(values["retention.data"]):
        if entry["format"] not in FORMATS_OF["sft"]:
            raise RequestError(
                f"{entry['format']!r} has no loss a token to measure; these have: "
                f"{', '.join(FORMATS_OF['sft'])}",
                key=f"retention.data[{i}].format",
            )
    if bool(values.get("retention.olora")) != bool(values.get("retention.olora_from")):
        raise RequestError(
            "retention.olora, a strength, and retention.olora_from, adapter directories, need each "
            "other",
            key="retention.olora_from" if values["retention.olora"] else "retention.olora",
        )
    check_measured(values)
    apply_replay(values, FORMATS_OF["sft"])
    bounds = [key for key in BOUNDS if values[key] is not None]
    if not bounds:
        if rolls_back:
            raise RequestError(
                "'rollback' needs retention.max_rise, max_kl or max_drop", key="retention.on_rise"
            )
        return
    if values["eval.every_steps"] is None:
        raise RequestError("needs eval.every_steps", key=bounds[0])
    save, evaluate = values["checkpoint.every_steps"], values["eval.every_steps"]
    if rolls_back and (save is None or save % evaluate):
        raise RequestError(
            f"'rollback' needs an evaluation at each checkpoint: checkpoint.every_steps = {save} "
            f"is no multiple of eval.every_steps = {evaluate}",
            key="retention.on_rise",
        )
