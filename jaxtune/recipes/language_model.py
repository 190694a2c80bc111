"""A loaded language model: logits, generation, adapters, and saving."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxtune.checkpoints import hf_export, native_adapter, peft_files
from jaxtune.core.errors import RequestError
from jaxtune.core.tree import Tree, flatten
from jaxtune.data.chat import render_prompt
from jaxtune.data.scored import scored_ids
from jaxtune.data.tokenizer import Tokenizer
from jaxtune.generate import engine, scoring, stops
from jaxtune.models.config import ModelConfig
from jaxtune.peft.method import Method
from jaxtune.recipes import adapters as several
from jaxtune.recipes.adapters import Choice, Stand


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A model, with the adapters that stand beside it; nothing is changed in place.

    Attributes:
        tokenizer: or None for a directory without one; then prompts are token ids.
        config: the ModelConfig.
        params: nested dict of parameters, jax arrays.
        method: how it was adapted.
        mesh: where the parameters lie.
        source: the directory that it came from.
        raw: the base's config.json, or None.
        stand: the base and all adapters by name; None: `params` are the base.
        active: what of them is in use: a name, {name: weight}, or None for the base alone.
    """

    tokenizer: Tokenizer | None
    config: ModelConfig
    params: Tree
    method: Method
    mesh: Mesh
    source: str
    raw: Mapping[str, Any] | None = None
    stand: Stand | None = None
    active: Choice = None

    def logits(self, ids: Any, mask: Any = None) -> jax.Array:
        """Returns float32 [B, T, V], the logits of the token after each real token.

        Args:
            ids: int [B, T].
            mask: [B, T], 1 at real tokens, which may stand left or right; None: all are real.

        Raises:
            RequestError: shapes that do not fit, ids outside the vocabulary, too many tokens.
        """
        self._check_lm_head()
        return scoring.logits(self.config, self.method, self.params, ids, mask)

    def logprobs(self, ids: Any, mask: Any = None) -> jax.Array:
        """Returns float32 [B, T-1], ln p(token t+1 | real tokens up to t); 0 at padding.

        Arguments and errors as `logits`.
        """
        self._check_lm_head()
        return scoring.logprobs(self.config, self.method, self.params, ids, mask)

    def scores(self, texts: Any, mask: Any = None, batch_size: int = 32) -> np.ndarray:
        """Returns float32 [n], a reward model's score at the last token of each text.

        Args:
            texts: a list of str, each a prompt with its completion, or of conversations (lists of
                messages that end with the assistant's), which become the ids that training makes
                of them, end included (`data.scored`); or a list of lists of ids, which are taken
                as they are; or int [n, T] with `mask`.
            mask: [n, T], 1 at real tokens, which may stand left or right; None: all are real.
            batch_size: texts to a compiled batch; does not change the scores.

        Raises:
            RequestError: a model without a score head, text without a tokenizer, an empty text,
                and what `logits` raises.
        """
        if not self.config.score_head:
            raise RequestError("the model is no reward model: it has no scores", where=self.source)
        if isinstance(texts, str) or (
            len(texts) and isinstance(texts[0], int | np.integer | Mapping)
        ):
            raise RequestError(
                "expected a list of texts, of conversations, or of lists of ids", key="texts"
            )
        if not len(texts):
            return np.zeros(0, np.float32)
        if isinstance(texts[0], str) or (len(texts[0]) and isinstance(texts[0][0], Mapping)):
            if self.tokenizer is None:
                raise RequestError("the model has no tokenizer; give token ids", where=self.source)
            texts = scored_ids(texts, self.tokenizer)
        if mask is None and isinstance(texts, list | tuple):
            texts, mask = scoring.padded(texts)
        ids, real = scoring.checked(self.config, self.method, texts, mask)
        parts = [slice(start, start + batch_size) for start in range(0, len(ids), batch_size)]
        found = [
            scoring.scores(self.config, self.method, self.params, ids[rows], real[rows])
            for rows in parts
        ]
        return np.concatenate([np.asarray(some) for some in found])

    def _check_lm_head(self) -> None:
        """Raises RequestError if the model has no logits."""
        if not self.config.lm_head:
            raise RequestError(
                "is a reward model, which has scores and no logits: it writes no text",
                where=self.source,
            )

    def generate(
        self,
        prompts: Any,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
        stop: str | Sequence[str] | None = None,
        batch_size: int = 32,
    ) -> Any:
        """Continues prompts: text in, text out; token ids in, new token ids out.

        Args:
            prompts: a str, a list of str, a list of ids, or a list of lists of ids. The answer
                has the same form and holds what is new only.
            max_new_tokens: the most tokens to write.
            temperature: 0 is greedy.
            top_p: keeps the most likely tokens that reach this probability together.
            top_k: keeps so many most likely tokens; 0 keeps all.
            seed: of the draws; a prompt's draws depend on its place in the list alone.
            stop: text, or texts, before which a completion ends.
            batch_size: prompts to a compiled batch; does not change the answers.

        Raises:
            RequestError: text without a tokenizer, an empty prompt, a setting out of range, or
                more tokens than the model has positions.
        """
        self._check_lm_head()
        if isinstance(prompts, str) or (len(prompts) and isinstance(prompts[0], int | np.integer)):
            one = prompts if isinstance(prompts, str) else list(prompts)
            return self.generate(
                [one], max_new_tokens, temperature, top_p, top_k, seed, stop, batch_size
            )[0]
        texts = len(prompts) > 0 and isinstance(prompts[0], str)
        wanted = [stop] if isinstance(stop, str) else list(stop or [])
        if (texts or wanted) and self.tokenizer is None:
            raise RequestError("the model has no tokenizer; give token ids", where=self.source)
        ids = [self.tokenizer.encode(p) for p in prompts] if texts else [list(p) for p in prompts]
        check = stops.stop_at(self.decode, wanted) if wanted else None
        new: list[list[int]] = []
        for start in range(0, max(len(ids), 1), batch_size):
            new += engine.generate(
                self.config,
                self.method,
                self.params,
                ids[start : start + batch_size],
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                seed=seed,
                eos_ids=self.eos_ids,
                stop_check=check,
                first_row=start,
            )
        if not texts:
            return new
        return [stops.cut(self.continuation(p, n), wanted) for p, n in zip(ids, new, strict=True)]

    def chat(self, messages: Sequence[Mapping[str, Any]], **settings: Any) -> str:
        """Returns the assistant's next message; `settings` are those of `generate`.

        Raises:
            RequestError: no tokenizer or no chat template, and what `generate` raises.
        """
        if self.tokenizer is None:
            raise RequestError("the model has no tokenizer", where=self.source)
        ids = render_prompt(messages, self.tokenizer)
        return self.continuation(ids, self.generate([ids], **settings)[0]).strip()

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids, without special tokens."""
        return self.tokenizer.decode(ids, skip_special=True)

    def continuation(self, prompt: Sequence[int], new: Sequence[int]) -> str:
        """Returns the text that `new` adds behind `prompt`, its first space included."""
        if not new:
            return ""
        before = self.decode(prompt)
        after = self.decode([*prompt, *new])
        return after[len(before) :] if after.startswith(before) else self.decode(new)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end a completion."""
        if self.tokenizer is not None:
            return self.tokenizer.eos_ids
        stop = (self.raw or {}).get("eos_token_id")
        return tuple(stop) if isinstance(stop, list) else () if stop is None else (stop,)

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the adapters that stand beside the base."""
        return tuple(self._stand().adapters)

    def _stand(self) -> Stand:
        return self.stand or Stand(self.config, flatten(self.params), {})

    def add_adapter(self, name: str, path: str | Path) -> LanguageModel:
        """Returns a model that also holds the adapter in a directory; what is in use stays.

        Args:
            name: a new name; a run's or `load`'s own adapter is called "default".
            path: PEFT directory, or one of format "jaxtune".

        Raises:
            RequestError: the name is taken, or the directory cannot be read or does not fit.
        """
        stand = self._stand()
        if not name or name in stand.adapters:
            raise RequestError(f"{name!r} is taken or empty; choose another", key="adapter")
        held = {**stand.adapters, name: several.read(stand, path, self.mesh)}
        return dataclasses.replace(self, stand=dataclasses.replace(stand, adapters=held))

    def use(self, choice: Choice) -> LanguageModel:
        """Returns the model with other adapters in use; the base's arrays are shared.

        Args:
            choice: a name; {name: weight} for base + Σ weight · (what the adapter changes), LoRA
                (but DoRA) and IA3 among themselves; None for the base alone.

        Raises:
            RequestError: an unknown name, or adapters that cannot be weighed.
        """
        stand = self._stand()
        config, method, params = several.use(stand, choice)
        return dataclasses.replace(
            self, config=config, method=method, params=params, stand=stand, active=choice
        )

    def merge(self, choice: Choice) -> LanguageModel:
        """Returns a model with adapters merged into its base, in use without any; the rest stay.

        Args:
            choice: as for `use`.

        Raises:
            RequestError: what `use` raises, or a method that cannot be merged.
        """
        return dataclasses.replace(self, stand=several.merge(self._stand(), choice)).use(None)

    def save(self, directory: str | Path, format: str = "hf") -> None:
        """Writes files that other tools load; an older export there is replaced at the end.

        Args:
            directory: where.
            format: "hf": config.json, safetensors (the method merged, in float32 arithmetic, and
                written in the dtype of the loaded weights; a quantised kernel as the whole weight
                that it stands for), tokenizer; "peft": the adapter alone;
                "jaxtune": the adapter alone, of any method, for `load` and `add_adapter`.

        Raises:
            RequestError: a format or method that cannot be written so.
        """
        if format == "hf":
            merged = self.method.merge(self.params)
            hf_export.save_hf(
                directory,
                self.config,
                merged,
                dtype=self.config.compute_dtype,
                tokenizer=self.tokenizer,
                raw=self.raw,
            )
        elif format == "peft":
            peft_files.save_adapter(
                directory, self.config.unquantized, self.method, self.params, self.source
            )
        elif format == "jaxtune":
            native_adapter.save_adapter(
                directory, self.config.unquantized, self.method, self.params, self.source
            )
        else:
            raise RequestError(f"{format!r} is none of 'hf', 'peft', 'jaxtune'", key="format")
