"""Reward models on HH-RLHF (harmless): writes docs/results/reward.md.

    python -m benchmarks.results_reward                      # all of it
    python -m benchmarks.results_reward --quick --out=FILE   # a few steps, to see that it runs
    python -m benchmarks.results_reward --keep=DIR           # goes on with what DIR holds
    python -m benchmarks.results_reward --validate --rate=1e-3 --epochs=3
                                                             # on a quarter of a training part

Needs the real models and data in ../shared. The data contain offensive text by design.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gzip
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.page import percent, table
from jaxtune.data.preferences import common_text

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
MODEL = "models/stories260k"
DATA = "data/preference/hh_rlhf_harmless_base_test.jsonl.gz"
FOLDS, SEED = 5, 0
# Characters that are kept: of the end of the last question, and of the beginning of each answer.
QUESTION, ANSWER = 48, 128
SEQ, ROWS, RATE, EPOCHS, CENTERING = 208, 16, 1e-3, 2, 0.01
QUICK = 48


class Pair(NamedTuple):
    """A record: the last question, and both answers whole."""

    question: str
    chosen: str
    rejected: str


def read(path: Path) -> list[Pair]:
    """Returns the pairs in the order of the file, white space as single spaces."""
    pairs = []
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            record = json.loads(line)
            prompt = common_text([record["chosen"], record["rejected"]])
            last = prompt.rpartition("\n\nHuman:")[2].rpartition("\n\nAssistant:")[0]
            sides = (record[side][len(prompt) :] for side in ("chosen", "rejected"))
            pairs.append(Pair(*(" ".join(text.split()) for text in (last, *sides))))
    return pairs


def write(path: Path, pairs: Sequence[Pair]) -> str:
    """Writes the pairs that a model sees and returns their source.

    Left out are those of which no difference is left: an empty answer, or two that begin alike.
    """
    with path.open("w", encoding="utf-8") as file:
        for pair in pairs:
            if comparable(pair):
                chosen, rejected = pair.chosen[:ANSWER], pair.rejected[:ANSWER]
                prompt = f"{pair.question[-QUESTION:]}\n"
                record = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
    return f"jsonl:{path}"


def config_of(train: str, held_out: str, rate: float, epochs: int, **more: Any) -> dict[str, Any]:
    """Returns the config of a run; `more` replaces top-level keys."""
    entry = {"format": "preference"}
    return {
        "seed": SEED,
        "model": {"path": str(SHARED / MODEL), "dtype": "float32"},
        "objective": {"name": "reward", "centering": CENTERING},
        "data": {
            "train": [entry | {"source": train}],
            "eval": [entry | {"source": held_out, "name": "held"}],
            "seq_len": SEQ,
            "overlong": "truncate",
        },
        "batch_size": ROWS,
        "total_epochs": epochs,
        "optim": {"name": "adamw", "lr": rate, "schedule": "cosine", "warmup_ratio": 0.1},
        "eval": {"batch_size": 64},
        "mesh": {"data": 1, "fsdp": 1},
        "log": {"tensorboard": False},
    } | more


def folds(count: int) -> list[np.ndarray]:
    """Returns which pairs are held out in each fold, at random by the seed."""
    return np.array_split(np.random.default_rng(SEED).permutation(count), FOLDS)


def margins(workdir: Path, pairs: Sequence[Pair], directory: Path) -> np.ndarray:
    """Returns score of the chosen less that of the rejected, float64 [n]; 0 where all is alike.

    As `jaxtune.load(workdir).scores` gives them, of the very tokens that the run was measured on.
    """
    import jaxtune
    from jaxtune.recipes.eval_data import Entry, open_one

    lm = jaxtune.load(workdir, dtype="float32")
    found = np.zeros(len(pairs))
    kept = [i for i, pair in enumerate(pairs) if comparable(pair)]
    source = write(directory / "scored.jsonl", pairs)
    store = open_one(lm, Entry("pairs", source, "preference", "data", SEQ, "truncate"))
    if len(store) != len(kept):
        raise RuntimeError(f"{len(kept)} pairs became {len(store)}")
    texts = []
    for number in range(len(store)):
        ids, branches = store.example(number)[0], store.example_columns(number)["branches"]
        texts += [ids[(branches == 0) | (branches == side)].tolist() for side in (1, 2)]
    scores = lm.scores(texts, batch_size=64).astype(np.float64).reshape(-1, 2)
    found[kept] = scores[:, 0] - scores[:, 1]
    return found


def one_fold(
    number: int,
    train: Sequence[Pair],
    held: Sequence[Pair],
    options: argparse.Namespace,
    keep: Path,
) -> dict[str, Any]:
    """Trains without a fold and scores it; what `keep` holds is not done again."""
    import jaxtune

    path = keep / f"fold{number}.json"
    if path.is_file():
        return json.loads(path.read_text())
    directory = keep / f"fold{number}"
    directory.mkdir(exist_ok=True)
    sources = write(directory / "train.jsonl", train), write(directory / "held.jsonl", held)
    config = config_of(*sources, options.rate, options.epochs)
    if options.quick:
        config = {k: v for k, v in config.items() if k != "total_epochs"} | {"total_steps": 2}
    begun = time.perf_counter()
    summary = jaxtune.train(config, str(directory / "run")).summary
    seconds = time.perf_counter() - begun
    result = {
        "margins": margins(directory / "run", held, directory).tolist(),
        "metrics": {k: v for k, v in summary["metrics"].items() if isinstance(v, float)},
        "steps": summary["step"],
        "parameters": summary["parameters"],
        "seconds": seconds,
    }
    path.write_text(json.dumps(result))
    return result


def comparable(pair: Pair) -> bool:
    """Tells whether the model sees two answers that differ."""
    chosen, rejected = pair.chosen[:ANSWER], pair.rejected[:ANSWER]
    return bool(chosen and rejected and chosen != rejected)


def right(values: np.ndarray) -> np.ndarray:
    """Returns 1 where a margin is above 0, 0 below it and a half at it: the toss of a coin."""
    return (np.sign(values) + 1) / 2


def interval(values: np.ndarray) -> tuple[float, float]:
    """Returns (mean, half the width of its 95 % confidence interval)."""
    return float(values.mean()), float(1.96 * values.std(ddof=1) / np.sqrt(len(values)))


def calibration(values: np.ndarray) -> float:
    """Returns the expected calibration error of margins; see `objectives.reward`."""
    import jax.numpy as jnp

    from jaxtune.objectives.reward import calibration_error, calibration_gaps

    array = jnp.asarray(values, jnp.float32)[None]
    gaps = calibration_gaps(array, jnp.ones_like(array))
    return calibration_error({name: gap.mean() for name, gap in gaps.items()})


def page(pairs: Sequence[Pair], results: Sequence[dict[str, Any]], facts: dict[str, str]) -> str:
    """Returns the Markdown of the page."""
    held = folds(len(pairs))[: len(results)]
    order = np.concatenate(
        [fold[: len(r["margins"])] for fold, r in zip(held, results, strict=True)]
    )
    longer = np.array([len(pairs[i].chosen) - len(pairs[i].rejected) for i in order])
    found = np.concatenate([r["margins"] for r in results])
    ways = {
        "reward model": right(found),
        "always the longer": right(longer),
        "always the shorter": right(-longer),
    }
    rows = []
    for name, hits in ways.items():
        mean, half = interval(hits)
        ahead, width = interval(ways["reward model"] - hits)
        gain = "" if hits is ways["reward model"] else f"{100 * ahead:+.1f} ± {100 * width:.1f}"
        rows.append([name, f"{percent(mean)} ± {100 * half:.1f}", gain])
    rows.append(["a coin", "50.0 %", f"{100 * (ways['reward model'].mean() - 0.5):+.1f}"])
    by_fold = ", ".join(percent(float(right(np.array(r["margins"])).mean())) for r in results)
    alike = sum(not comparable(pair) for pair in pairs)
    return f"""# Reward models on real data

