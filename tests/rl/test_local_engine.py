"""The local engine: the trainer's own arrays, meshes, processes, and what it refuses."""

import dataclasses
import gc
import json
import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from jaxtune.core.errors import RequestError
from jaxtune.core.tree import combine, flatten, nbytes, partition, without_holes
from jaxtune.generate import sampler
from jaxtune.generate.sampler import sample
from jaxtune.models.config import LayerKind
from jaxtune.models.decoder import param_axes
from jaxtune.models.rope import Rope
from jaxtune.parallel.mesh import make_mesh
from jaxtune.parallel.rules import shardings
from jaxtune.peft.method import TRAINED, labels
from jaxtune.rl.engine import Sampling
from jaxtune.rl.local_engine import LocalEngine
from jaxtune.rl.mismatch import mismatch
from tests.conftest import ROOT, xla_flags
from tests.generate.tiny_models import CONFIG, model, row_logits

PROMPTS = [[5, 9, 2, 40, 7], [3], [60, 1, 1, 17, 8, 30, 22, 4, 11, 50, 31]]
SAMPLING = Sampling(9, temperature=0.8, eos_ids=(4, 8, 15, 16))


def engine_of(name: str, config=CONFIG, **options) -> LocalEngine:
    config, method, params = model(name, config)
    return LocalEngine(config, method, params=params, **options)


def test_the_weights_are_the_trainers_own(monkeypatch):
    """Not copied before a call, in its midst (a stop check looks) or after it."""
    config, method, params = model("lora")
    trainable, frozen = partition(params, labels(method, params), lambda name: name == TRAINED)
    given, seen = without_holes(trainable) | without_holes(frozen), []
    gc.collect()  # what earlier tests left must not go in the midst of this one
    before = sum(array.nbytes for array in jax.live_arrays())

    def decode(ids):
        seen.append(sum(array.nbytes for array in jax.live_arrays()) - before)
        return ""

    monkeypatch.setattr(sampler, "CHUNK", 3)
    engine = LocalEngine(config, method, decode, slots=4)
    engine.update(combine(trainable, frozen))
    for path, leaf in flatten(engine.params).items():
        assert leaf.unsafe_buffer_pointer() == given[path].unsafe_buffer_pointer()
    engine.sample(PROMPTS, 2, dataclasses.replace(SAMPLING, stop=("y",)), 0)
    assert 0 < max(seen) < nbytes(params)  # a cache of four short rows
    assert sum(array.nbytes for array in jax.live_arrays()) == before


def test_the_samples_are_those_of_the_model_with_its_adapter():
    """C18, C25: log-probabilities of full passes at this temperature, and not the base's."""
    found = engine_of("lora").sample(PROMPTS, 2, SAMPLING, 5)
    sampled, adapted, base = [], [], []
    for prompt, group in zip(PROMPTS, found, strict=True):
        for one in group:
            sampled += one.logprobs
            for scores, name in ((adapted, "lora"), (base, "full")):
                logits = row_logits(name, [*prompt, *one.ids])[len(prompt) - 1 : -1]
                logps = jax.nn.log_softmax(logits / SAMPLING.temperature, axis=-1)
                scores += [float(logps[n, i]) for n, i in enumerate(one.ids)]
    ones = np.ones(len(sampled))
    same, other = (mismatch(sampled, np.asarray(s), ones) for s in (adapted, base))
    assert same["max"] < 1e-4 and same["k3"] < 1e-8
    assert other["max"] > 0.1 and other["k3"] > 1e-3


def test_weights_that_a_step_freed_are_named():
    engine = engine_of("lora")
    engine.update(jax.tree.map(lambda leaf: leaf + 0, engine.params))
    jax.tree.leaves(engine.params)[0].delete()
    with pytest.raises(RequestError, match="a step freed them: call update"):
        engine.sample(PROMPTS, 1, SAMPLING, 0)
    with pytest.raises(RequestError, match="no weights"):
        LocalEngine(engine.config, engine.method).sample(PROMPTS, 1, SAMPLING, 0)


