"""lm-evaluation-harness with jaxtune's model beside lm_eval's own `hf` model: figures and time.

    python -m benchmarks.harness                # prints the table
    python -m benchmarks.harness --write        # and writes docs/harness.md
    python -m benchmarks.harness --limit=20 --tasks=local_copa,local_piqa

The two take turns, task by task, in one process and on the same cores. The batch size of `hf` is
the fastest of --hf_batch_sizes on the first documents of each task; jaxtune's is its own choice,
and its time includes loading and compiling.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import logging
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness_tasks import TASKS, write
from benchmarks.page import table

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("loglikelihood", "loglikelihood_rolling", "generate_until")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a model made of tasks.

    Attributes:
        metrics: {task: {metric: figure}}, lm_eval's.
        answers: of each request: (log-likelihood, greedy), a log-likelihood, or a text.
        seconds, cpu_seconds: of the whole evaluation, lm_eval's own part included.
        model_seconds: of the model's part.
    """

    metrics: dict[str, dict[str, float]]
    answers: list[Any]
    seconds: float
    cpu_seconds: float
    model_seconds: float


def run(model: Any, manager: Any, names: Sequence[str], limit: int | None) -> Outcome:
    """Returns the Outcome of tasks."""
    import lm_eval

    answers: list[Any] = []
    spent = 0.0

    def watched(ask: Callable) -> Callable:
        def answer(requests: Sequence[Any], *rest: Any, **settings: Any) -> list[Any]:
            nonlocal spent
            began = time.perf_counter()
            found = ask(requests, *rest, **settings)
            spent += time.perf_counter() - began
            answers.extend(found)
            return found

        return answer

    for kind in KINDS:
        setattr(model, kind, watched(getattr(type(model), kind).__get__(model)))
    began, cpu = time.perf_counter(), time.process_time()
    with contextlib.redirect_stdout(sys.stderr):
        results = lm_eval.simple_evaluate(
            model=model,
            tasks=list(names),
            task_manager=manager,
            limit=limit,
            log_samples=False,
            bootstrap_iters=0,
        )
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    metrics = {
        name: {
            key.removesuffix(",none"): float(value)
            for key, value in results["results"][name].items()
            if "," in key and not isinstance(value, str)
        }
        for name in names
    }
    return Outcome(metrics, answers, seconds, cpu, spent)


def hf_model(path: Path, batch_size: int) -> Any:
    """Returns lm_eval's `hf` model in float32 on the processor."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(str(path), device="cpu", dtype="float32", batch_size=batch_size)


def our_model(path: Path, batch_size: int | None = None) -> Any:
    """Returns jaxtune's model in float32."""
    from jaxtune.recipes.evaluation.harness_model import HarnessModel

    return HarnessModel(str(path), dtype="float32", batch_size=batch_size)


def distance(ours: Outcome, theirs: Outcome) -> float:
    """Returns the largest difference of log-likelihoods, or the share of texts that differ."""
    pairs = list(zip(ours.answers, theirs.answers, strict=True))
    texts = [a != b for a, b in pairs if isinstance(a, str)]
    scores = [(a[0], b[0]) if isinstance(a, tuple) else (a, b) for a, b in pairs]
    away = [abs(a - b) for a, b in scores if not isinstance(a, str)]
    return max([*away, sum(texts) / max(len(texts), 1)])


def check(ours: dict[str, dict[str, float]], theirs: dict[str, dict[str, float]]) -> None:
    """Raises AssertionError unless shares are equal, and other figures to 1e-3 of their size."""
    assert ours.keys() == theirs.keys()
    for name, metrics in ours.items():
        assert metrics.keys() == theirs[name].keys() and metrics
        for metric, value in metrics.items():
            share = "acc" in metric or "match" in metric
            same = abs(value - theirs[name][metric]) <= (0.0 if share else 1e-3 * abs(value))
            assert same, f"{name} {metric}: {value}, hf {theirs[name][metric]}"


def fastest(models: dict[int, Any], manager: Any, name: str, limit: int) -> Any:
    """Returns the model of the batch size that is fastest on the first documents of a task."""
    if len(models) == 1:
        return next(iter(models.values()))
    spent = {size: run(m, manager, [name], limit).model_seconds for size, m in models.items()}
    return models[min(spent, key=spent.__getitem__)]


