"""The engine of servers against vLLM: what it samples, what it is given, what it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxtune
from jaxtune.checkpoints.hf_export import save_hf
from jaxtune.core.tree import flatten, map_paths, unflatten
from jaxtune.data.tokenizer import load_tokenizer
from jaxtune.models.decoder import abstract_params
from jaxtune.peft.lora import Lora
from jaxtune.rl.engine import Sampling
from jaxtune.rl.http import Server, ServerError
from jaxtune.rl.local_engine import LocalEngine
from jaxtune.rl.openai_engine import OpenAIEngine
from tests.checkpoints.world import logits_of
from tests.generate.tiny_models import CONFIG, model
from tests.rl.tiny import run_config, write_tokenizer
from tests.vllm.server import PYTHON, serving

pytestmark = pytest.mark.skipif(not PYTHON, reason="JAXTUNE_VLLM names no Python that has vLLM")

# vLLM's attention on the CPU has no smaller heads.
WIDE = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 32}
SMALL = dataclasses.replace(CONFIG, vocab_size=32, **WIDE)
PROMPTS = [[1, 5, 9, 20, 7], [1, 3], [1, 12, 13]]
GREEDY = Sampling(12, temperature=0.0, eos_ids=(2,))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with the tokenizer, and the base as format hf writes it."""
    directory = tmp_path_factory.mktemp("vllm")
    tokenizer = load_tokenizer(write_tokenizer(directory / "tokenizer"))
    config, _, params = model("full", SMALL)
    save_hf(directory / "base", config, params, dtype=np.float32, tokenizer=tokenizer)
    return directory, tokenizer


@pytest.fixture(scope="module")
def raw(place):
    """URL of a server that gives its log-probabilities as vLLM does by default."""
    with serving(place[0] / "base", place[0] / "raw.log", "--max-model-len", "96") as url:
        yield url


@pytest.fixture(scope="module")
def processed(place):
    """URL of a server whose log-probabilities have the temperature in them."""
    more = ("--max-model-len", "96", "--logprobs-mode", "processed_logprobs")
    with serving(place[0] / "base", place[0] / "processed.log", *more) as url:
        yield url


def engine_of(url, method, directory, **more):
    """An engine that says at once what the server says."""
    server = Server(url, timeout=120.0, attempts=1)
    return OpenAIEngine(SMALL, method, server, "base", directory, **more)


def adapted(variant, targets=None, rank=4):
    """(method, params): the base under a LoRA far from it."""
    more = {} if targets is None else {"targets": targets}
    method = Lora(rank=rank, alpha=6.0, variant=variant, **more)
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        return jnp.asarray(0.3 * rng.standard_normal(leaf.shape, np.float32))

    own = flatten(map_paths(draw, abstract_params(SMALL, method)))
    return method, unflatten(own | flatten(model("full", SMALL)[2]))


def check_logprobs(found, method, params, temperature=1.0):
    """The log-probabilities of samples are those of our own model."""
    for prompt, group in zip(PROMPTS, found, strict=True):
        for one in group:
            (logits,) = logits_of(SMALL, method, params, [[*prompt, *one.ids]])
            all_of_them = jax.nn.log_softmax(logits[len(prompt) - 1 : -1] / temperature)
            wanted = np.take_along_axis(np.asarray(all_of_them), np.array(one.ids)[:, None], 1)
            np.testing.assert_allclose(one.logprobs, wanted[:, 0], atol=2e-4)


@pytest.mark.parametrize(
    ("variant", "targets"),
    [("lora", None), ("rslora", None), ("pissa", None), ("lora", ("q_proj", "down_proj"))],
)
def test_greedy_tokens_are_ours_before_and_behind_each_adapter(
    raw, place, tmp_path, variant, targets
):
    method, params = adapted(variant, targets)
    engine = engine_of(raw, method, tmp_path)
    _, none, base = model("full", SMALL)
    for part in ((none, base), (method, params)):
        local = LocalEngine(SMALL, part[0], place[1].decode, params=part[1])
        if part[0] is method:
            engine.update(params)
        for stop in ((), ("c", "fo"), ("<unk>",)):
            sampling = dataclasses.replace(GREEDY, stop=stop)
            ours = local.sample(PROMPTS, 2, sampling, 0)
            theirs = engine.sample(PROMPTS, 2, sampling, 0)
            said = [[(one.ids, one.finished) for one in group] for group in theirs]
            assert said == [[(one.ids, one.finished) for one in group] for group in ours]
            check_logprobs(theirs, *part)


def test_drawn_tokens_have_the_log_probabilities_of_the_policy(raw, processed, tmp_path):
    method, params = adapted("lora")
    for url, tempered, sampling in [
        (raw, False, Sampling(12, eos_ids=(2,))),
        (raw, False, Sampling(12, top_p=0.8, top_k=5, eos_ids=(2,))),
        (processed, True, Sampling(12, temperature=0.7, eos_ids=(2,))),
        (processed, True, GREEDY),
    ]:
        engine = engine_of(url, method, tmp_path, tempered=tempered)
        engine.update(params)
        found = engine.sample(PROMPTS, 4, sampling, 1)
        check_logprobs(found, method, params, sampling.temperature or 1.0)
        if sampling.temperature:
            assert all(len({tuple(one.ids) for one in group}) > 1 for group in found)


def test_what_vllm_refuses_is_one_line(raw, tmp_path):
    engine = engine_of(raw, adapted("lora")[0], tmp_path)
    long = dataclasses.replace(SMALL, max_position_embeddings=500)
    with pytest.raises(ServerError, match=r"HTTP 400 .*cannot be greater than max_model_len=96"):
        dataclasses.replace(engine, config=long).sample(
            PROMPTS, 1, dataclasses.replace(GREEDY, max_new_tokens=100), 0
        )
    with pytest.raises(ServerError, match=r"HTTP 404 .*does not exist"):
        dataclasses.replace(engine, base="other").sample(PROMPTS, 1, GREEDY, 0)
    large, params = adapted("lora", rank=32)
    with pytest.raises(ServerError, match=r"HTTP 500 .*32 is greater than max_lora_rank 16"):
        engine_of(raw, large, tmp_path).update(params)


def test_a_run_of_grpo_samples_from_vllm_what_it_has_learnt(raw, place, tmp_path):
    config = run_config(tmp_path, total_steps=8, checkpoint__every_steps=None)
    config["model"] = {"path": str(place[0] / "base"), "dtype": "float32"}
    config["objective"] |= {
        "engine": "openai",
        "server": raw,
        "server_model": "base",
        "server_directory": str(tmp_path / "adapters"),
    }
    result = jaxtune.train(config, tmp_path / "run")
    rows = [row for row in result.history if "reward" in row]
    assert len(rows) == 8 and max(row["sampler_gap"] for row in rows) < 2e-4
    assert rows[-1]["rollout_kl"] != 0 and "eval/reward" in result.history[-1]
    assert len(list((tmp_path / "adapters").iterdir())) == 1