Written by `benchmarks/results_reward.py`; no figure is typed by hand. The model is
`shared/{MODEL}`, {results[0]["parameters"]["total"]:,} parameters with the score head, trained on
children's stories and nothing else. All parameters are trained.

{table(["", "this page was made with"], [[name, f"`{value}`"] for name, value in facts.items()])}
`shared/{DATA}`: {len(pairs):,} pairs of answers, of which people found one less harmful. A model
sees the last {QUESTION} characters of the last question and the first {ANSWER} of each answer;
of {alike} pairs no difference is left, and they count as half right. White space is made single
spaces. The pairs are divided into {FOLDS} parts by seed {SEED}; each part is judged by a model that
was trained on the others, so that every pair is held out once. Rate and epochs were chosen on a
quarter of the first training part (`--validate`), no figure by held-out pairs.

AdamW, rate {facts["rate"]}, cosine, warm-up over 10 % of the steps, {facts["epochs"]} epochs of
{ROWS} pairs a step, Bradley–Terry with centring {CENTERING}; {results[0]["steps"]} steps a part.

Share of the {len(order):,} held-out pairs of which the chosen answer is preferred, with 95 %
confidence intervals (normal, over pairs); *gain* is the reward model's share less that of the row,
pair by pair. The majority in training is the shorter answer.

{table(["preferred is", "right", "gain"], rows)}
By part: {by_fold}. Expected calibration error: {calibration(found):.3f}. Training took
{sum(r["seconds"] for r in results):.0f} s in all with compilation, on a machine that does other
work too.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark and writes the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "reward.md")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--validate", action="store_true")
    parser.add_argument("--rate", type=float, default=RATE)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    options = parser.parse_args(argv)
    if not (SHARED / MODEL).is_dir():
        print(f"needs the real models and data in {SHARED}", file=sys.stderr)
        return 2
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    pairs = read(SHARED / DATA)
    parts = folds(len(pairs))
    with contextlib.ExitStack() as stack:
        keep = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        keep.mkdir(parents=True, exist_ok=True)
        if options.validate:
            known = np.concatenate(parts[1:])
            cut = len(known) // 4
            chosen = [[pairs[i] for i in part] for part in (known[cut:], known[:cut])]
            result = one_fold(-1, *chosen, options, keep)
            mean, half = interval(right(np.array(result["margins"])))
            print(f"{percent(mean)} ± {100 * half:.1f}, {result['seconds']:.0f} s")
            return 0
        results = []
        for number, part in enumerate(parts[: 1 if options.quick else FOLDS]):
            rest = np.concatenate([other for other in parts if other is not part])
            chosen = [[pairs[i] for i in p] for p in (rest, part)]
            if options.quick:
                chosen = [some[:QUICK] for some in chosen]
            results.append(one_fold(number, *chosen, options, keep))
            print(f"part {number}: {percent(right(np.array(results[-1]['margins'])).mean())}")
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(page(pairs, results, facts(options)), encoding="utf-8")
    print(f"{options.out}: written")
    return 0


def facts(options: argparse.Namespace) -> dict[str, str]:
    """Returns what the figures were made with."""
    from jaxtune.recipes.train import versions

    quick = " --quick" if options.quick else ""
    return {
        "date": datetime.date.today().isoformat(),
        "command": f"python -m benchmarks.results_reward{quick}",
        "rate": f"{options.rate:g}",
        "epochs": str(options.epochs),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores",
        "python": platform.python_version(),
        **versions(),
    }


if __name__ == "__main__":
    raise SystemExit(main())
