"""What each mitigation keeps of TinyStories, at several strengths, as docs/forgetting.md.

    python -m benchmarks.forgetting                  # all of it
    python -m benchmarks.forgetting --quick --out=FILE   # a few steps of each, to see that it runs
    python -m benchmarks.forgetting --keep=DIR       # continues: what DIR holds is not run again
    python -m benchmarks.forgetting --tasks=sms_spam --only=plain,replay

Needs the real models and data in ../shared.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import platform
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import tasks
from benchmarks.forgetting_page import Found, Sizes, write_page
from benchmarks.results import MODEL, ROOT, SHARED
from benchmarks.tasks import Task

# Small enough that all settings fit into an hour on one busy core.
LENGTH = 160  # the most tokens of an example or a story, BOS and EOS included
SIZES = Sizes(
    rows=6, length=LENGTH, train=800, held=102, stories=34, replayed=300, own=120, fisher=48
)
QUICK = dataclasses.replace(SIZES, train=32, held=8, stories=4, replayed=8, own=4, fisher=4)
STEPS = {"sms_spam": 24, "rasbt": 32}
BATCH = 34  # rows of a forward pass of the measurement
RANK, RATE, SEED = 8, 5e-3, 0


@dataclasses.dataclass(frozen=True)
class Setting:
    """One run, or what is made of one or two afterwards.

    Attributes:
        group: the mitigation.
        strength: its strength, as the table shows it.
        config: sections that differ from the plain run's.
        replay: where replayed stories come from, and their weight beside the task's examples.
        mix: fields of `recipes.combine.Mix`, for what is made of plain runs; None: it is trained.
        both: whether the second plain run is merged in.
    """

    group: str
    strength: str = ""
    config: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    replay: tuple[str, float] | None = None
    mix: Mapping[str, Any] | None = None
    both: bool = False

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.group}_{self.strength}".replace(" ", "_").replace("/", "-")


PLAIN, SECOND = Setting("plain"), Setting("plain", "another seed")


def settings() -> list[Setting]:
    """Returns every mitigation at its strengths; all of them train LoRA."""
    story, own = ("corpus", 0.1), "replay of the base's own"
    out = [PLAIN, SECOND]
    out += [Setting("replay", f"{w:g}", replay=("corpus", w)) for w in (0.03, 0.1, 0.3, 1)]
    out += [Setting(own, f"{w:g}", replay=("own", w)) for w in (0.03, 0.1, 0.3)]
    out += [Setting("KL", f"{x:g}", {"retention": {"kl": x}}) for x in (0.1, 0.5, 2)]
    for x in (0.1, 0.5, 2):
        hot = {"kl": x, "kl_temperature": 2.0}
        out.append(Setting("learning without forgetting", f"{x:g}", {"retention": hot}))
    both = "KL and replay 0.1"
    out += [Setting(both, f"{x:g}", {"retention": {"kl": x}}, story) for x in (0.1, 0.5, 2)]
    out += [Setting("L2-SP", f"{x:g}", {"retention": {"l2sp": x}}) for x in (0.01, 0.1, 1, 10)]
    out += [Setting("EWC", f"{x:g}", {"retention": {"ewc": x}}) for x in (0.01, 0.1, 0.3, 1)]
    for x in (0.8, 0.5, 0.2):
        out.append(Setting("layer decay", f"{x:g}", {"optim": {"layer_decay": x}}))
    out += [Setting("WiSE-FT", f"{x:g}", mix={"tuned_share": x}) for x in (0.8, 0.6, 0.4, 0.2)]
    for x in (1.0, 0.7, 0.4):
        out.append(Setting("soup of two", f"{x:g}", mix={"tuned_share": x}, both=True))
    for merge in ("ties", "dare"):
        for x in (0.8, 0.5, 0.2):
            mix = {"merge": merge, "density": x}
            out.append(Setting(f"{merge.upper()} of two", f"{x:g}", mix=mix, both=True))
    return out


def config_of(
    setting: Setting, model: Path, files: Mapping[str, Path], sizes: Sizes, steps: int
) -> dict[str, Any]:
    """Returns the config of a setting's run."""
    train = [{"source": f"jsonl:{files['train']}", "format": "completion"}]
    if setting.replay is not None:
        source, weight = setting.replay
        stories = {"source": f"jsonl:{files[source]}", "format": "text", "weight": weight}
        train.append(stories)
    config: dict[str, Any] = {
        "seed": SEED + (setting == SECOND),
        "model": {"path": str(model), "dtype": "float32"},
        "peft": {"method": "lora", "rank": RANK, "alpha": 2.0 * RANK},
        "data": {"train": train, "seq_len": LENGTH, "packing": True},
        "batch_size": sizes.rows,
        "total_steps": steps,
        "optim": {
            "name": "adamw",
            "lr": RATE,
            "schedule": "cosine",
            "warmup_ratio": 0.05,
            "end_lr_ratio": 0.1,
        },
        "mesh": {"data": 1, "fsdp": 1},
        "log": {"tensorboard": False},
    }
    for section, values in setting.config.items():
        config[section] = config.get(section, {}) | dict(values)
    if "ewc" in config.get("retention", {}):
        # Stories that are not measured: those are as new to the Fisher information as to replay.
        config["retention"] |= {"data": [{"source": f"jsonl:{files['fisher']}", "format": "text"}]}
    return config


