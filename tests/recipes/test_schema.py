"""The schema refuses what it must, names the key, and completes the rest."""

from __future__ import annotations

import copy
import json
import pathlib
import pickle

import hypothesis
import hypothesis.strategies as st
import ml_collections
import numpy as np
import pytest

from jaxtune.core.errors import RequestError
from jaxtune.recipes.schema.keys import BY_PATH, KEYS
from jaxtune.recipes.schema.optim import OPTIMIZERS, SCHEDULES
from jaxtune.recipes.schema.peft import METHODS
from jaxtune.recipes.schema.resolve import Resolved, changes, plain, resolve

SOURCE = "jsonl:train.jsonl"


def base() -> dict:
    return {
        "model": {"path": "/models/m"},
        "data": {"train": [{"source": SOURCE, "format": "chat"}], "seq_len": 128},
        "batch_size": 8,
        "total_steps": 100,
        "optim": {"lr": 1e-3},
    }


def put(config: dict, path: str, value: object) -> dict:
    """Sets `a.b[0].c`, the slow way."""
    node = config
    *heads, last = path.replace("[", ".[").split(".")
    for head in heads:
        key = int(head[1:-1]) if head.startswith("[") else head
        if isinstance(node, list):
            node = node[key]
        else:
            node = node.setdefault(key, {})
    node[last] = value
    return config


def lora(**keys: object) -> dict:
    return {"peft": {"method": "lora", **keys}}


EVAL = {"data.eval": [{"source": "jsonl:held.jsonl", "format": "chat"}]}

