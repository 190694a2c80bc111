"""PEFT directories: ours load in the real peft, theirs load here, the rest is refused."""

import dataclasses
import json
import math
import warnings

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxtune
from jaxtune.checkpoints.hf import load_params, read_config
from jaxtune.checkpoints.hf_export import save_hf
from jaxtune.checkpoints.peft_files import load_adapter, read_method, save_adapter
from jaxtune.checkpoints.peft_lora import pissa_starts
from jaxtune.core.errors import RequestError
from jaxtune.core.tree import flatten, unflatten
from jaxtune.models.decoder import abstract_params
from jaxtune.peft.adapter import Adapter
from jaxtune.peft.bitfit import BitFit
from jaxtune.peft.full import Full
from jaxtune.peft.ia3 import Ia3
from jaxtune.peft.lora import Lora
from jaxtune.peft.prefix import Prefix
from jaxtune.peft.prompt import Prompt
from tests.checkpoints.world import (
    BASE,
    CONFIG,
    assert_same_logits,
    logits_of,
    probe,
    random_params,
)
from tests.goldens import tiny

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
KINDS = {
    "lora": Lora(rank=4, alpha=8.0, targets=ALL),
    "lora_qv": Lora(rank=4, alpha=8.0, targets=("q_proj", "v_proj")),
    "rslora": Lora(rank=4, alpha=8.0, targets=ALL, variant="rslora"),
    "dora": Lora(rank=4, alpha=8.0, targets=ALL, variant="dora"),
    "prompt": Prompt(num_tokens=5),
    "prefix": Prefix(num_tokens=5),
    "ia3": Ia3(targets=("k_proj", "v_proj", "down_proj")),
}
SAVED = {
    **KINDS,
    "pissa": Lora(rank=3, alpha=5.0, dropout=0.1, variant="pissa"),
    "head": Lora(rank=2, alpha=3.5, targets=("lm_head", "up_proj")),
    "regex": Lora(rank=2, targets=r"blocks/mlp/(gate|down)_proj", variant="dora"),
    "ia3_q": Ia3(targets=("q_proj",)),
}


def own_leaves(config, method) -> set[str]:
    return set(flatten(abstract_params(config, method))) - set(
        flatten(abstract_params(config, BASE))
    )


def base_of(config, params):
    """The parameters without the method's own."""
    own = flatten(abstract_params(config, BASE))
    return unflatten({path: leaf for path, leaf in flatten(params).items() if path in own})


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """(directory, config, parameters) of the plain tiny Llama."""
    directory = tiny.write_llama(tmp_path_factory.mktemp("base"))
    config = dataclasses.replace(read_config(directory)[0], dtype="float32")
    return directory, config, load_params(directory, config, dtypes="float32")


@pytest.mark.parametrize("kind", KINDS)
def test_theirs_load_here(kind, base, tmp_path):
    directory, config, _ = base
    tiny.write_adapter(tmp_path, kind, directory)
    method = read_method(tmp_path, CONFIG)
    assert method == KINDS[kind]
    leaves = load_adapter(tmp_path, config, method)
    assert set(leaves) == own_leaves(config, method)
    shapes = flatten(abstract_params(config, method))
    for path, leaf in leaves.items():
        assert (leaf.dtype, leaf.shape) == (np.float32, shapes[path].shape), path
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    layer = "base_model.model.model.layers.1"
    if kind.startswith(("lora", "rslora", "dora")):
        q, v = (f"{layer}.self_attn.{m}_proj" for m in "qv")
        a, b = leaves["blocks/attn/q_proj/lora/a"], leaves["blocks/attn/v_proj/lora/b"]
        assert np.array_equal(a[1].T, tensors[f"{q}.lora_A.weight"])
        assert np.array_equal(b[1].T, tensors[f"{v}.lora_B.weight"])
    if kind == "prefix":
        table = tensors["prompt_embeddings"].reshape(5, 3, 2, 16)
        assert np.array_equal(leaves["blocks/attn/prefix/key"][2, 4], table[4, 2, 0])
        assert np.array_equal(leaves["blocks/attn/prefix/value"][1, 3], table[3, 1, 1])


@pytest.mark.parametrize("kind", KINDS)
def test_theirs_are_written_back_byte_for_byte(kind, base, tmp_path):
    directory, config, _ = base
    source, out = tmp_path / "in", tmp_path / "out"
    tiny.write_adapter(source, kind, directory)
    method = read_method(source, CONFIG)
    save_adapter(out, config, method, unflatten(load_adapter(source, config, method)), "there")
    before, after = (load_file(d / "adapter_model.safetensors") for d in (source, out))
    assert before.keys() == after.keys()
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)
    theirs, ours = (json.loads((d / "adapter_config.json").read_text()) for d in (source, out))
    assert ours["base_model_name_or_path"] == "there"
    ignored = ("base_model_name_or_path", "feedforward_modules", "target_modules")
    for name in ours.keys() & theirs.keys() - set(ignored):
        assert ours[name] == theirs[name], name
    assert sorted(ours.get("target_modules", [])) == sorted(theirs.get("target_modules", []))
    assert ours.keys() - theirs.keys() == set()
    assert read_method(out, CONFIG) == method


