"""DPO on real pairs: writes docs/results_dpo.md.

    python -m benchmarks.results_dpo                    # all of it, some minutes on two cores
    python -m benchmarks.results_dpo --keep=DIR         # continues: what DIR holds is not run again
    python -m benchmarks.results_dpo --quick --out=FILE # a few steps of each, to see that it runs

`babyllama105` is tuned on the chosen sides of rasbt's pairs, then a LoRA learns from the pairs
themselves by DPO; a second time while `babyllama105`'s own samples are replayed. Needs the real
models and data in ../shared.

Then `python -m benchmarks.results --objectives`: docs/results.md quotes the page.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import gzip
import json
import os
import platform
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import tasks
from benchmarks.page import percent, table
from benchmarks.results import MODEL, SHARED, scored, stories_nll

ROOT = Path(__file__).resolve().parents[1]
SOURCE = "preference/rasbt_instruction_preference_1100.json.gz"
LENGTH = 240  # tokens of a prompt with one side
STORIES, QUICK_STORIES, QUICK_PAIRS, QUICK_STEPS = 100, 4, 24, 3
SFT_RATE, SFT_EPOCHS, SFT_ROWS = 1e-3, 2, 16
# A row holds a prompt twice; longer pairs are left out of training, not of what is measured.
DPO = {"beta": 0.1, "rate": 2e-3, "epochs": 0.5, "rows": 8, "rank": 8, "length": 320}
# Settings that were taken once, not searched for.
REPLAY = {"samples": 400, "strength": 0.2, "rows": 4}
RUNS = {  # name of a model: what the page calls it
    "base": "before",
    "sft": "SFT on chosen",
    "dpo": "then DPO",
    "replay": "then DPO with replay",
}
RESAMPLES = 10_000
Pair = tuple[str, str, str]


@dataclasses.dataclass(frozen=True)
class Measured:
    """A model on the held-out pairs.

    Attributes:
        chosen, rejected: log-probability of each side, nats, summed over tokens, EOS included.
        lengths: tokens of the two sides of each pair.
        stories: TinyStories NLL, nats a token.
        seconds: of the training that made the model.
    """

    chosen: list[float]
    rejected: list[float]
    lengths: list[tuple[int, int]]
    stories: float
    seconds: float = 0.0

    @property
    def by_sum(self) -> np.ndarray:
        """Whether the chosen side is the likelier one, bool [pairs]."""
        return np.array(self.chosen) > np.array(self.rejected)

    @property
    def by_token(self) -> np.ndarray:
        """The same of log-probabilities a token."""
        one, two = np.array(self.lengths).T
        return np.array(self.chosen) / one > np.array(self.rejected) / two

    def rewarded(self, reference: Measured) -> np.ndarray:
        """Whether the chosen side gained more on a reference than the rejected one."""
        gains = np.array(self.chosen) - reference.chosen
        return gains > np.array(self.rejected) - reference.rejected


def load_pairs(known: set[str]) -> tuple[list[Pair], Counter]:
    """Returns (prompt, chosen, rejected) in the model's characters, and what became of the rows."""
    rows = json.loads(gzip.decompress((SHARED / "data" / SOURCE).read_bytes()))
    counts, pairs = Counter(records=len(rows), dropped=0), []
    for row in rows:
        question, context, good, bad = (
            tasks.spell(row[name], known, counts)
            for name in ("instruction", "input", "chosen", "rejected")
        )
        prompt = f"Task: {question}" + (f" Input: {context}" if context else "") + " Answer:"
        longest = max(tasks.tokens(prompt, f" {side}") for side in (good, bad))
        if not good or not bad or good == bad or longest > LENGTH:
            counts["dropped"] += 1
        else:
            pairs.append((prompt, f" {good}", f" {bad}"))
    return pairs, counts


def write(path: Path, rows: list[dict[str, str]]) -> str:
    """Writes JSONL and returns its source."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"jsonl:{path}"


def measure(lm: Any, pairs: Sequence[Pair], texts: Sequence[str], seconds: float) -> Measured:
    """Returns a model's figures on pairs and stories."""
    rows, lengths = [], []
    for prompt, *sides in pairs:
        for side in sides:
            rows.append([*lm.tokenizer.encode(prompt + side), lm.tokenizer.eos_id])
            lengths.append(len(side) + 1)
    sums = np.zeros(len(rows))
    for found, values in scored(lm, rows):
        sums[found] = values[-lengths[found] :].sum()
    both = list(zip(lengths[::2], lengths[1::2], strict=True))
    return Measured(sums[::2].tolist(), sums[1::2].tolist(), both, stories_nll(lm, texts), seconds)


