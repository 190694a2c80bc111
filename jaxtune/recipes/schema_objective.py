"""The keys of `objective`: what is learned, and how."""

from __future__ import annotations

from jaxtune.recipes.schema_key import Key

# Objectives that learn from pairs of completions.
PAIRED = ("dpo", "orpo", "simpo", "cpo")
_LATER = "is not available in this version of jaxtune"


def _objective(*names: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    return (("objective.name", names),)


OBJECTIVE: tuple[Key, ...] = (
    Key(
        "objective.name",
        "choice",
        "sft",
        "what is learned",
        choices=("sft", "pretrain", *PAIRED),
        refused={name: _LATER for name in ("reward", "grpo", "ppo", "distill")},
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
        used_by=_objective(*PAIRED),
        defaults={"simpo": 2.0},
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
        "weight of the mean NLL a token of the chosen completions",
        low=0,
        used_by=_objective(*PAIRED),
        defaults={"orpo": 1.0, "cpo": 1.0},
    ),
)
