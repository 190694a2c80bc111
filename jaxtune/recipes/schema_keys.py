"""Every key of a config, declared once: type, default, valid values, and what uses it.

The table is data. `schema.resolve` checks configs against it, `cli.flags` reads flag types from
it, and the reference page of the documentation is written from it.
"""

from __future__ import annotations

from jaxtune.recipes.schema_eval import EVAL_KEYS
from jaxtune.recipes.schema_key import ABSENT, REQUIRED, Key
from jaxtune.recipes.schema_objective import OBJECTIVE
from jaxtune.recipes.schema_retention import retention_keys

PRESETS = (
    "tiny-1m",
    "small-20m",
    "smollm2-135m",
    "gpt2-124m",
    "qwen2.5-0.5b",
    "llama3.2-1b",
    "gemma2-2b",
    "gemma2-9b",
    "llama3.1-8b",
    "qwen3-8b",
    "qwen3-30b-a3b",
    "llama3.1-70b",
)
METHODS = ("full", "lora", "adapter", "prompt", "prefix", "ia3", "bitfit")
PARTIAL = METHODS[1:]
ATTENTION = ("auto", "xla", "splash", "cudnn", "ring")
OPTIMIZERS = ("adamw", "adafactor", "lion", "sgd", "muon")
SCHEDULES = ("constant", "linear", "cosine", "wsd")
FORMATS = (
    "chat", "completion", "instruction", "text", "tokens",
    "preference", "unpaired", "ranked", "stepwise", "prompt",
)  # fmt: skip
DURATION_UNITS = ("steps", "epochs", "examples", "tokens")

_LATER = "is not available in this version of jaxtune"


