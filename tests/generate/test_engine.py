import dataclasses

import jax
import numpy as np
import pytest

from jaxtune.core.errors import RequestError
from jaxtune.generate import sampler, slots
from jaxtune.generate.engine import generate
from jaxtune.generate.stops import cut, stop_at
from jaxtune.models.config import LayerKind
from jaxtune.models.rope import Rope
from jaxtune.peft.registry import METHODS
from tests.generate.tiny_models import CONFIG, greedy_oracle, model, row_logits

PROMPTS = [[5, 9, 2, 40, 7], [3], [60, 1, 1, 17, 8, 30, 22, 4, 11, 50, 31], [12, 13]]
NEW = 12
WINDOWED = dataclasses.replace(
    CONFIG, num_layers=4, kinds=(LayerKind(), LayerKind(8)), pattern=(0, 1)
)


def write(name: str, prompts=PROMPTS, config=CONFIG, **options):
    return generate(*model(name, config), prompts, **{"max_new_tokens": NEW, **options})


@pytest.mark.parametrize("name", METHODS)
def test_cached_greedy_is_the_argmax_of_the_whole_row_for_ragged_prompts(name):
    found = write(name)
    assert found == [greedy_oracle(name, prompt, NEW) for prompt in PROMPTS]
    assert len({tuple(row) for row in found}) == len(PROMPTS)


def test_methods_differ_from_the_base():
    base = write("full")
    for name in METHODS:
        assert name == "full" or write(name) != base


@pytest.mark.parametrize("kind", ["windows", "learned"])
def test_windows_and_learned_positions(kind):
    config = WINDOWED
    if kind == "learned":
        config = dataclasses.replace(
            CONFIG,
            learned_positions=True,
            kinds=(LayerKind(rope=None),),
            norm="layer",
            gated=False,
            activation="gelu_tanh",
        )
    name = "prefix" if kind == "learned" else "prompt"
    found = write(name, config=config, max_new_tokens=16)
    assert found == [greedy_oracle(name, prompt, 16, config) for prompt in PROMPTS]


def test_longrope_reads_everything_anew_where_its_factors_change():
    """With 3 virtual tokens the rows begin on the original context, below (twice) and beyond it."""
    rope = Rope(
        theta=100.0,
        scaling="longrope",
        original_context=8,
        short_factors=(1.0, 1.1, 1.4, 2.0),
        long_factors=(2.0, 4.0, 6.0, 9.0),
    )
    config = dataclasses.replace(CONFIG, kinds=(LayerKind(rope=rope),))
    expected = [greedy_oracle("prompt", prompt, NEW, config) for prompt in PROMPTS]
    assert write("prompt", config=config) == expected
    eos = expected[1][6]
    cut_at_eos = [row[: row.index(eos)] if eos in row else row for row in expected]
    assert write("prompt", config=config, eos_ids=[eos]) == cut_at_eos


@pytest.mark.parametrize("name", ["lora", "prompt"])
def test_a_row_does_not_depend_on_the_rows_beside_it(name):
    for options in ({}, {"temperature": 1.0, "top_p": 0.9, "seed": 3}):
        together = write(name, **options)
        alone = [
            write(name, [prompt], first_row=row, **options)[0] for row, prompt in enumerate(PROMPTS)
        ]
        assert together == alone


def test_seeds_repeat_and_differ():
    one = write("full", temperature=1.0, seed=1)
    assert write("full", temperature=1.0, seed=1) == one
    assert write("full", temperature=1.0, seed=2) != one
    # rows with one prompt draw apart
    twins = write("full", [[5, 6]] * 4, temperature=1.0, seed=1)
    assert len({tuple(row) for row in twins}) == 4
    assert all(0 <= i < CONFIG.vocab_size for row in one + twins for i in row)


def test_sampled_tokens_follow_the_enumerated_distribution():
    """The first two tokens of many rows against p(a) p(b | a) from uncached logits."""
    rows, prompt = 2048, [5, 9]
    found = write("lora", [prompt] * rows, temperature=1.0, top_k=3, max_new_tokens=2)

    def three(ids):
        scores = np.float64(row_logits("lora", ids)[-1])
        best = np.argsort(-scores)[:3]
        weights = np.exp(scores[best] - scores[best].max())
        return dict(zip(best.tolist(), weights / weights.sum(), strict=True))

    wanted = {
        (a, b): p * q for a, p in three(prompt).items() for b, q in three([*prompt, a]).items()
    }
    pairs = [tuple(row) for row in found]
    assert set(pairs) <= set(wanted)
    for pair, p in wanted.items():
        assert abs(pairs.count(pair) / rows - p) <= 5 * np.sqrt(p * (1 - p) / rows)


