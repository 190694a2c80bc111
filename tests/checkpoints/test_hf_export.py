import dataclasses
import json
import os

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxtune.checkpoints.hf import load_params, read_config
from jaxtune.checkpoints.hf_directory import MARKER, replaced
from jaxtune.checkpoints.hf_export import config_of, save_hf
from jaxtune.checkpoints.hf_tensors import INDEX
from jaxtune.core.errors import RequestError
from jaxtune.core.tree import flatten, map_paths
from jaxtune.data.tokenizer import load_tokenizer
from jaxtune.peft.bitfit import BitFit
from jaxtune.peft.lora import Lora
from tests.checkpoints.world import (
    BASE,
    CONFIG,
    assert_same_logits,
    logits_of,
    probe,
    random_params,
)
from tests.goldens import tiny

OPTIONS = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "llama3": {"rope_scaling": tiny.LLAMA3_ROPE, "head_dim": 12},
    "linear": {"rope_style": "parameters", "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
}


def tensors_in(directory) -> dict[str, np.ndarray]:
    files = sorted(directory.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("name", OPTIONS)
def test_import_and_export_give_equal_tensors_and_config(name, shards, tmp_path):
    """C29."""
    source, out = tmp_path / "source", tmp_path / "out"
    tiny.write_llama(source, shards=shards, **OPTIONS[name])
    config, raw = read_config(source)
    params = load_params(source, config, dtypes="float32")
    save_hf(out, config, params, dtype="float32", raw=raw, max_shard_bytes=20_000 * shards)
    before, after = tensors_in(source), tensors_in(out)
    assert before.keys() == after.keys()
    for tensor in before:
        assert before[tensor].dtype == after[tensor].dtype
        assert before[tensor].tobytes() == after[tensor].tobytes(), tensor
    again, written = read_config(out)
    assert again == config
    assert (written["bos_token_id"], written["torch_dtype"]) == (1, "float32")
    same = load_params(out, again, dtypes="float32")
    assert jax.tree.all(jax.tree.map(np.array_equal, params, same))


def test_shards_keep_to_their_size_and_are_indexed(tmp_path):
    params = random_params(CONFIG, BASE)
    save_hf(tmp_path / "out", CONFIG, params, dtype="bfloat16", max_shard_bytes=9000)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3
    total = 0
    for file in files:
        held = load_file(file)
        size = sum(tensor.nbytes for tensor in held.values())
        assert size <= 9000
        assert all(tensor.dtype == ml_dtypes.bfloat16 for tensor in held.values())
        assert {name for name, where in index["weight_map"].items() if where == file.name} == set(
            held
        )
        total += size
    assert index["metadata"]["total_size"] == total
    one = tmp_path / "one"
    save_hf(one, CONFIG, params, dtype="float32")
    assert sorted(os.listdir(one)) == [
        MARKER,
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]


def test_sharded_parameters_are_gathered(tmp_path):
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices: XLA_FLAGS=--xla_force_host_platform_device_count=8")
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    params = random_params(CONFIG, BASE)

    def place(leaf):
        last = "fsdp" if leaf.shape[-1] % 8 == 0 else None
        spec = jax.sharding.PartitionSpec(*[None] * (leaf.ndim - 1), last)
        return jax.device_put(leaf, jax.sharding.NamedSharding(mesh, spec))

    save_hf(tmp_path / "a", CONFIG, params, dtype="float32")
    save_hf(tmp_path / "b", CONFIG, jax.tree.map(place, params), dtype="float32")
    a, b = tensors_in(tmp_path / "a"), tensors_in(tmp_path / "b")
    assert all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", OPTIONS)
def test_export_loads_in_transformers(name, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config, _ = read_config(tiny.write_llama(tmp_path / "source", **OPTIONS[name]))
    config = dataclasses.replace(config, dtype="float32")
    params = random_params(config, BASE)
    save_hf(tmp_path / "out", config, params, dtype="float32", max_shard_bytes=30_000)
    net, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    rows = probe(config, (40, 17))
    with torch.no_grad():
        theirs = [net(torch.tensor([row])).logits[0].numpy() for row in rows]
    assert_same_logits(logits_of(config, BASE, params, rows), theirs)


def test_tokenizer_travels_with_the_weights(tmp_path, shared):
    tokenizer = load_tokenizer(shared / "models" / "stories260k")
    save_hf(tmp_path, CONFIG, random_params(CONFIG, BASE), dtype="float32", tokenizer=tokenizer)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == 2
    again = load_tokenizer(tmp_path)
    assert again.fingerprint() == tokenizer.fingerprint()


def test_absent_token_ids_are_written_as_null(tmp_path):
    """transformers would take 1 and 2, which may be ordinary tokens, for absent ones."""
    save_hf(tmp_path, CONFIG, random_params(CONFIG, BASE), dtype="float32")
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] is None


# -- biases that only the merged model has ------------------------------------------------------


def biases_of(method, config=CONFIG):
    params = random_params(config, method, seed=3)
    merged = method.merge(params)
    return params, merged


@pytest.mark.parametrize(
    ("targets", "family", "flags"),
    [
        ("all-linear", "llama", (True, True, True)),
        (("q_proj",), "llama", (True, True, False)),
        (("up_proj",), "llama", (False, False, True)),
        (("k_proj",), "qwen2", (True, False, False)),
        (("o_proj",), "qwen2", (True, True, False)),
    ],
)
def test_merged_bitfit_exports_with_the_biases_it_has(targets, family, flags, tmp_path):
    base = CONFIG
    if family == "qwen2":
        base = dataclasses.replace(CONFIG, family="qwen2", attention_bias=True)
    method = BitFit(targets=targets)
    params, merged = biases_of(method, base)
    written = save_hf(tmp_path, base, merged, dtype="float32")
    read, _ = read_config(tmp_path)
    assert dataclasses.replace(read, dtype="float32") == written
    assert (read.attention_bias, read.attention_out_bias, read.mlp_bias) == flags
    assert read.family == ("qwen2" if targets == ("k_proj",) else "llama")
    loaded = load_params(tmp_path, read, dtypes="float32")
    rows = probe()
    assert_same_logits(
        logits_of(written, BASE, loaded, rows), logits_of(base, method, params, rows)
    )


def test_biases_that_no_family_holds_are_refused():
    config = dataclasses.replace(CONFIG, family="qwen3", qk_norm=True)
    _, merged = biases_of(BitFit(targets=("up_proj",)), config)
    with pytest.raises(RequestError, match=r"no Hugging Face family .* up_proj"):
        config_of(config, merged)


# -- what is refused, and what survives ---------------------------------------------------------


def test_unmerged_parameters_are_refused(tmp_path):
    params = random_params(CONFIG, Lora(rank=2))
    with pytest.raises(RequestError, match=r"lora.* is no part of a base model; merge it first"):
        save_hf(tmp_path / "out", CONFIG, params, dtype="float32")
    short = map_paths(lambda path, leaf: leaf, random_params(CONFIG, BASE))
    del short["final_norm"]
    with pytest.raises(RequestError, match="final_norm/scale' is missing"):
        save_hf(tmp_path / "out", CONFIG, short, dtype="float32")
    wrong = random_params(CONFIG, BASE)
    wrong["lm_head"]["kernel"] = jnp.zeros((3, 3))
    with pytest.raises(RequestError, match="lm_head/kernel' has shape"):
        save_hf(tmp_path / "out", CONFIG, wrong, dtype="float32")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("present", ["metrics.jsonl", "checkpoints", "notes.txt"])
def test_a_directory_with_other_files_is_left_alone(present, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "config.json").write_text("{}")
    if present == "checkpoints":
        (out / present).mkdir()
    else:
        (out / present).write_text("x")
    with pytest.raises(RequestError, match=present):
        save_hf(out, CONFIG, random_params(CONFIG, BASE), dtype="float32")
    assert sorted(os.listdir(out)) == sorted(["config.json", present])
    assert os.listdir(tmp_path) == ["run"]


def test_a_directory_that_no_export_wrote_is_left_alone(tmp_path):
    """A downloaded base consists of the files that an export has."""
    out = tmp_path / "base"
    save_hf(out, CONFIG, random_params(CONFIG, BASE), dtype="float32")
    (out / MARKER).unlink()
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    with pytest.raises(RequestError, match="not written by an export"):
        save_hf(out, CONFIG, random_params(CONFIG, BASE, seed=1), dtype="float32")
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


def test_an_old_export_stays_until_the_new_one_is_whole(tmp_path):
    out = tmp_path / "out"
    save_hf(out, CONFIG, random_params(CONFIG, BASE), dtype="float32", max_shard_bytes=20_000)
    before = {file.name: file.read_bytes() for file in out.iterdir()}

    class Broken:
        shape = CONFIG.hidden_size, CONFIG.vocab_size

        def __array__(self, dtype=None, copy=None):
            raise OSError("the device is gone")

    params = random_params(CONFIG, BASE, seed=1)
    params["lm_head"]["kernel"] = Broken()
    with pytest.raises(OSError, match="gone"):
        save_hf(out, CONFIG, params, dtype="float32")
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert os.listdir(tmp_path) == ["out"]
    save_hf(out, CONFIG, random_params(CONFIG, BASE, seed=1), dtype="float32")
    assert not (out / INDEX).exists()  # nothing of the old export is left
    assert os.listdir(tmp_path) == ["out"]


def test_left_overs_of_a_killed_export_do_not_matter(tmp_path):
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "half.safetensors").write_text("x")
    with replaced(tmp_path / "out") as aside:
        assert os.listdir(aside) == []
        (aside / "config.json").write_text("{}")
    assert sorted(os.listdir(tmp_path / "out")) == [MARKER, "config.json"]
    with (
        pytest.raises(RequestError, match="no plain directory"),
        replaced(tmp_path / "out" / "config.json"),
    ):
        pass


def test_real_models_survive_the_round_trip(tmp_path, shared):
    source = shared / "models" / "stories260k"
    config, raw = read_config(source)
    params = load_params(source, config, dtypes="float32")
    save_hf(tmp_path, config, params, dtype="float32", raw=raw)
    before, after = tensors_in(source), tensors_in(tmp_path)
    assert before.keys() == after.keys()
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)
    assert flatten(params).keys() == flatten(load_params(tmp_path, config, dtypes="float32")).keys()
