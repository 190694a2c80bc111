"""Exports of every family in vLLM: whole models, and LoRA as PEFT directories."""

import copy
import json
import subprocess

import numpy as np
import pytest

from jaxtune.checkpoints.hf_export import save_hf
from jaxtune.checkpoints.peft_files import save_adapter
from jaxtune.core.tree import flatten, unflatten
from jaxtune.generate.sampler import sample
from jaxtune.peft.lora import Lora
from tests.checkpoints.world import BASE, random_params
from tests.models.families import ROWS
from tests.models.family_checks import load, randomise
from tests.vllm.server import PYTHON, environment

pytestmark = pytest.mark.skipif(not PYTHON, reason="JAXTUNE_VLLM names no Python that has vLLM")

NAMES = (
    *("llama", "llama tied", "mistral", "qwen2 tied", "qwen3 plain", "olmo2", "smollm3", "granite"),
    *("gemma", "gemma2", "gemma3", "gpt2", "gpt_neox", "phi3 plain"),
    *("mixtral", "qwen3_moe plain", "gpt_oss"),
)
# GPT-2 has no LoRA in vLLM; that of routed families needs Triton, which the CPU has not.
ALONE = ("gpt2", "mixtral", "qwen3_moe plain", "gpt_oss")
METHOD = Lora(rank=3, alpha=5.0)
PROMPTS = [np.random.default_rng(0).integers(3, 97, n).tolist() for n in (20, 11, 6)]
NEW, CONTEXT = 8, 64


def row_of(name):
    """A row of the families' table, with heads that vLLM's attention on the CPU takes."""
    fields = copy.deepcopy(ROWS[name])
    if name == "gpt2":
        return fields | {"n_embd": 128, "n_inner": 96}
    wide = {"hidden_size": 128, "intermediate_size": 96, "moe_intermediate_size": 32}
    fields |= {key: value for key, value in wide.items() if key in fields}
    if name == "gemma":
        fields["attention_bias"] = False  # vLLM leaves out Gemma's, which no published model has
    return fields | ({"head_dim": 32} if "head_dim" in fields else {})


def greedy(config, method, params):
    """[ids, log-probabilities] of what each prompt is continued with."""
    settings = {"max_new_tokens": NEW, "temperature": 0.0, "slots": 4}
    found = sample(config, method, params, PROMPTS, 1, **settings)
    return [(one.ids, one.logprobs) for (one,) in found]


def run(directory):
    """({(name, "base" or "lora"): ours}, the same of vLLM's), all models in one process."""
    import transformers

    jobs, ours, theirs = [], {}, {}
    for name in NAMES:
        place = directory / name.replace(" ", "_")
        source = transformers.AutoConfig.for_model(**row_of(name))
        net = transformers.AutoModelForCausalLM.from_config(source).eval()
        randomise(net)
        net.save_pretrained(place / "theirs")
        config, params = load(place / "theirs")
        raw = json.loads((place / "theirs" / "config.json").read_text())
        save_hf(place / "base", config, params, dtype="float32", raw=raw)
        ours[name, "base"] = greedy(config, BASE, params)
        adapters = []
        if name not in ALONE:
            own = unflatten(flatten(random_params(config, METHOD)) | flatten(params))
            save_adapter(place / "lora", config, METHOD, own, "base")
            ours[name, "lora"] = greedy(config, METHOD, own)
            adapters = [str(place / "lora")]
        sizes = {"max_tokens": NEW, "max_model_len": CONTEXT, "prompts": PROMPTS}
        jobs.append(sizes | {"name": name, "model": str(place / "base"), "adapters": adapters})
    (directory / "jobs.json").write_text(json.dumps(jobs))
    subprocess.run(
        [PYTHON, "tests/vllm/offline.py", directory / "jobs.json", directory / "answers.jsonl"],
        env=environment() | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        check=True,
    )
    for line in (directory / "answers.jsonl").read_text().splitlines():
        answer = json.loads(line)
        for adapter, rows in answer["found"].items():
            theirs[answer["name"], "lora" if adapter else "base"] = rows
    return ours, theirs


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    return run(tmp_path_factory.mktemp("families"))


@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_and_their_log_probabilities_are_ours(answers, name):
    ours, theirs = answers
    for part in ("base",) if name in ALONE else ("base", "lora"):
        got = theirs[name, part]
        assert not isinstance(got, str), got
        assert [ids for ids, _ in got] == [ids for ids, _ in ours[name, part]]
        for (_, wanted), (_, found) in zip(ours[name, part], got, strict=True):
            np.testing.assert_allclose(found, wanted, atol=1e-4)
