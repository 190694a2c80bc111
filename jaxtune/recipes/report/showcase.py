"""A few completions of a run, before and after training, for people to compare."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune.core.tree import Tree, combine
from jaxtune.generate import engine
from jaxtune.parallel.processes import is_writer
from jaxtune.training.workdir import read_json, write_json

FILE = "showcase.json"
NEW_TOKENS = 64


def show(plan: Any, workdir: Path, when: str, trainable: Tree, frozen: Tree) -> None:
    """Notes what the model writes behind the prompts of `log.samples` examples.

    The prompt of an example is what stands before its first target; of a document, a third of it.
    Only objectives of which an example is a text that is continued show any.

    Args:
        plan: of the run.
        workdir: keeps the note in `showcase.json`.
        when: "before" or "after".
        trainable, frozen: the parameters.
    """
    tokenizer, count = plan.base.tokenizer, plan.config.log.samples
    if not count or tokenizer is None or not plan.objective.likelihood:
        return
    examples = itertools.islice(first_examples(plan), count)
    split = [parted(ids, mask) for ids, mask in examples]
    split = [(prompt, wanted) for prompt, wanted in split if len(prompt)]
    if not split:
        return
    room = plan.parts.config.max_context - plan.config.data.seq_len
    new = engine.generate(
        plan.parts.config,
        plan.parts.method,
        combine(trainable, frozen),
        [prompt.tolist() for prompt, _ in split],
        max_new_tokens=max(1, min(NEW_TOKENS, room + min(len(w) for _, w in split))),
        eos_ids=tokenizer.eos_ids,
    )
    if not is_writer():
        return
    known = {item["prompt"]: item for item in read(workdir)}
    items = []
    for (prompt, wanted), ids in zip(split, new, strict=True):
        words = [tokenizer.decode(list(map(int, x)), skip_special=True) for x in (prompt, wanted)]
        item = {"prompt": words[0], "wanted": words[1]}
        told = {when: tokenizer.decode(ids, skip_special=True)}
        items.append(item | known.get(words[0], {}) | told)
    write_json(workdir / FILE, {"items": items})


def first_examples(plan: Any) -> Any:
    """Yields (ids, mask) of held-out examples, or of training examples where there are none."""
    stores = list(plan.data.evals.values()) or list(plan.data.stream.stores)
    for store in stores:
        for index in range(len(store)):
            yield store.example(index)[:2]


def parted(ids: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (prompt, what follows) of an example.

    >>> [x.tolist() for x in parted(np.array([1, 2, 3, 4]), np.array([0, 0, 1.0, 1.0]))]
    [[1, 2], [3, 4]]
    """
    targets = np.flatnonzero(mask)
    first = int(targets[0]) if len(targets) else 0
    if first <= 1:
        first = max(1, len(ids) // 3)
    return ids[:first], ids[first:]


def read(workdir: Path) -> list[dict[str, str]]:
    """Returns the items {"prompt", "wanted", "before", "after"} that a run noted."""
    path = workdir / FILE
    return read_json(path)["items"] if path.is_file() else []