def test_eos_ends_a_row_and_is_left_out():
    plain = write("full")
    ends = [plain[0][4], plain[2][7]]
    found = write("full", eos_ids=ends)
    for row, ids in enumerate(plain):
        stop = next((i for i, token in enumerate(ids) if token in ends), NEW)
        assert found[row] == ids[:stop]
    first = write("full", eos_ids=[ids[0] for ids in plain])
    assert first == [[], [], [], []]


def decode(ids: list[int]) -> str:
    return "".join(f"<{i}>" for i in ids)


@pytest.mark.parametrize("chunk", [1, 3, 16])
def test_stop_strings_end_a_row_with_the_token_that_completes_them(chunk, monkeypatch):
    monkeypatch.setattr(sampler, "CHUNK", chunk)
    plain = write("full")
    # the first is within two tokens, the second cannot come, the third is one whole token
    stops = [f"{plain[0][3]}><{plain[0][4]}", "@", f"<{plain[2][0]}>"]
    found = write("full", stop_check=stop_at(decode, stops))
    for row, ids in zip(found, plain, strict=True):
        ends = [n for n in range(1, NEW + 1) if any(stop in decode(ids[:n]) for stop in stops)]
        assert row == ids[: min(ends, default=NEW)]
        shown = cut(decode(row), stops)
        assert shown == cut(decode(ids), stops)
        assert not any(stop in shown for stop in stops)
    assert len(found[0]) <= 5 and len(found[2]) == 1


def test_chunks_do_not_change_what_is_drawn(monkeypatch):
    whole = write("full", temperature=1.0, seed=4)
    monkeypatch.setattr(sampler, "CHUNK", 5)
    assert write("full", temperature=1.0, seed=4, stop_check=lambda ids: None) == whole


def test_one_compile_serves_a_bucket(monkeypatch):
    config = dataclasses.replace(CONFIG, norm_eps=2e-5)
    method, params = model("full")[1:]
    traces, run = [], slots.decoder.hidden_states

    def counted(config, method, params, batch, **kwargs):
        traces.append(batch["input_ids"].shape)
        return run(config, method, params, batch, **kwargs)

    monkeypatch.setattr(slots.decoder, "hidden_states", counted)
    for options in (
        {"max_new_tokens": 3},
        {"max_new_tokens": 9, "temperature": 0.5, "top_k": 4, "top_p": 0.5, "seed": 9},
        {"max_new_tokens": 16, "eos_ids": [4, 5], "stop_check": lambda ids: None},
    ):
        for count in (3, 4):
            generate(config, method, params, PROMPTS[:count], **options)
    assert len(set(traces)) == 2  # prefill [4, 16] and decode [4, 1]
    assert traces.count((4, 16)) == 1
    doubled = jax.tree.map(lambda leaf: 2 * leaf, params)
    before = len(traces)
    one = generate(config, method, params, PROMPTS, max_new_tokens=5)
    two = generate(config, method, doubled, PROMPTS, max_new_tokens=5)
    assert len(traces) == before and one != two  # parameters are arguments, not constants


def test_it_ends_at_the_last_position():
    long = list(range(1, 61))
    room = CONFIG.max_position_embeddings - len(long)
    assert len(write("full", [long], max_new_tokens=room)[0]) == room
    with pytest.raises(RequestError, match=rf"60 \+ {room + 1} new = 97 positions.*96"):
        write("full", [long], max_new_tokens=room + 1)
    with pytest.raises(RequestError, match=r"60 \+ 3 of prompt tuning \+ 34 new = 97 .*96"):
        write("prompt", [long], max_new_tokens=34)
    with pytest.raises(RequestError, match=r"3 of prefix tuning"):
        write("prefix", [long], max_new_tokens=34)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "prompts: there is no prompt"),
        ([[1], []], {}, "prompt 1 is empty; begin it with the BOS"),
        ([[1, 61]], {}, "token id 61 in row 0 is outside the vocabulary of 61"),
        ([[-1]], {}, "token id -1"),
        ([[1.5]], {}, "list of token ids"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens: 0"),
        ([[1]], {"temperature": -0.1}, "temperature: -0.1"),
        ([[1]], {"temperature": float("nan")}, "temperature: nan"),
        ([[1]], {"top_p": 0.0}, "top_p: 0.0"),
        ([[1]], {"top_p": 1.1}, "top_p: 1.1"),
        ([[1]], {"top_k": -1}, "top_k: -1"),
    ],
)
def test_what_is_refused(prompts, options, message):
    with pytest.raises(RequestError, match=message):
        write("full", prompts, **options)


def test_an_empty_stop_string_is_refused():
    with pytest.raises(RequestError, match="stop: a stop string must not be empty"):
        stop_at(decode, ["a", ""])
