"""`jaxtune data teacher`: writes a teacher's most likely tokens of each target of a source."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxtune.core.errors import RequestError
from jaxtune.data.batches import placed_batches
from jaxtune.parallel.batches import global_batch
from jaxtune.recipes.evaluation.data import Entry, open_one
from jaxtune.recipes.load import load
from jaxtune.recipes.scores import most_likely
from jaxtune.recipes.teacher_data import write_one


def write_teacher(
    *,
    model: str,
    source: str,
    format: str,
    out: str,
    top_k: int = 64,
    temperature: float = 1.0,
    seq_len: int | None = None,
    overlong: str = "error",
    batch_size: int = 8,
    dtype: str = "bfloat16",
    quantize: str | None = None,
) -> dict[str, Any]:
    """Writes what a model says of each target of a source, for `objective.teacher_data`.

    Args:
        model: Hugging Face directory, or a run's workdir.
        source, format, seq_len, overlong: as in the `data` section of the run that reads it.
        out: directory of all sources.
        top_k: tokens that are kept of each distribution.
        temperature: divides the logits; the run's `objective.teacher_temperature`.
        batch_size: rows at a time; does not change the result.
        dtype, quantize: of the model.

    Returns:
        {"directory", "targets", "top_k", "mass": mean probability of the kept tokens}.

    Raises:
        RequestError: model or data cannot be read, `out` is a file, or top_k is more than the
            vocabulary.
    """
    if Path(out).exists() and not Path(out).is_dir():
        raise RequestError("is not a directory", key="--out", where=out)
    lm = load(model, dtype=dtype, quantize=quantize)
    if top_k > lm.config.vocab_size:
        raise RequestError(f"the model has {lm.config.vocab_size} tokens", key="--top_k")
    store = open_one(lm, Entry(source, source, format, "--source", seq_len, overlong))
    width = -(-int(store.room(lm.method.num_virtual).max()) // 32) * 32
    run = jax.jit(functools.partial(most_likely, lm.config, lm.method, top_k, temperature))
    ids, logprobs = [], []
    with jax.set_mesh(lm.mesh):
        for batch, _ in placed_batches(store, batch_size, width, lm.method.num_virtual):
            found = jax.device_get(run(lm.params, global_batch(batch, lm.mesh)))
            targets = batch["loss_mask"] > 0
            ids.append(found[0][targets])
            logprobs.append(found[1][targets])
    all_ids, all_logprobs = np.concatenate(ids), np.concatenate(logprobs)
    facts = {
        "tokenizer": None if lm.tokenizer is None else lm.tokenizer.fingerprint(),
        "temperature": temperature,
        "vocab_size": lm.config.vocab_size,
        "model": str(model),
        "source": source,
        "format": format,
    }
    place = write_one(Path(out), store, all_ids, all_logprobs, facts)
    return {
        "directory": str(place),
        "targets": len(all_ids),
        "top_k": top_k,
        "mass": float(np.exp(all_logprobs.astype(np.float64)).sum(axis=1).mean()),
    }
