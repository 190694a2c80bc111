"""The keys of `retention`: what the model should not forget, and what is done for it."""

from __future__ import annotations

from jaxtune.recipes.schema_key import Key


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
    )
