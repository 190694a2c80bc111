"""What O-LoRA keeps of an earlier task, at several strengths, as docs/forgetting_sequence.md.

    python -m benchmarks.forgetting_sequence
    python -m benchmarks.forgetting_sequence --quick --out=FILE  # a few steps of each
    python -m benchmarks.forgetting_sequence --keep=DIR  # what DIR holds is not run again

A LoRA learns one task and is merged in; another LoRA then learns the next task, as it is and pushed
out of the first one's subspace. Needs the real models and data in ../shared.
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
from benchmarks.forgetting import (
    QUICK,
    RANK,
    RATE,
    SEED,
    SIZES,
    STEPS,
    Setting,
    config_of,
    measure,
    small,
)
from benchmarks.forgetting_page import Found, Sizes, points
from benchmarks.page import table
from benchmarks.results import MODEL, ROOT, SHARED
from benchmarks.tasks import Task

STRENGTHS = (0.1, 1, 10, 100)
FIRST, PLAIN = Setting("first"), Setting("plain")


@dataclasses.dataclass(frozen=True)
class Kept:
    """A model on the task that it learns second and on the one that it learned first.

    Attributes:
        second, first: what was measured of each; their NLL of stories is of the same stories.
    """

    second: Found
    first: Found

    @property
    def as_found(self) -> Found:
        """The second task's figures, with the first task's loss where the stories' NLL stands."""
        return dataclasses.replace(self.second, stories=self.first.loss)


def trained(
    config: Mapping[str, Any], workdir: Path, order: Sequence[Task], texts: Sequence[str]
) -> Kept:
    """Trains a run, exports its adapter beside it and measures it on (first, second) task."""
    import jaxtune

    summary = jaxtune.train(config, workdir).summary
    if summary["stop_reason"] != "finished":  # by a signal; the next call continues it
        raise SystemExit(f"{workdir}: {summary['stop_reason']}")
    lm = jaxtune.load(workdir, dtype="float32")
    lm.save(workdir.with_name(f"{workdir.name}_adapter"), format="peft")
    first, second = (measure(lm, task, texts) for task in order)
    return Kept(dataclasses.replace(second, seconds=summary["wall_seconds"]), first)


def sequence(
    order: Sequence[Task], steps: Mapping[str, int], sizes: Sizes, texts: Sequence[str], keep: Path
) -> list[tuple[str, str, Kept]]:
    """Returns (run, strength, Kept) of the first task's run and of each that follows it."""
    first, second = order
    place = keep / f"{first.name}_then_{second.name}"
    place.mkdir(parents=True, exist_ok=True)
    adapter = str(place / f"{FIRST.name}_adapter")
    pushed = [
        Setting("O-LoRA", f"{x:g}", {"retention": {"olora": x, "olora_from": [adapter]}})
        for x in STRENGTHS
    ]
    out = []
    for setting in (FIRST, PLAIN, *pushed):
        kept = place / f"{setting.name}.json"
        task, model = (first, SHARED / MODEL) if setting is FIRST else (second, place / FIRST.name)
        if not kept.exists():
            files = dict(zip(("train", "held"), task.write(place), strict=True))
            config = config_of(setting, model, files, sizes, steps[task.name])
            found = trained(config, place / setting.name, order, texts)
            kept.write_text(json.dumps(dataclasses.asdict(found)))
        held = {name: Found(**values) for name, values in json.loads(kept.read_text()).items()}
        out.append((setting.group, setting.strength, Kept(**held)))
        print(place.name, setting.name, out[-1][2], flush=True)
    return out


def part(order: Sequence[Task], rows: Sequence[tuple[str, str, Kept]]) -> str:
    """Returns the section of an order of tasks."""
    first, second = order
    before, after = rows[0][2], rows[1:]
    shares = points(before.as_found, [(*names, kept.as_found) for *names, kept in after])
    lines = [[f"after {first.title}", "", *figures(before), "", ""]]
    for (group, strength, kept), point in zip(after, shares, strict=True):
        name = f"then {second.title}" if group == "plain" else group
        percents = (f"{100 * share:.0f} %" for share in (point.gain, point.rise))
        lines.append([name, strength, *figures(kept), *percents])
    header = ["", "`retention.olora`", f"loss, {second.title}", f"loss, {first.title}"]
    header += [f"right, {first.title}", "TinyStories NLL", "gain kept", "rise left"]
    return f"## {first.title}, then {second.title}\n\n{table(header, lines)}"


def figures(kept: Kept) -> list[str]:
    """Returns what is told of a model, as text."""
    right = f"{100 * kept.first.accuracy:.1f} %"
    return [
        f"{kept.second.loss:.4f}",
        f"{kept.first.loss:.4f}",
        right,
        f"{kept.second.stories:.4f}",
    ]


def page(parts: Sequence[str], sizes: Sizes, steps: Mapping[str, int], command: str) -> str:
    """Returns the page."""
    from jaxtune.recipes.versions import versions

    facts = {
        "date": datetime.date.today().isoformat(),
        "command": command,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores",
        "python": platform.python_version(),
        **versions(),
    }
    told = ", ".join(f"{count} of {name}" for name, count in steps.items())
    return "\n".join(
        [
            "# One task after another, measured\n",
            "Written by `benchmarks/forgetting_sequence.py`; no figure is typed by hand. A LoRA of"
            f" rank {RANK} teaches `babyllama105` one task; its run is the base of another LoRA,"
            " which learns the next task, once as it is and once at each strength of"
            " [O-LoRA](retention.md#one-task-after-another). Tasks, rows and examples are those of"
            f" [Forgetting, measured](forgetting.md): {sizes.rows} packed rows of {sizes.length}"
            f" tokens a step, AdamW, rate {RATE:g}, seed {SEED}; steps: {told}.\n",
            table(["", "this page was made with"], [[k, f"`{v}`"] for k, v in facts.items()]),
            "*Gain kept* is how far the second task's held-out loss falls, over how far it falls in"
            " the plain run; *rise left* the same of how far the first task's rises. One run a"
            " strength: a few percent more or less mean nothing.\n",
            *parts,
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark and writes the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "forgetting_sequence.md")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args(argv)
    if not (SHARED / MODEL).is_dir():
        print(f"needs the real models and data in {SHARED}", file=sys.stderr)
        return 2
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    known = tasks.characters(SHARED / MODEL)
    sizes = QUICK if options.quick else SIZES
    makers = (tasks.sms_spam, tasks.rasbt)
    both = [small(maker(SHARED / "data", known), sizes) for maker in makers]
    steps = {task.name: 3 if options.quick else STEPS[task.name] for task in both}
    texts = tasks.stories(SHARED / "data", sizes.stories)
    with tempfile.TemporaryDirectory() as scratch:
        keep = options.keep or Path(scratch)
        parts = [
            part(order, sequence(order, steps, sizes, texts, keep)) for order in (both, both[::-1])
        ]
    command = "python -m benchmarks.forgetting_sequence" + (" --quick" if options.quick else "")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(page(parts, sizes, steps, command))
    print(f"{options.out}: written")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
