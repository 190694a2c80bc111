"""Checks between the keys of an objective that samples its own data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtune.core.errors import RequestError

Values = dict[str, Any]
NAMES = ("grpo", "ppo")  # objectives that sample
_ALONE = ("batch",)  # advantages that need no second sample of a prompt


def apply(values: Values, given: Mapping[str, Any]) -> None:
    """Raises RequestError for a contradiction, with the key that is easiest to change.

    Args:
        values: {dotted key: checked value} of every key that applies.
        given: the keys that the user gave.
    """
    name = values["objective.name"]
    if name not in NAMES:
        return
    _data(values, given, name)
    rows = values["objective.prompts"] * values["objective.samples"]
    if rows % values["batch_size"]:
        raise RequestError(
            f"{values['batch_size']} does not divide the {rows} rows of an iteration, "
            "objective.prompts × objective.samples",
            key="batch_size",
        )
    for unit in ("epochs", "examples", "tokens"):
        for key in (f"total_{unit}", f"optim.warmup_{unit}"):
            if key in values:
                raise RequestError(
                    f"contradicts objective.name = {name!r}, which makes its data as it goes: give "
                    f"{key.replace(unit, 'steps')}; an iteration has "
                    f"{values['objective.epochs'] * rows // values['batch_size']} steps",
                    key=key,
                )
    if values.get("peft.dropout"):
        raise RequestError(
            f"contradicts objective.name = {name!r}: the policy that is trained is the one that "
            "was sampled from, without dropout",
            key="peft.dropout",
        )
    _sampling(values)
    _server(values)
    _learning(values)


def _data(values: Values, given: Mapping[str, Any], name: str) -> None:
    if values["data.packing"]:
        raise RequestError(
            f"contradicts objective.name = {name!r}: a row holds one prompt and its completion",
            key="data.packing",
        )
    if given.get("eval.batch_size") is not None:
        raise RequestError(
            f"not used by objective.name = {name!r}: the sampler takes all held-out prompts",
            key="eval.batch_size",
        )


def _sampling(values: Values) -> None:
    new, length = values["objective.max_new_tokens"], values["data.seq_len"]
    if new >= length:
        raise RequestError(
            f"{new} tokens leave no room for a prompt in data.seq_len = {length}",
            key="objective.max_new_tokens",
        )
    if values["objective.overlong"] > new:
        raise RequestError(
            f"{values['objective.overlong']} is more than objective.max_new_tokens = {new}",
            key="objective.overlong",
        )
    kind = values.get("objective.advantage", "batch")
    if values["objective.samples"] < 2 and kind not in _ALONE:
        raise RequestError(
            f"1 leaves objective.advantage = {kind!r} nothing to compare a sample with; give 2 or "
            "more",
            key="objective.samples",
        )


def _server(values: Values) -> None:
    """Refuses settings under which a server's log-probabilities are not the policy's."""
    tempered = values.get("objective.server_tempered")
    if tempered is None:
        return
    for key, fine in (("temperature", (1.0,)), ("eval_temperature", (0.0, 1.0))):
        value = values[f"objective.{key}"]
        if not tempered and value not in fine:
            raise RequestError(
                f"{value:g} contradicts objective.server_tempered = False: the server's "
                "log-probabilities are those of temperature 1; start vLLM with --logprobs-mode "
                "processed_logprobs and set it to True",
                key=f"objective.{key}",
            )
    for key, off in (("top_p", 1), ("top_k", 0)):
        if tempered and values[f"objective.{key}"] != off:
            raise RequestError(
                "contradicts objective.server_tempered = True: the server's log-probabilities "
                f"would be those of the narrowed choice; use {off}",
                key=f"objective.{key}",
            )


def _learning(values: Values) -> None:
    ratio, normaliser = (values.get(f"objective.{key}") for key in ("ratio", "normaliser"))
    if ratio in ("sequence", "total") and normaliser != "sequence":
        raise RequestError(
            f"{normaliser!r} contradicts objective.ratio = {ratio!r}, one ratio a sequence: use "
            "'sequence'",
            key="objective.normaliser",
        )
    if values["objective.kl_target"] is not None and not values["objective.kl_coef"]:
        raise RequestError("needs a kl_coef above 0 to steer", key="objective.kl_target")
