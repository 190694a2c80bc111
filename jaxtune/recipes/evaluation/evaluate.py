"""`jaxtune eval`: loss and perplexity of a model or a run on data, and tasks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxtune.core.errors import RequestError
from jaxtune.core.places import place
from jaxtune.core.tree import partition
from jaxtune.data.batches import eval_batches
from jaxtune.data.parts import Part, by_key, parts_of
from jaxtune.data.questions import Question
from jaxtune.data.shares import SharedStore
from jaxtune.data.token_store import TokenStore
from jaxtune.evaluate.loss import Sums, loss_sums
from jaxtune.parallel import processes
from jaxtune.parallel.batches import held_rows
from jaxtune.parallel.mesh import batch_shards, make_mesh
from jaxtune.recipes.base import is_run
from jaxtune.recipes.evaluation import harness, judged
from jaxtune.recipes.evaluation.against import comparable, compare
from jaxtune.recipes.evaluation.data import PAIRS, Entry, entries_of, open_one, questions_of
from jaxtune.recipes.evaluation.judge import COMPARING, GRADING, open_judge
from jaxtune.recipes.evaluation.pairs import pair_loss
from jaxtune.recipes.evaluation.text_figures import Found, measure_texts, texts_asked
from jaxtune.recipes.language_model import LanguageModel
from jaxtune.recipes.load import load
from jaxtune.recipes.reward import measured_loss
from jaxtune.recipes.rows import alone
from jaxtune.recipes.schema.resolve import resolve
from jaxtune.recipes.sft import sft_loss
from jaxtune.training.workdir import read_json

BASE = "base"  # what a run was tuned from


def evaluate(
    *,
    config: Mapping[str, Any] | None = None,
    workdir: str | Path | None = None,
    model: str | Path | None = None,
    adapter: str | Path | None = None,
    data: str | None = None,
    format: str | None = None,
    seq_len: int | None = None,
    batch_size: int | None = None,
    dtype: str | None = None,
    limit: int | None = None,
    tasks: Sequence[str] | None = None,
    include_path: str | None = None,
    against: str | Path | None = None,
    metrics: Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
    by: str | None = None,
    judge: str | None = None,
    judge_model: str | None = None,
    judge_template: str | None = None,
    **writing: Any,
) -> dict[str, Any]:
    """Returns {"loss", "perplexity", "tokens", "examples", "accuracy", "tasks"}.

    On pairs there is no perplexity, and more is told of them; see `pairs.pair_loss`. Of
    several sources "sources" has the same of each.

    With `tasks` and without `data`, only "tasks" is there: {name: {metric: value}}.

    Args:
        config: of the run in `workdir`; by default the one that the workdir holds.
        workdir: a run, evaluated on its own `data.eval` unless `data` is given.
        model: Hugging Face directory or workdir, with `adapter` a PEFT directory or None.
        data, format: a source and what its records hold.
        seq_len: tokens a row; by default the run's, or what the longest example needs.
        batch_size: rows at a time, 8 by default, and for tasks what suits the device; does not
            change the result.
        dtype: "bfloat16" or "float32"; by default the run's, or bfloat16.
        limit: the first so many examples of each source and task.
        against: another model, or BASE for the run's own; "against" then tells the difference,
            see `against.compare`, of metrics and labels too.
        tasks, include_path: tasks of lm-evaluation-harness, and a directory with more of them.
        metrics: names in `text_metrics.METRICS`; "metrics" then says how near what the model writes
            is to the completions, see `answers.told`.
        labels: the completions to choose from, or ("auto",); "labels" then says how well the model
            chooses, see `text_figures.Found`.
        by: a field of the records, by default the run's; "by" then has the figures of each of its
            values.
        judge: URL of a server whose `judge_model` judges what the model writes, by the request that
            the file `judge_template` holds; "judge" then has its grades, or with `against` the rate
            of wins; see `recipes.evaluation.judged`.
        writing: fields of `answers.Writing`, for `metrics` and `judge`.

    Raises:
        RequestError: no model, no data, no such task or metric, or what cannot be read.
    """
    # A wrong name is known before a model is loaded.
    asked = None if tasks is None else harness.find_tasks(tasks, include_path)
    kind = GRADING if against is None else COMPARING
    opened = judge and open_judge(judge, judge_model, judge_template, kind)
    texts = texts_asked(metrics, labels, opened, writing)
    where = workdir if model is None else model
    if where is None:
        raise RequestError("needs the --workdir of a run, or --model", key="--config")
    run = run_config(place(where), config)
    if dtype is None:
        dtype = "bfloat16" if run is None else run.model.dtype
    mesh = None
    if jax.process_count() > 1:
        if asked is not None:
            raise RequestError("run in one process; give --distributed=none", key="--tasks")
        mesh = make_mesh({"fsdp": -1})
    lm = load(where, adapter=adapter, dtype=dtype, mesh=mesh)
    if (asked is not None or texts is not None) and not lm.config.lm_head:
        raise RequestError("is a reward model, which has no logits for tasks", where=lm.source)
    measured = {}
    if asked is not None:
        measured = harness.run_tasks(lm, asked, limit=limit, batch_size=batch_size)
        if data is None:
            return {"tasks": measured}
    size = batch_size or 8
    entries = entries_of(run, data, format, seq_len, by)
    stores = {entry.name: open_one(lm, entry) for entry in entries}
    if limit is not None:
        stores = {name: store.head(limit) for name, store in stores.items()}
    found, questions = None, {}
    if texts is not None:
        questions = asked_of(lm, entries, limit)
        found = measure_texts(lm, questions, texts, size)
    every = [question for some in questions.values() for question in some]
    results = {}
    for entry in entries:
        store = stores[entry.name]
        parts = {"": store}
        if entry.by is not None:
            parts = parts_of(store, entry.by, by_key(entry.key))
        for value, part in parts.items():
            results[entry.name, value] = measure(lm, part, size, run, width_of(lm, store))
    total = functools.reduce(Sums.__add__, results.values())
    report = {
        **total.means(),
        "examples": sum(len(store) for store in stores.values()),
        "tasks": measured,
    }
    if found is not None:
        report |= found.report()
    if against is not None:
        other = base_of(lm, against, dtype)
        report["against"] = {}
        if found is None or comparable(lm, other):
            report["against"] = compare(lm, other, stores, size)
        if found is not None:
            theirs = asked_of(other, entries, limit)
            if sum(map(len, theirs.values())) != len(every):
                raise RequestError("leaves out other examples as too long", key="--against")
            others = measure_texts(other, theirs, texts, size, found.names)
            report["against"] |= found.compared(others)
            if opened:
                report["judge"] = by_one(
                    lambda: judged.compare(opened, every, found.texts, others.texts)
                )
    elif opened:
        report["judge"] = by_one(lambda: judged.grade(opened, every, found.texts))
    if len(stores) > 1:
        report["sources"] = pooled(results, 0, found)
    if any(entry.by is not None for entry in entries):
        report["by"] = pooled(results, 1, found)
    return report


def by_one(ask: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Returns what the first process is told, in all of them: a judge is asked once.

    Raises:
        RequestError: in all of them, what `ask` raised.
    """
    told = refused = None
    if processes.is_writer():
        try:
            told = ask()
        except RequestError as error:
            refused = error
    processes.all_agree("verdicts", refused)
    return processes.gather("verdicts", told)[0]


