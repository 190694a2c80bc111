"""The methods by name."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxtune.peft.adapter import Adapter
from jaxtune.peft.bitfit import BitFit
from jaxtune.peft.full import Full
from jaxtune.peft.ia3 import Ia3
from jaxtune.peft.lora import Lora
from jaxtune.peft.method import Method
from jaxtune.peft.prefix import Prefix
from jaxtune.peft.prompt import Prompt

METHODS: dict[str, type[Method]] = {
    cls.name: cls for cls in (Full, Lora, Adapter, Prompt, Prefix, Ia3, BitFit)
}


def spec_of(method: Method) -> dict[str, Any]:
    """Returns the method as JSON values; `method_of_spec` is the inverse."""
    return {"name": method.name, **dataclasses.asdict(method)}


def method_of_spec(spec: dict[str, Any]) -> Method:
    """Returns the method that `spec_of` wrote down."""
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in spec.items() if k != "name"}
    return METHODS[spec["name"]](**values)
