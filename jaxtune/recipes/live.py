"""The model of a run while it trains, as a LanguageModel."""

from __future__ import annotations

from jax.sharding import Mesh

from jaxtune.core.tree import Tree, combine
from jaxtune.data.tokenizer import Tokenizer
from jaxtune.recipes.assemble import TEACHER, Parts
from jaxtune.recipes.language_model import LanguageModel


def live_model(
    tokenizer: Tokenizer | None, parts: Parts, mesh: Mesh, trainable: Tree, frozen: Tree
) -> LanguageModel:
    """Returns the model that these parameters make; they are used where they lie.

    Args:
        tokenizer: of the run.
        parts: its model.
        mesh: where the parameters lie.
        trainable, frozen: the parameters; a teacher's are left out.
    """
    own = {node: leaves for node, leaves in frozen.items() if node != TEACHER}
    params = combine(trainable, own)
    return LanguageModel(tokenizer, parts.config, params, parts.method, mesh, "the run")
