"""Rotary embeddings in config.json: `rope_scaling` of transformers 4, `rope_parameters` of 5."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

from jaxtune.core.errors import nearest
from jaxtune.models.rope import Rope

ORIGINAL = "original_max_position_embeddings"
# The fields of each type, and whether they must be there.
FIELDS: dict[str, dict[str, bool]] = {
    "default": {},
    "linear": {"factor": True},
    "dynamic": {"factor": True},
    "llama3": {"factor": True, "low_freq_factor": True, "high_freq_factor": True, ORIGINAL: False},
    "yarn": {
        "factor": False,
        ORIGINAL: False,
        "attention_factor": False,
        "beta_fast": False,
        "beta_slow": False,
        "mscale": False,
        "mscale_all_dim": False,
        "truncate": False,
    },
    "longrope": {
        "short_factor": True,
        "long_factor": True,
        "factor": False,
        ORIGINAL: False,
        "attention_factor": False,
    },
}


class Fields(Protocol):
    """What reading an object needs of `reader.Reader`."""

    def refuse(self, key: str, message: str) -> Exception:
        """Returns the error that names a field."""

    def positive(self, key: str, value: Any) -> float:
        """Returns `value` as a float if it is a positive number."""


def read_rope(
    read: Fields,
    key: str,
    fields: Any,
    *,
    context: int,
    theta: float,
    width: int,
    fraction: float | None = None,
    original: int | None = None,
    types: tuple[str, ...] = tuple(FIELDS),
) -> Rope:
    """Returns the Rope of one object of fields.

    Args:
        read: of the config.json, for errors.
        key: of the object, for errors.
        fields: the object.
        context: max_position_embeddings.
        theta: where the object has none of its own.
        width: of a head, H.
        fraction: the part of a head that turns, where the object does not say; None for a family
            that turns whole heads.
        original: original_max_position_embeddings beside the object, which wins.
        types: that the family knows.
    """
    if not isinstance(fields, Mapping):
        raise read.refuse(key, f"an object is wanted, not {fields!r}")
    fields = {name: value for name, value in fields.items() if value is not None}
    legacy = fields.pop("type", "default")
    kind = fields.pop("rope_type", legacy)
    if not isinstance(kind, str) or kind not in types:
        raise read.refuse(
            f"{key}.rope_type", f"{kind!r} is not supported; supported are {', '.join(types)}"
        )
    theta = read.positive(f"{key}.rope_theta", fields.pop("rope_theta", theta))
    part = fields.pop("partial_rotary_factor", None)
    if part is not None and fraction is None and part != 1:
        raise read.refuse(f"{key}.partial_rotary_factor", "only 1.0 is supported by this family")
    part = 1.0 if fraction is None else read.positive(key, fraction if part is None else part)
    if part > 1 or int(width * part) % 2:
        raise read.refuse(
            "head_dim" if part == 1 else f"{key}.partial_rotary_factor",
            f"{part} of {width} dimensions is no even number up to {width}",
        )
    unknown = [name for name in fields if name not in FIELDS[kind]]
    if unknown:
        hint = nearest(unknown[0], FIELDS[kind])
        raise read.refuse(f"{key}.{unknown[0]}", f"not a field of rope type {kind!r}{hint}")
    missing = [name for name, needed in FIELDS[kind].items() if needed and name not in fields]
    if missing:
        raise read.refuse(f"{key}.{missing[0]}", "the field is missing")

    def number(name: str, default: float) -> float:
        return read.positive(f"{key}.{name}", fields.get(name, default))

    common = {"theta": theta, "fraction": part, "scaling": kind}
    if kind == "default":
        return Rope(**common)
    if kind in ("linear", "dynamic"):
        common["factor"] = number("factor", 1)
        return Rope(**common, **({"original_context": context} if kind == "dynamic" else {}))
    before = int(number(ORIGINAL, context)) if original is None else original
    if kind == "llama3":
        low, high = number("low_freq_factor", 1), number("high_freq_factor", 4)
        if high <= low:
            raise read.refuse(f"{key}.high_freq_factor", "must be above low_freq_factor")
        return Rope(
            **common,
            factor=number("factor", 1),
            low_freq_factor=low,
            high_freq_factor=high,
            original_context=before,
        )
    factor = number("factor", context / before)
    if kind == "yarn":
        truncate = fields.get("truncate", True)
        if not isinstance(truncate, bool):
            raise read.refuse(f"{key}.truncate", f"true or false is wanted, not {truncate!r}")
        magnitude = _yarn_magnitude(factor, fields.get("mscale"), fields.get("mscale_all_dim"))
        return Rope(
            **common,
            factor=factor,
            original_context=before,
            beta_fast=number("beta_fast", 32),
            beta_slow=number("beta_slow", 1),
            truncate=truncate,
            magnitude=number("attention_factor", magnitude),
        )
    magnitude = longrope_magnitude(factor, before)
    factors = {}
    for name in ("short_factor", "long_factor"):
        value, size = fields[name], int(width * part) // 2
        if not isinstance(value, list) or len(value) != size:
            raise read.refuse(f"{key}.{name}", f"a list of {size} numbers is wanted")
        factors[f"{name}s"] = tuple(read.positive(f"{key}.{name}", v) for v in value)
    return Rope(
        **common,
        original_context=before,
        magnitude=number("attention_factor", magnitude),
        **factors,
    )


def _yarn_magnitude(factor: float, mscale: Any, mscale_all_dim: Any) -> float:
    """YaRN's attention factor (arXiv:2309.00071, eq. 22) with DeepSeek's two multipliers."""

    def scaled(multiplier: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * multiplier * math.log(factor) + 1.0

    if mscale and mscale_all_dim:
        return scaled(mscale) / scaled(mscale_all_dim)
    return scaled(1.0)


def longrope_magnitude(factor: float, original: int) -> float:
    """Returns LongRoPE's attention factor (arXiv:2402.13753, as Phi-3 computes it)."""
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def rope_fields(rope: Rope) -> dict[str, Any]:
    """Returns the object of one Rope, without `rope_theta`; {} for a plain one."""
    fields: dict[str, Any] = {"rope_type": rope.scaling}
    if rope.scaling == "default":
        return {}
    if rope.scaling in ("linear", "dynamic"):
        return fields | {"factor": rope.factor}
    fields[ORIGINAL] = rope.original_context
    if rope.scaling == "llama3":
        return fields | {
            "factor": rope.factor,
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
        }
    fields["attention_factor"] = rope.magnitude
    if rope.scaling == "yarn":
        return fields | {
            "factor": rope.factor,
            "beta_fast": rope.beta_fast,
            "beta_slow": rope.beta_slow,
            "truncate": rope.truncate,
        }
    return fields | {
        "short_factor": list(rope.short_factors),
        "long_factor": list(rope.long_factors),
    }


def rope_to_hf(rope: Rope | None) -> dict[str, Any]:
    """Returns `rope_theta` and `rope_scaling`, the spelling that transformers 4 and 5 both read."""
    if rope is None:
        return {}
    return {"rope_theta": rope.theta, "rope_scaling": rope_fields(rope) or None}
