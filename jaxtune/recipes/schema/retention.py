"""The keys of `retention`: what the model should not forget, and what is done for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtune.core.errors import RequestError
from jaxtune.data.questions import FORMATS
from jaxtune.recipes.schema.key import Key

# Objectives that give each target token a log-probability, and have no KL of their own.
SCORED = ("sft", "pretrain", "dpo", "orpo", "simpo", "cpo")

# {key of `retention`: the metric that it bounds}
METRICS_OF = {
    "max_rise": "retention/nll_rise",
    "max_kl": "retention/kl",
    "max_drop": "retention/accuracy_drop",
}
# {key that bounds what is measured: what it needs}
BOUNDS = {
    "retention.max_rise": "retention.data",
    "retention.max_kl": "retention.measure_kl",
    "retention.max_drop": "retention.tasks",
}


def retention_keys(entry: tuple[Key, ...], replayed: tuple[Key, ...]) -> tuple[Key, ...]:
    """Returns the keys; `entry` are those of an evaluation source, `replayed` of a training one."""
    return (
        Key(
            "retention.data",
            "entries",
            (),
            "what is to be retained; measured before the run, at each evaluation and at the end",
            entry=entry,
        ),
        Key(
            "retention.tasks",
            "entries",
            (),
            "tasks whose accuracy is to be retained, measured at the same times",
            entry=(
                *entry,
                Key(
                    "labels",
                    "texts",
                    (),
                    "completions to choose from, ['auto'] for all that the source has; none: the "
                    "model writes, and its answer is to match",
                ),
            ),
        ),
        Key(
            "retention.measure_kl",
            "bool",
            False,
            "measure KL(start‖model) of the next token on retention.data as well",
        ),
        Key(
            "retention.max_rise",
            "float",
            None,
            "nats a token by which the loss on retention.data may rise before the run stops",
            above=0,
            optional=True,
        ),
        Key(
            "retention.max_kl",
            "float",
            None,
            "nats a token of KL(start‖model) past which the run stops; with measure_kl",
            above=0,
            optional=True,
        ),
        Key(
            "retention.max_drop",
            "float",
            None,
            "by how much the accuracy on retention.tasks may fall before the run stops",
            above=0,
            below=1,
            optional=True,
        ),
        Key(
            "retention.on_rise",
            "choice",
            "stop",
            "past a bound: stop, the newest checkpoint being the result, or roll back to the "
            "newest within all bounds",
            choices=("stop", "rollback"),
        ),
        Key(
            "retention.kl",
            "float",
            0.0,
            "strength of the KL from the base at the target tokens, for a method whose base stays "
            "whole",
            low=0,
            used_by=(("objective.name", SCORED),),
        ),
        Key(
            "retention.kl_temperature",
            "float",
            1.0,
            "divides both models' logits in it and in retention.replay_kl; the term is multiplied "
            "by its square",
            above=0,
        ),
        Key(
            "retention.replay_data",
            "entries",
            (),
            "old data, of which each step reads rows beside those of the objective",
            entry=replayed,
        ),
        Key(
            "retention.replay",
            "float",
            0.0,
            "strength of the mean loss a token on retention.replay_data",
            low=0,
        ),
        Key(
            "retention.replay_kl",
            "float",
            0.0,
            "strength of the KL from the base at the targets of retention.replay_data, for a "
            "method whose base stays whole",
            low=0,
        ),
        Key(
            "retention.replay_batch_size",
            "int",
            None,
            "rows of retention.replay_data a step; by default as many as batch_size",
            low=1,
            optional=True,
        ),
        Key(
            "retention.l2sp",
            "float",
            0.0,
            "strength of the pull of trained parameters towards their start (L2-SP)",
            low=0,
        ),
        Key(
            "retention.ewc",
            "float",
            0.0,
            "the same, weighted by each element's Fisher information on retention.data (EWC)",
            low=0,
        ),
        Key(
            "retention.ewc_examples",
            "int",
            256,
            "examples of retention.data that the Fisher information is estimated on",
            low=1,
        ),
        Key(
            "retention.olora",
            "float",
            0.0,
            "strength of the push of LoRA's A away from those of retention.olora_from (O-LoRA)",
            low=0,
            used_by=(("peft.method", ("lora",)),),
        ),
        Key(
            "retention.olora_from",
            "texts",
            (),
            "adapter directories of the earlier runs, whose result model.path is",
            used_by=(("peft.method", ("lora",)),),
        ),
    )


def apply_replay(values: dict[str, Any], valid: tuple[str, ...]) -> None:
    """Fills in how many rows are replayed.

    Args:
        values: {dotted key: checked value}, changed in place.
        valid: formats that replayed data may have.

    Raises:
        RequestError: a key without those that it needs, or an objective that replays nothing.
    """
    entries, rows = values["retention.replay_data"], values["retention.replay_batch_size"]
    strengths = [k for k in ("retention.replay", "retention.replay_kl") if values[k]]
    used = [*strengths, *(["retention.replay_batch_size"] if rows is not None else [])]
    if not entries:
        if used:
            raise RequestError("needs retention.replay_data, which is empty", key=used[0])
        return
    if values["objective.name"] == "reward":
        raise RequestError(
            "cannot be replayed: a reward model has no logits, so text has no loss",
            key="retention.replay_data",
        )
    if not strengths:
        raise RequestError(
            "needs a strength, retention.replay or retention.replay_kl", key="retention.replay_data"
        )
    for i, entry in enumerate(entries):
        if entry["format"] not in valid:
            raise RequestError(
                f"{entry['format']!r} has no loss a token to replay; these have: "
                f"{', '.join(valid)}",
                key=f"retention.replay_data[{i}].format",
            )
    if rows is None:
        values["retention.replay_batch_size"] = rows = values["batch_size"]
    if rows % values["grad_accum"]:
        raise RequestError(
            f"grad_accum = {values['grad_accum']} does not divide it, {rows} rows",
            key="retention.replay_batch_size",
        )


def check_measured(values: Mapping[str, Any]) -> None:
    """Raises RequestError for what cannot be measured of what is retained, or bounded."""
    needs = {"retention.ewc": "retention.data", "retention.measure_kl": "retention.data"} | BOUNDS
    for key, needed in needs.items():
        if values[key] and not values[needed]:
            empty = "" if needed == "retention.measure_kl" else ", which is empty"
            raise RequestError(f"needs {needed}{empty}", key=key)
    if values["retention.tasks"] and values["objective.name"] == "reward":
        raise RequestError(
            "cannot be measured: a reward model has no logits", key="retention.tasks"
        )
    for i, entry in enumerate(values["retention.tasks"]):
        if entry["format"] not in FORMATS:
            raise RequestError(
                f"{entry['format']!r} has no prompt with an answer; valid: {', '.join(FORMATS)}",
                key=f"retention.tasks[{i}].format",
            )
