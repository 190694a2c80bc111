"""What each mitigation keeps of TinyStories, at several strengths, as docs/forgetting.md.

    python -m benchmarks.forgetting                  # all of it
    python -m benchmarks.forgetting --quick          # a few steps of each, to see that it runs
    python -m benchmarks.forgetting --keep=DIR       # continues: what DIR holds is not run again
    python -m benchmarks.forgetting --tasks=sms_spam --only=plain,kl

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

from benchmarks import tasks
from benchmarks.page import table
from benchmarks.results import MODEL, ROOT, SHARED, measure
from benchmarks.tasks import STORY_LENGTH, Task

KEPT, REPLAYED, GENERATED = 100, 400, 200  # stories measured, replayed, written by the base
STEPS = {"sms_spam": 90, "rasbt": 90}
ROWS, RANK, RATE = 16, 8, 5e-3
SEED = 0


@dataclasses.dataclass(frozen=True)
class Setting:
    """One run, or what is made of one afterwards.

    Attributes:
        group: the mitigation.
        strength: its strength, as the table shows it.
        config: sections that differ from the plain run's.
        replay: weight of replayed stories beside the task's examples, and where they come from.
        share: of what the plain run changed, for WiSE-FT; None: it is trained.
    """

    group: str
    strength: str
    config: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    replay: tuple[str, float] | None = None
    share: float | None = None

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.group}_{self.strength}".replace(" ", "_").replace("/", "-")


def settings() -> list[Setting]:
    """Returns every mitigation at its strengths; all of them train LoRA."""
    out = [Setting("plain", "")]
    out += [Setting("replay", f"{w:g}", replay=("corpus", w)) for w in (0.1, 0.3, 1.0)]
    out += [Setting("replay of the base's own", f"{w:g}", replay=("own", w)) for w in (0.3, 1.0)]
    out += [Setting("KL from the base", f"{x:g}", {"retention": {"kl": x}}) for x in (0.1, 0.5, 2)]
    hot = {"kl": 0.5, "kl_temperature": 2.0}
    out.append(Setting("learning without forgetting", "0.5, T = 2", {"retention": hot}))
    out += [Setting("L2-SP", f"{x:g}", {"retention": {"l2sp": x}}) for x in (0.001, 0.01, 0.1)]
    out += [Setting("EWC", f"{x:g}", {"retention": {"ewc": x}}) for x in (1e-5, 1e-4, 1e-3)]
    out += [Setting("layer decay", f"{x:g}", {"optim": {"layer_decay": x}}) for x in (0.7, 0.4)]
    out += [Setting("lower rate", f"{x:g}", {"optim": {"lr": x}}) for x in (2e-3, 5e-4)]
    out += [Setting("WiSE-FT", f"{x:g}", share=x) for x in (0.8, 0.6, 0.4, 0.2)]
    return out


def config_of(
    setting: Setting, task: Task, model: Path, files: Mapping[str, Path], steps: int
) -> dict[str, Any]:
    """Returns the config of a setting's run."""
    train = [{"source": f"jsonl:{files['train']}", "format": "completion"}]
    if setting.replay is not None:
        source, weight = setting.replay
        stories = {"source": f"jsonl:{files[source]}", "format": "text", "weight": weight}
        train.append(stories)
    config: dict[str, Any] = {
        "seed": SEED,
        "model": {"path": str(model), "dtype": "float32"},
        "peft": {"method": "lora", "rank": RANK, "alpha": 2.0 * RANK},
        "data": {"train": train, "seq_len": max(task.length, STORY_LENGTH), "packing": True},
        "batch_size": ROWS,
        "total_steps": steps,
        "optim": {
            "name": "adamw",
            "lr": RATE,
            "schedule": "cosine",
            "warmup_ratio": 0.05,
            "end_lr_ratio": 0.1,
        },
        "retention": {"data": [{"source": f"jsonl:{files['stories']}", "format": "text"}]},
        "eval": {"batch_size": 50},
        "mesh": {"data": 1, "fsdp": 1},
        "log": {"tensorboard": False},
    }
    for section, values in setting.config.items():
        config[section] = config[section] | dict(values)
    return config


