"""Full fine-tuning, and partial unfreezing by path."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from jaxtune.core.tree import Rules
from jaxtune.peft.method import TRAINED, Method


@dataclasses.dataclass(frozen=True)
class Full(Method):
    """Trains every parameter, or only those whose path matches a regex of `train`."""

    name: ClassVar[str] = "full"

    def rules(self) -> Rules:
        """Returns the rule that trains all, unless `train` names the paths."""
        return () if self.train else ((".*", TRAINED),)
