"""Reward models in the files of transformers and PEFT: equal scores, and no key too few or many."""

import dataclasses
import json
import warnings

import jax
import numpy as np
import pytest

import jaxtune
from jaxtune.checkpoints import hf
from jaxtune.core.errors import RequestError
from jaxtune.core.tree import flatten, unflatten
from jaxtune.models.families import registry, score
from jaxtune.models.families.registry import FAMILIES
from jaxtune.parallel.mesh import make_mesh
from jaxtune.peft.ia3 import Ia3
from jaxtune.peft.lora import Lora
from jaxtune.peft.method import SCORE, Method
from jaxtune.peft.prompt import Prompt
from jaxtune.recipes.base import from_hf
from jaxtune.recipes.heads import REWARD_MODEL, headed, with_heads
from jaxtune.recipes.language_model import LanguageModel
from tests.checkpoints.world import CONFIG, random_params
from tests.models.families import ROWS

pytestmark = pytest.mark.slow

LLAMA = headed(CONFIG, REWARD_MODEL)
IDS = np.random.default_rng(0).integers(3, 61, (3, 12))
MASK = np.arange(12) < np.array([[12], [5], [9]])
PAD = 0


BASE = Method()


def model_of(name: str, method: Method = BASE) -> LanguageModel:
    """A reward model with random weights, nothing at the method's identity."""
    config = LLAMA
    if name != "llama":
        raw = next(raw for raw in ROWS.values() if raw["model_type"] == name)
        config = headed(registry.from_hf(raw), REWARD_MODEL)
        config = dataclasses.replace(config, dtype="float32")
    mesh = make_mesh({}, jax.devices()[:1])
    raw = {"pad_token_id": PAD, "eos_token_id": 2}
    return LanguageModel(None, config, random_params(config, method), method, mesh, "here", raw)


def padded(side: str):
    ids, mask = np.where(MASK, IDS, PAD), MASK
    if side == "left":
        ids = np.stack([np.roll(row, 12 - n) for row, n in zip(ids, MASK.sum(1), strict=True)])
        mask = MASK[:, ::-1].copy()
    return ids, mask


def test_scores_do_not_depend_on_padding_or_batches():
    lm = model_of("llama")
    rows = [row[kept].tolist() for row, kept in zip(IDS, MASK, strict=True)]
    expected = lm.scores(rows)
    assert expected.shape == (3,)
    assert expected.dtype == np.float32
    for side in ("left", "right"):
        np.testing.assert_array_equal(lm.scores(*padded(side)), expected)
    np.testing.assert_allclose(lm.scores(rows, batch_size=1), expected, rtol=1e-5, atol=1e-5)


def test_a_reward_model_writes_no_text_and_a_language_model_has_no_scores():
    lm = model_of("llama")
    for ask in (lm.logits, lm.logprobs):
        with pytest.raises(RequestError, match="is a reward model"):
            ask(IDS)
    with pytest.raises(RequestError, match="writes no text"):
        lm.generate([[3, 4]])
    with pytest.raises(RequestError, match="no token to score"):
        lm.scores(IDS, np.zeros_like(IDS))
    plain = LanguageModel(None, CONFIG, random_params(CONFIG, Method()), Method(), lm.mesh, "here")
    with pytest.raises(RequestError, match="is no reward model"):
        plain.scores([[3, 4]])


FAMILIES_OF_SCORES = sorted(score.ARCHITECTURES.keys() - {"llama"})


@pytest.mark.parametrize(
    ("name", "method"), [("llama", Lora(rank=2)), *((name, BASE) for name in FAMILIES_OF_SCORES)]
)
def test_transformers_loads_it_with_equal_scores(name, method, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    lm = model_of(name, method)
    lm.save(tmp_path / "out", "hf")
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert fields["architectures"] == [score.ARCHITECTURES[lm.config.family]]
    assert not (tmp_path / "out" / "generation_config.json").exists()
    net, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", output_loading_info=True, attn_implementation="eager"
    )
    assert type(net).__name__ == fields["architectures"][0]
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (net.config.num_labels, net.config.problem_type) == (1, "regression")
    again = jaxtune.load(tmp_path / "out", dtype="float32")
    assert again.config.score_head and not again.config.lm_head
    for side in ("right", "left"):
        ids, mask = padded(side)
        positions = np.maximum(mask.cumsum(1) - 1, 0)
        tensors = [torch.tensor(array) for array in (ids, mask, positions)]
        with torch.no_grad():
            out = net.eval()(tensors[0], attention_mask=tensors[1], position_ids=tensors[2])
        theirs = out.logits[:, 0].numpy()
        for ours in (lm, again):
            np.testing.assert_allclose(ours.scores(ids, mask), theirs, rtol=1e-4, atol=1e-4)


