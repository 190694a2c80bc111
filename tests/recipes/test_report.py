"""The page of a run and that of a sweep: whole, self-contained, and true to the files."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

import jaxtune
from jaxtune.cli.main import main
from jaxtune.recipes.report.page import kept, report
from jaxtune.recipes.schema.resolve import resolve
from tests.cli import bad_world

pytestmark = pytest.mark.slow
VOID = {"meta", "line", "rect", "polyline", "br"}


class Page(HTMLParser):
    """Headings, text and links of a page; every element must be closed."""

    def __init__(self, source: str):
        super().__init__()
        self.open: list[str] = []
        self.headings: list[str] = []
        self.words: list[str] = []
        self.links: list[str] = []
        self.feed(source)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("h1", "h2"):
            self.headings.append(data)
        self.words.append(data)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("world")
    bad_world.write_world(directory)
    return directory


def config_of(world: Path) -> dict:
    config = bad_world.config()
    config["model"]["path"] = str(world / "model")
    for name, file in (("train", "train.jsonl"), ("eval", "held.jsonl")):
        config["data"][name][0]["source"] = f"jsonl:{world / file}"
    config["eval"] = {"every_steps": 2}
    config["log"]["samples"] = 2
    retained = {"source": f"jsonl:{world / 'train.jsonl'}", "format": "chat"}
    config["retention"] = {"data": [retained]}
    return config


def test_a_run_ends_with_its_report(world, tmp_path):
    workdir = tmp_path / "a <run>"
    summary = jaxtune.train(config_of(world), workdir, price=3600).summary
    source = (workdir / "report.html").read_text(encoding="utf-8")
    page = Page(source)
    assert page.links == [] and "<script" not in source and "viewport" in source
    assert page.headings == [
        "sft: a <run>",
        "Loss",
        "Other metrics",
        "What is retained",
        "Learning rate",
        "Throughput",
        "Memory",
        "Before and after",
        "Data",
        "Cost",
        "Fingerprints",
        "Again",
    ]
    words = " ".join(page.words)
    for value in (
        summary["stop_reason"],
        f"{summary['metrics']['eval/loss']:.4g}",
        *filter(None, summary["fingerprints"].values()),
        json.loads((workdir / "retention.json").read_text())["data"],
        summary["code"],
        f"{summary['parameters']['trainable']:,}",
        f"{summary['memory']['host_bytes'] / 2**30:,.2f} GiB",
        f"{summary['cost']['usd']:,.2f} (3600 an hour of a device, --price)",
        f"most {summary['data']['review'][0]['longest']}",
    ):
        assert value in words
    metrics, at = summary["metrics"], page.words.index("nll")
    after, rise = page.words[at + 2 : at + 4]
    assert after == f"{metrics['retention/nll']:.4g}"
    assert rise == f"{metrics['retention/nll_rise']:+.4g}"
    items = json.loads((workdir / "showcase.json").read_text())["items"]
    assert len(items) == 2 and all({"before", "after", "wanted"} <= set(item) for item in items)
    # What the page names does make the run again.
    again = ["train", f"--config={workdir / 'config.json'}", f"--workdir={tmp_path / 'again'}"]
    assert main(again) == 0
    one, two = (json.loads((d / "summary.json").read_text()) for d in (workdir, tmp_path / "again"))
    assert one["metrics"]["loss"] == two["metrics"]["loss"]
    assert one["cost"]["usd"] == pytest.approx(one["wall_seconds"]) and two["cost"]["usd"] is None


def test_what_is_retained_is_told_with_its_interval():
    before = {"step": 0, "retention/nll": 1.0, "retention/accuracy": 0.75, "retention/kl": 0.0}
    ends = {"retention/accuracy_drop/low": 0.05, "retention/accuracy_drop/high": 0.4}
    after = {"step": 9, "retention/nll": 1.5, "retention/accuracy": 0.5, "retention/kl": 0.2}
    page = Page(kept([before, {"step": 3, "loss": 2.0}, after | ends]))
    words = [word for word in page.words if word.strip()]
    assert words[4:] == [
        *("nll", "1", "1.5", "+0.5"),
        *("accuracy", "0.75", "0.5", "-0.25", "-0.4 to -0.05"),
        *("kl", "0", "0.2", "+0.2"),
    ]
    assert kept([{"step": 3, "loss": 2.0}]) is None


def test_what_the_doctor_found_is_in_the_page(world, tmp_path):
    """Its own report, beside the run's files; a leak between the splits is planted."""
    config = config_of(world)
    leaking = tmp_path / "leaking.jsonl"
    leaking.write_text((world / "train.jsonl").read_text().splitlines()[0] + "\n")
    config["data"]["eval"][0]["source"] = f"jsonl:{leaking}"
    (tmp_path / "config.json").write_text(json.dumps(resolve(config).to_dict()))
    words = [f"--config={tmp_path / 'config.json'}", f"--json={tmp_path / 'doctor.json'}"]
    assert main(["data", "doctor", *words]) == 0
    words = " ".join(Page(report(tmp_path)).words)
    assert "split_leak" in words and "leaking.jsonl:1" in words
    assert "Not data of this run" not in words
    found = json.loads((tmp_path / "doctor.json").read_text())
    found["inputs"][0]["source"] = "jsonl:elsewhere.jsonl"
    (tmp_path / "doctor.json").write_text(json.dumps(found))
    assert "Not data of this run: jsonl:elsewhere.jsonl" in " ".join(Page(report(tmp_path)).words)


def test_a_run_that_is_going_on_has_a_page_too(world, tmp_path):
    config = resolve(config_of(world)).to_dict()
    for asked in (0, 2):
        config["log"]["samples"] = asked
        (tmp_path / "config.json").write_text(json.dumps(config))
        words = " ".join(Page(report(tmp_path)).words)
        assert "not ended" in words
        assert ("--config.log.samples=4 shows what the model writes." in words) == (not asked)


def test_a_sweep_has_a_page(world, tmp_path):
    config = config_of(world)
    config["log"]["samples"], config["peft"] = 0, {}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    words = [f"--config={path}", f"--workdir={tmp_path / 'sweep'}"]
    words += ["--sweep.optim.lr=1e-3,1e-2", "--sweep.peft.method=lora,ia3"]
    assert main(["sweep", *words]) == 0
    page = Page((tmp_path / "sweep/report.html").read_text(encoding="utf-8"))
    assert page.headings == ["Sweep: sweep", "Ranking", "Settings and result", "Curves"]
    assert page.links == []
