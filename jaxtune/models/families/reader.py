"""Reading config.json strictly: a field that is not understood is refused, never dropped."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any

from jaxtune.core.errors import RequestError, nearest
from jaxtune.models.families.rope_fields import FIELDS, read_rope
from jaxtune.models.rope import Rope

# transformers' names of activations, and ours.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}

# No model has more, and a file that says so would fill the memory before its tensors are missed.
MOST = 2**31 - 1
MOST_PARTS = dict.fromkeys(
    ("num_hidden_layers", "n_layer", "num_experts", "num_local_experts"), 10_000
)

# Fields that leave the logits alone: ids, storage, bookkeeping of transformers 4 and 5, decoding
# defaults that old versions kept here, and dropout rates, which a run's own config decides.
INERT = frozenset(
    """
    add_cross_attention architectures attention_dropout bad_words_ids begin_suppress_tokens
    bos_token_id chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id
    diversity_penalty do_sample dtype early_stopping encoder_no_repeat_ngram_size eos_token_id
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id
    id2label is_decoder is_encoder_decoder keys_to_ignore_at_inference label2id length_penalty
    max_length min_length model_type no_repeat_ngram_size num_beam_groups num_beams
    num_return_sequences output_attentions output_hidden_states output_scores pad_token_id prefix
    problem_type pruned_heads remove_invalid_values repetition_penalty resid_pdrop return_dict
    return_dict_in_generate sep_token_id suppress_tokens task_specific_params temperature
    tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p torch_dtype torchscript
    transformers.js_config transformers_version typical_p use_bfloat16 use_cache
    """.split()  # noqa: SIM905 - a paragraph reads better than sixty lines
)


class Reader:
    """Fields of a config.json, each taken once; `finish` refuses what nobody took.

    Args:
        raw: the parsed file.
        where: the file, for messages.
    """

    def __init__(self, raw: Mapping[str, Any], where: object | None = None):
        self.raw, self.where, self.taken = raw, where, set(INERT)

    def refuse(self, key: str, message: str) -> RequestError:
        """Returns the error that names a field."""
        return RequestError(message, key=key, where=self.where)

    def take(self, key: str, default: Any = None) -> Any:
        """Returns a field's value, or the default where it is absent or null."""
        self.taken.add(key)
        value = self.raw.get(key)
        return default if value is None else value

    def integer(self, key: str, default: int | None = None) -> int:
        """Returns a positive integer; without a default the field must be there."""
        value = self.take(key, default)
        if value is None:
            raise self.refuse(key, "the field is missing")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.refuse(key, f"a positive integer is wanted, not {value!r}")
        most = MOST_PARTS.get(key, MOST)
        if value > most:
            raise self.refuse(key, f"{value} is too large; at most {most} is read")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Returns a positive number; without a default the field must be there."""
        value = self.take(key, default)
        return self.positive(key, value)

    def positive(self, key: str, value: Any) -> float:
        """Returns `value` as a float if it is a positive number."""
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 < value <= sys.float_info.max:  # neither NaN nor infinity
            raise self.refuse(key, f"a positive number is wanted, not {value!r}")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        """Returns a boolean."""
        value = self.take(key, default)
        if not isinstance(value, bool):
            raise self.refuse(key, f"true or false is wanted, not {value!r}")
        return value

    def only(self, key: str, *allowed: Any) -> None:
        """Refuses any value but null and the allowed ones."""
        value = self.take(key)
        if value is not None and value not in allowed:
            wanted = " or ".join(repr(a) for a in allowed) or "null"
            raise self.refuse(key, f"{value!r} is not supported; only {wanted} is")

    def architecture(self, name: str) -> None:
        """Refuses a checkpoint that says it is anything but `name`."""
        found = self.raw.get("architectures")
        if found is None or found == []:
            return
        if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
            raise self.refuse("architectures", f"a list of names is wanted, not {found!r}")
        if name not in found:
            raise self.refuse("architectures", f"{found!r} is not supported; only {name!r} is")

    def activation(self, key: str = "hidden_act", default: str = "silu") -> str:
        """Returns our name of an activation."""
        value = self.take(key, default)
        if not isinstance(value, str) or value not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise self.refuse(key, f"{value!r} is not supported; known are {known}")
        return ACTIVATIONS[value]

    def heads(self, default_head_dim: int | None = None) -> dict[str, int]:
        """Returns num_heads, num_kv_heads, head_dim and hidden_size."""
        hidden, heads = self.integer("hidden_size"), self.integer("num_attention_heads")
        kv_heads = self.integer("num_key_value_heads", heads)
        if heads % kv_heads:
            raise self.refuse(
                "num_key_value_heads", f"num_attention_heads {heads} is no multiple of {kv_heads}"
            )
        if self.raw.get("head_dim") is None and default_head_dim is None and hidden % heads:
            raise self.refuse("hidden_size", f"{hidden} is no multiple of {heads} attention heads")
        head_dim = self.integer("head_dim", default_head_dim or hidden // heads)
        return {
            "hidden_size": hidden,
            "num_heads": heads,
            "num_kv_heads": kv_heads,
            "head_dim": head_dim,
        }

    def rope(
        self,
        context: int,
        width: int,
        *,
        theta: float = 10000.0,
        fraction: float | None = None,
        original: int | None = None,
        types: tuple[str, ...] = tuple(FIELDS),
        names: tuple[str, str] = ("rope_theta", "partial_rotary_factor"),
    ) -> Rope:
        """Returns the rotary embedding that all layers share; see `rope_fields.read_rope`.

        `names` are the fields of theta and of the fraction.
        """
        if fraction is None:
            self.only(names[1], 1, 1.0)
        else:
            fraction = self.number(names[1], fraction)
        theta = self.number(names[0], theta)
        old, new = self.take("rope_scaling", {}), self.take("rope_parameters", {})
        key, fields = ("rope_scaling", old) if old else ("rope_parameters", new)
        if old and new and old != new:
            raise self.refuse("rope_parameters", "contradicts rope_scaling")
        more = {"context": context, "theta": theta, "width": width, "fraction": fraction}
        return read_rope(self, key, fields, original=original, types=types, **more)

    def layer_types(self, count: int) -> list[str] | None:
        """Returns `layer_types`: for each layer "full_attention" or "sliding_attention"."""
        types = self.take("layer_types")
        if types is None:
            return None
        known = ("full_attention", "sliding_attention")
        if not isinstance(types, list) or len(types) != count or any(t not in known for t in types):
            wanted = f"{count} (num_hidden_layers) of {' and '.join(map(repr, known))}"
            raise self.refuse("layer_types", f"{wanted} wanted")
        return types

    def finish(self, known: Iterable[str] = ()) -> None:
        """Refuses fields that were not taken, unless they are switched off or private.

        Args:
            known: further fields that do not matter to this family.
        """
        known = set(known) | self.taken
        for key, value in self.raw.items():
            # null, false and empty switch a feature off; `_name_or_path` and its like are notes
            off = value is None or value is False or value == {} or value == []
            if key not in known and not off and not key.startswith(("_", "unsloth_")):
                raise self.refuse(
                    key,
                    f"unknown field with value {str(value)[:60]!r}, which may change what the "
                    f"model computes{nearest(key, known - INERT)}; if it does not, remove it",
                )


def activation_to_hf(name: str) -> str:
    """Returns transformers' name of an activation; ours where it has none, which is refused."""
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    return (names | {"gelu_tanh": "gelu_pytorch_tanh"}).get(name, name)