def common(rate: float, rows: int) -> dict[str, Any]:
    """Returns what both runs' configs share."""
    return {
        "seed": 0,
        "batch_size": rows,
        "optim": {"lr": rate, "schedule": "cosine", "warmup_ratio": 0.05, "end_lr_ratio": 0.1},
        "mesh": {"data": 1, "fsdp": 1},
        "log": {"tensorboard": False},
    }


def sft_config(source: str) -> dict[str, Any]:
    """Returns the config that tunes every weight on the chosen sides."""
    return common(SFT_RATE, SFT_ROWS) | {
        "model": {"path": str(SHARED / MODEL), "dtype": "float32"},
        "peft": {"method": "full"},
        "data": {
            "train": [{"source": source, "format": "completion"}],
            "seq_len": LENGTH,
            "packing": True,
        },
    }


def dpo_config(model: Path, source: str, held: str) -> dict[str, Any]:
    """Returns the config that tunes a LoRA on the pairs.

    The positions of each side stay below the model's 256, a row is longer.
    """
    return common(DPO["rate"], DPO["rows"]) | {
        "model": {
            "path": str(model),
            "dtype": "float32",
            "overrides": {"max_position_embeddings": DPO["length"]},
        },
        "peft": {"method": "lora", "rank": DPO["rank"], "alpha": 2.0 * DPO["rank"]},
        "objective": {"name": "dpo", "beta": DPO["beta"]},
        "data": {
            "train": [{"source": source, "format": "preference"}],
            "eval": [{"source": held, "format": "preference", "name": "held"}],
            "seq_len": DPO["length"],
            "overlong": "drop",
        },
    }


def replaying(source: str) -> dict[str, Any]:
    """Returns the part of a config that replays text."""
    return {
        "retention": {
            "replay_data": [{"source": source, "format": "tokens"}],
            "replay": REPLAY["strength"],
            "replay_batch_size": REPLAY["rows"],
        }
    }


def write_samples(path: Path, count: int) -> str:
    """Writes samples of the untuned model and returns their source."""
    from jaxtune.recipes.retention.replay import write_replay

    model = str(SHARED / MODEL)
    write_replay(model=model, out=str(path), num=count, max_new_tokens=LENGTH - 1, dtype="float32")
    return f"jsonl:{path}"


