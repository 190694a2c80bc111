"""Samples in slots against one full forward pass a token."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.core.errors import RequestError
from jaxtune.generate import engine, sampler, sampling, scoring, slots
from jaxtune.generate.sampler import sample
from jaxtune.generate.stops import stop_at
from jaxtune.models.config import Experts, LayerKind
from jaxtune.models.decoder import init_params
from jaxtune.models.rope import Rope
from jaxtune.peft.method import Method
from jaxtune.peft.registry import METHODS
from tests.generate.tiny_models import CONFIG, model, row_logits

PROMPTS = [[5, 9, 2, 40, 7], [3], [60, 1, 1, 17, 8, 30, 22, 4, 11, 50, 31], [12, 13]]
NEW, COUNT = 12, 3
ENDS = (4, 8, 15, 16, 23, 42)  # so that most samples end early and slots are refilled
SETTINGS = {"max_new_tokens": NEW, "seed": 3, "eos_ids": ENDS}
WINDOWS_AND_CAPS = dataclasses.replace(
    CONFIG,
    num_layers=4,
    kinds=(LayerKind(), LayerKind(8)),
    pattern=(0, 1),
    attention_softcap=20.0,
    final_softcap=30.0,
    attention_sinks=True,
)


@functools.cache
def drawn(name: str, slots: int, temperature: float = 1.0, config=CONFIG):
    parts, settings = model(name, config), {**SETTINGS, "temperature": temperature}
    return sample(*parts, PROMPTS, COUNT, slots=slots, **settings)


def oracle(name: str, prompt, number: int, temperature: float, config=CONFIG, ends=ENDS):
    """(ids, logprobs): the whole row run again for each token, without cache or slots."""
    key, ids, logprobs = sampling.row_keys(SETTINGS["seed"], number, 1), [], []
    for step in range(NEW):
        scores = row_logits(name, [*prompt, *ids], config)[-1]
        found = sampling.sample(
            jnp.asarray(scores)[None], sampling.step_keys(key, step), temperature, 0, 1.0
        )
        ids.append(int(found.ids[0]))
        heat = np.float64(scores) / temperature
        top = heat.max()
        logprobs.append(heat[ids[-1]] - top - np.log(np.sum(np.exp(heat - top))))
        if ids[-1] in ends:
            break
    return ids, logprobs


def flat(groups):
    return [one for group in groups for one in group]


def assert_alike(found, wanted):
    for one, two in zip(flat(found), flat(wanted), strict=True):
        assert one.ids == two.ids and one.finished == two.finished
        np.testing.assert_allclose(one.logprobs, two.logprobs, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "temperature"), [("lora", 0.7), ("prompt", 1.0)])
def test_a_sample_is_what_full_passes_draw_with_the_same_keys(name, temperature):
    found = drawn(name, 2, temperature)
    for number in (0, 4, 7, 11):
        prompt, one = PROMPTS[number // COUNT], found[number // COUNT][number % COUNT]
        ids, logprobs = oracle(name, prompt, number, temperature)
        assert one.ids == ids
        np.testing.assert_allclose(one.logprobs, logprobs, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora", "prompt", "prefix"])
def test_slots_and_neighbours_change_no_sample(name):
    few, many = drawn(name, 2), drawn(name, 16)
    assert_alike(few, many)
    assert all(one.finished == (one.ids[-1] in ENDS) for group in few for one in group)
    assert all(one.finished or len(one.ids) == NEW for group in few for one in group)
    assert len({len(one.ids) for group in few for one in group}) > 2


def test_generate_is_one_sample_of_each_prompt():
    repeated = [prompt for prompt in PROMPTS for _ in range(COUNT)]
    whole = engine.generate(*model("lora"), repeated, temperature=1.0, **SETTINGS)
    found = flat(drawn("lora", 2))
    assert whole == [one.ids[:-1] if one.finished else one.ids for one in found]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "temperature"), [("lora", 1.0), *((m, 0.6) for m in METHODS)])
def test_logprobs_are_those_of_the_scorer_with_the_temperature(name, temperature):
    """C18, C25: the scorer runs the trainer's forward pass; its logits are divided."""
    parts = model(name)
    found = drawn(name, 2, temperature)
    rows = [[*p, *one.ids] for p, group in zip(PROMPTS, found, strict=True) for one in group]
    width = 24
    ids = np.asarray([[*row, *[0] * (width - len(row))] for row in rows])
    mask = np.asarray([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    scores = np.float64(scoring.logits(*parts, ids, mask)) / temperature
    logps = np.asarray(jax.nn.log_softmax(jnp.asarray(scores, jnp.float32), axis=-1))
    for number, row in enumerate(rows):
        one = found[number // COUNT][number % COUNT]
        start = len(row) - len(one.ids)
        wanted = [logps[number, t - 1, row[t]] for t in range(start, len(row))]
        np.testing.assert_allclose(one.logprobs, wanted, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["windows", "dynamic", "longrope", "experts", "int8"])
def test_other_models(kind):
    """Slots that are refilled against slots that are not; the former against full passes."""
    config = {
        "windows": WINDOWS_AND_CAPS,
        "dynamic": dataclasses.replace(
            CONFIG,
            kinds=(LayerKind(rope=Rope(scaling="dynamic", factor=4.0, original_context=8)),),
        ),
        "longrope": dataclasses.replace(
            CONFIG,
            kinds=(
                LayerKind(
                    rope=Rope(
                        theta=100.0,
                        scaling="longrope",
                        original_context=8,
                        short_factors=(1.0, 1.1, 1.4, 2.0),
                        long_factors=(2.0, 4.0, 6.0, 9.0),
                    )
                ),
            ),
        ),
        "experts": dataclasses.replace(CONFIG, experts=Experts(4, 2)),
        "int8": dataclasses.replace(CONFIG, quantize="int8"),
    }[kind]
    if kind == "int8":
        parts = config, Method(), init_params(config, Method(), jax.random.key(0))
    else:
        parts = model("full", config)
    few = sample(*parts, PROMPTS, COUNT, slots=2, **SETTINGS)
    assert_alike(few, sample(*parts, PROMPTS, COUNT, slots=16, **SETTINGS))
    if kind in ("windows", "longrope", "experts"):
        for number in (1, 7):
            one = few[number // COUNT][number % COUNT]
            ids, logprobs = oracle("full", PROMPTS[number // COUNT], number, 1.0, config)
            assert one.ids == ids
            np.testing.assert_allclose(one.logprobs, logprobs, atol=1e-4)


def test_a_run_compiles_once_and_reads_a_prompt_once(monkeypatch):
    """Other prompts, weights, seeds, counts of samples that wait: the same four programs."""
    config = dataclasses.replace(CONFIG, norm_eps=3e-5)
    method, params = model("full")[1:]
    traces, read = [], []
    run, pad = slots.decoder.hidden_states, sampler.left_padded

    def counted(config, method, params, batch, **kwargs):
        traces.append(batch["input_ids"].shape)
        return run(config, method, params, batch, **kwargs)

    def noted(method, prompts, rows, width):
        read.extend(map(tuple, prompts))
        return pad(method, prompts, rows, width)

    monkeypatch.setattr(slots.decoder, "hidden_states", counted)
    monkeypatch.setattr(sampler, "left_padded", noted)
    sets = [PROMPTS, [[7] * 9, [8], [9, 9, 9], [7, 7]], [*PROMPTS, [33, 1], PROMPTS[0]]]
    for number, prompts in enumerate(sets):
        read.clear()
        doubled = jax.tree.map(lambda leaf, n=number: (1 + n) * leaf, params)
        settings = {"max_new_tokens": 9 + number, "seed": number, "temperature": 0.5 + number}
        sample(config, method, doubled, prompts, 4, slots=4, eos_ids=ENDS, **settings)
        assert sorted(read) == sorted({tuple(prompt) for prompt in prompts})
        if number == 0:
            before = list(traces)
    assert traces == before and set(traces) == {(1, 16), (4, 1)}
    programs = slots.programs(config, method)
    assert [p._cache_size() for p in programs] == [1, 1, 1, 1]


def test_stop_strings_and_eos_end_a_sample_and_are_told_apart():
    parts = model("lora")
    plain = drawn("lora", 2)

    def decode(ids):
        return "".join(f"<{i}>" for i in ids)

    first = next(one for one in flat(plain) if len(one.ids) > 4)
    check = stop_at(decode, [f"<{first.ids[2]}>"])
    found = sample(*parts, PROMPTS, COUNT, slots=2, stop_check=check, **SETTINGS)
    for one, whole in zip(flat(found), flat(plain), strict=True):
        stop = first.ids[2]
        ids = whole.ids[: whole.ids.index(stop) + 1] if stop in whole.ids else whole.ids
        assert one.ids == ids and len(one.logprobs) == len(ids)
        assert one.finished == (stop in whole.ids or whole.finished)


def test_narrowing_changes_the_choice_but_not_what_a_probability_is():
    parts = model("lora")
    found = sample(*parts, PROMPTS, 2, top_k=2, slots=4, **SETTINGS)
    for prompt, group in zip(PROMPTS, found, strict=True):
        scores = np.float64(row_logits("lora", prompt)[-1])
        logps = scores - scores.max() - np.log(np.sum(np.exp(scores - scores.max())))
        for one in group:
            assert one.ids[0] in np.argsort(-scores)[:2]
            assert abs(one.logprobs[0] - logps[one.ids[0]]) < 1e-4
    greedy = sample(*parts, PROMPTS, 1, temperature=0.0, slots=4, **SETTINGS)
    assert greedy[0][0].ids[0] == int(np.argmax(row_logits("lora", PROMPTS[0])[-1]))
    assert greedy[0][0].logprobs[0] < 0


def test_what_is_refused():
    for options, message in (({"count": 0}, "count: 0"), ({"slots": 0}, "slots: 0")):
        with pytest.raises(RequestError, match=message):
            sample(*model("full"), PROMPTS, **options)
