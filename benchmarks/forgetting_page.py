"""Measured forgetting as docs/forgetting.md, with a plot for each task."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.forgetting_plot import plot
from benchmarks.page import table
from benchmarks.tasks import Task

GAIN, RISE = 0.9, 0.25  # at least this share of the gain, at most this share of the rise
SLACK = 0.02  # of the accuracy


@dataclasses.dataclass(frozen=True)
class Found:
    """A model on a task.

    Attributes:
        loss: held-out, nats a target token.
        accuracy: share of held-out messages classified right; without choices, of target tokens
            that are the most likely one.
        stories: TinyStories NLL, nats a token.
        seconds: of the training loop.
    """

    loss: float
    accuracy: float
    stories: float
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is trained on and measured.

    Attributes:
        rows: packed rows of a step.
        length: tokens of a row, and the most of an example or a story.
        train: the most training examples.
        held: held-out examples.
        stories: stories that are measured.
        replayed: other stories, for replay.
        own: stories that the base writes, for replay.
        fisher: replayed stories that EWC's Fisher information is estimated on.
    """

    rows: int
    length: int
    train: int
    held: int
    stories: int
    replayed: int
    own: int
    fisher: int


@dataclasses.dataclass(frozen=True)
class Point:
    """What a setting keeps, against the plain run.

    Attributes:
        group, strength: the setting.
        found: what was measured.
        gain: share of the plain run's fall of the held-out loss.
        rise: share of the plain run's rise of the stories' NLL.
    """

    group: str
    strength: str
    found: Found
    gain: float
    rise: float

    @property
    def reaches(self) -> bool:
        """Whether nearly all of the gain is kept at little of the rise."""
        return self.gain >= GAIN and self.rise <= RISE


def points(before: Found, rows: Sequence[tuple[str, str, Found]]) -> list[Point]:
    """Returns each (group, strength, Found) against the first, the plain run."""
    plain = rows[0][2]
    gain, rise = before.loss - plain.loss, plain.stories - before.stories
    return [
        Point(
            group,
            strength,
            found,
            (before.loss - found.loss) / gain,
            (found.stories - before.stories) / rise,
        )
        for group, strength, found in rows
    ]


def by_group(found: Sequence[Point]) -> dict[str, list[Point]]:
    """Returns the mitigations' points, without the plain runs'."""
    groups: dict[str, list[Point]] = {}
    for point in found:
        if point.group != "plain":
            groups.setdefault(point.group, []).append(point)
    return groups


def verdict(group: Sequence[Point]) -> list[str]:
    """Returns a row: the mitigation, what it is good for, and at which strength that is."""
    keeping = [point for point in group if point.gain >= GAIN]
    if not keeping:
        best = max(group, key=lambda point: point.gain)
        return [best.group, "costs too much of the gain", *shares(best)]
    best = min(keeping, key=lambda point: point.rise)
    if best.reaches:
        return [best.group, "**reaches it**", *shares(best)]
    told = (
        "helps" if best.rise <= 1 - RISE else "hardly helps" if best.rise < 1 else "does not help"
    )
    return [best.group, told, *shares(best)]


def shares(point: Point) -> list[str]:
    """Returns strength, accuracy, gain kept and rise left as text."""
    values = (point.gain, point.rise)
    right = f"{100 * point.found.accuracy:.1f} %"
    return [point.strength, right, *(f"{100 * value:.0f} %" for value in values)]


def as_right(found: Sequence[Point]) -> list[str]:
    """Returns the settings that reach the bounds and hardly lose the plain run's accuracy."""
    least = found[0].found.accuracy - SLACK
    kept = [point for point in found if point.reaches and point.found.accuracy >= least]
    return [f"{point.group} {point.strength}" for point in kept]


def figures(found: Found) -> list[str]:
    """Returns loss, accuracy and NLL as text."""
    return [f"{found.loss:.4f}", f"{100 * found.accuracy:.1f} %", f"{found.stories:.4f}"]


def task_part(
    task: Task, before: Found, found: Sequence[Point], steps: int, picture: str
) -> list[str]:
    """Returns the section of a task; `picture` is the name of its plot."""
    lines = [["before", "", *figures(before), "", "", ""]]
    for point in found:
        strength, _, gain, rise = shares(point)
        rise = f"**{rise}**" if point.reaches else rise
        seconds = f"{point.found.seconds:.0f}" if point.found.seconds else ""
        lines.append([point.group, strength, *figures(point.found), gain, rise, seconds])
    right = "accuracy" if task.choices else "token accuracy"
    header = ["mitigation", "strength", "held-out loss", right, "TinyStories NLL"]
    groups = by_group(found)
    parts = [
        f"## {task.title}\n",
        f"{len(task.train):,} examples to train on, {len(task.held):,} held out, {steps} steps.\n",
    ]
    if groups:
        best = [verdict(group) for group in groups.values()]
        reached = [group for group, of in groups.items() if any(p.reaches for p in of)]
        parts += [
            f"At least {100 * GAIN:.0f} % of the gain at no more than {100 * RISE:.0f} % of the"
            f" rise: {', '.join(reached) or 'none'}. Of each mitigation, the strength with the"
            " smallest rise among those that keep that much, or else with the most gain:\n",
            table(["mitigation", "", "strength", right, "gain kept", "rise left"], best),
            f"![Gain kept over rise left, {task.title}]({picture})\n",
        ]
    if task.choices:
        common = max(sum(answer == c for _, answer in task.held) for c in task.choices)
        parts.append(
            "Most of the fall of the loss is to write a label at all. Whether it is the right one"
            " shows in the accuracy; always the most common one would be right for"
            f" {100 * common / len(task.held):.1f} %. These settings reach the bounds and"
            f" classify at most {100 * SLACK:.0f} points worse than the plain run:"
            f" {', '.join(as_right(found)) or 'none'}.\n"
        )
    return [*parts, table([*header, "gain kept", "rise left", "seconds"], lines)]


