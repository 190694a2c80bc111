"""`model.add_tokens`: rows of their own, begun as the mean, trained, merged and exported."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import jaxtune
from jaxtune.core.errors import RequestError
from jaxtune.core.tree import flatten
from jaxtune.recipes.build import build
from jaxtune.recipes.schema.resolve import resolve
from tests.cli import bad_world
from tests.goldens.tiny import write_llama

TOKENS = ["<call>", "</call>", "«"]
OLD, IDS = {"padded": 21, "grown": 97}, "the cat <call>sat on </call>"


def world(directory: Path, kind: str) -> dict:
    """A config of a LoRA run whose data have the new tokens."""
    words = [*bad_world.WORDS, *(f"w{i}" for i in range(OLD[kind] - 21))]
    write_llama(directory / "model", tie_word_embeddings=kind == "grown")
    bad_world.write_tokenizer(directory / "model", words)
    rows = [{"prompt": f"the {w}", "completion": " <call>cat</call> sat"} for w in words[:16]]
    bad_world.write_lines(directory / "train.jsonl", rows)
    config = bad_world.config()
    config["model"] |= {"path": str(directory / "model"), "add_tokens": TOKENS}
    source = {"source": f"jsonl:{directory}/train.jsonl", "format": "completion"}
    config["data"] |= {"train": [source], "eval": []}
    return config


@pytest.fixture(scope="module", params=OLD)
def ran(request, tmp_path_factory):
    """(kind, directory with a finished run in `run`)."""
    directory = tmp_path_factory.mktemp(request.param)
    jaxtune.train(world(directory, request.param), directory / "run")
    return request.param, directory


def test_the_new_rows_begin_as_the_mean_and_alone_are_trained(ran):
    kind, directory = ran
    before = flatten(jaxtune.load(directory / "model", dtype="float32").params)
    lm = jaxtune.load(directory / "run", dtype="float32")
    after, start = flatten(lm.params), OLD[kind]
    assert lm.config.vocab_size == max(97, start + 3)
    ids = lm.tokenizer.encode("<call> </call> «", special=False)
    assert ids == [start, start + 1, start + 2]
    table = before["embed/embedding"]
    assert np.array_equal(after["embed/embedding"][:start], table[:start])
    mean = np.asarray(table[:start], np.float64).mean(axis=0)
    plan = build(resolve(json.loads((directory / "run" / "config.json").read_text())))
    assert plan.parts.labels["embed"] == {"embedding": "frozen", "added": "trained"}
    fresh = plan.base.load(lambda path: np.dtype(np.float32), plan.mesh)["embed"]["embedding"]
    np.testing.assert_allclose(fresh[start : start + 3], np.tile(mean, (3, 1)), atol=1e-6)
    moved = np.abs(after["embed/added"] - mean).max(axis=1)
    assert (moved[:2] > 1e-3).all()
    if kind == "padded":  # a head of its own trains its columns too
        columns = np.asarray(before["lm_head/kernel"][:, :start], np.float64).mean(axis=1)
        assert np.abs(after["lm_head/added"] - columns[:, None]).max() > 1e-3
        assert np.array_equal(after["embed/embedding"][start + 3 :], table[start + 3 :])


def test_an_export_has_them(ran):
    """Merged = adapter model, here and in transformers."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    _, directory = ran
    lm = jaxtune.load(directory / "run", dtype="float32")
    lm.save(directory / "out", format="hf")
    merged = jaxtune.load(directory / "out", dtype="float32")
    ids = [lm.tokenizer.encode(IDS)]
    assert merged.tokenizer.encode(IDS) == ids[0]
    expected = np.asarray(lm.logits(ids))
    np.testing.assert_allclose(merged.logits(ids), expected, atol=1e-4)
    net = transformers.AutoModelForCausalLM.from_pretrained(directory / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(directory / "out")
    assert theirs(IDS)["input_ids"] == ids[0]
    with torch.no_grad():
        np.testing.assert_allclose(net(torch.tensor(ids)).logits.numpy(), expected, atol=1e-4)
    with pytest.raises(RequestError, match="new tokens"):
        lm.save(directory / "adapter", format="peft")


def test_a_second_run_builds_on_the_first(ran):
    _, directory = ran
    lm = jaxtune.load(directory / "run", dtype="float32")
    config = world(directory, ran[0])
    config["model"] = {"path": str(directory / "run"), "dtype": "float32"}
    base = build(resolve(config)).base
    assert base.config.vocab_size == lm.config.vocab_size
    assert base.tokenizer.encode(IDS) == lm.tokenizer.encode(IDS)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [(["cat"], "'cat' is a token already"), (["a", "a"], "each once"), ("x", "list of strings")],
)
def test_tokens_that_cannot_be_added_are_refused(tokens, message, tmp_path):
    config = world(tmp_path, "padded")
    config["model"]["add_tokens"] = tokens
    with pytest.raises(RequestError, match=message) as error:
        build(resolve(config))
    assert error.value.key == "model.add_tokens"
