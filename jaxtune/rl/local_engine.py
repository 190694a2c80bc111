"""Samples drawn on the training mesh, by the arrays that are trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax

from jaxtune.core.errors import RequestError
from jaxtune.core.tree import Tree
from jaxtune.generate import sampler, stops
from jaxtune.models.config import ModelConfig
from jaxtune.peft.method import Method
from jaxtune.rl.engine import Sample, Sampling


@dataclasses.dataclass
class LocalEngine:
    """An Engine that runs the trainer's model: adapter applied, no weight copied.

    Attributes:
        config, method: the model as it is trained.
        decode: token ids → text, for stop strings; None where there are none.
        slots: the most samples that are written side by side, which sizes the cache.
        params: those of the latest `update`.
    """

    config: ModelConfig
    method: Method
    decode: Callable[[list[int]], str] | None = None
    slots: int = 64
    params: Tree | None = None

    def update(self, params: Tree) -> None:
        """Takes the combined parameters, the very arrays of the trainer.

        A step that donates its state frees them: call this again after each.
        """
        self.params = params

    def sample(
        self, prompts: Sequence[Sequence[int]], count: int, sampling: Sampling, seed: int
    ) -> list[list[Sample]]:
        """Returns `count` samples of each prompt; see `engine.Engine` and `sampler.sample`.

        Raises:
            RequestError: what `sampler.sample` refuses, a stop string without `decode`, and rows
                whose length changes the rotary frequencies of what was read before.
        """
        self._check(prompts, sampling)
        check = stops.stop_at(self.decode, sampling.stop) if sampling.stop else None
        return sampler.sample(
            self.config,
            self.method,
            self.params,
            prompts,
            count,
            max_new_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            seed=seed,
            eos_ids=sampling.eos_ids,
            stop_check=check,
            slots=self.slots,
        )

    def _check(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:
        if self.params is None or any(leaf.is_deleted() for leaf in jax.tree.leaves(self.params)):
            raise RequestError("the sampler has no weights, or a step freed them: call update")
        if sampling.stop and self.decode is None:
            raise RequestError("stop strings need a tokenizer", key="stop")
        lead = self.method.num_virtual + self.method.position_offset
        for number, prompt in enumerate(prompts):
            read = lead + len(prompt)
            self._check_length(number, read, read + sampling.max_new_tokens)

    def _check_length(self, number: int, read: int, whole: int) -> None:
        """Refuses a row whose tokens have other probabilities when it is longer.

        Dynamic and LongRoPE frequencies follow the length that a row has, so what the sampler sees
        while it is short is not what the trainer sees when it is whole.
        """
        for kind in self.config.kinds:
            if kind.rope is None or not kind.rope.follows_length:
                continue
            edge = kind.rope.original_context
            if whole > edge and (kind.rope.scaling == "dynamic" or read <= edge):
                raise RequestError(
                    f"prompt {number} of {read} positions may grow to {whole}: beyond {edge} the "
                    f"frequencies of rope scaling {kind.rope.scaling!r} change with the length, "
                    "and with them the probabilities of the tokens before",
                    key="max_new_tokens",
                )
