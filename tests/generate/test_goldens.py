"""The two real models continue and score text as their golden files say."""

import dataclasses
import functools
import json

import numpy as np
import pytest

from jaxtune.checkpoints import hf
from jaxtune.generate import scoring
from jaxtune.generate.engine import generate
from jaxtune.peft.method import Method

MODELS = ("stories260k", "babyllama105")


@pytest.fixture(scope="module", params=MODELS)
def real(request, shared):
    """(config, method, params, golden.json) of a real model in float32."""
    directory = shared / "models" / request.param
    config = dataclasses.replace(hf.read_config(directory)[0], dtype="float32")
    params = hf.load_params(directory, config, dtypes=np.float32)
    return config, Method(), params, json.loads((directory / "golden.json").read_text())


def test_greedy_ids_from_bos_and_from_the_prompt(real):
    *model, golden = real
    wanted = golden["greedy_from_bos_ids"]
    write = functools.partial(generate, *model, max_new_tokens=len(wanted) - 1)
    assert write([wanted[:1]]) == [wanted[1:]]
    # ragged: the longer prompt starts further along the same text
    found = write([wanted[:1], wanted[:9]])
    assert found[0] == wanted[1:]
    assert found[1][: len(wanted) - 9] == wanted[9:]


def test_logits_of_the_prompt(real):
    *model, golden = real
    ids = np.asarray([golden["prompt_ids"]])
    out = np.asarray(scoring.logits(*model, ids))[0]
    np.testing.assert_allclose(out[:, :8], golden["logits_first8"], atol=1e-3)
    total = np.log(np.sum(np.exp(np.float64(out)), axis=-1))
    np.testing.assert_allclose(total, golden["logsumexp"], atol=1e-3)
    np.testing.assert_array_equal(np.argmax(out, axis=-1), golden["argmax"])
    scores = np.asarray(scoring.logprobs(*model, ids))[0]
    wanted = [row[i] for row, i in zip(out[:-1] - total[:-1, None], ids[0, 1:], strict=True)]
    np.testing.assert_allclose(scores, wanted, atol=1e-4)
