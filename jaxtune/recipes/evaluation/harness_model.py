"""The model `jaxtune` of lm-evaluation-harness. Importing this file imports `lm_eval`."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from jaxtune.core.errors import RequestError, nearest
from jaxtune.evaluate.continuations import Request, Score, positions, score
from jaxtune.generate import stops
from jaxtune.recipes.language_model import LanguageModel
from jaxtune.recipes.load import load

# Tokens that a task may write when it does not say how many, as in lm_eval's `hf`.
NEW_TOKENS = 256
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
WRITING = ("until", *LENGTHS, "do_sample", "temperature", "top_p", "top_k")


@dataclasses.dataclass(frozen=True)
class Writing:
    """How a task wants text to be written: the settings of `LanguageModel.generate`."""

    max_new_tokens: int
    until: tuple[str, ...]
    temperature: float
    top_p: float
    top_k: int


def writing(given: Mapping[str, Any]) -> Writing:
    """Returns the settings of a task's `generation_kwargs`, read as lm_eval's `hf` reads them.

    Raises:
        RequestError: a key that would change the text and that is not known here.
    """
    for key, value in given.items():
        if key not in WRITING and value not in (None, 1, 1.0, False):
            raise RequestError(
                f"{value!r} is not available{nearest(key, WRITING)}; valid keys: "
                + ", ".join(WRITING),
                key=f"generation_kwargs.{key}",
            )
    until = given.get("until") or ()
    length = next((given[key] for key in LENGTHS if given.get(key) is not None), NEW_TOKENS)
    return Writing(
        int(length),
        (until,) if isinstance(until, str) else tuple(text for text in until if text),
        0.0 if given.get("do_sample") is False else float(given.get("temperature") or 0.0),
        float(given.get("top_p") or 1.0),
        int(given.get("top_k") or 0),
    )


@register_model("jaxtune")
class HarnessModel(TemplateLM):
    """A LanguageModel behind lm_eval's interface.

    Strings become token ids as in lm_eval's `hf` model: BOS where the tokenizer adds it, once;
    a space at the end of a context belongs to the continuation; what is too long loses its
    first tokens.

    Args:
        pretrained: Hugging Face directory or workdir of a run, or a LanguageModel.
        adapter: PEFT directory on top of it.
        dtype: "bfloat16" or "float32".
        batch_size: rows at a time; by default as many as suit the device.
        max_length: tokens that the model reads at a time; by default all that it has positions for.
        add_bos_token: overrides what the tokenizer does.
        device, max_batch_size: of lm_eval's command line; jax chooses the device.

    Raises:
        RequestError: a model that cannot be read, or one without a tokenizer.
    """

    def __init__(
        self,
        pretrained: str | LanguageModel,
        adapter: str | None = None,
        dtype: str = "bfloat16",
        batch_size: int | str | None = None,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        device: str | None = None,
        max_batch_size: int | None = None,
    ):
        super().__init__()
        del device, max_batch_size
        if not isinstance(pretrained, LanguageModel):
            pretrained = load(str(pretrained), adapter=adapter, dtype=dtype)
        if pretrained.tokenizer is None:
            raise RequestError("tasks are text and need a tokenizer", where=pretrained.source)
        self.lm = pretrained
        if pretrained.mesh.size == 1 and jax.default_backend() == "cpu":
            config = dataclasses.replace(pretrained.config, attention="heads")
            self.lm = dataclasses.replace(pretrained, config=config)
        self.tokenizer = pretrained.tokenizer.hf
        self.rows = None if str(batch_size or "auto").startswith("auto") else int(batch_size)
        self.add_bos_token = add_bos_token
        longest = positions(self.lm.config, self.lm.method)
        self.max_length = longest if max_length is None else min(longest, int(max_length))

    @property
    def eot_token_id(self) -> int | None:
        """Id that ends a document."""
        return self.lm.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """Id that stands for an empty context: BOS, or EOS where there is none."""
        found = self.lm.tokenizer.bos_id
        found = self.eot_token_id if found is None else found
        if found is None:
            raise RequestError("has neither BOS nor EOS", key="tokenizer", where=self.lm.source)
        return found

    @property
    def tokenizer_name(self) -> str:
        """A name for lm_eval's cache of requests."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Returns a conversation as text."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **ignored: Any
    ) -> list[int]:
        """Returns the ids of one text."""
        del ignored
        return self.encode([string], add_special_tokens)[string]

    def encode(self, texts: Sequence[str], special: bool | None = None) -> dict[str, list[int]]:
        """Returns {text: ids}; with `special` None, BOS is added unless the text begins with it."""
        distinct = dict.fromkeys(texts)
        if special is None:
            begin = self.tokenizer.decode([self.prefix_token_id])
            special = self.add_bos_token
            plain = [text for text in distinct if begin and text.startswith(begin)]
        else:
            plain = []
        rest = list(distinct.keys() - set(plain)) if plain else list(distinct)
        found = dict(zip(plain, self._ids(plain, False), strict=True))
        return found | dict(
            zip(rest, self._ids(rest, True if special is None else special), strict=True)
        )

    def _ids(self, texts: list[str], special: bool) -> list[list[int]]:
        if not texts:
            return []
        settings = {"return_attention_mask": False, "return_token_type_ids": False}
        return self.tokenizer(texts, add_special_tokens=special, verbose=False, **settings)[
            "input_ids"
        ]

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False):
        """Returns (ln p(continuation | context), is greedy) of each request."""
        pairs = [request.args for request in requests]
        moved = []
        for context, continuation in pairs:
            kept = context.rstrip() if context else context
            moved.append((kept, context[len(kept) :] + continuation))
        ids = self.encode([text for c, rest in moved if c for text in (c, c + rest)])
        bare = self.encode([rest for c, rest in moved if not c], special=False)
        tokens = []
        for pair, (context, rest) in zip(pairs, moved, strict=True):
            if context:
                before, whole = ids[context], ids[context + rest]
                tokens.append((pair, before, whole[len(before) :]))
            elif bare[rest][:1] == [self.prefix_token_id]:
                tokens.append((pair, bare[rest][:1], bare[rest][1:]))
            else:
                tokens.append((pair, [self.prefix_token_id], bare[rest]))
        return self._loglikelihood_tokens(tokens, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple], disable_tqdm: bool = False, **ignored: Any
    ) -> list[tuple[float, bool]]:
        del ignored
        pieces = [self._pieces(*request[1:]) for request in requests]
        asked = [piece for several in pieces for piece in several]
        scores = iter(self.score(asked, disable_tqdm))
        found = []
        for several in pieces:
            parts = list(itertools.islice(scores, len(several)))
            found.append((sum(p.logprob for p in parts), all(p.greedy for p in parts)))
        for (pair, _, _), result in zip(requests, found, strict=True):
            if pair is not None:
                self.cache_hook.add_partial("loglikelihood", pair, result)
        return found

    def _pieces(self, context: list[int], continuation: list[int]) -> list[Request]:
        """Returns a request, or pieces of a continuation that is longer than the model reads.

        A piece is half as long as what the model reads, behind as many tokens as fit. lm_eval's own
        model stops with an error there.
        """
        if len(continuation) <= self.max_length:
            return [Request(context, continuation)]
        size, whole = max(self.max_length // 2, 1), [*context, *continuation]
        starts = range(len(context), len(whole), size)
        return [Request(whole[:start], whole[start : start + size]) for start in starts]

    def score(self, asked: Sequence[Request], quiet: bool = False) -> list[Score]:
        """Returns the scores of token ids, with a progress bar on a terminal."""
        quiet = quiet or not sys.stderr.isatty() or jax.process_index() > 0
        with tqdm(total=len(asked), disable=quiet, desc="log-likelihoods") as bar:
            lm = self.lm
            return score(
                *(lm.config, lm.method, lm.params, lm.mesh, asked),
                max_length=self.max_length,
                rows=self.rows,
                progress=bar.update,
            )

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Returns ln p(text) of each request, read in windows where it is long."""
        texts = [request.args[0] for request in requests]
        ids = self.encode(texts)
        asked, owners = [], []
        for number, text in enumerate(texts):
            windows = get_rolling_token_windows(
                token_list=ids[text],
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for window in windows:
                asked.append(Request(*make_disjoint_window(window)))
                owners.append(number)
        found = [0.0] * len(texts)
        for number, result in zip(owners, self.score(asked, disable_tqdm), strict=True):
            found[number] += result.logprob
        for text, total in zip(texts, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Returns the text that continues each request, up to its first stop string."""
        asked = [request.args for request in requests]
        ids = self.encode([context for context, _ in asked])
        groups: dict[Writing, list[int]] = {}
        for number, (_, given) in enumerate(asked):
            groups.setdefault(writing(given), []).append(number)
        found = [""] * len(asked)
        quiet = disable_tqdm or not sys.stderr.isatty() or jax.process_index() > 0
        with tqdm(total=len(asked), disable=quiet, desc="texts") as bar:
            for settings, numbers in groups.items():
                for number, text in zip(
                    numbers, self._write(settings, [ids[asked[n][0]] for n in numbers]), strict=True
                ):
                    found[number] = text
                    self.cache_hook.add_partial("generate_until", asked[number], text)
                bar.update(len(numbers))
        return found

    def _write(self, settings: Writing, prompts: Sequence[list[int]]) -> list[str]:
        room = self.max_length - settings.max_new_tokens
        if room < 1:
            raise RequestError(
                f"{settings.max_new_tokens} leaves no room for a prompt: the model reads "
                f"{self.max_length} tokens",
                key="generation_kwargs.max_gen_toks",
            )
        cut = [(prompt or [self.prefix_token_id])[-room:] for prompt in prompts]
        order = sorted(range(len(cut)), key=lambda n: -len(cut[n]))
        new = self.lm.generate(
            [cut[n] for n in order],
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            stop=settings.until or None,
            batch_size=self.rows or 32,
        )
        texts = [""] * len(cut)
        for number, written in zip(order, new, strict=True):
            texts[number] = stops.cut(self.lm.decode(written), settings.until)
        return texts
