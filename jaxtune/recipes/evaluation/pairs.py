"""What `jaxtune eval` measures on pairs."""

from __future__ import annotations

from typing import Any

from jaxtune.recipes.assemble import plan_parts
from jaxtune.recipes.language_model import LanguageModel
from jaxtune.recipes.preference import (
    base_reference,
    dpo_term,
    likelihood_term,
    preference_loss,
)
from jaxtune.recipes.reference import adapters_off
from jaxtune.recipes.rows import Rows
from jaxtune.training.step import SumLoss


def pair_loss(lm: LanguageModel, rows: Rows, run: Any) -> SumLoss:
    """Returns the loss of pairs under a model.

    Of a DPO run whose reference is its base it is the run's own, with implicit rewards; of another
    model the NLL of the chosen sides, with the sides' likelihoods compared.

    Args:
        lm: the model.
        rows: what is known of the rows of a batch.
        run: resolved config of the run that the model comes from, or None.
    """
    name = None if run is None else run.objective.name
    if name == "dpo" and adapters_off(
        plan_parts(lm.config, lm.method, lm.mesh), run.peft.get("init_from")
    ):
        reference = base_reference(lm.config, rows)
        term = dpo_term(run.objective)
        return preference_loss(lm.config, lm.method, rows, term, reference=reference)
    return preference_loss(lm.config, lm.method, rows, likelihood_term)
