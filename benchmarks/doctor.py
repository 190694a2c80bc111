"""How fast `jaxtune data doctor` is: seconds, rows a second, peak memory with its processes.

    python -m benchmarks.doctor                # 100,000 rows of 500 characters, two processes
    python -m benchmarks.doctor --model=DIR    # with a tokenizer and lengths in tokens
    python -m benchmarks.doctor --rows=20000 --profile

The words are of `../shared/data/texts/c4_demo.jsonl.gz`: 120 in a row, a quarter of them
replaced, so that rows differ and n-grams recur as in prose; one row in 50 nearly repeats another.
"""

from __future__ import annotations

import argparse
import cProfile
import gzip
import json
import os
import pstats
import random
import resource
import tempfile
import threading
import time
from pathlib import Path

from jaxtune.data.doctor.run import examine
from jaxtune.data.doctor.settings import Input, Settings

TEXTS = Path(__file__).resolve().parents[2] / "shared/data/texts/c4_demo.jsonl.gz"


def write_rows(path: Path, count: int, characters: int) -> None:
    """Writes rows of prompt and completion."""
    r = random.Random(0)
    with gzip.open(TEXTS, "rt", encoding="utf-8") as file:
        words = [word for line in file for word in json.loads(line)["text"].split()]
    texts: list[str] = []
    with path.open("w", encoding="utf-8") as file:
        for i in range(count):
            if i % 50 == 49:
                text = r.choice(texts).replace(" the ", " that ", 1)
            else:
                start = r.randrange(len(words) - 200)
                chosen = words[start : start + 120]
                for _ in range(30):
                    chosen[r.randrange(len(chosen))] = r.choice(words)
                text = " ".join(chosen)[:characters]
                texts.append(text)
            row = {"prompt": text[: characters // 3], "completion": text[characters // 3 :]}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


class PeakMemory:
    """Samples the resident memory of this process and its children, in bytes."""

    def __init__(self) -> None:
        self.peak, self._stop = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.25):
            self.peak = max(self.peak, sum(map(resident, family(os.getpid()))))


def family(pid: int) -> list[int]:
    """Returns a process and all that it began."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += [p for child in task.read_text().split() for p in family(int(child))]
        except OSError:  # it ended meanwhile
            continue
    return found


def resident(pid: int) -> int:
    """Returns the resident memory of a process in bytes, 0 if it has ended."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def cpu_seconds() -> float:
    """Returns the CPU time of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


PARTS = {
    ("examine.py", "_read"): "reading records",
    ("language.py", "language"): "languages",
    ("pii.py", "find"): "personal data",
    ("texts.py", "damage"): "damage to characters",
    ("answers.py", "phrases"): "refusals and stock phrases",
    ("rendering.py", "judge"): "rendering and tokens",
    ("examine.py", "_sign"): "near-duplicate signatures",
    ("contamination.py", "search"): "contamination",
    ("diagnose.py", "_find_repeats"): "comparing repeats",
}


def shares(stats: pstats.Stats) -> dict[str, float]:
    """Returns which share of the profiled time went into what is looked for."""
    total = stats.total_tt
    found = {}
    for (path, _, name), (_, _, _, cumulative, _) in stats.stats.items():
        part = PARTS.get((Path(path).name, name))
        if part and "doctor" in path:
            found[part] = round(cumulative / total, 3)
    return dict(sorted(found.items(), key=lambda entry: -entry[1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--characters", type=int, default=500)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--model", default=None)
    parser.add_argument(
        "--profile", action="store_true", help="where the time goes, in one process"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "rows.jsonl"
        write_rows(path, args.rows, args.characters)
        settings = Settings(
            (Input("train", f"jsonl:{path}", "completion", "train"),),
            tokenizer=args.model,
            seq_len=512 if args.model else None,
            workers=1 if args.profile else args.workers,
        )
        if args.profile:
            profiler = cProfile.Profile()
            profiler.runcall(examine, settings)
            stats = pstats.Stats(profiler)
            print(json.dumps(shares(stats)))
            stats.sort_stats("tottime").print_stats(20)
            return
        before = cpu_seconds()  # writing the rows is no part of it
        began = time.monotonic()
        with PeakMemory() as memory:
            report = examine(settings)
        seconds = time.monotonic() - began
    print(
        json.dumps(
            {
                "rows": args.rows,
                "workers": args.workers,
                "tokenizer": args.model,
                "seconds": round(seconds, 1),
                "cpu_seconds": round(cpu_seconds() - before, 1),
                "rows_per_second": round(args.rows / seconds),
                "peak_memory_bytes": memory.peak,
                "parts": report["seconds"],
                "findings": {e["kind"]: e["count"] for e in report["findings"]},
                "load": os.getloadavg(),
            }
        )
    )


if __name__ == "__main__":
    main()
