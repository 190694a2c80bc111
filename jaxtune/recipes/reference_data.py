"""The reference's log-probabilities as a column of the data, where the base is not the reference.

They are computed once, before the first step, from the parameters that the run starts with, and
kept in the workdir under a fingerprint of all that they follow from. A run that goes on reads them
again. Of several processes all compute all of them: the result is small, and each needs any row.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

from jaxtune.checkpoints.fingerprint import fingerprint_files
from jaxtune.core.errors import RequestError
from jaxtune.core.places import is_remote
from jaxtune.core.tree import Tree, combine
from jaxtune.data.batches import placed_batches
from jaxtune.data.shares import SharedStore
from jaxtune.data.token_store import TokenStore
from jaxtune.evaluate.loss import loss_sums
from jaxtune.models import decoder
from jaxtune.parallel import processes
from jaxtune.parallel.batches import Rows, global_batch, held_rows
from jaxtune.parallel.mesh import batch_shards
from jaxtune.parallel.rules import batch_sharding, replicated
from jaxtune.peft.registry import spec_of
from jaxtune.recipes.build import Plan
from jaxtune.recipes.data import Data
from jaxtune.recipes.reference import COLUMN, check_start, needs_column
from jaxtune.recipes.scores import at_targets, predictions

DIRECTORY = "reference"
DIGEST = 16  # bytes in front of the numbers
HOW = ("attention", "remat")  # of a model: how it is computed, not what
Store = TokenStore | SharedStore
# Returns (trained, the rest) of the parameters that the run started with.
Start = Callable[[], tuple[Tree, Tree]]


def with_reference(plan: Plan, start: Start, workdir: Path) -> Plan:
    """Returns the plan with the reference's log-probabilities in its data, if it needs them there.

    Args:
        plan: of the run.
        start: gives the parameters at step 0; called only if nothing is kept.
        workdir: of the run; what is computed is written below it.

    Raises:
        RequestError: what is kept is damaged.
    """
    if not needs_column(plan.objective, plan.config, plan.parts):
        return plan
    stores = stores_of(plan.data)
    sizes = [int(store.lengths.sum()) for store in stores]
    path = path_of(plan, stores, workdir)
    kept = read(path, sum(sizes))
    # A process that cannot see the file computes with all others, or they would wait for it.
    if not all(processes.gather("reference log-probabilities", kept is not None)):
        trainable, frozen = start()
        kept = np.concatenate([column(plan, store, trainable, frozen) for store in stores])
        if processes.is_writer():
            write(path, kept)
    flats = iter(np.split(kept, np.cumsum(sizes)[:-1]))
    return dataclasses.replace(plan, data=with_columns(plan.data, flats))


def with_columns(data: Data, flats: Iterator[np.ndarray]) -> Data:
    """Returns the data with a column of each store, in the order of `stores_of`."""
    stream = data.stream.with_column(COLUMN, [next(flats) for _ in data.stream.stores])
    evals = {name: store.with_column(COLUMN, next(flats)) for name, store in data.evals.items()}
    others = data.mismatched and with_columns(data.mismatched, flats)
    return dataclasses.replace(data, stream=stream, evals=evals, mismatched=others)


def check_kept(plan: Plan, workdir: Path) -> None:
    """Raises RequestError if what the workdir keeps of the plan's reference is damaged."""
    if needs_column(plan.objective, plan.config, plan.parts):
        stores = stores_of(plan.data)
        read(path_of(plan, stores, workdir), sum(int(store.lengths.sum()) for store in stores))


def stores_of(data: Data) -> list[Store]:
    """Returns the stores whose targets need the reference: of training, then of evaluation."""
    others = [] if data.mismatched is None else stores_of(data.mismatched)
    return [*data.stream.stores, *data.evals.values(), *others]


def path_of(plan: Plan, stores: Sequence[Store], workdir: Path) -> Path:
    """Returns the file that keeps the reference's log-probabilities of the stores."""
    return workdir / DIRECTORY / f"{fingerprint(plan, stores)}.f32"


