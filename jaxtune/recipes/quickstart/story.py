"""The quickstart: pretrain a small model, tune it with LoRA, stop and continue, look at it."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from jaxtune.core.errors import RequestError
from jaxtune.recipes.quickstart import report, texts
from jaxtune.recipes.quickstart.tokenizer import train_tokenizer

PRETRAIN_STEPS, TUNE_STEPS = 350, 120
ROW = 128  # tokens
SHOWN, ASKED = 6, 100  # held-out questions that are printed; that are marked right or wrong

Config = dict[str, Any]


def pretrain_config(paths: dict[str, Path], tokenizer: Path, steps: int = PRETRAIN_STEPS) -> Config:
    """Returns the config of the first run: a random `tiny-1m` learns the corpus."""
    return {
        "model": {
            "preset": "tiny-1m",
            "tokenizer": str(tokenizer),
            "dtype": "float32",
            # So narrow a model learns facts about twice as fast from larger initial weights.
            "overrides": {"initializer_range": 0.06},
        },
        "peft": {"method": "full"},
        "objective": {"name": "pretrain"},
        "data": {
            "train": [{"source": f"jsonl:{paths['corpus']}", "format": "text"}],
            "eval": [_corpus_loss(paths)],
            "seq_len": ROW,
            "packing": True,
        },
        "batch_size": 8,
        "total_steps": steps,
        "optim": {
            "lr": 2e-3,
            "b2": 0.95,
            "schedule": "cosine",
            "warmup_ratio": 0.1,
            "end_lr_ratio": 0.1,
        },
        "eval": {"every_steps": max(1, steps // 5)},
        "log": {"every_steps": 5, "tensorboard": False},
    }


def tune_config(paths: dict[str, Path], base: Path, steps: int = TUNE_STEPS) -> Config:
    """Returns the config of the second run: LoRA on the conversations, watching the corpus."""
    return {
        "model": {"path": str(base), "dtype": "float32"},
        "peft": {"method": "lora", "rank": 8, "alpha": 16.0},
        "objective": {"name": "sft"},
        "data": {
            "train": [{"source": f"jsonl:{paths['chat']}", "format": "chat"}],
            "eval": [
                {
                    "source": f"jsonl:{paths['chat_held_out']}",
                    "format": "chat",
                    "name": "questions",
                },
                _corpus_loss(paths),
            ],
            "seq_len": ROW,
            "packing": True,
        },
        "batch_size": 8,
        "total_steps": steps,
        "optim": {"lr": 2e-3, "b2": 0.95, "schedule": "cosine", "warmup_ratio": 0.1},
        "eval": {"every_steps": max(1, steps // 5)},
        "log": {"every_steps": 5, "tensorboard": False},
    }


def _corpus_loss(paths: dict[str, Path]) -> Config:
    return {"source": f"jsonl:{paths['corpus_held_out']}", "format": "text", "name": "corpus"}


def main(
    workdir: str | Path,
    *,
    pretrain_steps: int = PRETRAIN_STEPS,
    tune_steps: int = TUNE_STEPS,
    console: Console | None = None,
) -> int:
    """Runs the whole story in a directory; run again, it continues where it was.

    Args:
        workdir: gets `texts/`, `tokenizer/`, `pretrain/` and `tune/` (the two runs), `base/` and
            `tuned/` (Hugging Face directories), `adapter/` (PEFT), `curves.png`, `curves.csv` and
            `quickstart.json`.
        pretrain_steps, tune_steps: lengths of the runs.
        console: where it prints.

    Returns:
        0, or 1 when a run failed.

    Raises:
        RequestError: the directory is another run's, or a model's.
    """
    if (Path(workdir) / "config.json").exists():
        raise RequestError(
            "holds another run or a model: there is a config.json; name another directory",
            key="--workdir",
            where=workdir,
        )
    # Here, so that `jaxtune quickstart --help` is quick.
    from jaxtune.recipes.evaluation.evaluate import evaluate
    from jaxtune.recipes.load import load
    from jaxtune.recipes.train import train

    console, workdir, started = console or Console(), Path(workdir).absolute(), time.perf_counter()
    runs = {"pretrain": workdir / "pretrain", "tune": workdir / "tune"}

    _keep_compiled(workdir / ".compiled")
    console.rule("1  A small world, and a tokenizer for it")
    paths = texts.write(workdir / "texts")
    tokenizer = train_tokenizer(_fields(paths["corpus"], "text"), workdir / "tokenizer")
    report.show_texts(console, paths)

    console.rule("2  Pretrain a model from scratch")
    config = pretrain_config(paths, tokenizer, pretrain_steps)
    first = train(config, runs["pretrain"], console=console)
    if first.summary["stop_reason"] != "finished":
        return report.show_failure(console, runs["pretrain"], first.summary)
    base = workdir / "base"
    load(runs["pretrain"], dtype="float32").save(base)

    console.rule("3  Tune it with LoRA to answer questions, stop it half-way, continue")
    config = tune_config(paths, base, tune_steps)
    with stopped_after(runs["tune"] / "metrics.jsonl", tune_steps // 2):
        second = train(config, runs["tune"], console=console)
    if second.summary["stop_reason"] == "preempted":
        report.show_stop(console, second.summary)
        second = train(config, runs["tune"], console=console)
    if second.summary["stop_reason"] != "finished":
        return report.show_failure(console, runs["tune"], second.summary)

    console.rule("4  Before and after")
    questions = [record["messages"] for record in _records(paths["chat_held_out"])]
    tuned = load(runs["tune"], dtype="float32")
    tuned.save(workdir / "tuned", format="hf")
    tuned.save(workdir / "adapter", format="peft")
    results: dict[str, report.Result] = {}
    for name, source in (("before", base), ("after", workdir / "tuned")):
        measured = evaluate(config=config, model=source)["sources"]
        losses = {measure: result["loss"] for measure, result in measured.items()}
        replies = answers(load(source, dtype="float32"), questions[:ASKED])
        results[name] = report.Result(losses, replies)
    seconds = time.perf_counter() - started
    report.show_answers(console, questions[:ASKED], results, SHOWN)
    report.show_losses(console, questions[:ASKED], results)
    report.write(workdir, first.history, second.history, questions[:ASKED], results, seconds)
    report.show_end(console, workdir, seconds)
    return 0


def _keep_compiled(directory: Path) -> None:
    """Has JAX keep compiled programs, so that a continued run need not compile its step again."""
    import jax

    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(directory))


def answers(lm: Any, conversations: list[list[dict[str, str]]]) -> list[str]:
    """Returns the model's greedy answer to the first turn of each conversation."""
    from jaxtune.data.chat import render_prompt

    prompts = [render_prompt(turns[:1], lm.tokenizer) for turns in conversations]
    replies = lm.generate(prompts, max_new_tokens=64)
    return [lm.decode(reply).strip() for reply in replies]


@contextmanager
def stopped_after(metrics: Path, step: int) -> Iterator[None]:
    """Sends this process SIGTERM once the run that writes `metrics` has logged `step`.

    A run takes SIGTERM as a preemption notice: it saves and returns. Should the signal come when
    the run is over, nothing happens: around the run this process ignores it. A run that was
    already past the step is left alone.
    """
    if threading.current_thread() is not threading.main_thread() or _last_step(metrics) >= step:
        yield
        return
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            if _last_step(metrics) >= step:
                os.kill(os.getpid(), signal.SIGTERM)
                return

    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
        signal.signal(signal.SIGTERM, before)


def _last_step(metrics: Path) -> int:
    """Returns the last step of a metrics file, 0 where there is none yet."""
    if not metrics.exists():
        return 0
    lines = [line for line in metrics.read_text().splitlines() if line.endswith("}")]
    return json.loads(lines[-1])["step"] if lines else 0


def _records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _fields(path: Path, field: str) -> list[str]:
    return [record[field] for record in _records(path)]
