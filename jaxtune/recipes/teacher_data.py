"""A teacher's most likely tokens from disk, in place of the teacher: written once, read by any run.

`DIR/FINGERPRINT/` holds those of the source whose tokens have this fingerprint: `ids.npy` int32 and
`logprobs.npy` float32 [targets, K], in the order of the targets, and `meta.json`. In a batch they
are `IDS` and `LOGPROBS` [B, T, K], at the targets' own places.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune.core.errors import RequestError
from jaxtune.core.tree import Tree
from jaxtune.data.batches import Batch, eval_batches
from jaxtune.data.shares import SharedStore
from jaxtune.data.token_store import TokenStore
from jaxtune.parallel.batches import held_rows
from jaxtune.peft.method import Method
from jaxtune.recipes import stream_feed
from jaxtune.recipes.base import Base
from jaxtune.recipes.data import Data
from jaxtune.recipes.evaluation import held_out
from jaxtune.recipes.objective import token_rows, tokenised
from jaxtune.training.feed import Source
from jaxtune.training.workdir import read_json

IDS, LOGPROBS, ROWS = "teacher_ids", "teacher_logprobs", "teacher_rows"
KEY = "objective.teacher_data"
FILES = ("ids.npy", "logprobs.npy")
Store = TokenStore | SharedStore


@dataclasses.dataclass(frozen=True, eq=False)
class TopK:
    """What a teacher said of the targets of several sources.

    Attributes:
        ids, logprobs: of each source, [targets, K].
        starts: number of the first target of each source, and at last of all targets.
        digest: of all that was read, in hexadecimal.
    """

    ids: tuple[np.ndarray, ...]
    logprobs: tuple[np.ndarray, ...]
    starts: np.ndarray
    digest: str

    def put(self, batch: Batch) -> Batch:
        """Returns the batch with `IDS` and `LOGPROBS` in place of `ROWS`, which number targets
        from 1; other tokens have distinct ids of no probability.
        """
        rest = dict(batch)
        rows = rest.pop(ROWS)
        shape = (*rows.shape, self.ids[0].shape[1])
        ids = np.broadcast_to(np.arange(shape[-1], dtype=np.int32), shape).copy()
        logprobs = np.full(shape, np.float32(np.log(1 / (shape[-1] + 1))))
        for at, start in enumerate(self.starts[:-1]):
            mine = (rows > start) & (rows <= self.starts[at + 1])
            ids[mine] = self.ids[at][rows[mine] - 1 - start]
            logprobs[mine] = self.logprobs[at][rows[mine] - 1 - start]
        return rest | {IDS: ids, LOGPROBS: logprobs}


def open_data(config: Any, base: Base, method: Method) -> Data:
    """Returns the examples, with what the teacher says of them where it is on disk.

    Raises:
        RequestError: what is on disk is of other data, another tokenizer or temperature, or
            damaged.
    """
    data = tokenised(config, base, method)
    directory = config.objective.teacher_data
    if directory is None:
        return data
    named = [(f"data.train[{i}]", store) for i, store in enumerate(data.stream.stores)]
    named += [(f"data.eval[{i}]", store) for i, store in enumerate(data.evals.values())]
    read = [read_one(Path(directory), store, key, config, base) for key, store in named]
    if len({ids.shape[1] for ids, _, _ in read}) > 1:
        raise RequestError("sources have different top_k", key=KEY, where=directory)
    known, flats = table_of([store for _, store in named], read)
    count = len(data.stream.stores)
    return dataclasses.replace(
        data,
        stream=data.stream.with_column(ROWS, flats[:count]),
        evals={
            name: store.with_column(ROWS, flat)
            for (name, store), flat in zip(data.evals.items(), flats[count:], strict=True)
        },
        teacher=known,
    )


def table_of(
    stores: Sequence[Store], read: Sequence[tuple[np.ndarray, np.ndarray, str]]
) -> tuple[TopK, list[np.ndarray]]:
    """Returns the table of what a teacher said of several sources, and the column ROWS of each.

    Args:
        stores: the sources.
        read: of each, (ids, logprobs) [targets, K] and a digest of them.
    """
    starts = np.cumsum([0] + [len(ids) for ids, _, _ in read])
    digest = hashlib.blake2b("".join(told for _, _, told in read).encode(), digest_size=16)
    known = TopK(
        tuple(ids for ids, _, _ in read),
        tuple(logprobs for _, logprobs, _ in read),
        starts,
        digest.hexdigest(),
    )
    pairs = zip(stores, starts, strict=False)
    return known, [numbers(store, int(start)) for store, start in pairs]


def numbers(store: Store, start: int) -> np.ndarray:
    """Returns start + 1, start + 2, … on the targets of a store and 0 elsewhere, int32 [tokens]."""
    masks = [store.example(i)[1] > 0 for i in range(len(store))]
    targets = np.concatenate(masks)
    return np.where(targets, start + np.cumsum(targets), 0).astype(np.int32)


def read_one(
    directory: Path, store: Store, key: str, config: Any, base: Base
) -> tuple[np.ndarray, np.ndarray, str]:
    """Returns (ids, logprobs, digest) of one source.

    Raises:
        RequestError: see `open_data`.
    """
    place = directory / store.fingerprint()
    if not place.is_dir():
        raise RequestError(
            f"holds nothing of {key} with the tokens that this run reads; write it with jaxtune "
            "data teacher, of the same source, format, template and length",
            key=KEY,
            where=directory,
        )
    meta = read_json(place / "meta.json")
    tokenizer = None if base.tokenizer is None else base.tokenizer.fingerprint()
    facts = {
        "tokenizer": (tokenizer, "data"),
        "temperature": (config.objective.teacher_temperature, "objective.teacher_temperature"),
        "vocab_size": (base.config.vocab_size, KEY),
    }
    for name, (wanted, culprit) in facts.items():
        if meta.get(name) != wanted:
            raise RequestError(
                f"was written with {name} {meta.get(name)!r}, and the run has {wanted!r}",
                key=KEY if culprit == "data" else culprit,
                where=place,
            )
    for name in FILES:
        if digest_of(place / name) != meta.get(name):
            raise RequestError("is damaged; write it again", key=KEY, where=place / name)
    ids, logprobs = (np.load(place / name, mmap_mode="r") for name in FILES)
    return ids, logprobs, meta[FILES[0]] + meta[FILES[1]]


def write_one(
    directory: Path, store: Store, ids: np.ndarray, logprobs: np.ndarray, facts: dict[str, Any]
) -> Path:
    """Writes what a teacher says of a source, whole or not at all; returns where.

    Args:
        directory: of all sources.
        store: the source.
        ids, logprobs: [targets, K].
        facts: of `meta.json`.
    """
    place = directory / store.fingerprint()
    aside = directory / f".{place.name}.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    for name, array in zip(FILES, (ids, logprobs), strict=True):
        np.save(aside / name, array)
    meta = facts | {name: digest_of(aside / name) for name in FILES}
    (aside / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
    shutil.rmtree(place, ignore_errors=True)
    os.rename(aside, place)
    return place


def digest_of(path: Path) -> str | None:
    """Returns the hash of a file's content in hexadecimal, or None without the file."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def open_feed(plan: Any, begun: Any, note: Callable[[dict[str, Any]], None]) -> Source:
    """Returns the Source of a run, with what the teacher says where it is on disk."""
    source = stream_feed.open_feed(plan, begun, note)
    known = plan.data.teacher
    if known is None:
        return source

    def feed(state: Any) -> tuple[Batch, dict[str, float]]:
        batch, told = source.feed(state)
        return known.put(batch), told

    return Source(feed, source.arrays)


def evaluate(plan: Any, trainable: Tree, frozen: Tree) -> dict[str, float]:
    """Returns the `eval/…` metrics."""
    known = plan.data.teacher
    if known is None:
        return held_out.evaluate(plan, trainable, frozen)
    size, length = plan.config.eval.batch_size, plan.config.data.seq_len
    rows = held_rows(size, length, plan.mesh)
    here = slice(None) if rows is None else rows.held
    results = {}
    for name, store in plan.data.evals.items():
        batches = filled(
            known, eval_batches(store, size, length, plan.parts.method.num_virtual, here)
        )
        results[name] = held_out.sums(plan, batches, trainable, frozen, rows)
    return held_out.named(results)


def filled(known: TopK, batches: Iterator[Batch]) -> Iterator[Batch]:
    """Yields batches with what the teacher says."""
    return (known.put(batch) for batch in batches)


def padding(config: Any, data: Data, rows: int, num_virtual: int) -> Batch:
    """Returns a batch of padding with all its keys."""
    batch = token_rows(config, data, rows, num_virtual)
    return batch if data.teacher is None else data.teacher.put(batch)