def write_stories(path: Path, texts: Sequence[str], tokenizer: Any) -> Path:
    """Writes stories, each cut at STORY_LENGTH tokens, as JSONL of the text format."""
    rows = []
    for text in texts:
        cut = tokenizer.encode(text)[: STORY_LENGTH - 2]
        rows.append({"text": tokenizer.decode(cut, skip_special=True)})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def own_stories(lm: Any, count: int) -> list[str]:
    """Returns stories that the base writes by itself, from BOS at temperature 1."""
    start = lm.tokenizer.encode("")
    ids = lm.generate([start] * count, max_new_tokens=STORY_LENGTH - 4, temperature=1.0, seed=SEED)
    return [text for text in map(lm.decode, ids) if text.strip()]


def run_setting(
    setting: Setting,
    task: Task,
    model: Path,
    files: Mapping[str, Path],
    plain: Path,
    out: Path,
    texts: Sequence[str],
    quick: bool,
) -> dict[str, float]:
    """Returns the figures of a setting: loss, accuracy on the task, NLL on the stories."""
    import jaxtune
    from jaxtune.recipes.combine import Mix, mixed

    seconds = 0.0
    if setting.share is None:
        steps = 3 if quick else STEPS[task.name]
        workdir = plain if setting.group == "plain" else out
        summary = jaxtune.train(config_of(setting, task, model, files, steps), workdir).summary
        lm, seconds = jaxtune.load(workdir, dtype="float32"), summary["session_seconds"]
    else:
        lm = mixed(plain, jaxtune.load(plain, dtype="float32"), Mix(tuned_share=setting.share))
    found = dataclasses.asdict(measure(lm, task, files["held"], texts, 32 if quick else None))
    return found | {"seconds": seconds}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark and writes the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", default="sms_spam,rasbt")
    parser.add_argument("--only", help="groups, with commas")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "forgetting.md")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args(argv)
    if not (SHARED / MODEL).is_dir():
        print(f"needs the real models and data in {SHARED}", file=sys.stderr)
        return 2
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jaxtune

    model, known = SHARED / MODEL, tasks.characters(SHARED / MODEL)
    makers = {"sms_spam": tasks.sms_spam, "rasbt": tasks.rasbt}
    chosen = [makers[name](SHARED / "data", known) for name in options.tasks.split(",")]
    wanted = settings()
    if options.only is not None:
        groups = options.only.split(",")
        wanted = [s for s in wanted if s.group in groups or s.group == "plain"]
    keep = Path(tempfile.mkdtemp()) if options.keep is None else options.keep
    keep.mkdir(parents=True, exist_ok=True)
    base = jaxtune.load(model, dtype="float32")
    all_stories = tasks.stories(SHARED / "data", KEPT + REPLAYED)
    texts = all_stories[:KEPT] if not options.quick else all_stories[:4]
    shared = {
        "stories": write_stories(keep / "stories.jsonl", texts, base.tokenizer),
        "corpus": write_stories(keep / "corpus.jsonl", all_stories[KEPT:], base.tokenizer),
        "own": keep / "own.jsonl",
    }
    if not shared["own"].exists():
        count = 4 if options.quick else GENERATED
        write_stories(shared["own"], own_stories(base, count), base.tokenizer)
    results: dict[str, dict[str, Any]] = {}
    for task in chosen:
        place = keep / task.name
        place.mkdir(exist_ok=True)
        train, held = task.write(place, 64 if options.quick else None)
        files = shared | {"train": train, "held": held}
        before = dataclasses.asdict(measure(base, task, held, texts, 32 if options.quick else None))
        rows = []
        for setting in wanted:
            kept = place / f"{setting.name}.json"
            if not kept.exists():
                found = run_setting(
                    setting,
                    task,
                    model,
                    files,
                    place / "plain",
                    place / setting.name,
                    texts,
                    options.quick,
                )
                kept.write_text(json.dumps(found))
            rows.append((setting, json.loads(kept.read_text())))
            print(task.name, setting.name, rows[-1][1], flush=True)
            results[task.name] = {"task": task, "before": before, "rows": rows}
            options.out.write_text(page(results, facts(options)))
    print(f"{options.out}: written")
    return 0