# (changes to the base config, key that the error names, text that the message must hold)
BAD = [
    # unknown keys, with the nearest valid name
    ({"sead": 1}, "sead", "did you mean 'seed'?"),
    ({"batchsize": 1}, "batchsize", "did you mean 'batch_size'?"),
    ({"optim.learning_rate": 1}, "optim.learning_rate", "unknown key"),
    ({"optim.wieght_decay": 1}, "optim.wieght_decay", "did you mean 'weight_decay'?"),
    ({"peft": {"method": "lora", "rnak": 4}}, "peft.rnak", "did you mean 'rank'?"),
    ({"data.train[0].sorce": "x"}, "data.train[0].sorce", "did you mean 'source'?"),
    (
        {"data.eval": [{"source": SOURCE, "format": "chat", "weight": 2}]},
        "data.eval[0].weight",
        "un",
    ),
    ({"rank": 8}, "rank", "did you mean 'peft.rank'?"),
    ({"lr": 8}, "lr", "did you mean 'optim.lr'?"),
    ({"optim.groups": {"a": {"lr_scal": 2}}}, "optim.groups['a'].lr_scal", "'lr_scale'"),
    ({"mesh.model": 2}, "mesh.model", "unknown key"),
    ({"checkpoint.every": 2}, "checkpoint.every", "did you mean 'every_steps'?"),
    # keys that the chosen method, optimizer, schedule does not use
    ({"peft.rank": 8}, "peft.rank", "peft.method = 'lora'"),
    ({"peft": {"method": "ia3", "ratio": 2.0}}, "peft.ratio", "'lora'"),
    (lora(bottleneck=8), "peft.bottleneck", "'adapter'"),
    (lora(num_tokens=8), "peft.num_tokens", "'prompt' or 'prefix'"),
    ({"peft": {"method": "prefix", "init": "text"}}, "peft.init", "'prompt'"),
    ({"peft": {"method": "prompt", "init_text": "Hi"}}, "peft.init_text", "peft.init = 'text'"),
    ({"peft.init_from": "/a"}, "peft.init_from", "'lora', 'adapter'"),
    ({"optim.momentum": 0.9}, "optim.momentum", "'sgd' or 'muon'"),
    ({"optim.name": "sgd", "optim.b1": 0.9}, "optim.b1", "optim.name = 'sgd'"),
    ({"optim.name": "lion", "optim.eps": 0.9}, "optim.eps", "'adamw' or 'muon'"),
    ({"optim.end_lr_ratio": 0.1}, "optim.end_lr_ratio", "optim.schedule = 'constant'"),
    ({"optim.schedule": "cosine", "optim.decay_ratio": 0.1}, "optim.decay_ratio", "'wsd'"),
    # wrong types
    ({"seed": 1.5}, "seed", "an integer"),
    ({"seed": True}, "seed", "an integer"),
    ({"batch_size": "8"}, "batch_size", "'8'"),
    ({"optim.lr": "1e-3"}, "optim.lr", "a number"),
    ({"optim.lr": False}, "optim.lr", "a number"),
    ({"data.packing": 1}, "data.packing", "True or False"),
    ({"model": "/models/m"}, "model", "is a section"),
    ({"model.path": 7}, "model.path", "a path"),
    ({"model.overrides": [1]}, "model.overrides", "a mapping"),
    ({"data.train": {"source": SOURCE, "format": "chat"}}, "data.train", "a list of"),
    ({"data.train": [SOURCE]}, "data.train[0]", "source, format, weight"),
    ({"data.seq_len": None}, "data.seq_len", "must not be None"),
    (lora(targets=[]), "peft.targets", "list of names"),
    (lora(targets=["q_proj", "q_proj"]), "peft.targets", "each once"),
    ({"peft.train": "norm"}, "peft.train", "list of regular expressions"),
    ({"optim.groups": {"a": 0.1}}, "optim.groups['a']", "lr_scale"),
    ({"optim.groups": 3}, "optim.groups", "lr_scale"),
    # values out of range
    ({"optim.lr": 0}, "optim.lr", "> 0"),
    ({"optim.lr": float("nan")}, "optim.lr", "nan"),
    ({"optim.b1": 1.0}, "optim.b1", "< 1"),
    ({"batch_size": 0}, "batch_size", "≥ 1"),
    ({"seed": -1}, "seed", "≥ 0"),
    (lora(rank=0), "peft.rank", "≥ 1"),
    (lora(dropout=1.0), "peft.dropout", "< 1"),
    ({"data.seq_len": 1}, "data.seq_len", "≥ 2"),
    ({"data.train[0].weight": 0}, "data.train[0].weight", "> 0"),
    ({"mesh.tensor": 0}, "mesh.tensor", "got 0"),
    ({"mesh.tensor": -2}, "mesh.tensor", "≥ -1"),
    ({"checkpoint.keep": 0}, "checkpoint.keep", "≥ 1"),
    ({"optim.clip_norm": 0}, "optim.clip_norm", "None"),
    # unknown values, and values of later versions
    ({"peft.method": "lroa"}, "peft.method", "did you mean 'lora'?"),
    (lora(variant="dorra"), "peft.variant", "did you mean 'dora'?"),
    ({"optim.name": "adam"}, "optim.name", "did you mean 'adamw'?"),
    ({"model.dtype": "bf16"}, "model.dtype", "'bfloat16'"),
    ({"model": {"preset": "tiny1m"}}, "model.preset", "did you mean 'tiny-1m'?"),
    ({"model.quantize": "nf"}, "model.quantize", "did you mean 'nf4'?"),
    ({"model.quantize": "nf4"}, "model.quantize", "contradicts peft.method = 'full'"),
    (lora(variant="pissa") | {"model.quantize": "nf4"}, "peft.variant", "starts from whole"),
    ({"objective.name": "stf"}, "objective.name", "did you mean 'sft'?"),
    ({"data.train[0].format": "preference"}, "data.train[0].format", "reads 'chat' or"),
    ({"data.train[0].format": "chats"}, "data.train[0].format", "did you mean 'chat'?"),
    ({"data.train[0].source": "a.jsonl"}, "data.train[0].source", "'jsonl:a.jsonl'"),
    ({"data.train[0].source": "json:a"}, "data.train[0].source", "did you mean 'jsonl'?"),
    ({"data.train[0].source": "tfds:imdb"}, "data.train[0].source", "SPLIT"),
    ({"data.train[0].source": "jsonl:"}, "data.train[0].source", "jsonl:PATH"),
    ({"mesh.slices": 0}, "mesh.slices", "number of slices"),
    ({"mesh.slice_axis": "tensor"}, "mesh.slice_axis", "fsdp"),
    ({"mesh.sequence": 0}, "mesh.sequence", "got 0"),
    (lora(targets="q_proj("), "peft.targets", "not a regular expression"),
    ({"peft.train": ["ok", "*"]}, "peft.train[1]", "not a regular expression"),
    ({"optim.groups": {"(": {}}}, "optim.groups['('].pattern", "not a regular expression"),
    # missing
    ({"model": {}}, "model.path", "model.preset"),
    ({"optim": {}}, "optim.lr", "missing"),
    ({"data.train": [{"source": SOURCE}]}, "data.train[0].format", "missing"),
    ({"data.train": []}, "data.train", "empty"),
    ({"total_steps": None}, "total_steps", "total_epochs"),
    ({"peft": {"method": "prompt", "init": "text"}}, "peft.init_text", "missing"),
    ({"model": {"preset": "tiny-1m"}}, "model.tokenizer", "needs one"),
    # contradictions
    ({"model.preset": "tiny-1m"}, "model.preset", "not both"),
    ({"total_epochs": 1.0}, "total_epochs", "total_steps"),
    ({"grad_accum": 3}, "grad_accum", "does not divide"),
    ({"optim.warmup_steps": 3, "optim.warmup_ratio": 0.1}, "optim.warmup_ratio", "one of them"),
    ({"optim.warmup_steps": 101}, "optim.warmup_steps", "longer than the run"),
    (
        {"optim.schedule": "wsd", "optim.warmup_ratio": 0.95},
        "optim.warmup_ratio",
        "decay_ratio",
    ),
    ({"data.train[0].source": "text:a.txt"}, "data.train[0].format", "one document"),
    ({"objective.name": "pretrain"}, "data.train[0].format", "every token"),
    (
        {"data.train": [{"source": SOURCE, "format": "text"}], "data.template": "x"},
        "data.template",
        "only by the formats",
    ),
    ({"peft": {"method": "prompt", "num_tokens": 128}}, "peft.num_tokens", "no room"),
    ({"mesh.data": -1, "mesh.fsdp": -1}, "mesh.fsdp", "only one axis"),
    ({"eval.every_steps": 5}, "eval.every_steps", "data.eval is empty"),
    ({"checkpoint.keep_best": "eval/loss"}, "checkpoint.keep_best", "data.eval is empty"),
    ({**EVAL, "checkpoint.keep_best": "loss"}, "checkpoint.keep_best", "eval/loss"),
    ({**EVAL, "checkpoint.keep_best": "eval/loss"}, "checkpoint.keep_best", "eval.every_steps"),
    (
        {"data.eval": [{"source": SOURCE, "format": "chat", "name": "a"}] * 2},
        "data.eval[1].name",
        "taken",
    ),
    (
        {"data.eval": [{"source": SOURCE, "format": "chat", "name": "a/b"}]},
        "data.eval[0].name",
        "letters",
    ),
    ({"optim.groups": [{"pattern": "a"}, {"pattern": "a"}]}, "optim.groups[0]", "twice"),
]


