"""The keys of `retention`: what the model should not forget, and what is done for it."""

from __future__ import annotations

from jaxtune.recipes.schema_key import Key

# Objectives that give each target token a log-probability, and have no KL of their own.
SCORED = ("sft", "pretrain", "dpo", "orpo", "simpo", "cpo")


def retention_keys(entry: tuple[Key, ...]) -> tuple[Key, ...]:
    """Returns the keys; `entry` are those of an evaluation source."""
    return (
        Key(
            "retention.data",
            "entries",
            (),
            "what is to be retained; measured before the run, at each evaluation and at the end",
            entry=entry,
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
            "retention.on_rise",
            "choice",
            "stop",
            "past max_rise: stop, the newest checkpoint being the result, or roll back to the "
            "newest within the bound",
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
            "divides both models' logits in it; the term is multiplied by its square",
            above=0,
            used_by=(("objective.name", SCORED),),
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
