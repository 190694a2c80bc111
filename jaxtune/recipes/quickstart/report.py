"""What the quickstart prints and leaves behind: tables, curves, a summary."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

Conversations = Sequence[Sequence[Mapping[str, str]]]
History = Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Result:
    """A model, measured.

    Attributes:
        losses: nats a target token, of `questions` and of `corpus`, both held out.
        answers: to the questions that were asked.
    """

    losses: dict[str, float]
    answers: list[str]

    def right(self, questions: Conversations) -> int:
        """Returns how many answers are right to the letter."""
        return sum(a == q[1]["content"] for a, q in zip(self.answers, questions, strict=True))


def show_texts(console: Console, paths: Mapping[str, Path]) -> None:
    """Prints one line of each file and how many it has."""
    table = Table(box=None)
    table.add_column("file", min_width=max(len(path.name) for path in paths.values()))
    table.add_column("lines", justify="right", min_width=5)
    table.add_column("the first one", no_wrap=True, overflow="ellipsis")
    for path in paths.values():
        lines = path.read_text(encoding="utf-8").splitlines()
        record = json.loads(lines[0])
        turns = [turn["content"] for turn in record.get("messages", [])]
        table.add_row(path.name, str(len(lines)), escape(record.get("text") or " → ".join(turns)))
    console.print(table)


def show_stop(console: Console, summary: Mapping[str, Any]) -> None:
    """Prints that the run was stopped."""
    console.print(
        f"Stopped on purpose at step {summary['step']} with SIGTERM, as a preempted machine would "
        f"be; the same call continues it."
    )


def show_failure(console: Console, workdir: Path, summary: Mapping[str, Any]) -> int:
    """Prints why a run stopped, and returns the exit code 1."""
    reason = summary["stop_reason"]
    console.print(f"[red]{workdir}: {reason}[/red], {escape(str(summary.get('detail', '')))}")
    if reason == "preempted":
        console.print("The same command continues.")
    return 1


def show_answers(
    console: Console, questions: Conversations, results: Mapping[str, Result], count: int
) -> None:
    """Prints answers to some questions, before and after."""
    table = Table(title="People and sums that no training question mentions", show_lines=True)
    table.add_column("question")
    for name in results:
        table.add_column(f"answer {name} tuning", ratio=1)
    table.add_column("right")
    for index in _varied(questions, count):
        wanted = questions[index][1]["content"]
        replies = [escape(_cropped(result.answers[index])) for result in results.values()]
        right = results["after"].answers[index] == wanted
        mark = "[green]yes[/green]" if right else f"[red]{escape(wanted)}[/red]"
        table.add_row(escape(questions[index][0]["content"]), *replies, mark)
    console.print(table)


def _varied(questions: Conversations, count: int) -> list[int]:
    """Returns indices of questions that begin with different words, in order."""
    seen: dict[str, int] = {}
    for index, turns in enumerate(questions):
        seen.setdefault(turns[0]["content"].split()[0], index)
    return list(seen.values())[:count]


def _cropped(text: str, longest: int = 90) -> str:
    return text if len(text) <= longest else f"{text[:longest]} …"


def show_losses(console: Console, questions: Conversations, results: Mapping[str, Result]) -> None:
    """Prints losses and right answers, before and after."""
    table = Table(title="Held-out measures")
    table.add_column("")
    for name in results:
        table.add_column(f"{name} tuning", justify="right")
    for measure, title in (
        ("questions", "loss on the questions"),
        ("corpus", "loss on the corpus"),
    ):
        table.add_row(title, *(f"{result.losses[measure]:.3f}" for result in results.values()))
    right = (f"{result.right(questions)} of {len(questions)}" for result in results.values())
    table.add_row("right answers", *right)
    console.print(table)


def show_end(console: Console, workdir: Path, seconds: float) -> None:
    """Prints what lies where and what to do next."""
    console.rule(f"Done in {seconds:.0f} s")
    run = _relative(workdir)
    for path, what in (
        ("curves.png", "the losses of both runs (numbers in curves.csv)"),
        ("quickstart.json", "the measures above"),
        ("pretrain/, tune/", "the runs: config.json, metrics.jsonl, summary.json, checkpoints/"),
        ("base/, tuned/", "Hugging Face directories, before and after (adapter merged)"),
        ("adapter/", "the LoRA adapter alone, as PEFT stores it"),
    ):
        console.print(f"  {run}/{path:<18} {what}", highlight=False, soft_wrap=True)
    console.print("\nNext:")
    for command in (
        f"jaxtune generate --model={run}/tuned --dtype=float32 --chat",
        f"jaxtune eval --model={run}/tuned --data=jsonl:{run}/texts/chat_held_out.jsonl "
        f"--format=chat",
        f"jaxtune data inspect --source=jsonl:{run}/texts/chat.jsonl --format=chat "
        f"--model={run}/base",
    ):
        console.print(f"  {command}", highlight=False, soft_wrap=True)


def _relative(path: Path) -> Path:
    """Returns the path from the current directory where it lies below, else the path itself."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) and path != here else path


def write(
    workdir: Path,
    pretraining: History,
    tuning: History,
    questions: Conversations,
    results: Mapping[str, Result],
    seconds: float,
) -> None:
    """Writes `quickstart.json`, `curves.csv` and `curves.png`."""
    summary = {
        name: {
            "losses": result.losses,
            "right": result.right(questions),
            "asked": len(questions),
            "answers": [
                {"question": turns[0]["content"], "wanted": turns[1]["content"], "answer": answer}
                for turns, answer in zip(questions, result.answers, strict=True)
            ],
        }
        for name, result in results.items()
    }
    text = json.dumps({**summary, "seconds": round(seconds, 1)}, indent=2)
    (workdir / "quickstart.json").write_text(text + "\n", encoding="utf-8")
    start = {f"eval/{name}/loss": loss for name, loss in results["before"].losses.items()}
    tuning = [{"step": 0, **start}, *tuning]
    _write_csv(workdir / "curves.csv", {"pretrain": pretraining, "tune": tuning})
    _plot(workdir / "curves.png", pretraining, tuning)


def _curves(history: History) -> dict[str, list[tuple[int, float]]]:
    """Returns {name: [(step, loss)]}: `loss` of the batches, `eval/NAME/loss` of held-out data."""
    several = any(key.startswith("eval/") and key.count("/") == 2 for row in history for key in row)
    # Pretraining has one held-out source, the corpus; with several, eval/loss would mix them.
    names = {} if several else {"eval/loss": "eval/corpus/loss"}
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in history:
        for key, value in row.items():
            name = names.get(key, key)
            if name == "loss" or re.fullmatch("eval/.+/loss", name):
                curves.setdefault(name, []).append((row["step"], value))
    return curves


def _write_csv(path: Path, runs: Mapping[str, History]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("run", "curve", "step", "loss"))
        for run, history in runs.items():
            for curve, points in _curves(history).items():
                writer.writerows((run, curve, *point) for point in points)


def _plot(path: Path, pretraining: History, tuning: History) -> None:
    # The object interface: pyplot would choose a back end and keep the figure alive.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2)
    for axes, title, history in zip(
        panels, ("pretraining", "LoRA tuning"), (pretraining, tuning), strict=True
    ):
        for name, points in _curves(history).items():
            label = "training batch" if name == "loss" else f"held-out {name.split('/')[-2]}"
            style = {"alpha": 0.5} if name == "loss" else {"marker": "o"}
            axes.plot(*zip(*points, strict=True), label=label, **style)
        axes.set(title=title, xlabel="step", ylabel="loss, nats a target token", ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)