@pytest.mark.parametrize(
    ("edits", "key", "text"), BAD, ids=[f"{i}-{b[1]}" for i, b in enumerate(BAD)]
)
def test_a_bad_config_is_refused_with_its_key(edits: dict, key: str, text: str) -> None:
    config = base()
    for path, value in edits.items():
        put(config, path, copy.deepcopy(value))
    with pytest.raises(RequestError) as error:
        resolve(config)
    assert error.value.key == key
    assert text in error.value.message
    assert "\n" not in str(error.value)


def test_the_resolved_config_has_every_applicable_key_and_no_other() -> None:
    config = resolve(base())
    assert set(config.peft) == {"method", "train"}
    assert "b2" in config.optim and "momentum" not in config.optim
    assert [key for key in config if key.startswith("total_")] == ["total_steps"]
    assert not [key for key in config.optim if key.startswith("warmup_")]
    assert config.model.dtype == "bfloat16" and config.optim.clip_norm == 1.0
    assert config.data.train[0] == {"source": SOURCE, "format": "chat", "weight": 1.0}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_defaults_of_each_choice_are_valid_and_resolving_is_idempotent(
    method: str, optimizer: str, schedule: str
) -> None:
    config = base()
    config["peft"] = {"method": method}
    config["optim"] |= {"name": optimizer, "schedule": schedule}
    resolved = resolve(config)
    assert resolve(resolved) == resolved
    assert resolve(json.loads(json.dumps(resolved.to_dict()))) == resolved
    for key in KEYS:
        uses = {"peft.method": method, "optim.name": optimizer, "optim.schedule": schedule}
        uses["objective.name"] = "sft"
        expected = all(uses.get(path, "vocab") in ok for path, ok in key.used_by)
        section, _, name = key.path.rpartition(".")
        present = name in (resolved[section] if section else resolved)
        assert present == ((expected and key.default != "<absent>") or key.path == "total_steps")


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | st.just("chat")
)
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(
    st.dictionaries(st.sampled_from([key.path for key in KEYS]), ANYTHING, max_size=3)
)
def test_whatever_is_given_it_resolves_or_is_refused_with_a_key(edits: dict) -> None:
    config = base()
    for path, value in edits.items():
        put(config, path, value)
    resolved, key = None, None
    try:
        resolved = resolve(config)
    except RequestError as error:
        key = error.key
    assert (
        key if resolved is None else resolve(json.loads(json.dumps(resolved.to_dict()))) == resolved
    )


