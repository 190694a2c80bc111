"""Every method on real data: writes docs/results.md, with what the pages on objectives hold.

    python -m benchmarks.results                    # all of it
    python -m benchmarks.results --quick --out=FILE # a few steps of each, to see that it runs
    python -m benchmarks.results --keep=DIR         # continues: what DIR holds is not run again
    python -m benchmarks.results --validate=1e-3,3e-3 --methods=lora --tasks=rasbt
                                                    # loss of learning rates on a part of training
    python -m benchmarks.results --objectives       # the part on the other pages alone, from them

Needs the real models and data in ../shared.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import tasks
from benchmarks.page import OBJECTIVES, objectives_part, results_page
from benchmarks.tasks import STORY_LENGTH, Task

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
MODEL = "models/babyllama105"
STORIES, QUICK_STORIES, QUICK_EXAMPLES, QUICK_STEPS = 100, 4, 32, 4
VIRTUAL = 16
ROWS = 16  # packed rows of a step, each with several examples
VALIDATION_STEPS = 20

METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"rank": 8, "alpha": 16.0},
    "adapter": {"bottleneck": 32},
    "prompt": {"num_tokens": VIRTUAL},
    "prefix": {"num_tokens": VIRTUAL},
    "ia3": {},
    "bitfit": {},
}
RATES = {
    "full": 1e-3,
    "lora": 5e-3,
    "adapter": 3e-3,
    "prompt": 0.03,
    "prefix": 0.2,
    "ia3": 0.1,
    "bitfit": 1e-3,
}
EPOCHS = {"sms_spam": 1, "rasbt": 2}


@dataclasses.dataclass(frozen=True)
class Measured:
    """A model on a task.

    Attributes:
        loss: held-out, nats a target token.
        accuracy: share of held-out examples that are classified right, or, where there is nothing
            to classify, of target tokens that are the most likely one.
        balanced: mean over the classes of the share classified right; or None.
        stories: TinyStories NLL, nats a token.
    """

    loss: float
    accuracy: float
    balanced: float | None
    stories: float


@dataclasses.dataclass(frozen=True)
class Run:
    """A method on a task: what was trained, for how long, and what came of it."""

    method: str
    share: float
    trainable: int
    rate: float
    steps: int
    train_loss: float
    seconds: float
    after: Measured


def config_of(
    method: str, rate: float, model: Path, length: int, data: tuple[Path, Path], **more: Any
) -> dict[str, Any]:
    """Returns the config of a run; `more` replaces top-level keys."""
    room = length + (VIRTUAL if method == "prompt" else 0)
    return {
        "seed": 0,
        "model": {"path": str(model), "dtype": "float32"},
        "peft": {"method": method, **METHODS[method]},
        "data": {
            "train": [{"source": f"jsonl:{data[0]}", "format": "completion"}],
            "eval": [{"source": f"jsonl:{data[1]}", "format": "completion"}],
            "seq_len": room,
            "packing": True,
        },
        "batch_size": ROWS,
        "optim": {
            "name": "adamw",
            "lr": rate,
            "schedule": "cosine",
            "warmup_ratio": 0.05,
            "end_lr_ratio": 0.1,
        },
        "eval": {"batch_size": 64},
        "mesh": {"data": 1, "fsdp": 1},
        "log": {"tensorboard": False},
    } | more


def scored(lm: Any, rows: Sequence[Sequence[int]], batch: int = 64) -> Iterable[tuple[int, Any]]:
    """Yields (index of a row, log-probabilities of its tokens from the second on)."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    batch = min(batch, len(rows))
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        # A last batch is filled up with copies: one shape to compile.
        filled = chosen + chosen[-1:] * (batch - len(chosen))
        width = -(-max(len(rows[i]) for i in chosen) // 80) * 80
        ids, mask = np.zeros((batch, width), np.int32), np.zeros((batch, width), np.int32)
        for row, i in enumerate(filled):
            ids[row, : len(rows[i])], mask[row, : len(rows[i])] = rows[i], 1
        values = np.asarray(lm.logprobs(ids, mask), np.float64)
        for row, i in enumerate(chosen):
            yield i, values[row, : len(rows[i]) - 1]


def stories_nll(lm: Any, texts: Sequence[str]) -> float:
    """Returns the mean NLL a token of stories, BOS first, cut at STORY_LENGTH tokens."""
    rows = [lm.tokenizer.encode(text)[:STORY_LENGTH] for text in texts]
    return -float(np.mean(np.concatenate([values for _, values in scored(lm, rows)])))


def measure(lm: Any, task: Task, held: Path, texts: Sequence[str], limit: int | None) -> Measured:
    """Returns a model's figures on the held-out part and on the stories."""
    from jaxtune.evaluate.labels import figures
    from jaxtune.recipes.evaluation import data as eval_data
    from jaxtune.recipes.evaluation import evaluate, labelled

    entry = eval_data.Entry("held", f"jsonl:{held}", "completion", "held")
    store = eval_data.open_one(lm, entry)
    store = store if limit is None else store.head(limit)
    found = evaluate.measure(lm, store, 32).means()
    if not task.choices:
        return Measured(found["loss"], found["accuracy"], None, stories_nll(lm, texts))
    questions = eval_data.questions_of(entry, lm.tokenizer, limit=limit)
    labels = labelled.labels_of([c.strip() for c in task.choices], questions, "held")
    table = labelled.label_scores(lm, questions, labels)
    told = {n: f.whole for n, f in figures(table, labelled.truth_of(questions, labels)).items()}
    balanced = told["balanced_accuracy"]
    return Measured(found["loss"], told["accuracy"], balanced, stories_nll(lm, texts))


def train_and_measure(
    method: str,
    task: Task,
    model: Path,
    files: tuple[Path, Path],
    texts: Sequence[str],
    scratch: Path,
    quick: bool,
) -> Run:
    """Trains a method on a task and measures what came of it."""
    import jaxtune

    rate = RATES[method]
    duration = {"total_steps": QUICK_STEPS} if quick else {"total_epochs": EPOCHS[task.name]}
    config, workdir = (
        config_of(method, rate, model, task.length, files, **duration),
        scratch / method / task.name,
    )
    # The held-out part is measured on the reloaded run instead, as a user's would be.
    config["data"]["eval"] = []
    del config["eval"]
    started = time.perf_counter()
    summary = jaxtune.train(config, workdir).summary
    seconds = time.perf_counter() - started
    lm = jaxtune.load(workdir, dtype="float32")
    counts = summary["parameters"]
    return Run(
        method,
        counts["trainable"] / counts["total"],
        counts["trainable"],
        rate,
        summary["step"],
        summary["metrics"]["loss"],
        seconds,
        measure(lm, task, files[1], texts, QUICK_EXAMPLES if quick else None),
    )


def validate(rates: list[float], methods: list[str], chosen: list[Task], model: Path) -> None:
    """Prints the loss of learning rates on the last tenth of the training part."""
    import jaxtune

    for task in chosen:
        cut = len(task.train) * 9 // 10
        inner = dataclasses.replace(task, train=task.train[:cut], held=task.train[cut:])
        for method in methods:
            for rate in rates:
                with tempfile.TemporaryDirectory() as scratch:
                    files = inner.write(Path(scratch))
                    more = {"total_steps": VALIDATION_STEPS}
                    config = config_of(method, rate, model, task.length, files, **more)
                    metrics = jaxtune.train(config, Path(scratch) / "run").summary["metrics"]
                loss, accuracy = metrics["eval/loss"], metrics["eval/accuracy"]
                print(f"{task.name} {method} {rate:g}: {loss:.4f} {accuracy:.4f}", flush=True)


def load_run(path: Path) -> Run:
    """Returns a Run that `run` has kept."""
    found = json.loads(path.read_text())
    return Run(**found | {"after": Measured(**found["after"])})


def run(
    methods: list[str],
    chosen: list[Task],
    model: Path,
    quick: bool,
    keep: Path | None,
    report: Callable[[dict[str, Any]], None],
) -> None:
    """Runs everything; `report` gets {task: (before, runs)} after each method.

    Each run is printed as it ends and written to `keep`; what is there already is not run again.
    """
    import jaxtune

    texts = tasks.stories(SHARED / "data", QUICK_STORIES if quick else STORIES)
    results = {}
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        keep = scratch / "keep" if keep is None else keep
        keep.mkdir(parents=True, exist_ok=True)
        limit = QUICK_EXAMPLES if quick else None
        files = {task.name: task.write(scratch, limit) for task in chosen}
        for task in chosen:
            kept = keep / f"{task.name}_before.json"
            if not kept.exists():
                base = jaxtune.load(model, dtype="float32")
                found = measure(base, task, files[task.name][1], texts, limit)
                kept.write_text(json.dumps(dataclasses.asdict(found)))
            before = Measured(**json.loads(kept.read_text()))
            results[task.name] = (before, [])
            print(f"{task.name} before: {before}", flush=True)
        for method in methods:  # a method's programs are compiled for the first task only
            for task in chosen:
                kept = keep / f"{task.name}_{method}.json"
                if not kept.exists():
                    done = train_and_measure(
                        method, task, model, files[task.name], texts, scratch, quick
                    )
                    kept.write_text(json.dumps(dataclasses.asdict(done)))
                results[task.name][1].append(load_run(kept))
                print(f"{task.name} {results[task.name][1][-1]}", flush=True)
            report(results)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark and writes the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--tasks", default="sms_spam,rasbt")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results.md")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--validate", help="learning rates, with commas")
    parser.add_argument("--objectives", action="store_true")
    options = parser.parse_args(argv)
    if options.objectives:
        kept, _, _ = options.out.read_text().partition(OBJECTIVES)
        options.out.write_text(kept + objectives_part(ROOT / "docs"))
        return 0
    if not (SHARED / MODEL).is_dir():
        print(f"needs the real models and data in {SHARED}", file=sys.stderr)
        return 2
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    model, known = SHARED / MODEL, tasks.characters(SHARED / MODEL)
    makers = {"sms_spam": tasks.sms_spam, "rasbt": tasks.rasbt}
    chosen = [makers[name](SHARED / "data", known) for name in options.tasks.split(",")]
    methods = options.methods.split(",")
    if options.validate:
        validate([float(r) for r in options.validate.split(",")], methods, chosen, model)
        return 0

    def write(results: dict[str, Any]) -> None:
        page = results_page(
            results,
            {task.name: task for task in chosen},
            facts(options),
            {name: settings(name) for name in methods},
            QUICK_STORIES if options.quick else STORIES,
        )
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(f"{page}\n{objectives_part(ROOT / 'docs')}")

    run(methods, chosen, model, options.quick, options.keep, write)
    print(f"{options.out}: written")
    return 0


def facts(options: argparse.Namespace) -> dict[str, str]:
    """Returns what the figures were made with."""
    from jaxtune.recipes.versions import versions

    command = ["python -m benchmarks.results", *(["--quick"] if options.quick else [])]
    if options.methods != ",".join(METHODS):
        command.append(f"--methods={options.methods}")
    if options.keep is not None:
        command.append(f"--keep={options.keep}")
    return {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(command),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores",
        "python": platform.python_version(),
        **versions(),
    }


def settings(method: str) -> str:
    """Returns a method's settings in words; what is not named is the config's default."""
    return ", ".join(f"{key} {value:g}" for key, value in METHODS[method].items()) or "defaults"


if __name__ == "__main__":
    raise SystemExit(main())