READING = (
    "What lies behind the figures:\n",
    "- The loss is a mean over target tokens. Every token of a story is a target, of an example"
    " only its completion is: at a small weight already, much of the gradient is the stories',"
    " most of all where completions are labels.\n"
    "- KL from the base acts at the same targets. At a task's, it asks for what the base would"
    " say there, which is to be unlearned, and it sees no story; with replay it sees some.\n"
    "- L2-SP holds all trained parameters alike. EWC holds those that matter to the stories; LoRA's"
    " B starts at zero, so the Fisher information of A is zero, and only B is held. Both act at"
    " every step, so that the task can be learned in what is left free.\n"
    "- Layer decay slows the lower layers: the task is learned in the upper ones.\n"
    "- WiSE-FT and the merges cost no training. They come afterwards: what the task needs shrinks"
    " with the rest.\n"
    "- O-LoRA is not among these: it keeps what an earlier LoRA run learned, not what the base"
    " knows. [Its curve](forgetting_sequence.md) is that of one task after another.\n",
)


def page(
    chosen: Sequence[Task],
    before: Mapping[str, Found],
    results: Mapping[str, Sequence[Point]],
    steps: Mapping[str, int],
    sizes: Sizes,
    facts: Mapping[str, str],
    pictures: Mapping[str, str],
) -> str:
    """Returns the page; `pictures` names the plot of each task."""
    total = sum(point.found.seconds for rows in results.values() for point in rows)
    parts = [
        "# Forgetting, measured\n",
        "Written by `benchmarks/forgetting.py`; no figure is typed by hand. `babyllama105` was"
        " trained on children's stories and nothing else. LoRA tunes it on another task, once as"
        " it is and once with each mitigation at several strengths. All runs of a task see the"
        " same number of steps.\n",
        table(["", "this page was made with"], [[k, f"`{v}`"] for k, v in facts.items()]),
        f"A step has {sizes.rows} packed rows of {sizes.length} tokens. Examples that are longer"
        f" are left out; stories are cut. {sizes.stories} TinyStories are measured; replay takes"
        f" {sizes.replayed} others, or {sizes.own} that the base wrote by itself; EWC's Fisher"
        f" information is of {sizes.fisher} of those others. The sizes are small, and there is one"
        " run a setting: a few percent more or less mean nothing. Strengths were chosen by these"
        " same figures, so that a curve shows both ends. All training loops together took"
        f" {total / 60:.0f} minutes on a busy core.\n",
        "- *Gain kept*: how far the held-out loss falls, over how far it falls in the plain run.\n"
        "- *Rise left*: how far the NLL of the stories rises, over how far it rises in the plain"
        " run. 0 % is nothing forgotten; below 0 % the model tells stories better than before.\n"
        "- *Strength*: the weight of the replayed stories beside the task's 1; `retention.kl`,"
        " `.l2sp`, `.ewc`; `optim.layer_decay`; `export --tuned_share` for WiSE-FT and the soup;"
        " the density of TIES and DARE. Learning without forgetting is KL at temperature 2. WiSE-FT"
        " is made of the plain run, and the merges of it and of the one with another seed, without"
        " training.\n"
        "- *Accuracy*: of messages, by the first letter of the label; of tokens, the most likely"
        " one. *Seconds*: of the training loop, for orientation only.\n",
        *READING,
    ]
    for task in chosen:
        rows = results[task.name]
        parts += task_part(task, before[task.name], rows, steps[task.name], pictures[task.name])
    return "\n".join(parts)


def write_page(
    path: Path,
    chosen: Sequence[Task],
    before: Mapping[str, Found],
    results: Mapping[str, Sequence[tuple[str, str, Found]]],
    steps: Mapping[str, int],
    sizes: Sizes,
    facts: Mapping[str, str],
) -> None:
    """Writes the page and, beside it, a plot for each task.

    Args:
        path: of the page.
        chosen: the tasks.
        before: {task: the base model}.
        results: {task: (group, strength, Found) of each setting, the plain run first}.
        steps: {task: steps of its runs}.
        sizes: how much was trained on and measured.
        facts: what the figures were made with.
    """
    found = {name: points(before[name], rows) for name, rows in results.items()}
    pictures = {task.name: f"{path.stem}_{task.name}.svg" for task in chosen}
    path.parent.mkdir(parents=True, exist_ok=True)
    for task in chosen:
        curves = {
            group: [(point.rise, point.gain) for point in of]
            for group, of in by_group(found[task.name]).items()
        }
        picture = plot(task.title, curves, (RISE, GAIN))
        path.with_name(pictures[task.name]).write_text(picture)
    path.write_text(page(chosen, before, found, steps, sizes, facts, pictures))
