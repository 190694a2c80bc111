"""Every family against transformers: logits, generation, files, and each field of config.json."""

import json

import pytest

from jaxtune.core.errors import RequestError
from jaxtune.models.families.registry import FAMILIES
from tests.models import family_checks as checks
from tests.models.families import ROWS, first_rows

pytestmark = pytest.mark.slow
pytest.importorskip("torch")
pytest.importorskip("transformers")

TOLERANCE = 1e-4


def test_every_family_has_a_row():
    assert {fields["model_type"] for fields in ROWS.values()} == set(FAMILIES)


@pytest.mark.parametrize("name", ROWS)
def test_logits_equal_transformers(name):
    """C14, C29, C35, C36: beyond the window and the original context, padded left and right."""
    w = checks.world(name)
    assert w.config.family == ROWS[name]["model_type"]
    for side in ("right", "left"):
        assert checks.logits_error(w, side) < TOLERANCE


@pytest.mark.parametrize("name", first_rows())
def test_greedy_tokens_equal_transformers(name):
    w = checks.world(name)
    ours, theirs = checks.greedy(w, w.samples)
    assert ours == theirs


@pytest.mark.parametrize("name", ROWS)
def test_export_gives_the_same_tensors(name, tmp_path):
    """C29: names, shapes and bytes; and a config.json under which transformers says the same."""
    ours, theirs, again = checks.exported(checks.world(name), tmp_path / "written")
    assert ours.keys() == theirs.keys()
    assert ours == theirs
    assert again < 1e-6


@pytest.mark.parametrize("name", first_rows())
def test_export_gives_the_same_bfloat16_tensors(name, tmp_path):
    ours, theirs = checks.exported_bf16(checks.world(name), tmp_path)
    assert {dtype for dtype, _, _ in ours.values()} == {"torch.bfloat16"}
    assert ours == theirs


@pytest.mark.parametrize("name", first_rows())
def test_every_field_is_honoured_or_refused_by_name(name, tmp_path):
    w = checks.world(name)
    raw = json.loads((w.directory / "config.json").read_text())
    wrong = []
    for number, (field, changed) in enumerate(checks.perturbations(raw)):
        problem = verdict(field, w, checks.perturbed(w, changed, tmp_path / str(number)))
        if problem:
            wrong.append(f"{field}: {problem}")
    assert not wrong


def verdict(field: str, w: checks.World, outcome: checks.Outcome) -> str | None:
    """Returns what is wrong with an outcome, or None."""
    ours, theirs = outcome.ours, outcome.theirs
    if isinstance(ours, RequestError):
        named = ours.key or ".safetensors: " in str(ours)  # a field, or a tensor that lacks room
        return None if named else f"refused without a name: {ours}"
    if isinstance(ours, Exception):
        return f"{type(ours).__name__}: {ours}"
    if isinstance(theirs, Exception):  # theirs is stricter: the value may be idle, not ours alone
        same = checks.error(ours, w.theirs[:1]) < TOLERANCE
        return None if same else f"changes our logits, and transformers refuses it: {theirs}"
    apart = checks.error(ours, theirs)
    return None if apart < TOLERANCE else f"our logits are off by {apart:.1e}"


@pytest.mark.parametrize("name", first_rows())
def test_an_unknown_field_is_refused_by_name(name):
    raw = json.loads((checks.world(name).directory / "config.json").read_text())
    with pytest.raises(RequestError, match="frobnicate"):
        FAMILIES[raw["model_type"]].from_hf(raw | {"frobnicate": 3})
