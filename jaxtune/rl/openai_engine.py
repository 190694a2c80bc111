"""Samples from a server that speaks OpenAI's completions protocol, such as vLLM.

The request fields beyond OpenAI's are vLLM's (docs.vllm.ai, "OpenAI-Compatible Server" and "LoRA
Adapters"): `return_token_ids`, `return_tokens_as_token_ids`, `stop_token_ids`, `ignore_eos`,
`top_k`, `min_p`, `repetition_penalty`, and the calls that load and unload an adapter.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import math
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune.checkpoints.peft_files import refuse_unsavable, save_adapter
from jaxtune.core.errors import RequestError
from jaxtune.core.tree import Tree, flatten
from jaxtune.generate.sampler import check_request
from jaxtune.models.config import ModelConfig
from jaxtune.models.decoder import abstract_params
from jaxtune.parallel import processes
from jaxtune.peft.lora import Lora
from jaxtune.peft.method import Method, is_routed
from jaxtune.rl.engine import Sample, Sampling
from jaxtune.rl.http import Server, ServerError

COMPLETIONS = "/v1/completions"
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
TOKEN_ID = "token_id:"  # in front of an id where tokens are written as ids


@dataclasses.dataclass
class OpenAIEngine:
    """An Engine that asks a server, which holds the base; each `update` gives it the adapter.

    Attributes:
        config, method: the model as it is trained; a LoRA, the one method that vLLM serves.
        server: where.
        base: the name by which the server knows the base model.
        directory: where the adapters are written, each into a directory of its own; the server must
            see it under the same path.
        tempered: whether the server's log-probabilities are those behind the temperature and the
            narrowing (vLLM's `--logprobs-mode processed_logprobs`) or, its default, those before.
        concurrency: requests under way at a time, one a prompt.
        name: of the adapters; the n-th is NAME-n. A run that is continued takes another by default,
            for the server may still hold those of before.
        updates: how many there were.
    """

    config: ModelConfig
    method: Method
    server: Server
    base: str
    directory: Path
    tempered: bool = False
    concurrency: int = 16
    name: str = dataclasses.field(default_factory=lambda: f"jaxtune-{secrets.token_hex(4)}")
    updates: int = 0

    def __post_init__(self):
        refuse_unsavable(self.method, self.config)
        wrong = None
        if not isinstance(self.method, Lora) or self.method.variant == "dora":
            variant = getattr(self.method, "variant", self.method.name)
            wrong = f"a server of adapters takes lora, not {variant}"
        elif self.method.train:
            wrong = "a server of adapters takes no other trained parameters (peft.train)"
        if wrong is not None:
            raise RequestError(f"{wrong}; use the local engine", key="peft.method")
        own = [p for p in flatten(abstract_params(self.config, self.method)) if "/lora/" in p]
        if any(is_routed(path) for path in own):
            raise RequestError(
                "adapts experts or their router, which vLLM reads otherwise than PEFT writes them "
                "(Mixtral's it leaves out); use the local engine",
                key="peft.targets",
            )

    def update(self, params: Tree) -> None:
        """Writes the adapter as a PEFT directory and has the server load it; the last one goes.

        Raises:
            ServerError: the server does not load it.
        """
        last = self.updates
        self.updates += 1
        path = self._path(self.updates)
        save_adapter(path, self.config.unquantized, self.method, params, self.base)
        if processes.is_writer():
            body = {"lora_name": self._model(self.updates), "lora_path": str(path)}
            self.server.post(LOAD, body)
            if last:
                self.server.post(UNLOAD, {"lora_name": self._model(last)})
                shutil.rmtree(self._path(last))

    def _path(self, number: int) -> Path:
        return Path(self.directory).absolute() / self._model(number)

    def _model(self, number: int) -> str:
        return f"{self.name}-{number}" if number else self.base

    def sample(
        self, prompts: Sequence[Sequence[int]], count: int, sampling: Sampling, seed: int
    ) -> list[list[Sample]]:
        """Returns `count` samples of each prompt; see `engine.Engine`.

        With several processes, the first asks and tells the others.

        Raises:
            RequestError: settings under which the server's log-probabilities are not those of the
                policy with its temperature.
            ServerError: no answer, a refusal, or an answer without the ids that were drawn.
        """
        s = sampling
        check_request(
            self.config, self.method, prompts, s.max_new_tokens, s.temperature, s.top_p, s.top_k
        )
        self._check_logprobs(s)
        asked = count if s.temperature else 1  # vLLM refuses several greedy samples, all the same
        found = None
        if processes.is_writer():
            bodies = [
                self._body(prompt, asked, s, seed_of(seed, n)) for n, prompt in enumerate(prompts)
            ]
            with concurrent.futures.ThreadPoolExecutor(self.concurrency) as pool:
                found = [group * (count // asked) for group in pool.map(self._ask, bodies)]
        told = processes.gather("samples of the server", found)[0]
        return [[Sample(*one) for one in group] for group in told]

    def _check_logprobs(self, sampling: Sampling) -> None:
        narrowed = sampling.top_p < 1 or sampling.top_k > 0
        if not self.tempered and sampling.temperature not in (0.0, 1.0):
            raise RequestError(
                f"the server gives log-probabilities of temperature 1, not {sampling.temperature}; "
                "start vLLM with --logprobs-mode processed_logprobs and say so (tempered)",
                key="temperature",
            )
        if self.tempered and narrowed:
            raise RequestError(
                "the server's processed log-probabilities are those of the narrowed choice; draw "
                "with top_p 1 and top_k 0",
                key="top_p" if sampling.top_p < 1 else "top_k",
            )

    def _body(self, prompt: Sequence[int], count: int, s: Sampling, seed: int) -> dict[str, Any]:
        """Returns the request; what a server would take from the model's files is all said."""
        return {
            "model": self._model(self.updates),
            "prompt": [int(i) for i in prompt],
            "n": count,
            "max_tokens": s.max_new_tokens,
            "temperature": s.temperature,
            "top_p": s.top_p,
            "top_k": s.top_k or -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "seed": seed,
            "stop": list(s.stop) or None,
            "skip_special_tokens": False,  # from the text that stop strings are looked for in
            "stop_token_ids": list(s.eos_ids),
            "ignore_eos": True,  # but for the ids above
            "logprobs": 1,  # some servers read 0 as no
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }

    def _ask(self, body: dict[str, Any]) -> list[Sample]:
        answer = self.server.post(COMPLETIONS, body)
        try:
            return samples_of(answer, body, self.config.vocab_size)
        except AnswerError as error:
            raise ServerError(f"{self.server.url.rstrip('/')}{COMPLETIONS}: {error}") from error


class AnswerError(ValueError):
    """What is wrong with an answer."""


def seed_of(seed: int, prompt: int) -> int:
    """Returns the seed of a prompt's samples, in [0, 2³¹): apart for each seed and prompt."""
    return int(np.random.SeedSequence((seed, prompt)).generate_state(1)[0] >> 1)


def samples_of(answer: Any, body: dict[str, Any], vocab_size: int) -> list[Sample]:
    """Returns the samples of an answer, in the order of their index.

    Args:
        answer: the parsed JSON.
        body: of the request.
        vocab_size: ids are below it.

    Raises:
        AnswerError: it is not what was asked for. Text alone is refused: tokenised again, it may
            give other ids than were drawn (CORRECTNESS C25).
    """
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or not all(isinstance(c, dict) for c in choices):
        raise AnswerError("the answer is not a completion")
    places = sorted(choice.get("index", -1) for choice in choices)
    if places != list(range(body["n"])):
        raise AnswerError(f"asked for {body['n']} samples, got the indices {places}")
    choices = sorted(choices, key=lambda choice: choice["index"])
    return [sample_of(choice, body, vocab_size) for choice in choices]


def sample_of(choice: dict[str, Any], body: dict[str, Any], vocab_size: int) -> Sample:
    """Returns the sample of one choice; arguments and errors as `samples_of`."""
    scores = choice.get("logprobs") or {}
    ids, logprobs = choice.get("token_ids"), scores.get("token_logprobs")
    if ids is None:
        ids = [id_of(token) for token in scores.get("tokens") or ()] or None
    if ids is None or None in ids:
        raise AnswerError(
            "the answer has text but not the ids that were drawn; serve with vLLM 0.10.2 or later, "
            "or another server that knows return_token_ids"
        )
    read = choice.get("prompt_token_ids")
    if read is not None and read != body["prompt"]:
        raise AnswerError(
            f"the server read {len(read)} prompt ids that are not the {len(body['prompt'])} sent"
        )
    if not ids or len(ids) > body["max_tokens"]:
        raise AnswerError(f"a sample has {len(ids)} ids, asked for 1 to {body['max_tokens']}")
    wrong = next((i for i in ids if not (isinstance(i, int) and 0 <= i < vocab_size)), None)
    if wrong is not None:
        raise AnswerError(f"id {wrong!r} is outside the vocabulary of {vocab_size}")
    if logprobs is None or len(logprobs) != len(ids):
        count = "no" if logprobs is None else len(logprobs)
        raise AnswerError(f"{count} log-probabilities for {len(ids)} ids")
    if not all(isinstance(p, int | float) and math.isfinite(p) and p <= 1e-3 for p in logprobs):
        raise AnswerError("a log-probability is not a finite number up to 0")
    reason = choice.get("finish_reason")
    if reason not in ("stop", "length"):
        raise AnswerError(f"a sample ended by {reason!r}, which is neither 'stop' nor 'length'")
    if reason == "length" and len(ids) < body["max_tokens"]:
        raise AnswerError(
            f"the server cut a sample at {len(ids)} ids, asked for {body['max_tokens']}: its "
            "--max-model-len or its generation config allows no more"
        )
    return Sample(list(ids), [float(np.float32(p)) for p in logprobs], reason == "stop")


def id_of(token: Any) -> int | None:
    """Returns the id of a token that is written as one, or None.

    >>> id_of("token_id:17"), id_of(" the")
    (17, None)
    """
    digits = str(token).removeprefix(TOKEN_ID)
    return int(digits) if str(token) != digits and digits.isdecimal() else None
