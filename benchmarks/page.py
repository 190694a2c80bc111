"""Measured results as the page docs/results.md."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.tasks import HELD_OUT, SEED, STORY_LENGTH, Task

if TYPE_CHECKING:
    from benchmarks.results import Measured, Run

# What the last part of the page begins with; the pages that it quotes, and a column of the table.
OBJECTIVES = "## Preferences and rewards\n"
QUOTED = {
    "results_dpo": "likelier",
    "results_reward": "right",
    "results_rl": "share of the possible gain",
}


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table, the first column to the left and the others to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def percent(value: float) -> str:
    """Returns a share as a percentage."""
    return f"{100 * value:.1f} %"


def task_table(task: Task, before: Measured, runs: Sequence[Run]) -> str:
    """Returns the table of a task: a row for the base model and one for each method."""
    right = ["accuracy", "balanced"] if task.choices else ["token accuracy"]
    header = ["method", "trained", "share", "rate", "steps", "loss", *right]

    def figures(found: Measured) -> list[str]:
        balanced = [] if found.balanced is None else [percent(found.balanced)]
        return [f"{found.loss:.4f}", percent(found.accuracy), *balanced, f"{found.stories:.4f}"]

    rows = [["before", "", "", "", "", *figures(before), "", ""]]
    for run in runs:
        rows.append(
            [
                run.method,
                f"{run.trainable:,}",
                f"{100 * run.share:.2f} %",
                f"{run.rate:g}",
                str(run.steps),
                *figures(run.after),
                f"{run.after.stories - before.stories:+.4f}",
                f"{run.seconds:.0f}",
            ]
        )
    return table([*header, "TinyStories NLL", "change", "seconds"], rows)


def task_text(task: Task) -> str:
    """Returns the paragraph above a task's table."""
    counts = ", ".join(f"{name}: {count:,}" for name, count in task.counts.items())
    text = (
        f"`shared/data/{task.source}`; {len(task.train):,} examples for training, "
        f"{len(task.held):,} held out. Prompt: `{task.prompt}`; at most {task.length} tokens."
        f" {counts[0].upper()}{counts[1:]}.\n"
    )
    if task.choices:
        share = sum(answer == task.choices[0] for _, answer in task.held) / len(task.held)
        text += (
            f"\nAn example counts as right if the right one of"
            f" {' and '.join(f'`{c}`' for c in task.choices)} is the more likely completion, its"
            " end included; *balanced* is the mean over the two classes. Always"
            f" `{task.choices[0]}` would be right for {percent(share)} of the held-out part.\n"
        )
    return text


def results_page(
    results: Mapping[str, tuple[Measured, Sequence[Run]]],
    chosen: Mapping[str, Task],
    facts: Mapping[str, str],
    settings: Mapping[str, Any],
    stories: int,
) -> str:
    """Returns the page.

    Args:
        results: {task: (the base model, the runs)}.
        chosen: {task: the Task}.
        facts: what the figures were made with.
        settings: {method: its settings}.
        stories: number of TinyStories.
    """
    parts = [
        "# Results on real data\n",
        "Written by `benchmarks/results.py`; no figure is typed by hand. The model is"
        " `shared/models/babyllama105`: 936,448 parameters, 105 characters, trained on children's"
        " stories and nothing else.\n",
        table(["", "this page was made with"], [[k, f"`{v}`"] for k, v in facts.items()]),
        f"Each task is split {percent(1 - HELD_OUT)} to {percent(HELD_OUT)} by seed {SEED}, the"
        " same for every method. *Loss* is nats a target token of the held-out part, end of"
        f" completion included. *TinyStories NLL* is nats a token on the first {stories} stories"
        f" of `tinystories_1000.json.gz`, BOS first, cut at {STORY_LENGTH} tokens: the model was"
        " trained on such stories, so a rise is forgetting. *Trained* counts parameters, *share* is"
        " of all, the method's own included. Everything is float32; AdamW with cosine decay to a"
        " tenth of *rate*, warm-up over 5 % of the steps, clip 1.0; packed rows. The rates were"
        " not searched for: customary ones, and for prompt, prefix, ia3 and bitfit what a short"
        " trial of two rates on a tenth of rasbt's training part suggested (`--validate`); none was"
        " chosen"
        " by held-out figures. *Seconds* are wall"
        " time of training with compilation, on a machine that does other work too: for"
        " orientation only.\n",
        table(["method", "settings"], [[k, f"`{v}`"] for k, v in settings.items()]),
    ]
    for name, (before, runs) in results.items():
        task = chosen[name]
        parts += [f"## {task.title}\n", task_text(task), task_table(task, before, runs)]
    return "\n".join(parts)


def objectives_part(docs: Path) -> str:
    """Returns the part on preferences and rewards: of each page its command and its table.

    Args:
        docs: directory of the pages.
    """
    parts = [OBJECTIVES, "Each has a page of its own, which is written by its command.\n"]
    for name, column in QUOTED.items():
        text = (docs / f"{name}.md").read_text(encoding="utf-8")
        title = text.partition("\n")[0].removeprefix("# ")
        tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
        (quoted,) = (
            found
            for found in tables
            if column in (cell.strip() for cell in found.partition("\n")[0].split("|"))
        )
        parts += [f"### {title}\n", f"`python -m benchmarks.{name}` → [{name}.md]({name}.md)\n"]
        parts.append(quoted)
    return "\n".join(parts)