def rope_config(scaling: str, **more):
    rope = Rope(scaling=scaling, original_context=16, **more)
    return dataclasses.replace(CONFIG, kinds=(LayerKind(rope=rope),))


def test_rows_whose_length_changes_the_frequencies_are_refused():
    factors = {"short_factors": (1.0,) * 4, "long_factors": (2.0,) * 4}
    long = rope_config("longrope", **factors)
    dynamic = rope_config("dynamic", factor=4.0)
    for config in (long, dynamic):
        engine = engine_of("full", config, decode=str)
        with pytest.raises(RequestError, match=r"prompt 2 of 11 positions may grow to 20: beyond"):
            engine.sample(PROMPTS, 1, SAMPLING, 0)
        engine._check(PROMPTS[:2], SAMPLING)
    engine_of("full", long)._check([[1] * 17], SAMPLING)  # long from the start
    with pytest.raises(RequestError, match="'dynamic' change"):
        engine_of("full", dynamic)._check([[1] * 17], SAMPLING)
    with pytest.raises(RequestError, match="stop: stop strings need a tokenizer"):
        engine_of("full")._check(PROMPTS, dataclasses.replace(SAMPLING, stop=("a",)))


def gentle():
    """(config, method, params): at half of the weights a rounding error stays one.

    At whole ones, float32 on a mesh is 2e-4 from float64 at a token, in the sampler and the scorer.
    """
    config, method, params = model("lora")
    return config, method, jax.tree.map(lambda leaf: 0.5 * leaf, params)


def spread_sample(sizes: dict[str, int]):
    config, method, params = gentle()
    mesh = make_mesh(sizes)
    spread = jax.device_put(params, shardings(param_axes(config, method), params, mesh))
    engine = LocalEngine(config, method, slots=4, params=spread)
    return engine.sample(PROMPTS, 3, SAMPLING, 2)


@pytest.mark.slow
@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 4, 2)])
def test_meshes_give_the_samples_of_one_device(sizes):
    named = dict(zip(("data", "fsdp", "tensor"), sizes, strict=True))
    config, method, params = gentle()
    wanted = LocalEngine(config, method, slots=4, params=params).sample(PROMPTS, 3, SAMPLING, 2)
    for ours, theirs in zip(spread_sample(named), wanted, strict=True):
        for one, two in zip(ours, theirs, strict=True):
            assert one.ids == two.ids and one.finished == two.finished
            np.testing.assert_allclose(one.logprobs, two.logprobs, atol=1e-4)


PROCESS = """
import json, sys
import jax
from jaxtune.parallel import processes
processes.join(sys.argv[1])
from tests.rl.test_local_engine import spread_sample
found = spread_sample({"data": 2, "fsdp": 2})
print(json.dumps([[[one.ids, one.logprobs, one.finished] for one in group] for group in found]))
processes.part(None, 0)
"""


@pytest.mark.slow
def test_each_of_two_processes_gets_all_samples():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {"XLA_FLAGS": xla_flags(devices=2), "PYTHONPATH": str(ROOT)}
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, f"127.0.0.1:{port},2,{index}"],
            env=env,
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    said = [json.loads(run.communicate(timeout=300)[0].splitlines()[-1]) for run in runs]
    assert said[0] == said[1]
    config, method, params = gentle()
    settings = {"max_new_tokens": 9, "temperature": 0.8, "seed": 2, "eos_ids": SAMPLING.eos_ids}
    wanted = sample(config, method, params, PROMPTS, 3, **settings)
    for ours, theirs in zip(said[0], wanted, strict=True):
        for (ids, logprobs, finished), one in zip(ours, theirs, strict=True):
            assert ids == one.ids and finished == one.finished
            np.testing.assert_allclose(logprobs, one.logprobs, atol=1e-4)
