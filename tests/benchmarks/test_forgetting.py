"""The forgetting benchmark judges what it measured, and writes it as a page with plots."""

import dataclasses
import json
import xml.etree.ElementTree as ET

import jax
import numpy as np
import pytest

from benchmarks import forgetting, tasks
from benchmarks.forgetting_page import Found, by_group, points, verdict, write_page
from benchmarks.results import MODEL
from jaxtune.recipes.schema.resolve import resolve

BEFORE = Found(loss=5.0, accuracy=0.5, stories=1.0)
ROWS = [
    ("plain", "", Found(1.0, 0.9, 3.0, 7.0)),
    ("plain", "another seed", Found(1.1, 0.9, 3.0, 7.0)),
    ("replay", "0.1", Found(1.2, 0.9, 1.4, 7.0)),  # 95 % of the gain, 20 % of the rise
    ("replay", "0.3", Found(2.0, 0.8, 1.2, 7.0)),  # 75 %, 10 %
    ("KL", "1", Found(1.0, 0.9, 2.8, 7.0)),  # 100 %, 90 %
    ("L2-SP", "1", Found(4.0, 0.5, 1.1, 7.0)),  # 25 %, 5 %
    ("WiSE-FT", "0.8", Found(1.4, 0.9, 2.0)),  # 90 %, 50 %
]


@pytest.fixture(scope="module")
def sms(shared):
    known = tasks.characters(shared / MODEL)
    return forgetting.small(tasks.sms_spam(shared / "data", known), forgetting.QUICK)


def test_a_setting_is_judged_by_its_share_of_the_plain_runs_gain_and_rise():
    found = points(BEFORE, ROWS)
    np.testing.assert_allclose([p.gain for p in found], [1, 0.975, 0.95, 0.75, 1, 0.25, 0.9])
    np.testing.assert_allclose([p.rise for p in found], [1, 1, 0.2, 0.1, 0.9, 0.05, 0.5])
    assert [p.reaches for p in found] == [False, False, True, False, False, False, False]
    verdicts = {name: verdict(group) for name, group in by_group(found).items()}
    assert verdicts == {
        "replay": ["replay", "**reaches it**", "0.1", "90.0 %", "95 %", "20 %"],
        "KL": ["KL", "hardly helps", "1", "90.0 %", "100 %", "90 %"],
        "L2-SP": ["L2-SP", "costs too much of the gain", "1", "50.0 %", "25 %", "5 %"],
        "WiSE-FT": ["WiSE-FT", "helps", "0.8", "90.0 %", "90 %", "50 %"],
    }


def test_the_page_holds_every_setting_and_a_plot_with_each_of_its_points(sms, tmp_path):
    path = tmp_path / "page.md"
    args = ([sms], {"sms_spam": BEFORE}, {"sms_spam": ROWS}, {"sms_spam": 24}, forgetting.SIZES)
    write_page(path, *args, {"date": "today"})
    lines = path.read_text().splitlines()
    row = next(line for line in lines if line.startswith("| replay | 0.1"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == ["replay", "0.1", "1.2000", "90.0 %", "1.4000", "95 %", "**20 %**", "7"]
    assert sum(line.startswith(("| plain", "| before")) for line in lines) == 3
    assert "](page_sms_spam.svg)" in path.read_text()
    picture = ET.parse(tmp_path / "page_sms_spam.svg").getroot()
    assert len(picture.findall("{*}circle")) == len(ROWS) - 2
    assert len(picture.findall("{*}polyline")) == 4


def test_settings_have_names_and_curves_of_their_own():
    found = forgetting.settings()
    assert len({setting.name for setting in found}) == len(found)
    groups = {s.group: [t for t in found if t.group == s.group] for s in found}
    assert all(len(group) >= 3 for name, group in groups.items() if name != "plain")


class Uniform:
    """Every token as likely as the other, but for one letter after each ▁."""

    def __init__(self, lm, letter):
        self.tokenizer = lm.tokenizer
        self.space, self.letter = lm.tokenizer.encode(f" {letter}")[-2:]

    def logits(self, ids, mask):
        out = np.zeros((*ids.shape, 105))
        out[..., self.letter] += ids == self.space
        return out


@pytest.mark.slow
def test_the_measurement_by_hand(shared, sms):
    import jaxtune

    lm = jaxtune.load(shared / MODEL, dtype="float32")
    always_spam = Uniform(lm, "s")
    found = forgetting.measure(always_spam, sms, ["a b"])
    answers = [answer for _, answer in sms.held]
    spam = answers.count(" spam")
    assert 0 < spam < len(answers)
    assert found.accuracy == spam / len(answers)
    total = np.log(104 + np.e)  # behind each ▁; elsewhere log 105
    spaced = sum((total - 1) if a == " spam" else total for a in answers)
    targets = sum(len(a) + 1 for a in answers)
    expected = (spaced + (targets - len(answers)) * np.log(105)) / targets
    np.testing.assert_allclose(found.loss, expected, rtol=1e-6)
    # BOS ▁ a ▁ b EOS: two tokens behind ▁, three behind others
    np.testing.assert_allclose(found.stories, (2 * total + 3 * np.log(105)) / 5, rtol=1e-6)


def test_every_setting_is_a_config_of_its_own(tmp_path):
    files = dict.fromkeys(("train", "corpus", "own", "fisher"), tmp_path / "rows.jsonl")
    trained = [setting for setting in forgetting.settings() if setting.mix is None]
    resolved = {
        resolve(forgetting.config_of(setting, tmp_path, files, forgetting.SIZES, 24))
        for setting in trained
        if setting.replay is None or setting.replay[0] == "corpus"  # the files are one here
    }
    assert len(resolved) == len(trained) - 3


@pytest.fixture
def compilation_cache():
    """Puts back what the benchmark sets for its own process."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.slow
def test_what_was_measured_before_is_not_run_again(shared, tmp_path, compilation_cache, capsys):
    place = tmp_path / "keep" / "sms_spam"
    place.mkdir(parents=True)
    wanted = [s for s in forgetting.settings() if s.group in ("plain", "WiSE-FT")]
    for number, setting in enumerate(wanted):
        found = Found(1.0 + number, 0.9, 3.0 + number)
        (place / f"{setting.name}.json").write_text(json.dumps(dataclasses.asdict(found)))
    argv = ["--quick", "--tasks=sms_spam", "--only=WiSE-FT", f"--keep={tmp_path / 'keep'}"]
    assert forgetting.main([*argv, f"--out={tmp_path / 'page.md'}"]) == 0
    text = (tmp_path / "page.md").read_text()
    assert [f"| {n:.4f} |" in text for n in range(1, 7)] == [True] * 6
    assert "`python -m benchmarks.forgetting --quick --only=WiSE-FT --tasks=sms_spam`" in text
    assert not any(path.is_dir() for path in place.iterdir())  # no run was begun
