"""The engine of servers against a small one on this machine, with its faults."""

import dataclasses

import numpy as np
import pytest

from jaxtune.core.errors import RequestError
from jaxtune.generate.sampler import sample
from jaxtune.models.config import Experts
from jaxtune.peft.lora import Lora
from jaxtune.peft.registry import METHODS
from jaxtune.rl.engine import Sampling
from jaxtune.rl.http import Server, ServerError
from jaxtune.rl.openai_engine import COMPLETIONS, LOAD, UNLOAD, OpenAIEngine, seed_of
from tests.generate.tiny_models import CONFIG, model
from tests.rl.serving import TinyServer, serving

PROMPTS = [[5, 9, 2, 40, 7], [3], [12, 13]]
SAMPLING = Sampling(6, eos_ids=(4, 8, 15, 16))
SECRET = "sk-do-not-print-me"


@pytest.fixture(scope="module")
def served():
    held = TinyServer(CONFIG, model("full")[2])
    with serving(held) as url:
        yield held, url


@pytest.fixture
def engine(served, tmp_path, monkeypatch):
    """An engine of a server without faults and without memory of other tests."""
    held, url = served
    held.asked.clear()
    monkeypatch.setattr(held, "spoil", lambda number, answer: answer)
    monkeypatch.setattr(held, "adapters", dict(held.adapters))
    monkeypatch.setenv("JAXTUNE_TEST_KEY", SECRET)
    server = Server(url, timeout=30.0, attempts=3, wait=0.01, key_variable="JAXTUNE_TEST_KEY")
    return OpenAIEngine(CONFIG, model("lora")[1], server, "base", tmp_path, name="jaxtune-policy")


def spoil(engine, served, change):
    """Has `change` edit the first choice of each answer, or return what is sent in its place."""

    def spoiled(number, answer):
        other = change(answer["choices"][0])
        return answer if other is None else other

    served[0].spoil = spoiled
    return lambda: engine.sample(PROMPTS[:1], 2, SAMPLING, 0)


def test_samples_are_the_served_model_s_and_follow_each_update(engine, served):
    config, method, params = model("lora")
    for number, (parts, name) in enumerate(
        [(model("full"), "base"), ((config, method, params), "jaxtune-policy-1")]
    ):
        if number:
            engine.update(params)
        found = engine.sample(PROMPTS, 2, SAMPLING, 7)
        for place, prompt in enumerate(PROMPTS):
            settings = {"max_new_tokens": 6, "eos_ids": SAMPLING.eos_ids, "slots": 4}
            (wanted,) = sample(*parts, [prompt], 2, seed=seed_of(7, place), **settings)
            for ours, theirs in zip(found[place], wanted, strict=True):
                assert ours.ids == theirs.ids and ours.finished == theirs.finished
                np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-4)
        assert {body["model"] for *_, body in served[0].asked[-3:]} == {name}


def test_an_update_replaces_the_adapter_before_it(engine, served, tmp_path):
    params = model("lora")[2]
    engine.update(params)
    engine.update(params)
    paths = [path for path, *_ in served[0].asked]
    assert paths == [LOAD, LOAD, UNLOAD]
    assert set(served[0].adapters) == {"base", "jaxtune-policy-2"}
    assert [p.name for p in tmp_path.iterdir()] == ["jaxtune-policy-2"]
    assert served[0].asked[1][2]["lora_path"] == str(tmp_path / "jaxtune-policy-2")


def test_what_is_asked_for_is_said_in_full(engine, served):
    sampling = dataclasses.replace(SAMPLING, top_p=0.9, stop=("end",))
    engine.sample(PROMPTS[:1], 2, sampling, 0)
    path, headers, body = served[0].asked[0]
    assert path == COMPLETIONS and headers["Authorization"] == f"Bearer {SECRET}"
    assert body.pop("seed") == seed_of(0, 0) != seed_of(0, 1) != seed_of(1, 0)
    assert body == {
        **{"model": "base", "prompt": PROMPTS[0], "n": 2, "max_tokens": 6, "logprobs": 1},
        **{"temperature": 1.0, "top_p": 0.9, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0},
        **{"presence_penalty": 0.0, "frequency_penalty": 0.0, "skip_special_tokens": False},
        **{"stop": ["end"], "stop_token_ids": [4, 8, 15, 16], "ignore_eos": True},
        **{"return_token_ids": True, "return_tokens_as_token_ids": True},
    }


def test_greedy_samples_are_drawn_once_and_counted_often(engine, served):
    greedy = dataclasses.replace(SAMPLING, temperature=0.0)
    (alone,), (first, second) = (engine.sample(PROMPTS[:1], n, greedy, 0)[0] for n in (1, 2))
    assert first == second == alone and [body["n"] for *_, body in served[0].asked] == [1, 1]


def test_ids_written_as_tokens_will_do_and_text_alone_will_not(engine, served):
    wanted = engine.sample(PROMPTS[:1], 2, SAMPLING, 0)
    assert spoil(engine, served, lambda c: c.pop("token_ids") and None)() == wanted

    def text_only(choice):
        del choice["token_ids"]
        choice["logprobs"]["tokens"] = [" the"] * len(choice["logprobs"]["tokens"])

    with pytest.raises(ServerError, match=r"completions: .*text but not the ids that were drawn"):
        spoil(engine, served, text_only)()


