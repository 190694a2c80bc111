"""Virtual tokens and padding: C31, C35."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from jaxtune.core.tree import flatten, unflatten
from jaxtune.models.config import LayerKind
from jaxtune.models.decoder import init_params
from jaxtune.models.probe import probe
from jaxtune.peft.method import Method
from jaxtune.peft.prefix import Prefix
from jaxtune.peft.prompt import Prompt
from jaxtune.recipes.schema.resolve import resolve
from tests.checkpoints.world import assert_same_logits, logits_of, random_params
from tests.correctness.runs import run_config
from tests.correctness.small import CONFIG, METHODS, examples

pytestmark = pytest.mark.slow

BASE = Method()
FIRST = (7, 3, 90)


def started(method: Method, ids=FIRST):
    """(base, base with the method as it starts): its random ids are the given ones."""
    base = random_params(CONFIG, BASE)
    fresh = init_params(CONFIG, method, jax.random.key(0))
    params = unflatten(flatten(fresh) | flatten(base))
    run = probe(CONFIG, params)
    return base, method.start(params, jax.random.key(1), lambda _: run(np.array([ids])))


@pytest.mark.parametrize(
    "method",
    [Prompt(num_tokens=3, init="text", init_ids=FIRST), Prefix(num_tokens=3)],
    ids=lambda m: m.name,
)
def test_c31_virtual_tokens_stand_where_the_same_real_tokens_would(method):
    """Padding between prompt and text, wrong positions: https://github.com/huggingface/peft/issues/1093.

    At the start the virtual tokens are vocabulary entries, so the model must compute exactly what
    the base computes with those tokens in front.
    """
    base, params = started(method)
    rows = [ids.tolist() for ids, _ in examples([9, 17, 4])]
    long = logits_of(CONFIG, BASE, base, [[*FIRST, *row] for row in rows])
    for side in ("right", "left"):
        found = logits_of(CONFIG, method, params, rows, side)
        assert_same_logits(found, [one[3:] for one in long], 1e-5)


def test_c31_a_prompt_starts_from_the_vocabulary_unless_told_otherwise(tmp_path):
    config = resolve(run_config(tmp_path, "prompt"))
    assert config.peft.init == "vocab" == Prompt().init
    base = random_params(CONFIG, BASE)
    params = unflatten(flatten(init_params(CONFIG, Prompt(), jax.random.key(0))) | flatten(base))
    rows = Prompt().start(params, jax.random.key(1), None)["prompt"]["embedding"]
    table = np.asarray(base["embed"]["embedding"])
    found = [int(np.flatnonzero((table == row).all(-1))[0]) for row in np.asarray(rows)]
    assert len(set(found)) > 10  # of 20, drawn from 97


@pytest.mark.parametrize("name", ["full", "dora", "houlsby", "prompt", "prefix", "ia3"])
def test_c35_left_and_right_padding_give_equal_logits(name):
    """Positions counted from the padding: https://github.com/huggingface/trl/issues/3307."""
    method = METHODS[name]
    config = dataclasses.replace(CONFIG, kinds=(LayerKind(), LayerKind(8)), pattern=(0, 1))
    params = random_params(config, method)
    rows = [ids.tolist() for ids, _ in examples([9, 17, 4])]
    right = logits_of(config, method, params, rows, "right")
    left = logits_of(config, method, params, rows, "left")
    assert_same_logits(left, right, 1e-5)
    # and a row alone, without any padding
    assert_same_logits(logits_of(config, method, params, rows[1:2]), right[1:2], 1e-5)
