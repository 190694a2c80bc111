"""The score of a model trained with objective.name = "reward", or of one like it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxtune.rl.rewards import arguments
from jaxtune.rl.rewards.reward import Scorer


def reward_model(load_model: Callable[[str], Any], path: str, batch_size: int = 8) -> Scorer:
    """The scalar that a reward model gives to prompt + completion.

    The model is loaded when the first batch is scored, within that batch's time limit.

    Args:
        load_model: directory → a model with `scores(texts: list[str]) → float [n]`.
        path: Hugging Face directory of a sequence classifier with one label, or a run's workdir.
        batch_size: texts that go through the model at once.
    """
    arguments.text("path", path)
    arguments.whole("batch_size", batch_size, 1)
    place = Path(path).expanduser()
    arguments.expect(
        any((place / name).is_file() for name in ("config.json", "summary.json")),
        "path",
        path,
        "a directory with a config.json",
    )
    loaded = functools.cache(lambda: load_model(str(place)))

    def score(prompts: list[str], completions: list[str], **columns: list) -> list[float]:
        texts = [p + c for p, c in zip(prompts, completions, strict=True)]
        parts = [texts[i : i + batch_size] for i in range(0, len(texts), batch_size)]
        return [float(value) for part in parts for value in loaded().scores(part)]

    return Scorer(score)
