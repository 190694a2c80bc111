"""Logits, log-probabilities and greedy tokens equal those of transformers + PEFT.

Against the goldens everywhere, against the libraries themselves where they can be imported.
"""

import functools
import json
from pathlib import Path

import numpy as np
import pytest

import jaxtune
from tests.goldens import tiny

pytestmark = pytest.mark.slow

GOLDEN = json.loads((Path(tiny.__file__).parent / "logits.json").read_text())["cases"]
CASES = tuple(GOLDEN)


def require_libraries() -> None:
    for module in ("torch", "transformers", "peft"):
        pytest.importorskip(module)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """name → (model directory, adapter directory or None) of a case of logits.json."""
    return tiny.cases(tmp_path_factory.mktemp("tiny")).__getitem__


@pytest.fixture(scope="module")
def loaded(case):
    """name → the case loaded by jaxtune in float32; each is loaded once."""

    @functools.cache
    def load(name: str):
        model, adapter = case(name)
        return jaxtune.load(str(model), adapter=adapter and str(adapter), dtype="float32")

    return load


def logits_of(lm, side: str) -> list[np.ndarray]:
    """[len, V] logits of each probe row, computed with the padding on `side`."""
    rows = tiny.probe()
    ids, mask = tiny.pad(rows, side)
    logits = np.asarray(lm.logits(ids, mask))
    assert logits.shape == (*ids.shape, tiny.VOCAB)
    assert logits.dtype == np.float32
    return [one[keep == 1] for one, keep in zip(logits, mask, strict=True)]


def check(lm, expected: dict) -> None:
    """Compares logits (both padding sides) and log-probabilities with those of a golden."""
    for side in ("right", "left"):
        for row, wanted in zip(logits_of(lm, side), expected["logits"], strict=True):
            kept = row[tiny.kept_positions(len(row))]
            np.testing.assert_allclose(kept, wanted, rtol=1e-4, atol=1e-4, err_msg=side)
    for side in ("right", "left"):
        ids, mask = tiny.pad(tiny.probe(), side)
        logprobs = np.asarray(lm.logprobs(ids, mask))
        assert logprobs.shape == (ids.shape[0], ids.shape[1] - 1)
        # A transition counts where both of its tokens are real.
        real = (mask[:, 1:] * mask[:, :-1]) == 1
        for one, keep, wanted in zip(logprobs, real, expected["logprobs"], strict=True):
            np.testing.assert_allclose(one[keep], wanted, rtol=1e-4, atol=1e-4, err_msg=side)


@pytest.mark.parametrize("name", CASES)
def test_golden_belongs_to_these_inputs(name, case):
    assert tiny.case_fingerprint(*case(name)) == GOLDEN[name]["inputs"]


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_the_golden(name, loaded):
    check(loaded(name), GOLDEN[name])


@pytest.mark.parametrize("name", CASES)
def test_greedy_tokens_equal_the_golden(name, loaded):
    prompts = tiny.prompts()
    new = loaded(name).generate(prompts, max_new_tokens=tiny.NEW_TOKENS)
    assert [list(map(int, ids)) for ids in new] == GOLDEN[name]["greedy"]


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_the_libraries_live(name, case, loaded):
    require_libraries()
    from tests.goldens import logits

    live = logits.run(*case(name))
    check(loaded(name), live)
    assert logits.distance(GOLDEN[name], live) < 2e-5


@pytest.mark.parametrize("kind", tiny.ADAPTERS)
def test_written_adapters_are_what_peft_writes(kind, case, tmp_path):
    require_libraries()
    from safetensors.numpy import load_file

    from tests.goldens import reference

    model, adapter = case(kind)
    config = reference.save_adapter(tmp_path, kind, model)
    written = json.loads((adapter / "adapter_config.json").read_text())
    ignored = {"base_model_name_or_path", "peft_version"}
    assert {k: v for k, v in written.items() if k not in ignored} == {
        k: v for k, v in config.items() if k not in ignored
    }
    ours, theirs = (load_file(d / "adapter_model.safetensors") for d in (adapter, tmp_path))
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