def cut(choice):
    """What a server gives whose context has room for one more token."""
    one = {name: values[:1] for name, values in choice["logprobs"].items()}
    choice.update(token_ids=choice["token_ids"][:1], logprobs=one, finish_reason="length")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["token_ids"].__setitem__(0, 61), "id 61 is outside the vocabulary of 61"),
        (lambda c: c["token_ids"].__setitem__(0, "7"), "id '7' is outside"),
        (lambda c: c["token_ids"].extend([1] * 7), "ids, asked for 1 to 6"),
        (lambda c: c["token_ids"].clear(), "a sample has 0 ids"),
        (lambda c: c["logprobs"]["token_logprobs"].pop() and None, "log-probabilities for"),
        (lambda c: c.update(logprobs=None), "no log-probabilities for"),
        (lambda c: c["logprobs"]["token_logprobs"].__setitem__(0, None), "not a finite number"),
        (lambda c: c["logprobs"]["token_logprobs"].__setitem__(0, 0.5), "not a finite number"),
        (lambda c: c.update(prompt_token_ids=[1, *PROMPTS[0]]), "read 6 prompt ids .* the 5 sent"),
        (lambda c: c.update(finish_reason="abort"), "ended by 'abort'"),
        (cut, "cut a sample at 1 ids, asked for 6"),
        (lambda c: c.update(index=0), r"asked for 2 samples, got the indices \[0, 0\]"),
        (lambda c: {"choices": []}, r"asked for 2 samples, got the indices \[\]"),
        (lambda c: (200, {}, "<html>"), "not a completion"),
        (lambda c: (301, {"Location": "http://127.0.0.1:9/"}, ""), "HTTP 301"),
        (lambda c: (400, {}, '{"error": {"message": "no\\nsuch thing"}}'), "HTTP 400.*no such"),
        (lambda c: (401, {}, f"wrong key {SECRET}"), "HTTP 401 Unauthorized: wrong key …"),
    ],
)
def test_a_wrong_answer_is_named_in_one_line_with_the_url(engine, served, change, message):
    with pytest.raises(ServerError, match=message) as raised:
        spoil(engine, served, change)()
    said = str(raised.value)
    assert said.startswith(f"{served[1]}{COMPLETIONS}: ")
    assert "\n" not in said and SECRET not in said and SECRET not in repr(engine)
    assert len(served[0].asked) == 1  # no use in asking again


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_asked_again(engine, served, status):
    wanted = engine.sample(PROMPTS, 2, SAMPLING, 0)
    served[0].asked.clear()
    served[0].spoil = lambda n, answer: (status, {}, "busy") if n <= 2 else answer
    assert engine.sample(PROMPTS, 2, SAMPLING, 0) == wanted
    assert len(served[0].asked) == len(PROMPTS) + 2
    served[0].spoil = lambda n, answer: (status, {}, "busy")
    with pytest.raises(ServerError, match=rf"HTTP {status} .*: busy \(3 attempts\)"):
        engine.sample(PROMPTS[:1], 2, SAMPLING, 0)


def test_silence_and_absence(engine, served):
    engine.sample(PROMPTS[:1], 2, SAMPLING, 0)
    engine.server = dataclasses.replace(engine.server, timeout=0.2, attempts=2)
    with pytest.raises(ServerError, match=r"no answer within 0.2 s \(2 attempts\)"):
        spoil(engine, served, lambda c: (0, {}, "0.5"))()
    engine.server = dataclasses.replace(engine.server, url="http://127.0.0.1:9")
    with pytest.raises(ServerError, match=r"127\.0\.0\.1:9/v1/completions: cannot be reached"):
        engine.sample(PROMPTS[:1], 1, SAMPLING, 0)


def test_log_probabilities_of_another_temperature_are_refused(engine):
    warm = dataclasses.replace(SAMPLING, temperature=0.7)
    with pytest.raises(RequestError, match=r"temperature: .*processed_logprobs"):
        engine.sample(PROMPTS, 1, warm, 0)
    engine.tempered = True
    assert len(engine.sample(PROMPTS[:1], 1, warm, 0)[0]) == 1
    with pytest.raises(RequestError, match=r"top_p: .*narrowed"):
        engine.sample(PROMPTS, 1, dataclasses.replace(warm, top_p=0.9), 0)
    with pytest.raises(RequestError, match="prompt 1 is empty"):
        engine.sample([[1], []], 1, warm, 0)


@pytest.mark.parametrize("name", [*(name for name in METHODS if name != "lora"), "dora", "more"])
def test_methods_that_no_server_holds_are_refused(engine, name):
    if name in METHODS:
        method = model(name)[1]
    else:
        more = {"variant": "dora"} if name == "dora" else {"train": ("final_norm/scale",)}
        method = Lora(rank=4, **more)
    with pytest.raises(RequestError):
        dataclasses.replace(engine, method=method)


@pytest.mark.parametrize(("targets", "fine"), [("blocks/mlp/.*", False), ("all-linear", True)])
def test_adapted_experts_are_refused(engine, targets, fine):
    experts = dataclasses.replace(CONFIG, experts=Experts(4, 2), family="mixtral")
    routed = {"config": experts, "method": Lora(rank=2, targets=targets)}
    if fine:
        assert dataclasses.replace(engine, **routed).method.targets == targets
        return
    with pytest.raises(RequestError, match=r"peft\.targets: adapts experts"):
        dataclasses.replace(engine, **routed)
