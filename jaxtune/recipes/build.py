"""Config → everything that a run is made of, before any weight is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import AbstractMesh, Mesh
from rich.console import Console

from jaxtune.checkpoints import adapters
from jaxtune.core.errors import RequestError
from jaxtune.core.tree import Tree
from jaxtune.models.attention_backends import Choice, choose, setting_on
from jaxtune.optim.anchor import Pull
from jaxtune.optim.schedules import Schedule, make_schedule
from jaxtune.optim.transform import OptimSpec, make_transform
from jaxtune.parallel.batches import check_batch
from jaxtune.parallel.mesh import BATCH_AXES, batch_shards, make_mesh
from jaxtune.parallel.rules import batch_sharding
from jaxtune.parallel.sequence import check_tokens
from jaxtune.peft.method import Method
from jaxtune.recipes.assemble import Parts, plan_parts
from jaxtune.recipes.base import Base
from jaxtune.recipes.data import Data, branched, positions_left
from jaxtune.recipes.evaluation.held_texts import HeldTexts, open_texts
from jaxtune.recipes.heads import heads_of
from jaxtune.recipes.methods import check_stored, check_targets, check_width, make_method
from jaxtune.recipes.objective import Objective
from jaxtune.recipes.objectives import OBJECTIVES
from jaxtune.recipes.reference import COLUMN, needs_column
from jaxtune.recipes.retention import replay_mixing
from jaxtune.recipes.retention.earlier import push_of
from jaxtune.recipes.retention.measured import Retention, open_retention
from jaxtune.recipes.rows import Rows, rows_of
from jaxtune.recipes.runs import open_base
from jaxtune.recipes.teacher import open_teacher, with_teacher
from jaxtune.training.compile import (
    Layout,
    abstract_batch,
    jit_evaluation,
    jit_step,
    make_layout,
    with_shardings,
)
from jaxtune.training.step import SumLoss, make_train_step
from jaxtune.training.writers import require_wandb


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run, ready to start.

    Attributes:
        config: the resolved config.
        mesh, base, parts, data: devices, weights to load, partitions, tokenised data.
        attention: the back end, and why.
        rows: what is known of its rows.
        loss: the objective on a batch.
        tx, schedule: the optimizer.
        layout: where the state lies.
        step, evaluation: jitted functions; no evaluation where the objective measures no loss.
        retention: what is measured of what the run retains, or None.
        texts: what it writes to held-out prompts and which labels it chooses, or None.
    """

    config: Any
    mesh: Mesh
    base: Base
    parts: Parts
    data: Data
    attention: Choice
    rows: Rows
    loss: SumLoss
    tx: optax.GradientTransformation
    schedule: Schedule
    layout: Layout
    step: Callable
    evaluation: Callable | None
    retention: Retention | None = None
    texts: HeldTexts | None = None

    @property
    def objective(self) -> Objective:
        """What is learned."""
        return OBJECTIVES[self.config.objective.name]

    def fingerprints(self) -> dict[str, str | None]:
        """Returns what the run depends on, hashed: base weights, data, tokenizer."""
        tokenizer = self.base.tokenizer
        held_out = [f"{name}:{s.fingerprint()}" for name, s in self.data.evals.items()]
        found = {
            "base": self.base.fingerprint,
            "data": self.data.stream.fingerprint(),
            "evaluation data": " ".join(held_out) or None,
            "tokenizer": None if tokenizer is None else tokenizer.fingerprint(),
        }
        if self.base.teacher is not None:
            found["teacher"] = self.base.teacher.fingerprint
        if self.data.teacher is not None:
            found["teacher"] = self.data.teacher.digest
        if self.data.replay is not None:
            found["replay data"] = self.data.replay.fingerprint()
        return found

    def abstract_rows(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shapes of a batch of the objective's own rows, with shardings."""
        one = self.objective.padding(self.config, self.data, 1, self.parts.method.num_virtual)
        if needs_column(self.objective, self.config, self.parts):
            one[COLUMN] = np.zeros((1, self.config.data.seq_len), np.float32)
        return self._abstract(one, self.config.batch_size)

    def _abstract(self, one: dict[str, np.ndarray], rows: int) -> dict[str, jax.ShapeDtypeStruct]:
        return abstract_batch(
            rows,
            self.config.data.seq_len,
            {name: np.dtype(array.dtype) for name, array in one.items()},
            batch_sharding(self.mesh),
            {name: array.shape[2:] for name, array in one.items()},
        )

    def abstract_arguments(self) -> tuple[Any, Any, Any]:
        """Returns the shapes of the step's arguments (state, frozen, batch), with shardings."""
        _, frozen = self.parts.split(self.parts.shapes)
        batch: dict[str, Any] = self.abstract_rows()
        if rows := replay_mixing.replayed_rows(self.config):
            old = replay_mixing.padding(self.config, self.parts.method.num_virtual)
            batch[replay_mixing.REPLAY] = self._abstract(old, rows)
        return self.layout.shapes, with_shardings(frozen, self.layout.frozen), batch

    def show_findings(self, console: Console) -> None:
        """Prints what the mesh cannot do for the model, a line each."""
        for finding in self.parts.findings:
            console.print(finding.line(), style="yellow", markup=False, highlight=False)

    def evaluate(self, trainable: Tree, frozen: Tree) -> dict[str, float]:
        """Returns the `eval/…` metrics of the objective; none without held-out data."""
        if not self.data.evals:
            return {}
        found = self.objective.evaluate(self, trainable, frozen)
        return found if self.texts is None else found | self.texts.measure(self, trainable, frozen)


def build(config: Any) -> Plan:
    """Returns the Plan of a resolved config; everything that can be refused is refused here.

    Raises:
        RequestError: what the config asks for cannot be had.
    """
    if config.log.wandb:
        require_wandb()
    mesh = make_mesh(config.mesh)
    model = assemble(config, mesh, mesh.devices.flat[0].platform)
    model.base.check()
    objective = OBJECTIVES[config.objective.name]
    method = model.parts.method
    data = objective.open_data(config, model.base, method)
    data = replay_mixing.with_replay(data, config, model.base, method)
    if config.retention.data or (config.data.eval and objective.held_out is not None):
        check_eval_batch(config.eval.batch_size, mesh)
    return connect(config, mesh, model, data)


class Model(NamedTuple):
    """What a config trains: the base, its partitions on the mesh, and the attention back end."""

    base: Base
    parts: Parts
    attention: Choice


def assemble(config: Any, mesh: Mesh | AbstractMesh, platform: str) -> Model:
    """Returns the Model that a resolved config asks for.

    Args:
        config: the resolved config.
        mesh: may be abstract.
        platform: of the devices that it is for: "cpu", "gpu" or "tpu".

    Raises:
        RequestError: what the config asks for cannot be had.
    """
    check_batch(config.batch_size, config.grad_accum, mesh)
    replayed = replay_mixing.replayed_rows(config)
    check_batch(replayed, config.grad_accum, mesh, "retention.replay_batch_size")
    check_tokens(config.data.seq_len, mesh)
    heads = heads_of(config.objective.name)
    base = open_base(config.model, config.seed, config.data.template, heads)
    method = method_of(config, base)
    check_targets(method, base.config)
    if config.peft.get("init_from") is None:
        check_width(method, base.config)
    if config.objective.balance and base.config.experts is None:
        raise RequestError("the model has no experts to balance", key="objective.balance")
    # Of a row that holds a prompt's completions side by side, each text is checked by itself.
    if not branched(config) and config.data.seq_len > positions_left(base.config, method):
        raise RequestError(
            f"{config.data.seq_len + method.position_offset} positions are more than the model's "
            f"{base.config.max_context} (model.overrides.max_position_embeddings)",
            key="data.seq_len",
        )
    if config.data.seq_len <= method.num_virtual:
        raise RequestError(
            f"{config.data.seq_len} tokens leave no room behind {method.num_virtual} virtual ones",
            key="data.seq_len",
        )
    attention = choose_attention(config, mesh, platform, base, method)
    chosen = dataclasses.replace(base.config, attention=attention.name)
    base = dataclasses.replace(base, config=chosen)
    parts = plan_parts(base.config, method, mesh)
    if config.objective.get("teacher") is not None:
        base, parts = with_teacher(base, parts, open_teacher(config, base), mesh)
    return Model(base, parts, attention)


def choose_attention(
    config: Any, mesh: Mesh | AbstractMesh, platform: str, base: Base, method: Method
) -> Choice:
    """Returns the attention back end of a run on a platform, "cpu", "gpu" or "tpu".

    Raises:
        RequestError: `model.attention` names one that cannot be had there.
    """
    # Each completion of a prompt is a segment of its row, if they do not share the prompt.
    several = branched(config)
    setting = setting_on(
        mesh,
        platform,
        config.data.seq_len,
        prefix=method.position_offset > 0,
        packed=config.data.packing or several,
        branches=config.data.packing and several,
    )
    return choose(base.config, setting)


def check_eval_batch(batch_size: int, mesh: Mesh) -> None:
    """Raises RequestError unless an evaluation batch spreads evenly over the mesh."""
    if batch_size % batch_shards(mesh):
        raise RequestError(
            f"{batch_size} rows do not spread over {batch_shards(mesh)} shards "
            f"({' × '.join(BATCH_AXES)})",
            key="eval.batch_size",
        )


def method_of(config: Any, base: Base) -> Method:
    """Returns the method of the config; with `peft.init_from`, the one of that directory.

    Dropout and LoRA+'s ratio are the config's: they are how one trains, not what is stored.

    Raises:
        RequestError: the directory holds another method, or one of other settings than are given.
    """
    method = dataclasses.replace(make_method(config.peft, base.tokenizer), new_rows=base.new_rows)
    if config.peft.get("init_from") is None:
        return method
    found = adapters.read_method(config.peft.init_from, base.config, to_train=True)
    if found.name != method.name:
        raise RequestError(
            f"holds a {found.name} adapter, not {method.name}",
            key="peft.init_from",
            where=config.peft.init_from,
        )
    check_stored(config.peft, found, base.config)
    kept = {"new_rows": base.new_rows, "train": tuple(dict.fromkeys((*found.train, *method.train)))}
    if method.name == "lora":
        kept |= {"ratio": method.ratio, "dropout": method.dropout}
    return dataclasses.replace(found, **kept)


def connect(config: Any, mesh: Mesh | AbstractMesh, model: Model, data: Data) -> Plan:
    """Returns the Plan of a run whose parts are known: loss, optimizer, layout, step."""
    base, parts, attention = model
    optim = config.optim
    schedule = make_schedule(
        optim.schedule,
        optim.lr,
        data.budget.steps,
        data.warmup_steps,
        optim.get("end_lr_ratio", 0.0),
        optim.get("decay_ratio", 0.1),
    )
    trained, frozen = parts.split(parts.shapes)
    if not jax.tree.leaves(trained):
        raise RequestError("no parameter is trained", key="peft.train")
    tx = make_transform(
        optim_spec(optim),
        parts.labels,
        trained,
        schedule,
        parts.method.learning_rate_scales(),
        Pull(config.retention.l2sp, config.retention.ewc),
        push_of(config, parts),
    )
    layout = make_layout(trained, frozen, parts.shardings, tx, mesh)
    objective = OBJECTIVES[config.objective.name]
    rows = rows_of(data, batch_shards(mesh), parts.method.num_virtual)
    loss = replay_mixing.with_terms(
        objective.trained(config, parts, rows), objective.term, config, parts, rows.shards
    )
    evaluation = None
    if objective.held_out is not None:
        held_out = objective.held_out(config, parts, rows)

        def evaluate(trainable: Tree, frozen: Tree, batch: dict[str, jax.Array]):
            return held_out(trainable, frozen, batch, None)

        evaluation = jit_evaluation(evaluate, layout)
    step = make_train_step(loss, tx, schedule, config.grad_accum)

    return Plan(
        config=config,
        mesh=mesh,
        base=base,
        parts=parts,
        data=data,
        attention=attention,
        rows=rows,
        loss=loss,
        tx=tx,
        schedule=schedule,
        layout=layout,
        step=jit_step(step, layout),
        evaluation=evaluation,
        retention=open_retention(config, parts, layout, base.tokenizer),
        texts=None if data.stream is None else open_texts(config, base, parts.method.num_virtual),
    )


def optim_spec(optim: Any) -> OptimSpec:
    """Returns the OptimSpec of a resolved `optim` section."""
    names = {field.name for field in dataclasses.fields(OptimSpec)}
    values = {name: value for name, value in optim.items() if name in names}
    groups = tuple((g.pattern, g.lr_scale, g.weight_decay) for g in optim.groups)
    return OptimSpec(**values | {"groups": groups})