def test_defaults_depend_on_the_selector() -> None:
    assert resolve({**base(), "peft": {"method": "lora"}}).peft.targets == "all-linear"
    ia3 = resolve({**base(), "peft": {"method": "ia3"}})
    assert ia3.peft.targets == ("k_proj", "v_proj", "down_proj")
    assert resolve(put(base(), "optim.name", "lion")).optim.b2 == 0.99
    assert resolve(put(base(), "optim.name", "muon")).optim.momentum == 0.95


def test_numbers_are_converted_but_not_guessed() -> None:
    config = put(put(base(), "optim.lr", 1), "batch_size", np.int64(4))
    resolved = resolve(config)
    assert type(resolved.optim.lr) is float and type(resolved.batch_size) is int
    path = resolve(put(base(), "model.path", pathlib.Path("/m"))).model.path
    assert path == "/m"


def test_none_removes_a_key_that_does_not_apply() -> None:
    assert resolve({**base(), "peft": {"method": "full", "rank": None}}) == resolve(base())


def test_another_axis_may_take_what_is_left() -> None:
    assert resolve(put(base(), "mesh.data", -1)).mesh.fsdp == 1
    assert resolve(base()).mesh.fsdp == -1


def test_evaluation_sources_get_names_of_their_own() -> None:
    config = put(
        base(),
        "data.eval",
        [
            {"source": "jsonl:/a/held out.jsonl.gz", "format": "chat"},
            {"source": "jsonl:/b/x.jsonl", "format": "chat"},
            {"source": "jsonl:/c/x.jsonl", "format": "chat"},
            {"source": "tfds:/d/sms:1.0.0:test", "format": "chat"},
            {"source": "jsonl:/c/x.jsonl", "format": "chat", "name": "mine"},
        ],
    )
    resolved = resolve(config)
    names = [entry.name for entry in resolved.data.eval]
    assert names == ["held-out", "x-1", "x-2", "sms-test", "mine"]
    assert resolved.eval.batch_size == 8
    assert resolve(resolved) == resolved


def test_groups_keep_the_order_in_which_they_were_written() -> None:
    groups = {"z.*": {"lr_scale": 2}, "a.*": {"weight_decay": 0.1}}
    expected = (
        {"pattern": "z.*", "lr_scale": 2.0, "weight_decay": None},
        {"pattern": "a.*", "lr_scale": 1.0, "weight_decay": 0.1},
    )
    assert resolve(put(base(), "optim.groups", groups)).optim.groups == expected
    assert resolve(put(base(), "optim.groups", list(expected))).optim.groups == expected
    config = ml_collections.ConfigDict(base())
    config.optim.groups = {"z": {}, "a": {}}  # a ConfigDict sorts, and refuses keys with dots
    assert [group.pattern for group in resolve(config).optim.groups] == ["z", "a"]
    del config.optim.groups  # and is type-safe
    config.optim.groups = list(expected)
    assert resolve(config).optim.groups == expected


def test_config_dicts_and_placeholders_are_read() -> None:
    config = ml_collections.ConfigDict(base())
    config.seed = ml_collections.config_dict.placeholder(int)
    config.seed = 3
    assert resolve(config) == resolve({**base(), "seed": 3})
    config.batch_size = 8
    config.optim.lr = ml_collections.config_dict.required_placeholder(float)
    with pytest.raises(RequestError, match=r"optim\.lr: missing"):
        resolve(config)


def test_resolve_leaves_its_input_alone() -> None:
    config = base()
    resolve(config)
    assert config == base()


def test_a_resolved_config_is_frozen_hashable_and_copied_by_value() -> None:
    config = resolve(base())
    with pytest.raises(AttributeError, match="frozen"):
        config.seed = 1
    with pytest.raises(AttributeError, match="no 'rank' here"):
        _ = config.peft.rank
    assert copy.deepcopy(config) == config == pickle.loads(pickle.dumps(config))
    assert hash(config) == hash(resolve(base()))
    assert isinstance(config.model, Resolved) and dict(**config.mesh)["fsdp"] == -1
    assert plain(config) == config.to_dict()


def test_changes_names_what_differs() -> None:
    old = resolve(base())
    new = resolve({**put(base(), "optim.lr", 0.1), "peft": {"method": "bitfit"}})
    assert changes(old, old) == [] == changes(old, old.to_dict())
    assert ("optim.lr", 1e-3, 0.1) in changes(old, new)
    assert ("peft.targets", None, "all-linear") in changes(old, new)


def test_every_key_is_documented_and_declared_once() -> None:
    assert len(BY_PATH) == len(KEYS)
    assert all(key.doc for key in KEYS)
