"""The teacher of distillation: a second model, frozen, among the parameters of the step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from jaxtune.core.errors import RequestError
from jaxtune.core.tree import Tree, map_paths
from jaxtune.models.decoder import abstract_params
from jaxtune.peft.method import FROZEN
from jaxtune.recipes.assemble import TEACHER, Parts, plan_parts
from jaxtune.recipes.base import BASE, Base
from jaxtune.recipes.runs import open_base
from jaxtune.recipes.schema.resolve import Resolved

KEY = "objective.teacher"


def open_teacher(config: Any, student: Base) -> Base:
    """Returns the Base of the teacher of a resolved config; its weights are not read yet.

    A run's result is a teacher too, its adapters merged.

    Raises:
        RequestError: it cannot be read, or does not have the student's vocabulary.
    """
    objective = config.objective
    model = config.model.to_dict() | {
        "path": objective.teacher,
        "preset": None,
        "tokenizer": None,
        "overrides": {},
        "add_tokens": (),
        "quantize": objective.teacher_quantize,
        "remat": "none",
    }
    try:
        base = open_base(Resolved(model), config.seed)
    except RequestError as error:
        raise RequestError(error.message, key=KEY, where=error.where) from None
    if base.config.vocab_size != student.config.vocab_size:
        raise RequestError(
            f"has {base.config.vocab_size} tokens, but the student {student.config.vocab_size}: "
            "distillation needs one vocabulary",
            key=KEY,
            where=objective.teacher,
        )
    tokenizers = (base.tokenizer, student.tokenizer)
    if None not in tokenizers and tokenizers[0].vocabulary() != tokenizers[1].vocabulary():
        raise RequestError(
            "its tokenizer gives other ids than the student's: distillation needs one vocabulary",
            key=KEY,
            where=objective.teacher,
        )
    if config.data.seq_len > base.config.max_context:
        raise RequestError(
            f"has {base.config.max_context} positions, fewer than data.seq_len = "
            f"{config.data.seq_len}",
            key=KEY,
            where=objective.teacher,
        )
    return base


def with_teacher(base: Base, parts: Parts, teacher: Base, mesh: Mesh) -> tuple[Base, Parts]:
    """Returns student and partitions with the teacher's parameters below the node `TEACHER`.

    They are frozen, so they are neither trained nor saved.
    """
    teacher = dataclasses.replace(
        teacher, config=dataclasses.replace(teacher.config, attention=base.config.attention)
    )
    own = plan_parts(teacher.config, BASE, mesh)

    def load(dtype_of: Callable[[str], Any], mesh: Mesh, quantize: str = "none") -> Tree:
        theirs = teacher.load(
            lambda path: dtype_of(f"{TEACHER}/{path}"), mesh, teacher.config.quantize
        )
        return base.load(dtype_of, mesh, quantize) | {TEACHER: theirs}

    labels = map_paths(lambda *_: FROZEN, abstract_params(teacher.config, BASE))
    return (
        dataclasses.replace(base, load=load, teacher=teacher),
        dataclasses.replace(
            parts,
            teacher=teacher.config,
            labels=parts.labels | {TEACHER: labels},
            shapes=parts.shapes | {TEACHER: own.shapes},
            shardings=parts.shardings | {TEACHER: own.shardings},
            findings=(*parts.findings, *own.findings),
        ),
    )


def apart(tree: Tree) -> tuple[Tree, Tree]:
    """Returns (the student's parameters, the teacher's) of a partition that holds both."""
    rest = dict(tree)
    held = rest.pop(TEACHER)
    return rest, jax.lax.stop_gradient(held)