def write_stories(path: Path, texts: Sequence[str], tokenizer: Any) -> Path:
    """Writes stories, each cut at LENGTH tokens, as JSONL of the text format."""
    rows = []
    for text in texts:
        cut = tokenizer.encode(text)[: LENGTH - 2]
        rows.append({"text": tokenizer.decode(cut, skip_special=True)})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def own_stories(lm: Any, count: int) -> list[str]:
    """Returns stories that the base writes by itself, from BOS at temperature 1."""
    start = lm.tokenizer.encode("")
    ids = lm.generate([start] * count, max_new_tokens=LENGTH - 4, temperature=1.0, seed=SEED)
    return [text for text in map(lm.decode, ids) if text.strip()]


def scored(lm: Any, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns of each text (token ids [T], log-probabilities [T-1, V] of what follows each)."""
    rows = [[*lm.tokenizer.encode(text), lm.tokenizer.eos_id][:LENGTH] for text in texts]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    found: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for start in range(0, len(rows), BATCH):
        chosen = order[start : start + BATCH]
        # A last batch is filled up with empty rows, and widths are few: each shape is compiled.
        width = -(-max(len(rows[i]) for i in chosen) // 80) * 80
        ids, mask = np.zeros((BATCH, width), np.int32), np.zeros((BATCH, width), np.int32)
        mask[:, 0] = 1
        for row, i in enumerate(chosen):
            ids[row, : len(rows[i])], mask[row, : len(rows[i])] = rows[i], 1
        logits = np.asarray(lm.logits(ids, mask), np.float64)
        values = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
        for row, i in enumerate(chosen):
            found[i] = ids[row, : len(rows[i])], values[row, : len(rows[i]) - 1]
    return [found[i] for i in range(len(rows))]


def measure(lm: Any, task: Task, texts: Sequence[str]) -> Found:
    """Returns a model's figures on the held-out examples of a task and on stories."""
    losses, hits = [], []
    letter = 1  # of a choice: what differs from the others, behind its space
    letters = [lm.tokenizer.encode(c)[-len(c) :][letter] for c in task.choices]
    held = scored(lm, [prompt + answer for prompt, answer in task.held])
    for (_, answer), (ids, values) in zip(task.held, held, strict=True):
        targets, predictions = ids[-len(answer) - 1 :], values[-len(answer) - 1 :]
        losses.append(-predictions[np.arange(len(targets)), targets])
        if letters:
            hits.append([letters[predictions[letter, letters].argmax()] == targets[letter]])
        else:
            hits.append(predictions.argmax(axis=-1) == targets)
    kept = [v[np.arange(len(ids) - 1), ids[1:]] for ids, v in scored(lm, texts)]
    return Found(
        loss=float(np.concatenate(losses).mean()),
        accuracy=float(np.concatenate(hits).mean()),
        stories=-float(np.concatenate(kept).mean()),
    )


def run_setting(
    setting: Setting, task: Task, config: Mapping[str, Any], place: Path, texts: Sequence[str]
) -> Found:
    """Trains or merges a setting and measures what came of it."""
    import jaxtune
    from jaxtune.recipes.combine import Mix, mixed

    plain, second = place / PLAIN.name, place / SECOND.name
    if setting.mix is None:
        summary = jaxtune.train(config, place / setting.name).summary
        if summary["stop_reason"] != "finished":  # by a signal; the next call continues it
            raise SystemExit(f"{place / setting.name}: {summary['stop_reason']}")
        lm, seconds = jaxtune.load(place / setting.name, dtype="float32"), summary["wall_seconds"]
    else:
        mix = Mix(others=(second,) if setting.both else (), seed=SEED, **setting.mix)
        lm, seconds = mixed(plain, jaxtune.load(plain, dtype="float32"), mix), 0.0
    return dataclasses.replace(measure(lm, task, texts), seconds=seconds)


def small(task: Task, sizes: Sizes) -> Task:
    """Returns a task with the first of its examples that fit into LENGTH tokens."""
    train, held = (
        [pair for pair in part if tasks.tokens(*pair) <= LENGTH] for part in (task.train, task.held)
    )
    return dataclasses.replace(task, train=train[: sizes.train], held=held[: sizes.held])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark and writes the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", default="sms_spam,rasbt")
    parser.add_argument("--only", help="groups, with commas; plain always runs")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "forgetting.md")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args(argv)
    if not (SHARED / MODEL).is_dir():
        print(f"needs the real models and data in {SHARED}", file=sys.stderr)
        return 2
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax

    import jaxtune

    keep = Path(tempfile.mkdtemp()) if options.keep is None else options.keep
    keep.mkdir(parents=True, exist_ok=True)
    # The settings share most of their programs, and each would compile them again.
    jax.config.update("jax_compilation_cache_dir", str(keep / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    model, known = SHARED / MODEL, tasks.characters(SHARED / MODEL)
    sizes = QUICK if options.quick else SIZES
    makers = {"sms_spam": tasks.sms_spam, "rasbt": tasks.rasbt}
    names = options.tasks.split(",")
    chosen = [small(makers[name](SHARED / "data", known), sizes) for name in names]
    groups = None if options.only is None else {"plain", *options.only.split(",")}
    wanted = [s for s in settings() if groups is None or s.group in groups]
    base = jaxtune.load(model, dtype="float32")
    found_stories = tasks.stories(SHARED / "data", sizes.stories + sizes.replayed)
    texts, others = found_stories[: sizes.stories], found_stories[sizes.stories :]
    shared = {
        "stories": write_stories(keep / "stories.jsonl", texts, base.tokenizer),
        "corpus": write_stories(keep / "corpus.jsonl", others, base.tokenizer),
        "fisher": write_stories(keep / "fisher.jsonl", others[: sizes.fisher], base.tokenizer),
        "own": keep / "own.jsonl",
    }
    if not shared["own"].exists() and any(s.replay and s.replay[0] == "own" for s in wanted):
        write_stories(shared["own"], own_stories(base, sizes.own), base.tokenizer)
    before = {task.name: measure(base, task, texts) for task in chosen}
    results: dict[str, list[tuple[str, str, Found]]] = {task.name: [] for task in chosen}
    steps = {task.name: 3 if options.quick else STEPS[task.name] for task in chosen}
    for setting in wanted:
        for task in chosen:
            place = keep / task.name
            place.mkdir(exist_ok=True)
            files = shared | dict(zip(("train", "held"), task.write(place), strict=True))
            kept = place / f"{setting.name}.json"
            if not kept.exists():
                config = config_of(setting, model, files, sizes, steps[task.name])
                found = run_setting(setting, task, config, place, texts)
                kept.write_text(json.dumps(dataclasses.asdict(found)))
            found = Found(**json.loads(kept.read_text()))
            results[task.name].append((setting.group, setting.strength, found))
            print(task.name, setting.name, found, flush=True)
    write_page(options.out, chosen, before, results, steps, sizes, facts(options))
    print(f"{options.out}: written")
    return 0


def facts(options: argparse.Namespace) -> dict[str, str]:
    """Returns what the figures were made with."""
    from jaxtune.recipes.versions import versions

    command = ["python -m benchmarks.forgetting", *(["--quick"] if options.quick else [])]
    command += [f"--only={options.only}"] if options.only else []
    command += [f"--tasks={options.tasks}"] if options.tasks != "sms_spam,rasbt" else []
    return {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(command),
        "machine": f"{platform.machine()}, one of {os.cpu_count()} CPU cores",
        "python": platform.python_version(),
        "method": f"LoRA, rank {RANK}, alpha {2 * RANK}, AdamW, rate {RATE:g}",
        "seed": f"{SEED}; {SEED + 1} for the second plain run",
        **versions(),
    }


if __name__ == "__main__":
    raise SystemExit(main())