def test_every_family_has_the_class_that_transformers_has():
    transformers = pytest.importorskip("transformers")
    for family, name in score.ARCHITECTURES.items():
        assert hasattr(transformers, name), family
    assert set(FAMILIES) - set(score.ARCHITECTURES) == {"granite"}
    granite = dataclasses.replace(LLAMA, family="granite", logits_scale=0.5)
    with pytest.raises(RequestError, match="a score head, for which transformers has no class"):
        registry.to_hf(granite)


def written(directory, **changes):
    model_of("llama").save(directory, "hf")
    path = directory / "config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, **changes}))
    return directory


@pytest.mark.parametrize(("changes", "message"), [
    ({"id2label": {"0": "a", "1": "b"}}, "2 labels; a reward model has 1"),
    ({"id2label": None}, "2 labels"),
    ({"architectures": ["GPT2ForSequenceClassification"]}, "only 'LlamaForSequenceClassification'"),
])  # fmt: skip
def test_other_classifiers_are_refused(changes, message, tmp_path):
    with pytest.raises(RequestError, match=message):
        jaxtune.load(written(tmp_path / "out", **changes))


def test_an_untied_head_is_left_in_its_file(tmp_path):
    """A language model as the base of a reward model."""
    mesh = make_mesh({}, jax.devices()[:1])
    params = random_params(CONFIG, Method())
    LanguageModel(None, CONFIG, params, Method(), mesh, "here").save(tmp_path / "lm", "hf")
    base = with_heads(from_hf(tmp_path / "lm", lm_head=False), REWARD_MODEL)
    base.check()
    found = flatten(base.load(lambda path: "float32", mesh))
    assert "lm_head/kernel" not in found
    assert not np.asarray(found[SCORE]).any()
    np.testing.assert_array_equal(found["final_norm/scale"], params["final_norm"]["scale"])
    with pytest.raises(RequestError, match="is a reward model, which has no logits"):
        with_heads(base, REWARD_MODEL._replace(lm=True))
    assert hf.read_config(tmp_path / "lm")[0].lm_head


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The directory of a language model and its parameters."""
    directory = tmp_path_factory.mktemp("base") / "lm"
    params = random_params(CONFIG, Method())
    mesh = make_mesh({}, jax.devices()[:1])
    lm = LanguageModel(None, CONFIG, params, Method(), mesh, "here", {"pad_token_id": PAD})
    lm.save(directory, "hf")
    return directory, params


def adapted(base, method: Method) -> LanguageModel:
    """A reward model whose own leaves are random on a language model's weights."""
    directory, params = base
    own, held = flatten(random_params(LLAMA, method, 1)), flatten(params)
    mixed = {p: leaf if p == SCORE or p not in held else held[p] for p, leaf in own.items()}
    mesh = make_mesh({}, jax.devices()[:1])
    return LanguageModel(None, LLAMA, unflatten(mixed), method, mesh, str(directory))


@pytest.mark.parametrize("method", [Lora(rank=2), Ia3()], ids=["lora", "ia3"])
def test_peft_loads_its_adapter_with_equal_scores(method, base, tmp_path):
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    lm = adapted(base, method)
    lm.save(tmp_path / "adapter", "peft")
    fields = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert fields["task_type"] == "SEQ_CLS"
    assert fields["modules_to_save"] == ["score"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        net = transformers.AutoModelForSequenceClassification.from_pretrained(
            base[0], num_labels=1, dtype=torch.float32
        )
        net = peft.PeftModel.from_pretrained(net, tmp_path / "adapter").eval()
    said = [str(w.message) for w in caught]
    assert not any("missing" in text or "unexpected" in text for text in said), said
    ids, mask = padded("right")
    with torch.no_grad():
        theirs = net(torch.tensor(ids), attention_mask=torch.tensor(mask)).logits[:, 0].numpy()
    np.testing.assert_allclose(lm.scores(ids, mask), theirs, rtol=1e-4, atol=1e-4)
    again = jaxtune.load(base[0], adapter=tmp_path / "adapter", dtype="float32")
    np.testing.assert_allclose(again.scores(ids, mask), theirs, rtol=1e-4, atol=1e-4)
    net.save_pretrained(tmp_path / "theirs")  # with the names that PEFT adds
    again = jaxtune.load(base[0], adapter=tmp_path / "theirs", dtype="float32")
    np.testing.assert_allclose(again.scores(ids, mask), theirs, rtol=1e-4, atol=1e-4)
    with pytest.raises(RequestError, match="'SEQ_CLS' is not supported on this base"):
        jaxtune.load(base[0], dtype="float32").add_adapter("reward", tmp_path / "adapter")


def test_our_own_layout_holds_every_method(base, tmp_path):
    lm = adapted(base, Prompt(num_tokens=3))
    with pytest.raises(RequestError, match="a peft prompt cannot hold a reward model"):
        lm.save(tmp_path / "peft", "peft")
    lm.save(tmp_path / "own", "jaxtune")
    again = jaxtune.load(base[0], adapter=tmp_path / "own", dtype="float32")
    np.testing.assert_allclose(again.scores(IDS), lm.scores(IDS), rtol=1e-5, atol=1e-5)