def contest(options: argparse.Namespace, directory: Path) -> tuple[list[list[str]], dict[str, int]]:
    """Returns (a row for each task, {task: records left out}).

    Raises:
        AssertionError: an accuracy differs, or a log-likelihood by more than 1e-3.
    """
    import jax
    from lm_eval.tasks import TaskManager

    jax.config.update("jax_enable_compilation_cache", False)
    sizes = [int(size) for size in options.hf_batch_sizes.split(",")]
    began = time.perf_counter()
    theirs = {sizes[0]: hf_model(options.model, sizes[0])}
    middle = time.perf_counter()
    ours = our_model(options.model, options.batch_size)
    loading = (middle - began, time.perf_counter() - middle)
    # Of a choice that is longer than what the model reads, `hf` says only that an assertion failed.
    dropped = write(
        options.data, directory, lambda text: len(ours.tok_encode(text)) < ours.max_length
    )
    manager = TaskManager(include_path=str(directory), include_defaults=False)
    theirs |= {size: hf_model(options.model, size) for size in sizes[1:]}
    rows, total = [], [0.0] * 4
    for turn, name in enumerate(options.tasks.split(",")):
        hf = fastest(theirs, manager, name, options.trial)
        order = (ours, hf) if turn % 2 else (hf, ours)
        found = {id(model): run(model, manager, [name], options.limit) for model in order}
        one, other = found[id(ours)], found[id(hf)]
        check(one.metrics, other.metrics)
        away = distance(one, other)
        assert away <= 1e-3, f"{name}: answers differ by {away}"
        spent = (one.seconds, other.seconds, one.cpu_seconds, other.cpu_seconds)
        total = [a + b for a, b in zip(total, spent, strict=True)]
        figures = ", ".join(f"{key} {value:.6g}" for key, value in one.metrics[name].items())
        row = [name.removeprefix("local_"), f"{len(one.answers):,}", figures, f"{away:.1e}"]
        rows.append([*row, str(hf.batch_size), *times(*spent)])
        print(*rows[-1], sep="  ", flush=True)
    total[0], total[1] = total[0] + loading[1], total[1] + loading[0]
    rows.append(["all, with loading", "", "", "", "", *times(*total)])
    print("loading: hf {:.1f} s, jaxtune {:.1f} s".format(*loading))
    return rows, dropped


def times(ours: float, theirs: float, our_cpu: float, their_cpu: float) -> list[str]:
    """Returns the columns of times; a ratio above 1 says that jaxtune takes less."""
    return [
        *(f"{theirs:.1f}", f"{ours:.1f}", f"{theirs / ours:.2f}"),
        *(f"{their_cpu:.1f}", f"{our_cpu:.1f}", f"{their_cpu / our_cpu:.2f}"),
    ]


HEADER = (
    *("task", "requests", "figures, equal in both", "largest difference", "hf batch"),
    *("hf s", "jaxtune s", "ratio", "hf CPU s", "jaxtune CPU s", "CPU ratio"),
)


def page(
    body: str, argv: Sequence[str], options: argparse.Namespace, dropped: dict[str, int]
) -> str:
    """Returns docs/harness.md."""
    from importlib import metadata

    from jaxtune.recipes.versions import versions

    facts = {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python -m benchmarks.harness", *argv]),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores",
        "load when it ended": f"{os.getloadavg()[0]:.1f}",
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("lm_eval", "torch")},
        **versions(),
    }
    without = ", ".join(f"{name.removeprefix('local_')} {n}" for name, n in dropped.items() if n)
    limit = "all documents" if options.limit is None else f"the first {options.limit} documents"
    return "\n".join(
        [
            "# lm-evaluation-harness beside its `hf` model\n",
            "Written by `benchmarks/harness.py`; no figure is typed by hand.\n",
            table(["", "this page was made with"], [[k, f"`{v}`"] for k, v in facts.items()]),
            f"`shared/models/{options.model.name}` in float32 on {limit} of each task; the tasks"
            " are files that `benchmarks/harness_tasks.py` makes of `shared/data/eval`. Records"
            " with a choice longer than the model reads, at which `hf` stops, are left out"
            f" ({without or 'none'}). The run stops if an accuracy differs at all, or a"
            " log-likelihood of a request, or the share of texts that differ, by more than 1e-3."
            " Times are of whole evaluations, lm_eval's"
            " own part included, and for jaxtune with compilation; a ratio above 1 says that"
            f" jaxtune takes less. `hf` has the fastest batch size of {options.hf_batch_sizes} on"
            f" each task's first {options.trial} documents.\n",
            body,
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the contest and prints its table."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shared = ROOT.parent / "shared"
    parser.add_argument("--model", type=Path, default=shared / "models" / "stories260k")
    parser.add_argument("--data", type=Path, default=shared / "data" / "eval")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--limit", type=int)
    parser.add_argument("--batch_size", type=int)
    parser.add_argument("--hf_batch_sizes", default="8,16,64")
    parser.add_argument("--trial", type=int, default=64)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "harness.md")
    options = parser.parse_args(argv)
    for name, value in (
        ("JAX_PLATFORMS", "cpu"),
        ("HF_HUB_OFFLINE", "1"),
        ("HF_DATASETS_OFFLINE", "1"),
        ("DISABLE_MULTIPROC", "1"),
    ):
        os.environ.setdefault(name, value)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as scratch:
        os.environ.setdefault("HF_DATASETS_CACHE", str(Path(scratch) / "cache"))
        rows, dropped = contest(options, Path(scratch) / "tasks")
    body = table(HEADER, rows)
    print(body)
    if options.write:
        options.out.write_text(page(body, argv, options, dropped), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
