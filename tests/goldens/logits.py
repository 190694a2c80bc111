"""Logits, log-probabilities and greedy tokens of the tiny models, from transformers and PEFT.

    python -m tests.goldens.logits --write     # rewrites logits.json
    python -m tests.goldens.logits             # compares with it

Before anything is stored, the libraries must agree with themselves: left with right padding, the
merged with the unmerged adapter, `generate` with step-by-step argmax.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.goldens import reference, tiny

FILE = Path(__file__).with_name("logits.json")
MERGEABLE = ("lora", "lora_qv", "rslora", "dora", "ia3")
SELF_AGREEMENT = 2e-5
# A greedy token counts as a golden only where rounding cannot change it.
MARGIN = 2e-4


def logprobs_of(logits: torch.Tensor, row: list[int]) -> np.ndarray:
    """[len - 1] log-probability of each next token of `row`, from its logits [len, V]."""
    logprobs = torch.log_softmax(logits, -1)[:-1]
    return logprobs.gather(-1, torch.tensor(row[1:])[:, None])[:, 0].numpy()


def right_padded_logits(net, rows: list[list[int]]) -> list[torch.Tensor]:
    """Logits [len, V] of each row, computed in one right-padded batch."""
    logits = reference.logits_of(net, *tiny.pad(rows, "right"))
    return [logits[i, : len(row)] for i, row in enumerate(rows)]


def greedy(net, prompt: list[int]) -> tuple[list[int], float]:
    """The argmax continuation without a cache, and the smallest lead of a first over a second."""
    ids, margin = list(prompt), float("inf")
    for _ in range(tiny.NEW_TOKENS):
        batch = np.array([ids], np.int32)
        best = reference.logits_of(net, batch, np.ones_like(batch))[0, -1].topk(2)
        margin = min(margin, float(best.values[0] - best.values[1]))
        ids.append(int(best.indices[0]))
    return ids[len(prompt) :], margin


def agree(what: str, a: list[torch.Tensor], b: list[torch.Tensor]) -> None:
    """Raises ValueError where two computations of the same logits differ."""
    error = max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))
    if error > SELF_AGREEMENT:
        raise ValueError(f"{what} differ by {error:.1e}: no reference")


@torch.no_grad()
def run(model: Path, adapter: Path | None = None) -> dict[str, Any]:
    """Logits at kept_positions, log-probabilities and greedy tokens of a checkpoint.

    `logits` [row][kept position][V], `logprobs` [row][len - 1], `greedy` [prompt][20],
    `greedy_margin` (logits, smallest), for tiny.probe() and tiny.prompts().
    """
    net, rows = reference.load_model(model, adapter).eval(), tiny.probe()
    logits = right_padded_logits(net, rows)
    agree(f"{adapter or model}: left and right", logits, reference.left_padded_logits(net, rows))
    decoded = [greedy(net, prompt) for prompt in tiny.prompts()]
    if adapter is None:
        for prompt, (ids, _) in zip(tiny.prompts(), decoded, strict=True):
            out = net.generate(
                torch.tensor([prompt]), max_new_tokens=tiny.NEW_TOKENS, do_sample=False
            )
            if out[0, len(prompt) :].tolist() != ids:
                raise ValueError(f"{model}: generate and argmax differ: no reference")
    elif adapter.name in MERGEABLE:
        merged = right_padded_logits(net.merge_and_unload(), rows)
        agree(f"{adapter}: merged and not", logits, merged)
    return {
        "logits": [
            [[float(f"{x:.7g}") for x in one[at]] for at in tiny.kept_positions(len(row))]
            for one, row in zip(logits, rows, strict=True)
        ],
        "logprobs": [
            [float(f"{x:.7g}") for x in logprobs_of(one, row)]
            for one, row in zip(logits, rows, strict=True)
        ],
        "greedy": [ids for ids, _ in decoded],
        "greedy_margin": min(margin for _, margin in decoded),
    }


def distance(a: dict[str, Any], b: dict[str, Any]) -> float:
    """The largest absolute difference of logits and log-probabilities; inf if tokens differ."""
    if a["greedy"] != b["greedy"]:
        return float("inf")
    logits = np.abs(np.array(a["logits"]) - np.array(b["logits"])).max()
    pairs = zip(a["logprobs"], b["logprobs"], strict=True)
    return float(max(logits, *(np.abs(np.subtract(x, y)).max() for x, y in pairs)))


def main() -> int:
    """Writes the goldens, or compares them with a new run; 1 if a case is off by over 1e-5."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"rewrite {FILE.name}")
    write = parser.parse_args().write
    reference.quiet()
    golden = {} if write else json.loads(FILE.read_text())["cases"]
    results, worst = {}, 0.0
    with tempfile.TemporaryDirectory() as scratch:
        for name, (model, adapter) in tiny.cases(Path(scratch)).items():
            result = run(model, adapter)
            if result["greedy_margin"] < MARGIN:
                raise ValueError(f"{name}: a close call; choose other prompts")
            results[name] = {"inputs": tiny.case_fingerprint(model, adapter)} | result
            change = 0.0 if write else distance(result, golden[name])
            worst = max(worst, change)
            print(f"{name:16} margin {result['greedy_margin']:.1e}  golden {change:.1e}")
    if write:
        # One case a line: a diff shows which moved.
        lines = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in results.items())
        head = json.dumps(reference.versions())
        FILE.write_text(f'{{"versions": {head},\n"cases": {{\n{lines}\n}}}}\n')
    return int(worst > 1e-5)


if __name__ == "__main__":
    raise SystemExit(main())