def check(plan: Plan, trainable: Tree, frozen: Tree) -> None:
    """Raises WrongReference unless the first batch's loss is that of a policy at its reference.

    Objectives without a reference have nothing to check.

    Args:
        plan: of the run, with the reference in its data.
        trainable, frozen: the parameters before the first update.
    """
    objective = plan.objective
    if objective.at_start is None:
        return
    size = plan.config.batch_size
    rows = held_rows(size, plan.config.data.seq_len, plan.mesh)
    first = plan.data.stream.batch(
        0, size, slice(None) if rows is None else rows.held, plan.data.budget.rows
    )
    # What the feed adds is 0 where policy and reference are one.
    whole = plan.objective.padding(plan.config, plan.data, 1, plan.parts.method.num_virtual)
    first = {name: np.zeros_like(first["loss_mask"]) for name in whole} | first
    sums = loss_sums(plan.evaluation, trainable, frozen, [first], plan.mesh, rows, likelihood=False)
    wanted = objective.at_start(plan.config.objective)
    check_start(wanted, sums.means(), plan.config.model.dtype)


def fingerprint(plan: Plan, stores: Sequence[Store]) -> str:
    """Returns a hash of all that the reference's log-probabilities follow from, in hexadecimal."""
    config, init = plan.config, plan.config.peft.get("init_from")
    model = dataclasses.asdict(plan.parts.config)
    facts = {
        "model": {name: model[name] for name in model if name not in HOW},
        "base": plan.base.fingerprint,
        "method": spec_of(plan.parts.method),
        "seed": config.seed,
        "init_from": init and fingerprint_files(p for p in Path(init).iterdir() if p.is_file()),
        "data": [store.fingerprint() for store in stores],
    }
    text = json.dumps(facts, sort_keys=True).encode()
    return hashlib.blake2b(text, digest_size=16).hexdigest()


def column(plan: Plan, store: Store, trainable: Tree, frozen: Tree) -> np.ndarray:
    """Returns the log-probability of each target of a store, float32 [its tokens]; 0 elsewhere."""
    size, length = plan.config.batch_size, plan.config.data.seq_len
    rows = held_rows(size, length, plan.mesh)
    run = jitted(plan)
    flat = np.zeros(int(store.lengths.sum()), np.float32)
    for batch, places in placed_batches(store, size, length, plan.parts.method.num_virtual):
        inputs = {name: array for name, array in batch.items() if name != COLUMN}
        found = np.asarray(
            run(trainable, frozen, global_batch(held(inputs, rows), plan.mesh, rows))
        )
        targets = batch["loss_mask"] > 0
        flat[places[targets]] = found[targets]
    if not np.isfinite(flat).all():
        raise ArithmeticError("a log-probability under the reference is not finite")
    return flat


def held(batch: dict[str, np.ndarray], rows: Rows | None) -> dict[str, np.ndarray]:
    """Returns the rows of a batch that this process holds."""
    return batch if rows is None else {n: array[list(rows.held)] for n, array in batch.items()}


def jitted(plan: Plan) -> Callable[[Tree, Tree, dict[str, jax.Array]], jax.Array]:
    """Returns (trained, the rest, batch) → log-probabilities [B, T] at the tokens' own places."""
    parts, mesh = plan.parts, plan.mesh

    def run(trainable: Tree, frozen: Tree, batch: dict[str, jax.Array]) -> jax.Array:
        params = combine(trainable, decoder.with_gathered_head(parts.config, frozen))
        found = predictions(parts.config, parts.method, params, batch, shards=batch_shards(mesh))
        return at_targets(found.scores.logprobs, "branches" in batch)

    return jax.jit(
        run,
        in_shardings=(plan.layout.state.trainable, plan.layout.frozen, batch_sharding(mesh)),
        out_shardings=replicated(mesh),
    )


def read(path: Path, count: int) -> np.ndarray | None:
    """Returns the numbers that `write` has written, float32 [count], or None without a file.

    Raises:
        RequestError: the file is not as it was written.
    """
    if not path.exists():
        return None
    content = path.read_bytes()
    digest, numbers = content[:DIGEST], content[DIGEST:]
    if hashlib.blake2b(numbers, digest_size=DIGEST).digest() != digest or len(numbers) != 4 * count:
        raise RequestError(
            "the reference's log-probabilities are damaged; delete the file to compute them again",
            where=path,
        )
    return np.frombuffer(numbers, "<f4").astype(np.float32)


def write(path: Path, values: np.ndarray) -> None:
    """Writes float32 values with their digest in front, whole or not at all."""
    numbers = values.astype("<f4").tobytes()
    content = hashlib.blake2b(numbers, digest_size=DIGEST).digest() + numbers
    if is_remote(path):
        path.write_bytes(content)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_bytes(content)
    os.replace(aside, path)
