import dataclasses
import json
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from jaxtune.checkpoints import hf
from jaxtune.checkpoints.hf import load_params, read_config
from jaxtune.checkpoints.safetensors import TensorFile
from jaxtune.core.errors import RequestError
from jaxtune.core.tree import flatten, map_paths
from jaxtune.models.decoder import abstract_params
from jaxtune.parallel.mesh import make_mesh
from jaxtune.recipes.base import from_hf
from tests.checkpoints.world import BASE, logits_of
from tests.conftest import ROOT, xla_flags
from tests.goldens import tiny


def load(directory, dtypes="float32", **options):
    config, _ = read_config(directory)
    return load_params(directory, config, dtypes=dtypes, **options)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(
    "fields", [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}]
)
def test_every_tensor_finds_its_place(fields, shards, tmp_path):
    tiny.write_llama(tmp_path, shards=shards, **fields)
    tensors = tiny.llama_tensors(tiny.llama_config(**fields))
    params = flatten(load(tmp_path))
    assert all(leaf.dtype == jnp.float32 for leaf in params.values())
    seen = {"model.embed_tokens.weight": params.pop("embed/embedding")}
    seen["model.norm.weight"] = params.pop("final_norm/scale")
    if "lm_head/kernel" in params:
        seen["lm_head.weight"] = params.pop("lm_head/kernel").T
    norms = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    for path, leaf in params.items():
        *_, module, last = path.split("/")
        module = norms.get(module, f"{'self_attn' if 'attn/' in path else 'mlp'}.{module}")
        for layer in range(3):
            end = "bias" if last == "bias" else "weight"
            one = leaf[layer].T if last == "kernel" else leaf[layer]
            seen[f"model.layers.{layer}.{module}.{end}"] = one
    assert seen.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert np.array_equal(np.asarray(seen[name]), tensor), name


def test_dtypes_may_depend_on_the_path(tmp_path):
    tiny.write_llama(tmp_path)
    exact = load(tmp_path)
    half = load(tmp_path, jnp.bfloat16)
    norms = load(tmp_path, lambda path: "float32" if "norm" in path else "bfloat16")
    tree = load(tmp_path, map_paths(lambda path, leaf: leaf.dtype, norms))
    for path, leaf in flatten(exact).items():
        rounded = np.asarray(leaf).astype(ml_dtypes.bfloat16)
        assert np.array_equal(np.asarray(flatten(half)[path]), rounded)
        wanted = np.asarray(leaf) if "norm" in path else rounded
        for result in (norms, tree):
            assert flatten(result)[path].dtype == wanted.dtype
            assert np.array_equal(np.asarray(flatten(result)[path]), wanted)


def test_bfloat16_shards_load(tmp_path):
    tiny.write_llama(tmp_path, shards=2)
    for file in tmp_path.glob("*.safetensors"):
        halves = {k: v.astype(ml_dtypes.bfloat16) for k, v in load_file(file).items()}
        save_file(halves, file, metadata={"format": "pt"})
    for leaf in jax.tree.leaves(load(tmp_path)):
        assert np.array_equal(leaf, np.asarray(leaf).astype(ml_dtypes.bfloat16))


def test_sharded_load_reads_each_slice_once(tmp_path, monkeypatch):
    """A host reads what its devices hold, in parts; equal parts are read once."""
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices: XLA_FLAGS=--xla_force_host_platform_device_count=8")
    tiny.write_llama(tmp_path, shards=2)
    config, _ = read_config(tmp_path)
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def shard(path, leaf):
        # 97 rows of the embedding are odd; widths are multiples of 4
        axes = [None] * (leaf.ndim - 1) + ["fsdp" if leaf.shape[-1] % 4 == 0 else None]
        return NamedSharding(mesh, PartitionSpec(*axes))

    shardings = map_paths(shard, abstract_params(config, BASE))
    plain = load_params(tmp_path, config, dtypes="float32")
    read = []
    original = TensorFile.read

    def counting(self, name, index=(), out=None):
        part = original(self, name, index, out)
        read.append((name, part.nbytes))
        return part

    monkeypatch.setattr(TensorFile, "read", counting)
    sharded = load_params(tmp_path, config, dtypes="float32", shardings=shardings)
    tensors = tiny.llama_tensors(tiny.llama_config())
    assert sum(n for _, n in read) == sum(t.nbytes for t in tensors.values())
    largest = tensors["model.layers.0.self_attn.q_proj.weight"].nbytes
    assert max(n for name, n in read if "q_proj" in name) == largest // 4
    for path, leaf in flatten(sharded).items():
        assert leaf.sharding.is_equivalent_to(flatten(shardings)[path], leaf.ndim)
        assert np.array_equal(leaf, flatten(plain)[path]), path


