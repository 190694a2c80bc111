"""Every family's gradients against torch's, its adapters in the real peft, and sharded loading."""

import importlib

import pytest

from jaxtune.checkpoints.peft_files import save_adapter
from jaxtune.core.errors import RequestError
from jaxtune.peft.lora import Lora
from tests.checkpoints.world import random_params
from tests.conftest import ROOT
from tests.models import family_training as checks
from tests.models.families import ROWS, first_rows

pytestmark = pytest.mark.slow
pytest.importorskip("torch")
pytest.importorskip("transformers")


@pytest.mark.parametrize("name", first_rows())
def test_gradients_equal_torchs(name, tmp_path):
    """Of every base parameter and of LoRA's A and B, in one backward pass."""
    assert checks.training_error(name, tmp_path) < 1e-4


@pytest.mark.parametrize("name", first_rows())
def test_an_exported_adapter_says_the_same_in_peft(name, tmp_path):
    """C17."""
    pytest.importorskip("peft")
    assert checks.adapter_error(name, tmp_path / "adapter") < 1e-4


SAVED = {
    "mixtral": ("router/kernel", "experts/up_proj/kernel"),
    "qwen3_moe": ("router/kernel", "experts/.*"),
    "gpt_oss": ("router/.*", "experts/.*"),
}


@pytest.mark.parametrize("name", [*SAVED, "gpt_neox"])
def test_what_is_trained_whole_says_the_same_in_peft(name, tmp_path):
    """C17: modules that files of transformers name otherwise, which peft passes over in silence."""
    pytest.importorskip("peft")
    train = tuple(f"blocks/mlp/{path}" for path in SAVED.get(name, ())) or ("lm_head/kernel",)
    assert checks.saved_error(name, train, tmp_path / "adapter") < 1e-4


def test_sinks_beside_an_adapter_in_their_module_are_refused(tmp_path):
    """PEFT would save self_attn whole, and find nothing left to adapt."""
    config = checks.world("gpt_oss").config
    method = Lora(rank=2, targets=("q_proj",), train=("blocks/attn/sinks",))
    with pytest.raises(RequestError, match=r"'blocks/attn/sinks' .*self_attn' is saved whole"):
        save_adapter(tmp_path / "a", config, method, random_params(config, method), "base")


@pytest.mark.parametrize("name", first_rows())
def test_a_sharded_load_is_the_whole_one(name):
    """C28: also where q, k and v lie in one tensor, and for experts."""
    assert checks.sharded_error(name) == 0


def test_the_page_says_what_is_measured(tmp_path, monkeypatch):
    """docs/families.md of one family: the differences are about as small."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    write_families = importlib.import_module("write_families")
    names = [name for name, fields in ROWS.items() if fields["model_type"] == "gpt_neox"]
    cells = write_families.differences(names, tmp_path)
    page = write_families.PAGE.read_text(encoding="utf-8")
    head, line = (
        next(line for line in page.splitlines() if line.startswith(f"| `{name}` |"))
        for name in ("model_type", "gpt_neox")
    )
    columns, shown = ([cell.strip() for cell in row.strip("|").split("|")] for row in (head, line))
    said = dict(zip(columns, shown, strict=True))
    for column, now in cells.items():
        bound = min(10 * float(said[column]), 1e-4)
        assert float(now) <= bound, f"{column}: {now}; the page says {said[column]}"