def facts(options: argparse.Namespace) -> dict[str, str]:
    """Returns what the figures were made with."""
    from jaxtune.recipes.versions import versions

    command = ["python -m benchmarks.forgetting"]
    command += [f"--{n}={v}" for n, v in vars(options).items() if n in ("tasks", "only") and v]
    return {
        "date": datetime.date.today().isoformat(),
        "command": " ".join([*command, *(["--quick"] if options.quick else [])]),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores",
        "python": platform.python_version(),
        **versions(),
    }


def verdict(before: Mapping[str, float], plain: Mapping[str, float], now: Mapping[str, float]):
    """Returns (share of the plain run's gain that is kept, share of its rise that is left)."""
    gain = (before["loss"] - now["loss"]) / (before["loss"] - plain["loss"])
    rise = (now["stories"] - before["stories"]) / (plain["stories"] - before["stories"])
    return gain, rise


def page(results: Mapping[str, Mapping[str, Any]], facts: Mapping[str, str]) -> str:
    """Returns the page."""
    parts = [
        "# Forgetting, measured\n",
        "Written by `benchmarks/forgetting.py`; no figure is typed by hand. `babyllama105` knows"
        " children's stories and nothing else; LoRA (rank"
        f" {RANK}, rate {RATE:g}, {ROWS} packed rows a step) tunes it on another task. *Gain kept*"
        " is the fall of the held-out loss over the plain run's; *rise left* that of the NLL on"
        f" {KEPT} TinyStories over the plain run's. Replay takes {REPLAYED} other stories, or"
        f" {GENERATED} that the base wrote itself; its strength is their weight beside the task's"
        " examples. WiSE-FT is made from the plain run without training.\n",
        table(["", "this page was made with"], [[k, f"`{v}`"] for k, v in facts.items()]),
    ]
    for result in results.values():
        before, rows = result["before"], result["rows"]
        plain = rows[0][1]
        lines, good = [["before", "", *figures(before), "", "", ""]], []
        for setting, found in rows:
            gain, rise = verdict(before, plain, found)
            passes = gain >= 0.9 and rise <= 0.25
            good += [f"{setting.group} {setting.strength}"] if passes else []
            mark = f"**{100 * rise:.0f} %**" if passes else f"{100 * rise:.0f} %"
            seconds = f"{found['seconds']:.0f}" if found["seconds"] else ""
            line = [setting.group, setting.strength, *figures(found), f"{100 * gain:.0f} %"]
            lines.append([*line, mark, seconds])
        header = ["mitigation", "strength", "held-out loss", "accuracy", "TinyStories NLL"]
        parts += [
            f"## {result['task'].title}, {STEPS[result['task'].name]} steps\n",
            table([*header, "gain kept", "rise left", "seconds"], lines),
            "At least 90 % of the gain at most a quarter of the rise: "
            + (", ".join(good) if good else "none")
            + ".\n",
        ]
    return "\n".join(parts)


def figures(found: Mapping[str, float]) -> list[str]:
    """Returns loss, accuracy and NLL as text."""
    loss, accuracy, stories = (found[name] for name in ("loss", "accuracy", "stories"))
    return [f"{loss:.4f}", f"{100 * accuracy:.1f} %", f"{stories:.4f}"]


if __name__ == "__main__":
    raise SystemExit(main())
