"""A run on pairs: its rows, its attention, and the batch that its step is made for."""

from __future__ import annotations

import json

import pytest

from jaxtune.core.errors import RequestError
from jaxtune.recipes.build import build
from jaxtune.recipes.schema.resolve import resolve
from tests.correctness.tiny_runs import run_config
from tests.data.conftest import write_tokenizer

BASE = {"input_ids", "loss_mask", "segment_ids", "positions"}
OF_PAIRS = {"completions", "example_weight", "margin"}


@pytest.fixture
def pairs(tmp_path):
    """A config that learns from eight pairs, without a reference."""
    rows = [{"prompt": "The cat", "chosen": f" sat {i}", "rejected": f" ran {i}"} for i in range(8)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    write_tokenizer(tmp_path / "tokenizer")
    entry = {"source": f"jsonl:{tmp_path}/pairs.jsonl", "format": "preference"}
    return run_config(
        tmp_path,
        objective={"name": "simpo"},
        data__train=[entry],
        data__eval=[entry],
        data__seq_len=64,
        model__tokenizer=str(tmp_path / "tokenizer"),
        model__overrides__vocab_size=512,
        model__overrides__num_layers=1,
    )


@pytest.mark.parametrize("packing", [False, True])
def test_the_step_is_made_for_the_keys_of_pairs(pairs, packing):
    pairs["data"]["packing"] = packing
    plan = build(resolve(pairs))
    batch = plan.abstract_arguments()[2]
    assert set(batch) == BASE | OF_PAIRS | ({"branches"} if packing else set())
    made = plan.data.stream.batch(0, 4)
    assert {name: array.dtype for name, array in made.items()} == {
        name: leaf.dtype for name, leaf in batch.items()
    }
    most = plan.data.stream.most_completions
    assert most == 2 if not packing else most >= int(made["completions"].max()) > 2
    assert plan.attention.name == "xla"


@pytest.mark.parametrize("packing", [False, True])
def test_a_row_of_pairs_may_be_longer_than_the_context_and_no_side(pairs, packing):
    pairs["data"]["packing"] = packing
    longest = 2 * build(resolve(pairs)).data.stream.row(0)["positions"].max() + 2
    side = int(longest) // 2
    pairs["model"]["overrides"]["max_position_embeddings"] = side
    plan = build(resolve(pairs))  # 64 tokens a row
    assert plan.data.stream.row(0)["positions"].max() == side - 1 < plan.config.data.seq_len // 2
    pairs["model"]["overrides"]["max_position_embeddings"] = side - 1
    with pytest.raises(RequestError, match=f"more than the model's {side - 1}") as error:
        build(resolve(pairs))
    assert error.value.key == "data.train[0]" and error.value.where.endswith("pairs.jsonl:1")
    texts = pairs | {"objective": {"name": "kto"}}  # one completion a row
    texts["data"]["packing"] = False
    with pytest.raises(RequestError, match=f"64 positions are more than the model's {side - 1}"):
        build(resolve(texts))


def test_what_cannot_share_prompts_is_refused(pairs):
    for changes, key in (
        ({"mesh": {"data": 1, "fsdp": 1, "sequence": 2}}, "data.packing"),
        ({"model": pairs["model"] | {"attention": "splash"}}, "model.attention"),
    ):
        with pytest.raises(RequestError) as error:
            build(resolve(pairs | changes))
        assert error.value.key == key


def test_an_objective_on_texts_refuses_pairs(pairs):
    with pytest.raises(RequestError, match="'preference' is read by dpo") as error:
        resolve(pairs | {"objective": {"name": "sft"}})
    assert error.value.key == "data.train[0].format"
