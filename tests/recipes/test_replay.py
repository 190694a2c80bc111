"""Samples of the base as data: what is written, stopped and continued, trained on and retained."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import jaxtune
from jaxtune.cli.main import main
from jaxtune.core.errors import RequestError
from jaxtune.generate import sampler
from jaxtune.recipes.retention import replay
from jaxtune.recipes.retention.replay_starts import starts_of
from tests.cli import bad_world

NUM, NEW = 11, 6
OPTIONS = {"num": NUM, "max_new_tokens": NEW, "seed": 3, "batch_size": 1, "dtype": "float32"}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("world")
    bad_world.write_world(directory)
    bad_world.write_lines(
        directory / "texts.jsonl", [{"text": "the cat sat on a mat and looked at the moon"}] * 2
    )
    return directory


@pytest.fixture(scope="module")
def lm(world):
    return jaxtune.load(world / "model", dtype="float32")


@pytest.fixture(scope="module")
def written(world) -> tuple[Path, dict]:
    """A file of samples from BOS, of three blocks, and what is told of it."""
    out = world / "own.jsonl"
    return out, replay.write_replay(model=str(world / "model"), out=str(out), **OPTIONS)


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def draw(lm, prompts, **settings):
    """Samples in one call of the sampler."""
    given = {"max_new_tokens": NEW, "seed": 3, "eos_ids": lm.eos_ids, "slots": 1} | settings
    return sampler.sample(lm.config, lm.method, lm.params, prompts, **given)


def test_a_line_is_what_the_model_wrote(written, lm):
    out, report = written
    rows = rows_of(out)
    drawn = [one for (one,) in draw(lm, [[lm.tokenizer.bos_id]] * NUM)]
    assert [row["input_ids"][1:] for row in rows] == [one.ids for one in drawn]
    for row, one in zip(rows, drawn, strict=True):
        assert row["input_ids"][0] == lm.tokenizer.bos_id
        assert row["loss_mask"] == [0] + [1] * len(one.ids)
        assert row["text"] == lm.decode(one.ids)
    assert len({tuple(row["input_ids"]) for row in rows}) > NUM // 2
    lengths = [len(row["input_ids"]) for row in rows]
    told = {"num": NUM, "tokens": sum(lengths), "new_tokens": sum(lengths) - NUM}
    told |= {"longest": max(lengths), "ended": sum(one.finished for one in drawn), "seed": 3}
    assert told.items() <= report.items()
    assert json.loads(out.with_name("own.jsonl.meta.json").read_text()) == report
    assert 0 < report["ended"] < NUM


def stopped_in_block(patch: pytest.MonkeyPatch, number: int) -> None:
    """Makes the sampler fail in block `number`."""
    real, calls = sampler.sample, []

    def fail(*arguments, **settings):
        calls.append(settings["first_row"])
        if len(calls) == number:
            raise KeyboardInterrupt
        return real(*arguments, **settings)

    patch.setattr(sampler, "sample", fail)


def test_a_stopped_command_goes_on_exactly(written, world, monkeypatch):
    out = world / "again.jsonl"
    given = {"model": str(world / "model"), "out": str(out)} | OPTIONS
    part = world / ".again.jsonl.part"
    with monkeypatch.context() as patch:
        stopped_in_block(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            replay.write_replay(**given)
    assert not out.exists() and len(rows_of(part)) == 8
    with part.open("a") as file:
        file.write('{"input_ids": [1, 2], "loss_mask": [0, 1]}\n{"input_')  # a block half written
    with pytest.raises(RequestError, match=r"again\.jsonl\.part: --out: .*made with seed 3, not 4"):
        replay.write_replay(**given | {"seed": 4})
    with monkeypatch.context() as patch:
        stopped_in_block(patch, 2)  # one block is left
        report = replay.write_replay(**given)
    assert out.read_bytes() == written[0].read_bytes()
    assert report == written[1]
    assert [path.name for path in world.glob(".again*")] == []
    with monkeypatch.context() as patch:
        stopped_in_block(patch, 1)  # nothing is left
        assert replay.write_replay(**given) == report
    with pytest.raises(RequestError, match=r"is there already, made with top_p 1\.0, not 0\.5"):
        replay.write_replay(**given | {"top_p": 0.5})
    out.write_text(out.read_text() + "\n")
    with pytest.raises(RequestError, match="not as this command wrote it"):
        replay.write_replay(**given)


def test_two_at_once_are_refused(world):
    given = {"model": str(world / "model"), "out": str(world / "both.jsonl")} | OPTIONS
    refusal = pytest.raises(RequestError, match="another process is writing")
    with replay.replay_file.growing(world / "both.jsonl", {}, 1), refusal:
        replay.write_replay(**given)


def test_samples_begin_as_they_are_told_to(world, lm):
    chat = starts_of(lm, f"jsonl:{world}/train.jsonl", "chat", None)
    prompt = lm.tokenizer.encode("<s> user the </s> <s> assistant", special=False)
    assert list(chat.ids[0]) == prompt and chat.places[0].endswith("train.jsonl:1")
    text = lm.tokenizer.encode("the cat sat on a mat and looked at the moon")
    for first, count in ((None, 8), (3, 3), (100, len(text))):
        (ids, same) = starts_of(lm, f"jsonl:{world}/texts.jsonl", "text", first).ids
        assert list(ids) == list(same) == text[: count + lm.tokenizer.adds_bos]
    bad_world.write_lines(world / "asked.jsonl", [{"prompt": "the cat"}, {"prompt": "moon"}])
    asked = starts_of(lm, f"jsonl:{world}/asked.jsonl", "prompt", None)
    assert [lm.decode(ids) for ids in asked.ids] == ["the cat", "moon"]


def test_greedy_answers_are_the_model_s(world, lm):
    out = world / "greedy.jsonl"
    given = {"model": str(world / "model"), "out": str(out), "temperature": 0.0}
    source = {"source": f"jsonl:{world}/train.jsonl", "format": "chat"}
    settings = {"max_new_tokens": 4, "dtype": "float32", "batch_size": 1}
    report = replay.write_replay(**given | source | settings)
    rows = rows_of(out)
    assert report["num"] == len(rows) == len(bad_world.WORDS)  # each start once
    starts = starts_of(lm, source["source"], "chat", None).ids
    assert {tuple(row["input_ids"][: row["loss_mask"].index(1)]) for row in rows} == {*starts}
    for row in rows:
        cut = row["loss_mask"].index(1)
        assert 0 not in row["loss_mask"][cut:]
        (again,) = lm.generate([row["input_ids"][:cut]], max_new_tokens=4, batch_size=1)
        ended = row["input_ids"][-1] in lm.eos_ids
        assert row["input_ids"][cut : len(row["input_ids"]) - ended] == again


@pytest.mark.slow
def test_it_is_trained_on_and_retained(written, world, lm, monkeypatch):
    """What is retained before the first step is what the sampler said of its own draws."""
    monkeypatch.chdir(world)
    config = bad_world.config()
    own = {"source": "jsonl:own.jsonl", "format": "tokens"}
    config["data"]["train"].append(own | {"weight": 0.5})
    config["retention"] = {"data": [own]}
    config["data"]["eval"], config["total_steps"] = [], 1
    jaxtune.train(config, world / "run")
    rows = [json.loads(line) for line in (world / "run/metrics.jsonl").read_text().splitlines()]
    drawn = [one for (one,) in draw(lm, [[lm.tokenizer.bos_id]] * NUM)]
    wanted = -np.mean([p for one in drawn for p in one.logprobs])
    before = next(row for row in rows if row["step"] == 0)
    assert before["retention/nll"] == pytest.approx(wanted, rel=1e-5)
    assert {row["step"] for row in rows if "retention/nll" in row} == {0, 1}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "--num: is missing"),
        (("--num=0",), "--num: expected an integer ≥ 1"),
        (("--num=2", "--format=chat"), "--format: needs --source"),
        (("--num=2", "--first_tokens=4"), "--first_tokens: needs --source"),
        (("--num=2", "--temperature=-1"), "--temperature: expected a number ≥ 0"),
        (("--num=2", "--temperature=0"), "--temperature: 0 writes one sample of each start"),
        (("--num=2", "--top_p=0"), "--top_p: expected"),
        (("--num=2", "--max_new_tokens=500"), "--max_new_tokens: 1 tokens and 500 new ones"),
        (("--source=jsonl:train.jsonl",), "--format: is missing"),
        (("--source=jsonl:train.jsonl", "--format=caht"), "'caht' cannot be measured"),
        (("--source=jsonl:trian.jsonl", "--format=chat"), "trian.jsonl"),
        (("--source=jsonl:train.jsonl", "--format=chat", "--first_tokens=2"), "text and tokens"),
        (
            ("--source=jsonl:train.jsonl", "--format=chat", "--max_new_tokens=125"),
            "train.jsonl:1: --max_new_tokens: ",
        ),
        (("--num=2", "--out=x.json"), "--out: expected a name that ends in .jsonl"),
        (("--num=2", "--out=no/x.jsonl"), "--out: no such directory"),
        (("--num=2", "--model=nowhere"), "nowhere"),
    ],
)
def test_what_cannot_be_done_is_refused(world, monkeypatch, capfd, words, told):
    monkeypatch.chdir(world)
    before = {path.name for path in world.iterdir()}
    assert main(["data", "replay", "--model=model", "--out=x.jsonl", *words]) == 2
    out, err = capfd.readouterr()
    assert told in err and err.count("\n") == 1 and out == ""
    assert {path.name for path in world.iterdir()} == before


def test_the_verb_tells_what_it_wrote(world, monkeypatch, capfd):
    monkeypatch.chdir(world)
    words = ["--model=model", "--num=3", "--max_new_tokens=5", "--out=told.jsonl"]
    words += ["--batch_size=1", "--dtype=float32", "--json"]
    assert main(["data", "replay", *words]) == 0
    report = json.loads(capfd.readouterr().out)
    assert report["num"] == 3 and report["model"] == "model" and report["dtype"] == "float32"
    assert main(["data", "replay", *words[:-1]]) == 0
    assert capfd.readouterr().out.startswith("written to told.jsonl: 3 samples, ")
