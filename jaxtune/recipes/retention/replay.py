"""`jaxtune data replay`: what a model writes by itself, to be mixed in or to be retained.

A base that is tuned on something new has seen data that its users do not have. Its own samples
stand for them (pseudo-rehearsal: Robins 1995, Connection Science 7(2)).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from jaxtune.checkpoints.hub import local_directory
from jaxtune.core.errors import RequestError
from jaxtune.data.doctor.progress import advancing
from jaxtune.data.order import Order
from jaxtune.generate import sampler
from jaxtune.recipes.base import from_hf, is_run
from jaxtune.recipes.language_model import LanguageModel
from jaxtune.recipes.load import load
from jaxtune.recipes.retention import replay_file
from jaxtune.recipes.retention.replay_starts import check_room, starts_of
from jaxtune.recipes.runs import base_of_run

# Slots are filled anew while samples wait; so many times in a block, on average.
ROUNDS = 4


def write_replay(
    *,
    model: str,
    out: str,
    num: int | None = None,
    source: str | None = None,
    format: str | None = None,
    first_tokens: int | None = None,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    batch_size: int = 64,
    dtype: str = "bfloat16",
    quantize: str | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Writes samples of a model as JSON lines of format "tokens", and `OUT.meta.json` beside them.

    A line holds `input_ids` as they were drawn, `loss_mask` with 1 at what the model wrote (the
    token that ended it included), and `text`. A sample follows from the seed, its number and what
    it begins with; a command that was stopped goes on where it was.

    Args:
        model: Hugging Face directory, `hub:ORG/NAME`, or a run's workdir.
        out: the file, which ends in .jsonl.
        num: samples; by default one of each start.
        source, format: what the samples begin with: the prompts of format "prompt", or of other
            formats what stands before the first target; by default all begin with BOS.
        first_tokens: of formats "text" and "tokens", how many tokens to begin with where all are
            targets, BOS not counted; 8 by default.
        max_new_tokens: the most tokens of a sample behind its start.
        temperature, top_p, top_k: see `generate.sampling.sample`.
        seed: of the draws, and of the order in which starts are taken.
        batch_size: samples written side by side.
        dtype, quantize: of the model.
        console: shows how far it is; None shows nothing.

    Returns:
        What `OUT.meta.json` holds.

    Raises:
        RequestError: model, source or file cannot be read or written, nothing says what to begin
            with, or a start leaves too few positions.
    """
    path = Path(out)
    check_out(path)
    where = local_directory(model, "--model")
    base = base_of_run(where) if is_run(where) else from_hf(where)
    lm = load(where, dtype=dtype, quantize=quantize)
    if not lm.config.lm_head:
        raise RequestError("is a reward model: it writes no text", key="--model", where=where)
    starts = starts_of(lm, source, format, first_tokens)
    num = len(starts.ids) if num is None and source is not None else num
    if num is None:
        raise RequestError("is missing: how many samples to write", key="--num")
    if temperature == 0 and num > len(starts.ids):
        raise RequestError(
            f"0 writes one sample of each start, but {num} of {len(starts.ids)} are asked for",
            key="--temperature",
        )
    check_room(lm, starts, max_new_tokens)
    told = {"model": str(model), "source": source, "format": format}
    facts = {
        "base": base.fingerprint,
        "tokenizer": None if lm.tokenizer is None else lm.tokenizer.fingerprint(),
        "starts": starts.digest,
        "num": num,
        "seed": seed,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "dtype": dtype,
        "quantize": lm.config.quantize,
    }
    known = replay_file.read_finished(path, facts)
    if known is not None:
        return known
    order = Order([len(starts.ids)], [1.0], shuffle=True, seed=seed).examples(0, num)
    block = batch_size * ROUNDS
    with replay_file.growing(path, facts, block) as (file, done):
        with advancing(console, "samples", num) as advance:
            advance(done)
            for first in range(done, num, block):
                chosen = [starts.ids[i] for i in order[first : first + block]]
                samples = sampler.sample(
                    lm.config,
                    lm.method,
                    lm.params,
                    chosen,
                    max_new_tokens=max_new_tokens,
                    temperature=temperature,
                    top_p=top_p,
                    top_k=top_k,
                    seed=seed,
                    eos_ids=lm.eos_ids,
                    first_row=first,
                    slots=batch_size,
                )
                records = [
                    record_of(lm, start, one.ids)
                    for start, (one,) in zip(chosen, samples, strict=True)
                ]
                lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
                file.write("".join(lines).encode())
                file.flush()
                advance(len(chosen))
        file.seek(0)
        return replay_file.finish(path, told | facts | tally(map(json.loads, file), lm.eos_ids))


def check_out(path: Path) -> None:
    """Raises RequestError if a file of this name cannot be written or would not be read."""
    if path.suffix != ".jsonl":
        raise RequestError(f"expected a name that ends in .jsonl; got {path.name!r}", key="--out")
    if not path.absolute().parent.is_dir():
        raise RequestError(f"no such directory: {path.parent}", key="--out")
    if path.is_dir():
        raise RequestError("is a directory; name a file", key="--out", where=path)


def record_of(lm: LanguageModel, start: Sequence[int], new: Sequence[int]) -> dict[str, Any]:
    """Returns the record of a sample."""
    ids = [*start, *new]
    record = {"input_ids": ids, "loss_mask": [0] * len(start) + [1] * len(new)}
    return record if lm.tokenizer is None else record | {"text": lm.decode(ids)}


def tally(records: Any, eos_ids: Sequence[int]) -> dict[str, int]:
    """Returns what a file of records holds.

    Args:
        records: of `record_of`.
        eos_ids: ids that end a sample.

    Returns:
        {"tokens", "new_tokens", "longest": tokens, "ended": samples that an end token closed}.
    """
    found = dict.fromkeys(("tokens", "new_tokens", "longest", "ended"), 0)
    for record in records:
        ids = record["input_ids"]
        found["tokens"] += len(ids)
        found["new_tokens"] += sum(record["loss_mask"])
        found["longest"] = max(found["longest"], len(ids))
        found["ended"] += ids[-1] in eos_ids
    return found
