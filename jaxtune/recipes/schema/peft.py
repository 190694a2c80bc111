"""The keys of `peft`: which partition is trained, and each method's own."""

from __future__ import annotations

from jaxtune.recipes.schema.key import REQUIRED, Key

METHODS = ("full", "lora", "adapter", "prompt", "prefix", "ia3", "bitfit")
PARTIAL = METHODS[1:]


def _method(*values: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    return (("peft.method", values),)


PEFT: tuple[Key, ...] = (
    Key("peft.method", "choice", "full", "which partition is trained", choices=METHODS),
    Key("peft.rank", "int", 8, "inner dimension r", low=1, used_by=_method("lora"), stored=True),
    Key(
        "peft.alpha",
        "float",
        16.0,
        "the update is scaled by alpha / r (rslora: alpha / sqrt(r))",
        above=0,
        used_by=_method("lora"),
        stored=True,
    ),
    Key(
        "peft.dropout",
        "float",
        0.0,
        "dropout on the adapter's input in training",
        low=0,
        below=1,
        used_by=_method("lora"),
    ),
    Key(
        "peft.targets",
        "targets",
        "all-linear",
        "modules that are adapted: all-linear, a regex of the path, or names",
        used_by=_method("lora", "ia3", "bitfit"),
        defaults={"ia3": ("k_proj", "v_proj", "down_proj")},
        stored=True,
    ),
    Key(
        "peft.variant",
        "choice",
        "lora",
        "scale and parametrisation",
        choices=("lora", "rslora", "dora", "pissa"),
        used_by=_method("lora"),
        stored=True,
    ),
    Key(
        "peft.ratio",
        "float",
        1.0,
        "LoRA+: learning rate of B over that of A",
        above=0,
        used_by=_method("lora"),
    ),
    Key(
        "peft.bottleneck",
        "int",
        64,
        "inner width",
        low=1,
        used_by=_method("adapter"),
        stored=True,
    ),
    Key(
        "peft.placement",
        "choice",
        "houlsby",
        "where the adapters stand",
        choices=("houlsby", "pfeiffer", "parallel"),
        used_by=_method("adapter"),
        stored=True,
    ),
    Key(
        "peft.activation",
        "choice",
        "gelu",
        "between down and up projection",
        choices=("gelu", "relu", "silu"),
        used_by=_method("adapter"),
        stored=True,
    ),
    Key(
        "peft.num_tokens",
        "int",
        20,
        "virtual tokens",
        low=1,
        used_by=_method("prompt", "prefix"),
        stored=True,
    ),
    Key(
        "peft.init",
        "choice",
        "vocab",
        "initial value of the prompt",
        choices=("vocab", "text", "random"),
        used_by=_method("prompt"),
        stored=True,
    ),
    Key(
        "peft.init_text",
        "text",
        REQUIRED,
        "text whose embeddings start the prompt",
        used_by=(("peft.method", ("prompt",)), ("peft.init", ("text",))),
    ),
    Key(
        "peft.train",
        "patterns",
        (),
        "path regexes trained besides the method's own; for full: the only ones (empty: all)",
    ),
    Key(
        "peft.init_from",
        "path",
        None,
        "adapter directory (PEFT, or format jaxtune) that training starts from; it says the keys "
        "of its method but dropout and ratio",
        optional=True,
        used_by=_method(*PARTIAL),
    ),
)
