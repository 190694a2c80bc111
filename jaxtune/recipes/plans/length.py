"""How long a planned run is: measured on its data where they are here, else from the config."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtune.data.stream import Budget
from jaxtune.peft.method import Method
from jaxtune.recipes.base import Base
from jaxtune.recipes.data import Data
from jaxtune.recipes.objectives import OBJECTIVES
from jaxtune.recipes.retention.replay_mixing import with_replay
from jaxtune.recipes.schema.formats import NOT_GIVEN
from jaxtune.recipes.schema.resolve import plain


@dataclasses.dataclass(frozen=True)
class Length:
    """The length of a run.

    Attributes:
        data: what the step's schedule reads, for `build.connect`.
        steps: optimizer steps, or None if only absent data could tell.
        tokens: real tokens in the run, without padding, or None if the data are absent.
        source: where these numbers are from.
    """

    data: Data
    steps: int | None
    tokens: int | None
    source: str


def for_planning(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the config with what only the data would need filled in.

    A plan needs no data: an entry of `data.train` may lack its source, and a preset its tokenizer.
    """
    raw = plain(config)
    data = dict(raw.get("data") or {})
    entries = data.get("train")
    if not isinstance(entries, list):
        return raw

    def usable(entry: Any) -> Any:
        if not isinstance(entry, dict):
            return entry
        if entry.get("source") is None:
            entry = {"format": "tokens"} | entry | {"source": NOT_GIVEN}
        return entry

    data["train"] = [usable(entry) for entry in entries]
    return raw | {"data": data}


def length_of(config: Any, base: Base, method: Method) -> Length:
    """Returns the Length of a resolved config.

    Raises:
        RequestError: data that are here and damaged.
    """
    entries = [*config.data.train, *config.data.eval]
    missing = [entry.source for entry in entries if not is_here(entry.source)]
    if not missing:
        data = OBJECTIVES[config.objective.name].open_data(config, base, method)
        if all(is_here(entry.source) for entry in config.retention.replay_data):
            data = with_replay(data, config, base, method)
        stats, steps = data.stream.stats(), data.budget.steps
        if "rows_per_epoch" not in stats:  # the tokens are yet to be sampled
            return Length(data, steps, None, "total_steps")
        rows = data.budget.rows or steps * config.batch_size
        tokens = round(rows * stats["tokens_per_epoch"] / stats["rows_per_epoch"])
        return Length(data, steps, tokens, "measured on the data")
    steps, source = _from_config(config)
    given = config.optim.get("warmup_steps", 0)
    warmup = given or round(config.optim.get("warmup_ratio", 0.0) * (steps or 0))
    # Any number of steps gives the same program.
    data = Data(None, Budget(steps or max(1000, warmup)), warmup, {})
    name = "data.train" if missing == [NOT_GIVEN] else missing[0]
    return Length(data, steps, None, f"{source}; {name} is not here to measure")


def is_here(source: str) -> bool:
    """Tells whether a source can be opened here: a file, or a prepared dataset."""
    kind, _, rest = source.partition(":")
    if kind == "tfds":
        from jaxtune.core.errors import RequestError
        from jaxtune.data.sources import open_source

        try:
            open_source(source)
        except RequestError:
            return False
        return True
    return Path(rest).is_file()


def _from_config(config: Any) -> tuple[int | None, str]:
    slots = config.batch_size * config.data.seq_len
    if "total_steps" in config:
        return config.total_steps, "total_steps"
    if "total_tokens" in config:
        return -(-config.total_tokens // slots), "total_tokens, rows taken as full"
    if "total_examples" in config and not config.data.packing:
        return -(-config.total_examples // config.batch_size), "total_examples"
    unit = "total_examples" if "total_examples" in config else "total_epochs"
    return None, f"{unit} needs the data"
