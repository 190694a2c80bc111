"""What a reward is: a Python callable, and what the config says about it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxtune.core.errors import RequestError

Function = Callable[..., Sequence[float | None]]
"""`(prompts: list[str], completions: list[str], **columns: list) → list[float | None]`.

`columns` are the other fields of the prompt records, each a list aligned with the completions; a
function gets those that its signature names, or all where it has `**`. It gets `completion_ids`
(list of lists of int) and `finished` (list of bool: ended by itself, not cut off) where it names
them. None is no score: the function does not apply to the sample.
"""

SAMPLES = ("prompts", "completions")
ON_REQUEST = ("completion_ids", "finished")
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


@dataclass(frozen=True)
class Scorer:
    """What a built-in reward becomes once its arguments are checked.

    Attributes:
        function: see `Function`.
        columns: names of the fields that a record must have.
    """

    function: Function
    columns: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reward:
    """One entry of `objective.rewards`, ready to be called.

    Attributes:
        name: for metrics and messages; unique among the rewards of a run.
        function: see `Function`.
        arguments: passed by keyword with every call.
        weight: factor in the total.
        timeout: seconds that one call, over a whole batch, may take; None: no limit.
        on_error: "stop" the run, or "drop" the samples that got no score.
        columns: names of the fields that a record must have.
        key: of the config, named in errors.
    """

    name: str
    function: Function
    arguments: Mapping[str, Any] = field(default_factory=dict)
    weight: float = 1.0
    timeout: float | None = None
    on_error: str = "stop"
    columns: tuple[str, ...] = ()
    key: str = "objective.rewards"


def check_columns(rewards: Iterable[Reward], columns: Iterable[str], where: str) -> None:
    """Checks that the prompt records have what the rewards ask for.

    Args:
        rewards: of the run.
        columns: fields of the records, besides the prompt.
        where: the source of the records, for the message.

    Raises:
        RequestError: a field is missing, or has a name that stands for something else.
    """
    found = sorted(columns)
    for name in (*SAMPLES, *ON_REQUEST):
        if name in found:
            raise RequestError(
                f"the field {name!r} has the name of what rewards are given; rename it",
                where=where,
            )
    for reward in rewards:
        for name in reward.columns:
            if name not in found:
                raise RequestError(
                    f"{reward.name} needs the field {name!r}, and the records of {where} have "
                    f"{', '.join(map(repr, found)) or 'none besides the prompt'}",
                    key=f"{reward.key}.function",
                )


def signature(function: Function) -> tuple[dict[str, bool], bool]:
    """Returns ({keyword that it names: whether it has a default}, whether it takes any other).

    Raises:
        TypeError, ValueError: what is given cannot be called, or hides its signature.
    """
    listed = inspect.signature(function).parameters.values()
    named = {p.name: p.default is not p.empty for p in listed if p.kind in _NAMED}
    return named, any(p.kind is inspect.Parameter.VAR_KEYWORD for p in listed)


def keywords(reward: Reward, given: Mapping[str, list]) -> dict[str, Any]:
    """Returns what a reward's function is given besides prompts and completions.

    Args:
        reward: its arguments win over a field of the same name.
        given: {name: values} of what `Function` describes.
    """
    named, takes_any = signature(reward.function)
    passed = {
        name: list(values)
        for name, values in given.items()
        if name not in SAMPLES
        if name in named or (takes_any and name not in ON_REQUEST)
    }
    return passed | dict(reward.arguments)
