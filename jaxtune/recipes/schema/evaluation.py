"""The keys of `eval`: when and how a run is measured on `data.eval`, and what is refused."""

from __future__ import annotations

from typing import Any

from jaxtune.core.errors import RequestError, nearest
from jaxtune.data.questions import FORMATS
from jaxtune.evaluate.text_metrics import METRICS
from jaxtune.recipes.schema.key import Key

NEW_TOKENS = 256

EVAL_KEYS = (
    Key("eval.every_steps", "int", None, "None: only at the end", low=1, optional=True),
    Key(
        "eval.batch_size",
        "int",
        None,
        "None: batch_size, where there is evaluation data",
        low=1,
        optional=True,
    ),
    Key(
        "eval.metrics",
        "texts",
        (),
        f"of what the model writes to data.eval, greedily: {', '.join(METRICS)}",
    ),
    Key(
        "eval.labels",
        "texts",
        (),
        "completions to choose from, the likeliest counts; ['auto']: all that data.eval has",
    ),
    Key(
        "eval.max_new_tokens",
        "int",
        None,
        f"the most tokens of an answer; None: {NEW_TOKENS}, where answers are written",
        low=1,
        optional=True,
    ),
    Key(
        "eval.answers",
        "int",
        None,
        "examples of each source that metrics and labels are measured on; None: all",
        low=1,
        optional=True,
    ),
)


# Objectives that measure a loss of each held-out example in the usual way.
PARTED = ("sft", "pretrain", "dpo", "orpo", "simpo", "cpo", "reward")


def check_answers(values: dict[str, Any]) -> None:
    """Sets how long answers are; raises RequestError for what cannot be measured on `data.eval`."""
    for name in values["eval.metrics"]:
        if name not in METRICS:
            raise RequestError(
                f"unknown metric {name!r}{nearest(name, METRICS)}; valid: {', '.join(METRICS)}",
                key="eval.metrics",
            )
    for i, entry in enumerate(values["data.eval"]):
        if entry["by"] is not None and values["objective.name"] not in PARTED:
            raise RequestError(
                f"not used by objective.name = {values['objective.name']!r}; only by "
                f"{', '.join(PARTED)}",
                key=f"data.eval[{i}].by",
            )
    asked = [key for key in ("eval.metrics", "eval.labels") if values[key]]
    writes = values["eval.metrics"] or any(not e["labels"] for e in values["retention.tasks"])
    if writes and values["eval.max_new_tokens"] is None:
        values["eval.max_new_tokens"] = NEW_TOKENS
    for key, needed, needs in (
        ("eval.max_new_tokens", writes, "eval.metrics, or retention.tasks"),
        ("eval.answers", asked, "eval.metrics or eval.labels"),
    ):
        if values[key] is not None and not needed:
            raise RequestError(f"needs {needs}", key=key)
    if asked and not values["data.eval"]:
        raise RequestError("needs evaluation data, and data.eval is empty", key=asked[0])
    for i, entry in enumerate(values["data.eval"] if asked else ()):
        if entry["format"] not in FORMATS:
            raise RequestError(
                f"needs prompts with answers, of format {', '.join(FORMATS)}; data.eval[{i}] has "
                f"{entry['format']!r}",
                key=asked[0],
            )