@pytest.mark.parametrize("kind", SAVED)
def test_ours_come_back(kind, tmp_path):
    method, rows = SAVED[kind], probe()
    params = random_params(CONFIG, method)
    save_adapter(tmp_path, CONFIG, method, params, "base")
    again = read_method(tmp_path, CONFIG)
    loaded = unflatten(flatten(base_of(CONFIG, params)) | load_adapter(tmp_path, CONFIG, again))
    expected = logits_of(CONFIG, method, params, rows)
    assert_same_logits(logits_of(CONFIG, again, loaded, rows), expected)
    if kind == "pissa":
        assert (again.variant, again.rank, again.alpha) == ("lora", 6, 10.0)
        assert again.scale == pytest.approx(method.scale)


# -- the real peft (C17) ------------------------------------------------------------------------


def peft_logits(model, adapter, rows):
    """Loads both with the real libraries; a missing or unexpected key is a failure."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    from tests.goldens import reference

    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        net = peft.PeftModel.from_pretrained(net, adapter).eval()
    said = [str(w.message) for w in caught]
    assert not any("missing" in text or "unexpected" in text for text in said), said
    held = peft.get_peft_model_state_dict(net, save_embedding_layers=False)
    stored = load_file(adapter / "adapter_model.safetensors")
    assert held.keys() == stored.keys()
    assert all(np.array_equal(held[name].detach().numpy(), stored[name]) for name in stored)
    with torch.no_grad():
        return [
            reference.logits_of(net, np.array([row]), np.ones((1, len(row)), int))[0].numpy()
            for row in rows
        ]


@pytest.mark.parametrize("kind", SAVED)
def test_ours_load_in_peft_with_equal_logits(kind, base, tmp_path):
    directory, config, params = base
    method = SAVED[kind]
    params = unflatten(flatten(random_params(config, method, seed=4)) | flatten(params))
    save_adapter(tmp_path, config, method, params, str(directory))
    rows = probe(config, (23, 9))
    theirs = peft_logits(directory, tmp_path, rows)
    assert_same_logits(logits_of(config, method, params, rows), theirs)
    plain = logits_of(config, BASE, base_of(config, params), rows)
    assert max(np.abs(a - b).max() for a, b in zip(plain, theirs, strict=True)) > 1e-2


def test_an_unconverted_pissa_of_peft_is_read_with_its_start(base, tmp_path):
    """PEFT subtracts the start from the base when it loads; here it is decomposed as exactly."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    directory, config, _ = base
    net = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    settings = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        init_lora_weights="pissa",
        target_modules=["q_proj", "down_proj"],
        task_type="CAUSAL_LM",
    )
    net = peft.get_peft_model(net, settings)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    net.save_pretrained(tmp_path)
    rows = probe(config, (23, 9))
    with torch.no_grad():
        theirs = [net(torch.tensor([row])).logits[0].numpy() for row in rows]
    method = read_method(tmp_path, CONFIG)
    assert method == Lora(rank=4, alpha=6.0, targets=("q_proj", "down_proj"), variant="pissa")
    leaves = load_adapter(tmp_path, config, method)
    assert all(path.endswith(("/a", "/b")) for path in leaves)
    lm = jaxtune.load(directory, adapter=tmp_path, dtype="float32")
    assert_same_logits(logits_of(config, method, lm.params, rows), theirs)