def pooled(
    results: Mapping[tuple[str, str], Sums], place: int, found: Found | None
) -> dict[str, dict[str, Any]]:
    """Returns the figures of each source (place 0), or of each value of a field (place 1).

    Args:
        results: {(source, value): what was measured there}.
        place: which of the two.
        found: what was measured in texts, or None.
    """
    sums: dict[str, Sums] = {}
    for names, result in results.items():
        name = names[place]
        if name:  # a source that is not parted has no value
            sums[name] = sums[name] + result if name in sums else result
    figures = {name: result.means() for name, result in sums.items()}
    if found is None:
        return figures
    part = (lambda name: found.part(name)) if place == 0 else (lambda name: found.part(None, name))
    return {name: own | part(name).report() for name, own in figures.items()}


def asked_of(
    lm: LanguageModel, entries: Sequence[Entry], limit: int | None
) -> dict[str, list[Question]]:
    """Returns the questions of sources in ids of a model's tokenizer."""
    virtual = lm.method.num_virtual
    return {e.name: questions_of(e, lm.tokenizer, virtual, limit) for e in entries}


def base_of(lm: LanguageModel, against: str | Path, dtype: str) -> LanguageModel:
    """Returns the model to compare with: that of a directory, or what the run was tuned from."""
    if str(against) != BASE:
        return load(against, dtype=dtype, mesh=lm.mesh)
    if lm.stand is not None:
        return lm.use(None)
    if is_run(Path(lm.source)) or lm.method.name == "base":
        raise RequestError("the model is no run with a base on disk; name one", key="--against")
    return load(lm.source, dtype=dtype, mesh=lm.mesh)


def run_config(where: Path, config: Mapping[str, Any] | None) -> Any:
    """Returns the resolved config of a workdir, or None for a Hugging Face directory."""
    if config is not None:
        return resolve(config)
    path = where / "config.json"
    raw = read_json(path) if path.is_file() else {}
    return resolve(raw) if "objective" in raw else None


def width_of(lm: LanguageModel, store: TokenStore | SharedStore | Part) -> int:
    """Returns the tokens of a row that holds the longest example of a source."""
    if len(store) == 0:
        raise RequestError("no example is left to evaluate")
    return -(-int(store.room(lm.method.num_virtual).max()) // 32) * 32


def measure(
    lm: LanguageModel,
    store: TokenStore | SharedStore | Part,
    batch_size: int,
    run: Any = None,
    width: int | None = None,
) -> Sums:
    """Returns the sums over one source, or a part of it.

    Args:
        lm: the model.
        store: the source.
        batch_size: rows at a time.
        run: resolved config of the run that the model comes from, or None.
        width: tokens of a row; None: as many as the longest example needs.
    """
    width = width_of(lm, store) if width is None else width
    shards = batch_shards(lm.mesh)
    size = -(-batch_size // shards) * shards
    facts = alone([store], shards, width, lm.method.num_virtual)
    nothing, held = partition(lm.params, lm.params, lambda _: False)
    scorer, paired = not lm.config.lm_head, store.format == PAIRS
    if scorer:
        loss = measured_loss(lm.config, lm.method, facts)
    elif paired:
        loss = pair_loss(lm, facts, run)
    else:
        loss = sft_loss(lm.config, lm.method, shards)
    step = jax.jit(lambda trainable, frozen, batch: loss(trainable, frozen, batch, None))
    rows = held_rows(size, width, lm.mesh)
    chosen = slice(None) if rows is None else rows.held
    batches = eval_batches(store, size, width, lm.method.num_virtual, chosen)
    with jax.set_mesh(lm.mesh):
        likelihood = not (scorer or paired)
        return loss_sums(step, nothing, held, batches, lm.mesh, rows, likelihood=likelihood)
