"""The objectives by name; a new one is a file beside this one and an entry here."""

from __future__ import annotations

from jaxtune.recipes import distill, grpo, kto, ppo, preference, reward, sft
from jaxtune.recipes.objective import Objective

OBJECTIVES: dict[str, Objective] = {
    "distill": distill.OBJECTIVE,
    "sft": sft.OBJECTIVE,
    "pretrain": sft.OBJECTIVE,
    "grpo": grpo.OBJECTIVE,
    "ppo": ppo.OBJECTIVE,
    "reward": reward.OBJECTIVE,
    "dpo": preference.DPO,
    "kto": kto.OBJECTIVE,
    "orpo": preference.ORPO,
    "simpo": preference.SIMPO,
    "cpo": preference.CPO,
}
