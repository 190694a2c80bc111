"""Runs put together after training: one drawn towards its base, or several of one base merged."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
from jax.sharding import Mesh

from jaxtune.checkpoints.hf_export import config_of, with_biases
from jaxtune.core.errors import RequestError
from jaxtune.core.merging import COMBINE, combined
from jaxtune.core.tree import Tree, flatten, unflatten
from jaxtune.recipes.base import BASE, is_run
from jaxtune.recipes.language_model import LanguageModel
from jaxtune.recipes.runs import Run, merged_params, open_run


@dataclasses.dataclass(frozen=True)
class Mix:
    """How runs are put together.

    Attributes:
        others: workdirs of further runs of the same base.
        merge: a name in `core.merging.COMBINE`.
        tuned_share: of what tuning changed: 1 all of it, 0 the base (WiSE-FT).
        density: part of each task vector that TIES and DARE keep.
        seed: of what DARE drops.
    """

    others: tuple[Path, ...] = ()
    merge: str = "soup"
    tuned_share: float = 1.0
    density: float = 0.5
    seed: int = 0

    def __post_init__(self):
        if self.merge not in COMBINE:
            raise RequestError(f"{self.merge!r} is none of {', '.join(COMBINE)}", key="merge")
        if not 0 <= self.tuned_share <= 2:
            raise RequestError(f"{self.tuned_share!r} is not in 0..2", key="tuned_share")
        if not 0 < self.density <= 1:
            raise RequestError(f"{self.density!r} is not above 0 and at most 1", key="density")

    @property
    def changes(self) -> bool:
        """Whether the result is another model than the run."""
        return bool(self.others) or self.tuned_share != 1.0


def mixed(
    source: str | Path, lm: LanguageModel, mix: Mix, pick: str | None = None
) -> LanguageModel:
    """Returns the model that a mix makes of a run, whole weights in float32.

    Args:
        source: the run's workdir.
        lm: the run, loaded in float32.
        mix: how.
        pick: which checkpoint of `source`.

    Raises:
        RequestError: a directory without a run, a run of another base, or a method that cannot be
            merged.
    """
    runs = [opened(source, pick), *(opened(path) for path in mix.others)]
    for path, run in zip(mix.others, runs[1:], strict=True):
        if run.base.fingerprint != runs[0].base.fingerprint:
            raise RequestError(
                f"was tuned from other base weights than {source}", key="with", where=path
            )
    base = base_params(runs[0], lm.mesh)
    tuned = [merged_params(run, lm.mesh) for run in runs]
    config = config_of(lm.config, tuned[0])
    whole = [flatten(with_biases(config, params)) for params in (base, *tuned)]
    if any(params.keys() != whole[0].keys() for params in whole):
        raise RequestError("the runs differ in what they add to the base", key="with")
    params = put_together(whole[0], whole[1:], mix)
    return dataclasses.replace(
        lm, config=config, method=BASE, params=unflatten(params), stand=None, active=None
    )


def opened(path: str | Path, pick: str | None = None) -> Run:
    """Returns the run in a workdir; RequestError if it cannot be mixed."""
    path = Path(path)
    if not is_run(path):
        raise RequestError("holds no run; only runs know their base", key="model", where=path)
    run = open_run(path, pick)
    if not run.method.mergeable:
        raise RequestError(
            f"the method {run.method.name!r} adds no change of weights that could be mixed",
            key="model",
            where=path,
        )
    return run


def base_params(run: Run, mesh: Mesh) -> Tree:
    """Returns the parameters of a run's base in float32."""
    config = dataclasses.replace(run.base.config, dtype="float32")
    return dataclasses.replace(run.base, config=config).load(lambda _: "float32", mesh)


def put_together(
    base: dict[str, jax.Array], tuned: Sequence[dict[str, jax.Array]], mix: Mix
) -> dict[str, jax.Array]:
    """Returns {path: float32 weight}, one weight after the other."""
    combine, root = jax.jit(combined, static_argnames=("combine",)), jax.random.key(mix.seed)
    return {
        path: combine(
            weight,
            [params[path] for params in tuned],
            combine=COMBINE[mix.merge],
            share=mix.tuned_share,
            density=mix.density,
            key=jax.random.fold_in(root, number),
        )
        for number, (path, weight) in enumerate(base.items())
    }
