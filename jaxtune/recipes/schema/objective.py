"""The keys of `objective`: what is learned, and how."""

from __future__ import annotations

from jaxtune.recipes.schema.key import REQUIRED, Key
from jaxtune.recipes.schema.online import ONLINE

# Objectives that learn from pairs of completions.
PAIRED = ("dpo", "orpo", "simpo", "cpo")

REWARD_ENTRY = (
    Key(
        "function",
        "text",
        REQUIRED,
        "name of a built-in reward (docs/rewards.md), module:function or path/to/file.py:function",
    ),
    Key("weight", "float", 1.0, "factor in the total; negative: a penalty"),
    Key("arguments", "table", {}, "keyword arguments of the function"),
    Key(
        "timeout",
        "float",
        300.0,
        "seconds that one call, over a whole batch, may take; None: no limit",
        above=0,
        optional=True,
    ),
    Key(
        "on_error",
        "choice",
        "stop",
        "a reward that raises, hangs or gives no number stops the run, or its samples are dropped",
        choices=("stop", "drop"),
    ),
)


def _objective(*names: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    return (("objective.name", names),)


OBJECTIVE: tuple[Key, ...] = (
    Key(
        "objective.name",
        "choice",
        "sft",
        "what is learned",
        choices=("sft", "pretrain", *PAIRED, "kto", "distill", "reward", "grpo", "ppo"),
    ),
    Key(
        "objective.balance",
        "float",
        0.0,
        "coefficient of the load-balancing loss; for models with experts",
        low=0,
    ),
    Key(
        "objective.loss_type",
        "choice",
        "sigmoid",
        "loss of a pair's margin; sigmoid_norm and ipo: of margins a token",
        choices=("sigmoid", "sigmoid_norm", "robust", "hinge", "ipo"),
        used_by=_objective("dpo"),
    ),
    Key(
        "objective.beta",
        "float",
        0.1,
        "strength of the pull towards the reference; simpo, cpo: scale of the rewards; orpo: "
        "weight of the odds ratio",
        above=0,
        used_by=_objective(*PAIRED, "kto"),
        defaults={"simpo": 2.0},
    ),
    Key(
        "objective.desirable_weight",
        "float",
        1.0,
        "factor of the loss of desirable completions",
        low=0,
        used_by=_objective("kto"),
    ),
    Key(
        "objective.undesirable_weight",
        "float",
        1.0,
        "factor of the loss of the others",
        low=0,
        used_by=_objective("kto"),
    ),
    Key(
        "objective.label_smoothing",
        "float",
        0.0,
        "share of pairs whose sides are taken to be exchanged",
        low=0,
        below=0.5,
        used_by=(
            *_objective("dpo", "simpo", "cpo"),
            ("objective.loss_type", ("sigmoid", "sigmoid_norm", "robust")),
        ),
    ),
    Key(
        "objective.gamma",
        "float",
        1.0,
        "by how much the chosen reward is to be larger",
        low=0,
        used_by=_objective("simpo"),
    ),
    Key(
        "objective.nll_weight",
        "float",
        0.0,
        "weight of the mean NLL a token of the chosen completions; distill: of the targets",
        low=0,
        used_by=_objective(*PAIRED, "distill"),
        defaults={"orpo": 1.0, "cpo": 1.0},
    ),
    Key(
        "objective.teacher",
        "path",
        None,
        "model whose distributions are learned: a Hugging Face directory or a run's workdir",
        optional=True,
        used_by=_objective("distill"),
    ),
    Key(
        "objective.teacher_data",
        "path",
        None,
        "directory that jaxtune data teacher has written, in place of the teacher",
        optional=True,
        used_by=_objective("distill"),
    ),
    Key(
        "objective.teacher_quantize",
        "choice",
        "none",
        "how the kernels of the teacher's blocks are held",
        choices=("none", "int8", "nf4"),
        used_by=_objective("distill"),
    ),
    Key(
        "objective.teacher_temperature",
        "float",
        1.0,
        "divides the logits of teacher and student",
        above=0,
        used_by=_objective("distill"),
    ),
    Key(
        "objective.divergence",
        "choice",
        "forward",
        "forward: KL(teacher‖student); reverse: KL(student‖teacher); jsd: the generalised "
        "Jensen–Shannon divergence",
        choices=("forward", "reverse", "jsd"),
        used_by=_objective("distill"),
    ),
    Key(
        "objective.mixture",
        "float",
        0.5,
        "share of the teacher in the middle of the jsd",
        above=0,
        below=1,
        used_by=(*_objective("distill"), ("objective.divergence", ("jsd",))),
    ),
    Key(
        "objective.rewards",
        "entries",
        REQUIRED,
        "what completions are scored by; the total is the weighted sum",
        entry=REWARD_ENTRY,
        used_by=(("objective.name", ("grpo", "ppo")),),
    ),
    Key(
        "objective.centering",
        "float",
        0.0,
        "coefficient of (chosen + rejected)², which holds scores around 0; of pairs",
        low=0,
        used_by=(("objective.name", ("reward",)),),
    ),
    *ONLINE,
)