def interval(values: np.ndarray) -> tuple[float, float]:
    """Returns the central 95 % of the mean over resampled pairs."""
    rng = np.random.default_rng(0)
    means = values[rng.integers(0, len(values), (RESAMPLES, len(values)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def shown(hits: np.ndarray) -> str:
    """Returns a share with its interval."""
    low, high = interval(hits.astype(float))
    return f"{percent(hits.mean())} ({100 * low:.1f}–{100 * high:.1f})"


def difference(hits: np.ndarray, others: np.ndarray) -> str:
    """Returns the points by which one share is above another of the same pairs."""
    gain = hits.astype(float) - others
    low, high = interval(gain)
    return f"{100 * gain.mean():+.1f} points (95 %: {100 * low:+.1f} to {100 * high:+.1f})"


def page(
    found: dict[str, Measured], logged: dict[str, float], counts: Counter, command: str
) -> str:
    """Returns the Markdown page."""
    from jaxtune.recipes.train import versions

    base, sft, dpo, replay = (found[name] for name in RUNS)
    rows = [
        [
            RUNS[name],
            shown(one.by_sum),
            shown(one.by_token),
            f"{np.mean(one.chosen):.2f}",
            f"{np.mean(one.rejected):.2f}",
            f"{one.stories:.4f}",
            f"{one.seconds:.0f}" if one.seconds else "",
        ]
        for name, one in found.items()
    ]
    told = ", ".join(f"{name}: {count:,}" for name, count in counts.items())
    header = ["model", "likelier", "likelier a token", "log p chosen", "log p rejected"]
    facts = {"date": datetime.date.today().isoformat(), "command": command}
    facts |= {"machine": f"{platform.machine()}, {os.cpu_count()} CPU cores", **versions()}
    return (
        "# DPO on rasbt's pairs\n\n"
        f"`shared/{MODEL}`, `shared/data/{SOURCE}` (chosen sides are polite, rejected ones are "
        f"not). {told[0].upper()}{told[1:]}; {len(base.chosen)} pairs are held out. First SFT of "
        f"every weight on the chosen sides ({SFT_EPOCHS} epochs, rate {SFT_RATE:g}), then DPO of a "
        f"LoRA of rank {DPO['rank']} (β {DPO['beta']:g}, {DPO['epochs']} epochs, rate "
        f"{DPO['rate']:g}); the reference is the SFT model, the adapter off.\n\n"
        + table([*header, "TinyStories NLL", "seconds"], rows)
        + "\nShares are of held-out pairs whose chosen side has the larger log-probability, summed "
        "over its tokens or a token; in parentheses the central 95 % of the mean over "
        f"{RESAMPLES:,} resamplings of the pairs.\n\n"
        f"DPO over SFT: {difference(dpo.by_sum, sft.by_sum)} by sum and "
        f"{difference(dpo.by_token, sft.by_token)} a token, of the same pairs. "
        "Implicit reward (gain on the reference) larger for the chosen side: "
        f"{shown(dpo.rewarded(sft))}; the run itself logged, of held-out pairs that fit into "
        f"{DPO['length']} tokens, "
        f"`eval/accuracy` {logged['eval/accuracy']:.4f}, `eval/loss` {logged['eval/loss']:.4f} "
        f"(ln 2 = 0.6931 at its start).\n\n"
        f"The last run is the same DPO with `retention.replay={REPLAY['strength']:g}`: each step "
        f"also reads {REPLAY['rows']} of {REPLAY['samples']} texts that the untuned model wrote by "
        "itself (`jaxtune data replay`), of which it takes the next-token loss. Over DPO alone its "
        f"TinyStories NLL is {replay.stories - dpo.stories:+.4f}, and of the pairs "
        f"{difference(replay.by_sum, dpo.by_sum)} by sum and "
        f"{difference(replay.by_token, dpo.by_token)} a token.\n\n"
        + "".join(f"- {name}: {value}\n" for name, value in facts.items())
    )


def run(quick: bool, keep: Path, known: set[str]) -> tuple[dict[str, Measured], dict, Counter]:
    """Trains and measures; each result is written to `keep`, and what is there is not run again."""
    import jaxtune

    pairs, counts = load_pairs(known)
    train, held = tasks.split(pairs)
    held = held[:QUICK_PAIRS] if quick else held
    texts = tasks.stories(SHARED / "data", QUICK_STORIES if quick else STORIES)
    chosen = write(keep / "chosen.jsonl", [{"prompt": p, "completion": c} for p, c, _ in train])
    sources = [
        write(
            keep / f"{name}.jsonl", [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in rows]
        )
        for name, rows in (("pairs", train), ("held", held))
    ]
    configs = {
        "sft": sft_config(chosen) | duration(quick, SFT_EPOCHS),
        "dpo": dpo_config(keep / "sft", *sources) | duration(quick, DPO["epochs"]),
    }
    samples = write_samples(keep / "samples.jsonl", QUICK_PAIRS if quick else REPLAY["samples"])
    configs["replay"] = configs["dpo"] | replaying(samples)
    found, logged = {}, {}
    for name in RUNS:
        kept = keep / f"{name}.json"
        if not kept.exists():
            started, seconds, metrics = time.perf_counter(), 0.0, {}
            if name in configs:
                summary = jaxtune.train(configs[name], keep / name).summary
                seconds, metrics = time.perf_counter() - started, summary["metrics"]
            lm = jaxtune.load(keep / name if name in configs else SHARED / MODEL, dtype="float32")
            one = dataclasses.asdict(measure(lm, held, texts, seconds))
            kept.write_text(json.dumps({"measured": one, "logged": metrics}))
        content = json.loads(kept.read_text())
        found[name], logged[name] = Measured(**content["measured"]), content["logged"]
        print(name, shown(found[name].by_sum), shown(found[name].by_token), flush=True)
    return found, logged["dpo"], counts


def duration(quick: bool, epochs: float) -> dict[str, Any]:
    """Returns how long a run is."""
    return {"total_steps": QUICK_STEPS} if quick else {"total_epochs": epochs}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark and writes the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results_dpo.md")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args(argv)
    if not (SHARED / MODEL).is_dir():
        print(f"needs the real models and data in {SHARED}", file=sys.stderr)
        return 2
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    known = tasks.characters(SHARED / MODEL)
    command = "python -m benchmarks.results_dpo" + (" --quick" if options.quick else "")
    with tempfile.TemporaryDirectory() as scratch:
        keep = options.keep or Path(scratch)
        keep.mkdir(parents=True, exist_ok=True)
        found, logged, counts = run(options.quick, keep, known)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(page(found, logged, counts, command))
    print(f"{options.out}: written")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