def test_pissas_start_is_exact_where_singular_values_are_close():
    """The best approximation of rank 3, of values that 12 rounds of iteration do not tell apart."""
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.standard_normal((2, n, 32)))[0] for n in (32, 48))
    s = 1 - 1e-3 * np.arange(32)
    kernel = np.float32((u * s) @ v.swapaxes(-1, -2))
    method = Lora(rank=3, alpha=5.0, variant="pissa")
    stem = "blocks/mlp/up_proj"
    leaves = {f"{stem}/lora/a": np.zeros((2, 32, 3)), f"{stem}/lora/b": np.zeros((2, 3, 48))}
    starts = pissa_starts(method, {f"{stem}/kernel": kernel}, leaves)
    best = (u[..., :3] * s[:3]) @ v[..., :3].swapaxes(-1, -2)
    product = method.scale * starts[f"{stem}/lora/a0"] @ starts[f"{stem}/lora/b0"]
    np.testing.assert_allclose(product, best, atol=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": "all-linear"},
        {"target_modules": r".*\.(q|k)_proj"},
        {"target_modules": ["self_attn.o_proj", "mlp.up_proj"]},
        {"target_modules": r".*_proj", "exclude_modules": ["down_proj"]},
        {"target_modules": ["q_proj"], "use_rslora": True, "use_dora": True},
        {"target_modules": ["q_proj"], "init_lora_weights": "gaussian", "lora_dropout": 0.25},
    ],
)
def test_lora_settings_of_peft(settings, base, tmp_path):
    """What PEFT saves under these settings has the leaves and the scale that it gives them."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    directory, config, params = base
    net = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    net = peft.get_peft_model(
        net, peft.LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **settings)
    ).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    net.save_pretrained(tmp_path)
    method = read_method(tmp_path, CONFIG)
    assert method.dropout == settings.get("lora_dropout", 0.0)
    leaves = load_adapter(tmp_path, config, method)
    rows = probe(config, (23,))
    with torch.no_grad():
        theirs = [net(torch.tensor([row])).logits[0].numpy() for row in rows]
    full = unflatten(flatten(params) | leaves)
    assert_same_logits(logits_of(config, method, full, rows), theirs)
    adapted = [module for module in net.modules() if hasattr(module, "lora_A")]
    assert adapted
    assert all(module.scaling["default"] == pytest.approx(method.scale) for module in adapted)


def test_merged_export_equals_the_adapter_in_peft(base, tmp_path):
    """C16."""
    directory, config, params = base
    for kind in ("rslora", "dora", "ia3", "pissa"):
        method = SAVED[kind]
        full = unflatten(flatten(random_params(config, method, seed=4)) | flatten(params))
        save_adapter(tmp_path / kind, config, method, full, str(directory))
        save_hf(tmp_path / f"{kind}-hf", config, method.merge(full), dtype="float32")
        rows = probe(config, (23, 9))
        reloaded = load_params(tmp_path / f"{kind}-hf", config, dtypes="float32")
        theirs = peft_logits(directory, tmp_path / kind, rows)
        assert_same_logits(logits_of(config, BASE, reloaded, rows), theirs)


# -- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "key", "fields"),
    [
        ("lora", "peft_type", {"peft_type": "LOHA"}),
        ("lora", "peft_type", {"peft_type": None}),
        ("lora", "task_type", {"task_type": "SEQ_CLS"}),
        ("lora", "rank_pattern", {"rank_pattern": {"q_proj": 0}}),
        ("lora", "rank_pattern", {"rank_pattern": [2]}),
        ("lora", "rank_pattern", {"rank_pattern": {"(q": 2}}),
        ("lora", "modules_to_save", {"modules_to_save": ["(q"]}),
        ("lora", "rank_pattern", {"rank_pattern": {"names_nothing": 0.5}}),
        ("lora", "alpha_pattern", {"alpha_pattern": {"q_proj": "2"}}),
        ("lora", "modules_to_save", {"modules_to_save": ["wte"]}),
        ("lora", "modules_to_save", {"modules_to_save": "lm_head"}),
        ("lora", "modules_to_save", {"modules_to_save": ["layers.1.input_layernorm"]}),
        ("lora", "layers_to_transform", {"layers_to_transform": "0"}),
        ("lora", "layer_replication", {"layer_replication": [[0, 1]]}),
        ("lora", "trainable_token_indices", {"trainable_token_indices": [1]}),
        ("lora", "target_parameters", {"target_parameters": ["x"]}),
        ("lora", "lora_bias", {"lora_bias": True}),
        ("lora", "use_qalora", {"use_qalora": True}),
        ("lora", "alora_invocation_tokens", {"alora_invocation_tokens": [1]}),
        ("lora", "not_yet_invented", {"not_yet_invented": 3}),
        ("lora", "bias", {"bias": "lora_only"}),
        ("lora", "r", {"r": 0}),
        ("lora", "r", {"r": "4"}),
        ("lora", "lora_alpha", {"lora_alpha": "8"}),
        ("lora", "lora_alpha", {"lora_alpha": float("nan")}),
        ("lora", "lora_alpha", {"lora_alpha": float("inf")}),
        ("lora", "lora_dropout", {"lora_dropout": float("nan")}),
        ("lora", "alpha_pattern", {"alpha_pattern": {"q_proj": float("inf")}}),
        ("lora", "init_lora_weights", {"init_lora_weights": "olora"}),
        ("lora", "init_lora_weights", {"init_lora_weights": "pissa_niter_16"}),
        ("dora", "use_dora", {"init_lora_weights": "pissa"}),
        ("dora", "use_dora", {"layers_to_transform": [0, 2]}),
        (
            "lora",
            "init_lora_weights",
            {"init_lora_weights": "pissa", "alpha_pattern": {"q_proj": 2}},
        ),
        ("lora", "target_modules", {"target_modules": None}),
        ("lora", "target_modules", {"target_modules": ["c_attn"]}),
        ("lora", "target_modules", {"target_modules": ["embed_tokens", "q_proj"]}),
        ("lora", "target_modules", {"target_modules": "(q"}),
        ("lora", "target_modules", {"target_modules": {"a": 1}}),
        ("prompt", "num_virtual_tokens", {"num_virtual_tokens": None}),
        ("prompt", "num_transformer_submodules", {"num_transformer_submodules": 2}),
        ("ia3", "feedforward_modules", {"feedforward_modules": []}),
        ("ia3", "feedforward_modules", {"feedforward_modules": ["down_proj", "k_proj"]}),
        ("ia3", "modules_to_save", {"modules_to_save": ["x"]}),
    ],
)
def test_settings_that_are_not_honoured_are_refused_by_name(kind, key, fields, base, tmp_path):
    tiny.write_adapter(tmp_path, kind, base[0])
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(RequestError) as error:
        read_method(tmp_path, CONFIG)
    assert (error.value.key, error.value.where) == (key, str(path))


def edit(change):
    def damage(directory):
        path = directory / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    return damage


def rename(old: str, new: str):
    return lambda directory: (directory / old).rename(directory / new)


A0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (rename("adapter_config.json", "x"), "holds no adapter_config.json"),
        (rename("adapter_model.safetensors", "adapter_model.bin"), "is a pickle"),
        (rename("adapter_model.safetensors", "x"), "holds no adapter_model.safetensors"),
        (lambda d: (d / "adapter_config.json").write_text("{"), "not valid JSON"),
        (edit(lambda t: t.pop(A0)), f"missing, the first is '{A0}'"),
        (edit(lambda t: t.update(stray=t[A0])), "the first is 'stray'"),
        (edit(lambda t: t.update({A0: t[A0][:2]})), r"shape \[4, 32\]"),
        (edit(lambda t: t.update({A0: t[A0].astype(np.int32)})), "is int32"),
        (lambda d: (d / "adapter_model.safetensors").write_bytes(b"x" * 50), "end inside"),
    ],
)
def test_damaged_adapters_are_refused(damage, message, base, tmp_path):
    directory, config, _ = base
    tiny.write_adapter(tmp_path, "lora", directory)
    damage(tmp_path)
    with pytest.raises(RequestError, match=message):
        load_adapter(tmp_path, config, read_method(tmp_path, CONFIG))


def test_an_adapter_of_another_base_is_refused(base, tmp_path):
    directory, config, _ = base
    tiny.write_adapter(tmp_path / "lora", "lora", directory)
    deeper = dataclasses.replace(config, num_layers=4)
    method = read_method(tmp_path / "lora", CONFIG)
    with pytest.raises(RequestError, match="14 of 56 tensors are missing"):
        load_adapter(tmp_path / "lora", deeper, method)
    wider = dataclasses.replace(config, hidden_size=48)
    with pytest.raises(RequestError, match="want a float of shape"):
        load_adapter(tmp_path / "lora", wider, method)
    with pytest.raises(RequestError, match="is not that of the adapter"):
        load_adapter(tmp_path / "lora", config, Lora(targets=("c_attn",)))
    with pytest.raises(RequestError, match="adds no parameters to this model"):
        save_adapter(tmp_path / "out", config, Lora(targets=("c_attn",)), {}, "base")
    with pytest.raises(RequestError, match="no such adapter directory"):
        read_method(tmp_path / "absent", CONFIG)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Full(), "cannot hold method 'full'.*export format 'hf'"),
        (BitFit(), "cannot hold method 'bitfit'.*format 'hf' merges"),
        (Adapter(), "cannot hold method 'adapter'.*export format 'jaxtune'"),
        (Lora(train=("blocks/attn/q_proj/kernel",)), "saved whole, and has an adapter as well"),
        (Prompt(train=("final_norm/scale",)), "trained by peft.train; export format 'jaxtune'"),
    ],
)
def test_methods_that_peft_cannot_hold_are_refused(method, message, tmp_path):
    params = random_params(CONFIG, method)
    with pytest.raises(RequestError, match=message):
        save_adapter(tmp_path / "out", CONFIG, method, params, "base")
    assert not (tmp_path / "out").exists()


def test_rslora_with_dora_keeps_its_scale(base, tmp_path):
    tiny.write_adapter(tmp_path, "dora", base[0])
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_rslora": True}))
    assert read_method(tmp_path, CONFIG).scale == pytest.approx(8 / math.sqrt(4))