def test_a_host_holds_the_part_of_one_device_at_a_time(tmp_path, monkeypatch):
    """Of a parameter over 8 devices none is held any more when the next part is read."""
    directory, parts, held = tiny.write_llama(tmp_path), [], []
    reader, put = hf.reader, jax.device_put

    def watched(*arguments):
        read = reader(*arguments)

        def part(index):
            held.append(sum(one() is not None for one in parts))
            out = read(index)
            parts.append(weakref.ref(out))
            return out

        return part

    # memory of its own for each device: on processors it would be the host's, kept for good
    monkeypatch.setattr(hf.jax, "device_put", lambda x, device: put(np.array(x), device))
    monkeypatch.setattr(hf, "reader", watched)
    params = from_hf(directory).load(lambda _: np.dtype(np.float32), make_mesh({"fsdp": 8}))
    assert len(parts) > 8 * 7 and set(held) == {0}
    kernel = flatten(params)["blocks/attn/q_proj/kernel"]
    assert kernel.addressable_shards[0].data.size * 8 == kernel.size


def test_only_the_layers_that_a_device_holds_are_read(tmp_path, monkeypatch):
    tiny.write_llama(tmp_path)
    config, _ = read_config(tmp_path)
    shape = flatten(abstract_params(config, BASE))["blocks/attn/q_proj/kernel"].shape
    weight = next(
        w
        for w in hf.registry.family("llama").table(config)
        if w.path == "blocks/attn/q_proj/kernel"
    )
    names = []
    original = TensorFile.read

    def watching(self, name, index=(), out=None):
        names.append((name, index))
        return original(self, name, index, out)

    monkeypatch.setattr(TensorFile, "read", watching)
    part = hf.reader(hf.open_checkpoint(tmp_path), weight, shape, np.dtype(np.float32))
    out = part((slice(1, 3), slice(0, 16), slice(None)))
    assert out.shape == (2, 16, 32)
    assert [name.split(".")[2] for name, _ in names] == ["1", "2"]
    assert all(index[1] == slice(0, 16) for _, index in names)


@pytest.mark.parametrize("name", ["stories260k", "babyllama105"])
def test_real_models_equal_their_goldens(name, shared):
    directory = shared / "models" / name
    golden = json.loads((directory / "golden.json").read_text())
    config, raw = read_config(directory)
    assert raw["model_type"] == config.family == "llama"
    config = dataclasses.replace(config, dtype="float32")
    params = load_params(directory, config, dtypes="float32")
    for side in ("right", "left"):
        prompt = golden["prompt_ids"]
        # the second row makes padding
        logits = logits_of(config, BASE, params, [prompt, prompt + prompt], side)[0]
        np.testing.assert_allclose(logits[:, :8], golden["logits_first8"], atol=1e-3)
        total = jax.scipy.special.logsumexp(jnp.asarray(logits), axis=-1)
        np.testing.assert_allclose(total, golden["logsumexp"], atol=1e-3)
        assert logits.argmax(-1).tolist() == golden["argmax"]


# -- tied heads (C15) ---------------------------------------------------------------------------


