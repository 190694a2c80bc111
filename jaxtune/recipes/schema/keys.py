"""Every key of a config, declared once: type, default, valid values, and what uses it.

The table is data. `schema.resolve` checks configs against it, `cli.flags` reads flag types from
it, and the reference page of the documentation is written from it.
"""

from __future__ import annotations

from jaxtune.recipes.schema.evaluation import EVAL_KEYS
from jaxtune.recipes.schema.key import ABSENT, REQUIRED, Key
from jaxtune.recipes.schema.objective import OBJECTIVE
from jaxtune.recipes.schema.optim import OPTIM
from jaxtune.recipes.schema.peft import PEFT
from jaxtune.recipes.schema.retention import retention_keys

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
ATTENTION = ("auto", "xla", "splash", "cudnn", "ring")
FORMATS = (
    "chat", "completion", "instruction", "text", "tokens",
    "preference", "unpaired", "ranked", "stepwise", "prompt",
)  # fmt: skip
DURATION_UNITS = ("steps", "epochs", "examples", "tokens")

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
    *PEFT,
    *OBJECTIVE,
    *_DATA,
    *_LENGTH,
    *OPTIM,
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
