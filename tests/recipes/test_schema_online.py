"""Configs of objectives that sample: defaults of each variant, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from jaxtune.core.errors import RequestError
from jaxtune.recipes.schema.resolve import resolve


def config(name: str = "grpo", **changes: Any) -> dict[str, Any]:
    """A config; `objective__temperature=…` sets a key."""
    found: dict[str, Any] = {
        "model": {"path": "MODEL"},
        "peft": {"method": "lora"},
        "objective": {"name": name, "rewards": [{"function": "contains"}]},
        "data": {"train": [{"source": "jsonl:FILE", "format": "prompt"}], "seq_len": 256},
        "batch_size": 32,
        "total_steps": 5,
        "optim": {"lr": 1e-3},
    }
    if name == "ppo":
        found["objective"]["prompts"] = 64
    for path, value in changes.items():
        section, _, key = path.rpartition("__")
        node = found.setdefault(section, {}) if section else found
        if value is None:
            node.pop(key, None)
        else:
            node[key] = value
    return found


SERVER = {
    "objective__engine": "openai",
    "objective__server": "http://127.0.0.1:1",
    "objective__server_model": "base",
    "objective__server_directory": "adapters",
}
EVAL = [{"source": "jsonl:HELD", "format": "prompt"}]
CHAT = [{"source": "jsonl:FILE", "format": "chat"}]
BAD = [
    ({"batch_size": 48}, "batch_size", "64 rows of an iteration"),
    ({"total_steps": None, "total_epochs": 1}, "total_epochs", "give total_steps; an iteration"),
    ({"optim__warmup_epochs": 1}, "optim.warmup_epochs", "optim.warmup_steps"),
    ({"peft__dropout": 0.1}, "peft.dropout", "without dropout"),
    ({"data__packing": True}, "data.packing", "one prompt and its completion"),
    (
        {"data__train": [{"source": "jsonl:F", "format": "chat"}]},
        "data.train[0].format",
        "'prompt'",
    ),
    ({"data__eval": EVAL, "eval__batch_size": 8}, "eval.batch_size", "takes all held-out"),
    ({"objective__max_new_tokens": 256}, "objective.max_new_tokens", "no room for a prompt"),
    ({"objective__overlong": 200}, "objective.overlong", "more than objective.max_new_tokens"),
    ({"objective__samples": 1, "batch_size": 8}, "objective.samples", "nothing to compare"),
    (
        {"objective__variant": "gspo", "objective__normaliser": "token"},
        "objective.normaliser",
        "use 'sequence'",
    ),
    ({"objective__kl_target": 5.0, "objective__kl_coef": 0.0}, "objective.kl_target", "kl_coef"),
    ({"objective__value_coef": 0.5}, "objective.value_coef", "only by objective.name = 'ppo'"),
    ({"objective__server": "http://x"}, "objective.server", "only by objective.name"),
    ({"objective__engine": "openai"}, "objective.server", "missing"),
    ({**SERVER, "objective__temperature": 0.7}, "objective.temperature", "processed_logprobs"),
    (
        {**SERVER, "objective__server_tempered": True, "objective__top_k": 5},
        "objective.top_k",
        "narrowed choice",
    ),
]


@pytest.mark.parametrize(("edits", "key", "text"), BAD, ids=[key for _, key, _ in BAD])
def test_a_contradiction_is_refused_with_its_key(edits, key, text):
    with pytest.raises(RequestError) as error:
        resolve(config(**edits))
    assert error.value.key == key
    assert text in error.value.message


def test_variants_are_settings_of_the_same_keys():
    def keys(variant):
        o = resolve(config(objective__variant=variant)).objective
        return o.advantage, o.normaliser, o.ratio, o.clip_low, o.clip_high, o.kl_coef, o.kl_in

    assert keys("grpo") == ("group", "sequence", "token", 0.2, 0.2, 0.04, "loss")
    assert keys("dr_grpo") == ("group_mean", "constant", "token", 0.2, 0.2, 0.0, "loss")
    assert keys("dapo") == ("group", "token", "token", 0.2, 0.28, 0.0, "loss")
    assert keys("gspo") == ("group", "sequence", "sequence", 3e-4, 4e-4, 0.0, "loss")
    assert keys("rloo") == ("leave_one_out", "sequence", "total", 0.2, 0.2, 0.05, "reward")
    assert keys("reinforce++") == ("batch", "token", "token", 0.2, 0.2, 0.01, "reward")
    assert resolve(config(objective__variant="dapo")).objective.dynamic_sampling == 3
    ppo = resolve(config("ppo")).objective
    assert (ppo.samples, ppo.epochs, ppo.kl_coef, ppo.kl_in) == (1, 4, 0.05, "reward")
    assert ppo.kl_estimator == "k1" and "variant" not in ppo and "advantage" not in ppo


def test_a_resolved_config_resolves_to_itself():
    for name in ("grpo", "ppo"):
        found = resolve(config(name, data__eval=EVAL)).to_dict()
        assert resolve(found).to_dict() == found