def _method(*values: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    return (("peft.method", values),)


def _optimizer(*values: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    return (("optim.name", values),)


def _schedule(*values: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    return (("optim.schedule", values),)


_SOURCE = Key(
    "source",
    "source",
    REQUIRED,
    "jsonl:PATH[.gz], text:PATH[.gz] or tfds:NAME[/CONFIG][:VERSION]:SPLIT",
)
_FORMAT = Key(
    "format",
    "choice",
    REQUIRED,
    "what a record holds",
    choices=FORMATS,
)

TRAIN_ENTRY = (
    _SOURCE,
    _FORMAT,
    Key("weight", "float", 1.0, "share of this source in the mixture", above=0),
)
EVAL_ENTRY = (
    _SOURCE,
    _FORMAT,
    Key("name", "text", None, "name in the metrics; by default from the source", optional=True),
)
HELD_ENTRY = (
    *EVAL_ENTRY,
    Key(
        "by",
        "text",
        None,
        "field of the records: the metrics of each of its values too, as eval/NAME/VALUE/…",
        optional=True,
    ),
)

_MODEL = (
    Key("model.path", "path", None, "Hugging Face directory or a run's workdir", optional=True),
    Key(
        "model.preset",
        "choice",
        None,
        "a named size with random weights",
        choices=PRESETS,
        optional=True,
    ),
    Key(
        "model.tokenizer",
        "path",
        None,
        "tokenizer directory; by default the one in model.path",
        optional=True,
    ),
    Key(
        "model.add_tokens",
        "texts",
        (),
        "tokens to add to the vocabulary; their rows begin as the mean of the others and train",
    ),
    Key(
        "model.dtype",
        "choice",
        "bfloat16",
        "of frozen weights and of the computation",
        choices=("bfloat16", "float32"),
    ),
    Key(
        "model.attention",
        "choice",
        "auto",
        "attention back end (docs/attention.md); auto takes the fastest that applies",
        choices=ATTENTION,
    ),
    Key(
        "model.remat",
        "choice",
        "none",
        "what is recomputed in the backward pass",
        choices=("none", "block", "dots"),
    ),
    Key(
        "model.quantize",
        "choice",
        "none",
        "storage of the blocks' kernels, which stay frozen",
        choices=("none", "int8", "nf4"),
    ),
    Key("model.overrides", "table", {}, "fields of ModelConfig that replace the loaded ones"),
)

_PEFT = (
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

_DATA = (
    Key("data.train", "entries", REQUIRED, "sources of training examples", entry=TRAIN_ENTRY),
    Key("data.eval", "entries", (), "sources of held-out examples", entry=HELD_ENTRY),
    Key("data.seq_len", "int", REQUIRED, "tokens in a row", low=2),
    Key("data.packing", "bool", False, "several examples in a row, with segment ids"),
    Key("data.shuffle", "bool", True, "a new order in each epoch"),
    Key(
        "data.overlong",
        "choice",
        "error",
        "what happens to an example longer than seq_len",
        choices=("error", "drop", "truncate"),
    ),
    Key(
        "data.max_prompt",
        "int",
        None,
        "most tokens of a prompt; by default what data.seq_len leaves beside a completion",
        low=1,
        optional=True,
        used_by=(("objective.name", ("grpo", "ppo")),),
    ),
    Key("data.template", "text", None, "chat template in place of the tokenizer's", optional=True),
)

_LENGTH = (
    Key("batch_size", "int", REQUIRED, "sequences in a step, over all devices", low=1),
    Key("grad_accum", "int", 1, "micro-batches that a step is divided into", low=1),
    Key("total_steps", "int", ABSENT, "length of the run in steps", low=1),
    Key("total_epochs", "float", ABSENT, "length of the run in epochs", above=0),
    Key("total_examples", "int", ABSENT, "length of the run in examples", low=1, high=2**53),
    Key("total_tokens", "int", ABSENT, "length of the run in tokens", low=1, high=2**53),
)

_ADAM = ("adamw", "lion", "muon")
_DECAYING = ("linear", "cosine", "wsd")

_OPTIM = (
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

_MESH = (
    Key("mesh.data", "int", 1, "devices along the batch, parameters copied", low=-1),
    Key(
        "mesh.fsdp",
        "int",
        -1,
        "devices along the batch, parameters sharded; -1: what is left",
        low=-1,
    ),
    Key("mesh.tensor", "int", 1, "devices along heads, hidden units and vocabulary", low=-1),
    Key("mesh.sequence", "int", 1, "devices along the tokens of a row", low=-1),
    Key(
        "mesh.expert",
        "int",
        1,
        "devices along experts, and along the batch outside them",
        low=-1,
    ),
    Key(
        "mesh.slices",
        "int",
        -1,
        "groups of devices joined by a slow network; sizes are those of one; -1: what devices say",
        low=-1,
    ),
    Key(
        "mesh.slice_axis",
        "choice",
        "data",
        "the axis that is as many times as long, across slices",
        choices=("data", "fsdp"),
    ),
)

_RUN = (
    Key("checkpoint.every_steps", "int", None, "None: only at the end", low=1, optional=True),
    Key("checkpoint.keep", "int", 2, "newest checkpoints that stay", low=1),
    Key(
        "checkpoint.keep_best",
        "text",
        None,
        "metric, such as eval/loss, whose best checkpoint stays too",
        optional=True,
    ),
    Key("checkpoint.async_save", "bool", True, "write while training goes on"),
    *EVAL_KEYS,
    Key("log.every_steps", "int", 10, "steps between two rows of metrics.jsonl", low=1),
    Key(
        "log.samples",
        "int",
        0,
        "completions of held-out prompts that the report shows before and after",
        low=0,
    ),
    Key("log.tensorboard", "bool", True, "write TensorBoard files"),
    Key("log.wandb", "bool", False, "report to Weights & Biases"),
)

KEYS: tuple[Key, ...] = (
    Key("seed", "int", 0, "of initialisation, order and dropout", low=0, high=2**32 - 1),
    *_MODEL,
    *_PEFT,
    *OBJECTIVE,
    *_DATA,
    *_LENGTH,
    *_OPTIM,
    *_MESH,
    *_RUN,
    *retention_keys(EVAL_ENTRY, TRAIN_ENTRY),
)
BY_PATH: dict[str, Key] = {key.path: key for key in KEYS}
SECTIONS: tuple[str, ...] = tuple(
    dict.fromkeys(key.path.partition(".")[0] for key in KEYS if "." in key.path)
)


def children(section: str) -> list[str]:
    """Returns the names directly below a section ("" is the top)."""
    names = []
    for path in BY_PATH:
        head, _, rest = path.rpartition(".")
        if head == section:
            names.append(rest)
    return names + (list(SECTIONS) if not section else [])
