"""The keys of `optim`: the optimizer, its schedule, and groups of parameters."""

from __future__ import annotations

from jaxtune.recipes.schema.key import ABSENT, REQUIRED, Key

OPTIMIZERS = ("adamw", "adafactor", "lion", "sgd", "muon")
SCHEDULES = ("constant", "linear", "cosine", "wsd")
_ADAM = ("adamw", "lion", "muon")
_DECAYING = ("linear", "cosine", "wsd")


def _optimizer(*values: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    return (("optim.name", values),)


def _schedule(*values: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    return (("optim.schedule", values),)


OPTIM: tuple[Key, ...] = (
    Key("optim.name", "choice", "adamw", "optimizer", choices=OPTIMIZERS),
    Key("optim.lr", "float", REQUIRED, "peak learning rate", above=0),
    Key("optim.schedule", "choice", "constant", "shape after warm-up", choices=SCHEDULES),
    Key("optim.warmup_steps", "int", ABSENT, "linear warm-up in steps", low=0),
    Key("optim.warmup_epochs", "float", ABSENT, "linear warm-up in epochs", low=0),
    Key("optim.warmup_examples", "int", ABSENT, "linear warm-up in examples", low=0, high=2**53),
    Key("optim.warmup_tokens", "int", ABSENT, "linear warm-up in tokens", low=0, high=2**53),
    Key(
        "optim.warmup_ratio", "float", ABSENT, "linear warm-up as a share of the run", low=0, high=1
    ),
    Key(
        "optim.end_lr_ratio",
        "float",
        0.0,
        "last learning rate over the peak",
        low=0,
        high=1,
        used_by=_schedule(*_DECAYING),
    ),
    Key(
        "optim.decay_ratio",
        "float",
        0.1,
        "share of the run that decays",
        above=0,
        high=1,
        used_by=_schedule("wsd"),
    ),
    Key(
        "optim.b1",
        "float",
        0.9,
        "decay of the first moment",
        low=0,
        below=1,
        used_by=_optimizer(*_ADAM),
    ),
    Key(
        "optim.b2",
        "float",
        0.999,
        "decay of the second moment (lion: of the momentum)",
        low=0,
        below=1,
        used_by=_optimizer(*_ADAM),
        defaults={"lion": 0.99},
    ),
    Key(
        "optim.eps",
        "float",
        1e-8,
        "added to the denominator",
        above=0,
        used_by=_optimizer("adamw", "muon"),
    ),
    Key(
        "optim.momentum",
        "float",
        0.9,
        "decay of the momentum",
        low=0,
        below=1,
        used_by=_optimizer("sgd", "muon"),
        defaults={"muon": 0.95},
    ),
    Key("optim.weight_decay", "float", 0.0, "decoupled weight decay", low=0),
    Key(
        "optim.clip_norm",
        "float",
        1.0,
        "global norm over the trainables; None: off",
        above=0,
        optional=True,
    ),
    Key(
        "optim.layer_decay",
        "float",
        1.0,
        "factor of the learning rate from each block to the one below it",
        above=0,
        high=1,
    ),
    Key(
        "optim.groups",
        "groups",
        (),
        "{path regex: {lr_scale, weight_decay}}; the first that matches wins",
        entry=(
            Key("pattern", "regex", REQUIRED, "path regex"),
            Key("lr_scale", "float", 1.0, "factor on the learning rate", low=0),
            Key("weight_decay", "float", None, "None: the optimizer's own", low=0, optional=True),
        ),
    ),
)