def with_head(directory, change: float):
    tiny.write_llama(directory, tie_word_embeddings=True)
    tensors = load_file(directory / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors["lm_head.weight"][90, 3] += change
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return tensors


def test_a_stored_head_equal_to_the_embedding_stays_tied(tmp_path):
    with_head(tmp_path, 0.0)
    assert read_config(tmp_path)[0].tie_embeddings
    assert "lm_head" not in load(tmp_path)


def test_a_stored_head_of_its_own_unties_the_model(tmp_path):
    tensors = with_head(tmp_path, 0.5)
    config, raw = read_config(tmp_path)
    assert raw["tie_word_embeddings"] and not config.tie_embeddings
    assert np.array_equal(load(tmp_path)["lm_head"]["kernel"].T, tensors["lm_head.weight"])


# -- bad input ----------------------------------------------------------------------------------


def edit(file: str, change):
    """A damage: rewrites the tensors of one file."""

    def damage(directory):
        tensors = load_file(directory / file)
        change(tensors)
        save_file(tensors, directory / file, metadata={"format": "pt"})

    return damage


def edit_index(change):
    def damage(directory):
        path = directory / hf.INDEX
        index = json.loads(path.read_text())
        change(index)
        path.write_text(json.dumps(index))

    return damage


def cut(file: str, size: int):
    def damage(directory):
        content = (directory / file).read_bytes()
        (directory / file).write_bytes(content[:size])

    return damage


ONE, FIRST = "model.safetensors", "model-00001-of-00003.safetensors"
Q0 = "model.layers.0.self_attn.q_proj.weight"


def to_pickle(directory):
    (directory / ONE).rename(directory / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("shards", "damage", "message", "where"),
    [
        (1, lambda d: shutil.rmtree(d), "no such model directory", ""),
        (1, lambda d: (d / "config.json").unlink(), "holds no config.json", ""),
        (1, lambda d: (d / "config.json").rename(d / "adapter_config.json"), "PEFT adapter", ""),
        (1, lambda d: (d / "config.json").write_text("{\n,"), "not valid JSON", "config.json:2"),
        (
            1,
            lambda d: (d / "config.json").write_text("[" * 10**5),
            "not valid JSON",
            "config.json:1",
        ),
        (
            1,
            lambda d: (d / "config.json").write_text("9" * 10**4),
            "not valid JSON",
            "config.json:1",
        ),
        (1, lambda d: (d / "config.json").write_text("[]"), "not a JSON object", "config.json"),
        (1, lambda d: (d / "config.json").write_bytes(b"\xff"), "not valid JSON", "config.json:1"),
        (1, lambda d: (d / ONE).unlink(), "holds no model.safetensors", ""),
        (1, to_pickle, "pytorch_model.bin is a pickle", ""),
        (1, cut(ONE, 5000), "truncated", ONE),
        (1, cut(ONE, 100), "end inside the header", ONE),
        (1, edit(ONE, lambda t: t.pop(Q0)), f"missing, the first is '{Q0}'", ONE),
        (1, edit(ONE, lambda t: t.update(score=t[Q0])), "the first is 'score'", ONE),
        (1, edit(ONE, lambda t: t.update({Q0: t[Q0][:, 1:]})), r"shape \[32, 31\]", ONE),
        (1, edit(ONE, lambda t: t.update({Q0: t[Q0].astype(np.int32)})), "is int32", ONE),
        (1, edit(ONE, lambda t: t.pop("lm_head.weight")), "'lm_head.weight'", ONE),
        (3, lambda d: (d / FIRST).unlink(), f"shard that is missing: {FIRST}", hf.INDEX),
        (3, lambda d: (d / hf.INDEX).unlink(), "holds no model.safetensors", ""),
        (3, lambda d: (d / hf.INDEX).write_text("{}"), "no weight_map", hf.INDEX),
        (3, edit(FIRST, lambda t: t.popitem()), "which lacks it", hf.INDEX),
        (3, edit(FIRST, lambda t: t.update(stray=t[next(iter(t))])), "'stray'", hf.INDEX),
        (3, edit_index(lambda i: i["weight_map"].update(absent=FIRST)), "'absent'", hf.INDEX),
        (3, edit_index(lambda i: i["weight_map"].update(x="../x")), "elsewhere", hf.INDEX),
        (3, cut(FIRST, 4000), "truncated", FIRST),
    ],
)
def test_bad_checkpoints_are_refused(shards, damage, message, where, tmp_path):
    directory = tmp_path / "model"
    tiny.write_llama(directory, shards=shards)
    damage(directory)
    with pytest.raises(RequestError, match=message) as error:
        load(directory)
    assert error.value.where == str(directory / where if where else directory)
    assert "\n" not in str(error.value)


def test_inert_buffers_are_ignored(tmp_path):
    tiny.write_llama(tmp_path)
    name = "model.layers.1.self_attn.rotary_emb.inv_freq"
    edit(ONE, lambda t: t.update({name: np.ones(4, np.float32)}))(tmp_path)
    load(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "quantize"), [(1, "none"), (4, "none"), (1, "nf4")])
def test_memory_while_loading_stays_near_the_size_of_the_model(devices, quantize, tmp_path):
    """Below 1.3 × what the host's devices hold, and the largest tensor of a file.

    A quantised model is held to the same, so its kernels are never in memory whole.
    """
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc/self/status")
    size = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 32}
    size |= {"num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 8000}
    tiny.write_llama(tmp_path / "small")
    tiny.write_llama(tmp_path / "large", shards=3, **size)
    command = [sys.executable, "-m", "tests.checkpoints.load_memory"]
    # What glibc's arenas keep for each thread differs by 15 MB from run to run.
    settings = {"MALLOC_ARENA_MAX": "1"}
    settings["XLA_FLAGS"] = xla_flags(devices)
    done = subprocess.run(
        [*command, str(tmp_path / "small"), str(tmp_path / "large"), quantize],
        env=os.environ | settings,
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    model, grown = json.loads(done.stdout)
    if quantize == "none":
        assert model > 5e8  # beside which the fixed memory of a runtime is small
    assert grown <= 1.3 * model + 8000 * 512 * 4


def test_weights_that_are_a_directory_are_missing(tmp_path):
    """Also where a run's base is described, before anything is loaded."""
    directory = tiny.write_llama(tmp_path / "model")
    (directory / ONE).unlink()
    (directory / ONE).mkdir()
    base = from_hf(directory)
    with pytest.raises(RequestError, match=r"holds no model\.safetensors"):
        base.load(lambda _: np.dtype(np.float32), make_mesh({"data": 8}))
