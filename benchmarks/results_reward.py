"""Reward models on HH-RLHF (harmless): writes docs/results_reward.md.

    python -m benchmarks.results_reward                      # all of it
    python -m benchmarks.results_reward --quick --out=FILE   # a few steps, to see that it runs
    python -m benchmarks.results_reward --keep=DIR           # goes on with what DIR holds
    python -m benchmarks.results_reward --validate --rate=0.3 --epochs=2
                                                             # on the half that is not reported

Needs the real data in ../shared. The data contain offensive text by design.

Then `python -m benchmarks.results --objectives`: docs/results.md quotes the page.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.page import percent, table
from benchmarks.reward_pairs import (
    ANSWER,
    FOLDS,
    QUESTION,
    SEED,
    VALIDATED,
    Pair,
    comparable,
    divided,
    read,
    write,
)

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
TOKENIZER = "data/tokenizers/gpt2"
DATA = "data/preference/hh_rlhf_harmless_base_test.jsonl.gz"
# One layer: what a few thousand pairs can tell is in the words.
SHAPE = {
    "vocab_size": 50257,
    "num_layers": 1,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 2,
    "num_kv_heads": 2,
    "head_dim": 32,
}
SEQ, ROWS, RATE, EPOCHS, CENTERING = 192, 8, 0.1, 1, 0.01
QUICK = 48


def config_of(train: str, held_out: str, rate: float, epochs: int, **more: Any) -> dict[str, Any]:
    """Returns the config of a run; `more` replaces top-level keys."""
    entry = {"format": "preference"}
    return {
        "seed": SEED,
        "model": {
            "preset": "tiny-1m",
            "tokenizer": str(SHARED / TOKENIZER),
            "dtype": "float32",
            "overrides": SHAPE,
        },
        "objective": {"name": "reward", "centering": CENTERING},
        "data": {
            "train": [entry | {"source": train}],
            "eval": [entry | {"source": held_out, "name": "held"}],
            "seq_len": SEQ,
            "packing": True,
        },
        "batch_size": ROWS,
        "total_epochs": epochs,
        "optim": {"name": "sgd", "lr": rate, "schedule": "cosine", "warmup_ratio": 0.1},
        "eval": {"batch_size": 32},
        "mesh": {"data": 1, "fsdp": 1},
        "log": {"tensorboard": False},
    } | more


def margins(workdir: Path, pairs: Sequence[Pair], directory: Path) -> np.ndarray:
    """Returns score of the chosen less that of the rejected, float64 [n]; 0 where all is alike.

    As `jaxtune.load(workdir).scores` gives them, of the very tokens that the run was measured on.
    """
    import jaxtune
    from jaxtune.data.scored import scored_ids
    from jaxtune.recipes.evaluation.data import Entry, open_one

    lm = jaxtune.load(workdir, dtype="float32")
    found = np.zeros(len(pairs))
    kept = [i for i, pair in enumerate(pairs) if comparable(pair)]
    source = write(directory / "scored.jsonl", pairs)
    store = open_one(lm, Entry("pairs", source, "preference", "data", SEQ))
    if len(store) != len(kept):
        raise RuntimeError(f"{len(kept)} pairs became {len(store)}")
    texts = []
    for number in range(len(store)):
        ids, branches = store.example(number)[0], store.example_columns(number)["branches"]
        texts += [ids[(branches == 0) | (branches == side)].tolist() for side in (1, 2)]
    sides = (
        pairs[i].question[-QUESTION:] + "\n" + side[:ANSWER] for i in kept for side in pairs[i][1:]
    )
    if texts != scored_ids(list(sides), lm.tokenizer):
        raise RuntimeError("what is scored is not what was trained")
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
    found = margins(directory / "run", held, directory)
    seen = np.array([comparable(pair) for pair in held])
    accuracy = float((found[seen] > 0).mean())
    if abs(accuracy - summary["metrics"]["eval/accuracy"]) > 1.5 / len(held):
        raise RuntimeError(f"{accuracy} by `scores`, {summary['metrics']['eval/accuracy']} by eval")
    result = {
        "margins": found.tolist(),
        "metrics": {k: v for k, v in summary["metrics"].items() if isinstance(v, float)},
        "steps": summary["step"],
        "parameters": summary["parameters"],
        "seconds": seconds,
    }
    path.write_text(json.dumps(result))
    return result


def right(values: np.ndarray) -> np.ndarray:
    """Returns 1 where a margin is above 0, 0 below it and a half at it: the toss of a coin."""
    return (np.sign(values) + 1) / 2


def between(ours: np.ndarray, theirs: np.ndarray) -> str:
    """Returns the difference of two shares in percentage points, with its paired bootstrap."""
    from jaxtune.evaluate.bootstrap import mean_of, paired

    found = paired(mean_of(ours), mean_of(theirs))
    return "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * end for end in found))


def share(hits: np.ndarray) -> str:
    """Returns a share as a percentage, with the ends of its interval by the bootstrap."""
    from jaxtune.evaluate.bootstrap import interval, mean_of

    found = interval(mean_of(hits))
    return "{:.1f} % ({:.1f} to {:.1f})".format(*(100 * end for end in found))


def calibration(values: np.ndarray) -> float:
    """Returns the expected calibration error of margins; see `objectives.reward`."""
    import jax.numpy as jnp

    from jaxtune.objectives.reward import calibration_error, calibration_gaps

    array = jnp.asarray(values, jnp.float32)[None]
    gaps = calibration_gaps(array, jnp.ones_like(array))
    return calibration_error({name: gap.mean() for name, gap in gaps.items()})


def page(pairs: Sequence[Pair], results: Sequence[dict[str, Any]], facts: dict[str, str]) -> str:
    """Returns the Markdown of the page."""
    validated, reported = divided(len(pairs))
    held = reported[: len(results)]
    order = np.concatenate(
        [fold[: len(r["margins"])] for fold, r in zip(held, results, strict=True)]
    )
    longer = np.array([len(pairs[i].chosen) - len(pairs[i].rejected) for i in order])
    found = np.concatenate([r["margins"] for r in results])
    ours = right(found)
    ways = {
        "the shorter": right(-longer),
        "the longer": right(longer),
        "the first, in random order (majority)": np.full(len(ours), 0.5),
    }
    rows = [["what the reward model prefers", share(ours), ""]]
    rows += [[name, share(hits), between(ours, hits)] for name, hits in ways.items()]
    by_fold = ", ".join(percent(float(right(np.array(r["margins"])).mean())) for r in results)
    alike = sum(not comparable(pair) for pair in pairs)
    shape = f"{SHAPE['num_layers']} layer, {SHAPE['hidden_size']} wide"
    return f"""# Reward models on real data

Written by `benchmarks/results_reward.py`; no figure is typed by hand. The model is a Llama of
{shape}, from random weights, with GPT-2's tokenizer: {results[0]["parameters"]["total"]:,}
parameters with the score head, most of them embeddings. All are trained.

{table(["", "this page was made with"], [[name, f"`{value}`"] for name, value in facts.items()])}
`shared/{DATA}`: {len(pairs):,} pairs of answers, of which people found one less harmful. The model
sees the last {QUESTION} characters of the last question and the first {ANSWER} of each answer;
of {alike} pairs no difference is left, and they count as half right. White space is made single
spaces. Half of the pairs, at random by seed {SEED}, chose the settings (`--validate`, in
{VALIDATED} parts held out in turn): {sum(map(len, validated)):,} pairs, which are not reported. The
other half is reported in {FOLDS} parts; each is judged by a model that was trained on all other
pairs, so that every pair is held out once.

SGD with momentum 0.9, rate {facts["rate"]}, cosine, warm-up over 10 % of the steps, epochs:
{facts["epochs"]}, {ROWS} packed rows of {SEQ} tokens a step, Bradley–Terry with centring
{CENTERING}; {results[0]["steps"]} steps a part.

Share of the {len(order):,} held-out pairs of which the chosen answer is preferred, and by how much
the reward model is ahead, in percentage points; 95 % intervals by the paired bootstrap over pairs
(`jaxtune.evaluate.bootstrap`). Lengths are those of the whole answers.

{table(["preferred is always", "right", "reward model ahead by"], rows)}
By part: {by_fold}. Expected calibration error: {calibration(found):.3f}. The run's own evaluation
and `lm.scores` give the same accuracy, or there would be no page. Training took
{sum(r["seconds"] for r in results):.0f} s in all with compilation, on a machine that does other
work too.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark and writes the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results_reward.md")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--validate", action="store_true")
    parser.add_argument("--rate", type=float, default=RATE)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    options = parser.parse_args(argv)
    if not (SHARED / TOKENIZER).is_dir():
        print(f"needs the real data in {SHARED}", file=sys.stderr)
        return 2
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    pairs = read(SHARED / DATA)
    validated, reported = divided(len(pairs))
    with contextlib.ExitStack() as stack:
        keep = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        keep.mkdir(parents=True, exist_ok=True)
        parts = validated if options.validate else reported
        others = [] if options.validate else validated
        results = []
        for number, part in enumerate(parts[:1] if options.quick else parts):
            rest = np.concatenate([*others, *(other for other in parts if other is not part)])
            chosen = [[pairs[i] for i in p] for p in (rest, part)]
            if options.quick:
                chosen = [some[:QUICK] for some in chosen]
            results.append(one_fold(number, *chosen, options, keep))
            print(f"part {number}: {percent(right(np.array(results[-1]['margins'])).mean())}")
        if options.validate:
            print(share(right(np.concatenate([result["margins"] for result in results]))))
            return 0
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
