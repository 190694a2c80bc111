"""Sweeps: building trials, running, continuing and ranking them."""

from __future__ import annotations

import csv
import json
import pathlib
from typing import Any

import pytest

from jaxtune.core.errors import RequestError
from jaxtune.recipes.schema.overrides import assign, declared, parse, split
from jaxtune.recipes.schema.resolve import Resolved
from jaxtune.recipes.sweep.hyper import Hyper, from_flags, short_name
from jaxtune.recipes.sweep.sweep import plan, rank, run_sweep

h = Hyper()


def base() -> dict[str, Any]:
    entry = {"source": "jsonl:a.jsonl", "format": "chat"}
    return {
        "model": {"path": "/m"},
        "peft": {"method": "lora"},
        "data": {"train": [entry], "eval": [entry], "seq_len": 64},
        "batch_size": 4,
        "total_steps": 10,
        "optim": {"lr": 1e-3},
    }


def summary(loss: float, stop: str = "finished") -> dict[str, Any]:
    return {"stop_reason": stop, "step": 10, "metrics": {"loss": 1.0, "eval/loss": loss}}


class Runs:
    """Stands for training: notes its calls and gives the learning rate back as the loss."""

    def __init__(self, fail: tuple[float, ...] = ()):
        self.fail = fail
        self.ran: list[str] = []

    def __call__(self, config: Resolved, directory: pathlib.Path) -> dict[str, Any]:
        self.ran.append(directory.name)
        if config.optim.lr in self.fail:
            raise MemoryError("no room for it")
        directory.mkdir(parents=True, exist_ok=True)
        result = summary(config.optim.lr)
        (directory / "summary.json").write_text(json.dumps(result))
        return result


def quiet(line: str) -> None:
    pass


def test_product_zip_and_chain_equal_nested_loops() -> None:
    a, b = h.sweep("optim.lr", [1, 2]), h.sweep("peft.rank", [3, 4])
    loops = [{"optim.lr": x, "peft.rank": y} for x in (1, 2) for y in (3, 4)]
    assert h.product([a, b]) == loops == h.product(a, b)
    assert h.zip([a, b]) == [loops[0], loops[3]]
    assert h.chain(a, b) == [*a, *b]
    assert h.product(a, h.fixed("seed", 5))[1] == {"optim.lr": 2, "seed": 5}
    assert h.product([h.zip([a, b]), h.sweep("seed", [0, 1])])[1] == {**loops[0], "seed": 1}


def test_parts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(RequestError, match="different lengths"):
        h.zip(h.sweep("seed", [1, 2]), h.sweep("optim.lr", [1]))
    with pytest.raises(RequestError, match="seed: two parts"):
        h.product(h.sweep("seed", [1]), h.sweep("seed", [2]))


def test_flags_are_split_at_commas_outside_brackets() -> None:
    assert from_flags([("peft.targets", "['q_proj','v_proj'],all-linear")]) == [
        {"peft.targets": ["q_proj", "v_proj"]},
        {"peft.targets": "all-linear"},
    ]
    assert from_flags([("optim.lr", "1e-3, 2e-3"), ("data.packing", "true,false")]) == [
        {"optim.lr": lr, "data.packing": packing}
        for lr in (1e-3, 2e-3)
        for packing in (True, False)
    ]
    with pytest.raises(RequestError, match=r"optim\.lr: expected"):
        from_flags([("optim.lr", ",")])


@pytest.mark.parametrize(
    ("trials", "key", "text"),
    [
        ([{"optim.lr": 1e-3}, {"optim.rl": 1e-3}], "optim.rl", "did you mean 'lr'?"),
        ([{"optim.lr": -1.0}], "optim.lr", "trial 0: lr=-1"),
        ([{"peft.method": "full", "peft.rank": 8}], "peft.rank", "not used"),
        ([{"seed": 1}, {"seed": 1}], "trial 1", "same as trial 0"),
        ([], "get_hyper", "list of trials"),
        (None, "get_hyper", "list of trials"),
        ([3], "trial 0", "key: value"),
        ([{5: 6}], "trial 0", "5 is no key"),
        ([{"data.train[7].format": "chat"}], "data.train[7].format", "no index"),
        ([{"seed.x": 1}], "seed.x", "there is no"),
    ],
)
def test_every_trial_is_checked_before_any_runs(trials: Any, key: str, text: str) -> None:
    tree = {**base(), "seed": 0}
    with pytest.raises(RequestError) as error:
        plan(tree, trials)
    assert error.value.key == key
    assert text in error.value.message
    assert tree == {**base(), "seed": 0}


def test_each_trial_has_a_directory_named_after_it(tmp_path: pathlib.Path) -> None:
    trials = h.product(
        h.sweep("optim.lr", [1e-3, 5e-4]), h.sweep("peft.targets", [["q_proj", "k_proj"]])
    )
    runs = Runs()
    run_sweep(plan(base(), trials), tmp_path, runs, report=quiet)
    assert runs.ran == ["000-lr=0.001,targets=q_proj+k_proj", "001-lr=0.0005,targets=q_proj+k_proj"]
    assert sorted(p.name for p in (tmp_path / "trials").iterdir()) == sorted(runs.ran)


def test_short_names_are_safe_unique_and_short() -> None:
    assert short_name({"log.every_steps": 1, "eval.every_steps": 2}) == (
        "log.every_steps=1,eval.every_steps=2"
    )
    assert short_name({"model.path": "/x/y z/"}) == "path=y_z"
    long = [short_name({"peft.targets": "x" * 100 + str(i)}) for i in range(2)]
    assert len(set(long)) == 2 and all(len(name) <= 80 for name in long)


def test_the_results_are_ranked_in_table_and_csv(tmp_path: pathlib.Path) -> None:
    planned = plan(base(), h.sweep("optim.lr", [3e-3, 1e-3, 2e-3]))
    rows = run_sweep(planned, tmp_path, Runs(), report=quiet)
    assert [row.metric for row in rows] == [1e-3, 2e-3, 3e-3]
    with (tmp_path / "results.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [float(row["eval/loss"]) for row in table] == [1e-3, 2e-3, 3e-3]
    assert table[0]["rank"] == "1" and table[0]["optim.lr"] == "0.001"
    assert [row.metric for row in rank(rows, "max")] == [3e-3, 2e-3, 1e-3]


def test_a_failed_trial_is_recorded_and_the_sweep_goes_on(tmp_path: pathlib.Path) -> None:
    planned = plan(base(), h.sweep("optim.lr", [1e-3, 2e-3, 3e-3]))
    runs = Runs(fail=(1e-3,))
    rows = run_sweep(planned, tmp_path, runs, report=quiet)
    assert len(runs.ran) == 3
    assert [row.status for row in rows] == ["finished", "finished", "failed"]
    assert rows[-1].error == "MemoryError: no room for it"
    assert "MemoryError" in (tmp_path / rows[-1].trial / "error.txt").read_text()

    again = Runs()
    rows = run_sweep(planned, tmp_path, again, report=quiet)
    assert again.ran == ["000-lr=0.001"]
    assert [row.status for row in rows] == ["finished", "kept", "kept"]
    assert not list(tmp_path.glob("trials/*/error.txt"))


def test_a_broken_sweep_continues_where_it_stopped(tmp_path: pathlib.Path) -> None:
    planned = plan(base(), h.sweep("optim.lr", [1e-3, 2e-3, 3e-3]))

    class Killed(Runs):
        def __call__(self, config: Resolved, directory: pathlib.Path) -> dict[str, Any]:
            if config.optim.lr == 2e-3:
                directory.mkdir(parents=True)
                raise KeyboardInterrupt
            return super().__call__(config, directory)

    with pytest.raises(KeyboardInterrupt):
        run_sweep(planned, tmp_path, Killed(), report=quiet)
    runs = Runs()
    rows = run_sweep(planned, tmp_path, runs, report=quiet)
    assert runs.ran == ["001-lr=0.002", "002-lr=0.003"]
    assert [row.status for row in rows] == ["kept", "finished", "finished"]


def test_a_preempted_trial_ends_the_sweep(tmp_path: pathlib.Path) -> None:
    planned = plan(base(), h.sweep("optim.lr", [1e-3, 2e-3]))
    rows = run_sweep(planned, tmp_path, lambda *_: summary(1.0, "preempted"), report=quiet)
    assert [row.status for row in rows] == ["preempted"]


def test_a_longer_sweep_keeps_the_old_trials_directories(tmp_path: pathlib.Path) -> None:
    run_sweep(plan(base(), h.sweep("optim.lr", [1e-3])), tmp_path, Runs(), report=quiet)
    runs = Runs()
    longer = plan(base(), h.sweep("optim.lr", [5e-3, 1e-3]))
    rows = run_sweep(longer, tmp_path, runs, report=quiet)
    assert runs.ran == ["001-lr=0.005"]
    assert [row.trial for row in rows] == ["trials/000-lr=0.001", "trials/001-lr=0.005"]


def test_a_changed_config_is_named_and_refused(tmp_path: pathlib.Path) -> None:
    trials = h.sweep("optim.lr", [1e-3])
    run_sweep(plan(base(), trials), tmp_path, Runs(), report=quiet)
    before = (tmp_path / "sweep.json").read_bytes()
    changed = plan({**base(), "batch_size": 8}, trials)
    with pytest.raises(RequestError, match="batch_size: was 4"):
        run_sweep(changed, tmp_path, Runs(), report=quiet)
    assert (tmp_path / "sweep.json").read_bytes() == before
    rows = run_sweep(changed, tmp_path, Runs(), allow_change=True, report=quiet)
    assert rows[0].status == "kept"


def test_a_metric_that_no_trial_has_is_refused(tmp_path: pathlib.Path) -> None:
    planned = plan(base(), h.sweep("optim.lr", [1e-3]))
    with pytest.raises(RequestError, match="did you mean 'eval/loss'"):
        run_sweep(planned, tmp_path, Runs(), metric="eval/los", report=quiet)
    tree = base()
    del tree["data"]["eval"]
    with pytest.raises(RequestError, match=r"data\.eval: .* needs evaluation data"):
        run_sweep(plan(tree, h.sweep("seed", [1])), tmp_path, Runs(), report=quiet)


def test_damaged_records_are_named(tmp_path: pathlib.Path) -> None:
    planned = plan(base(), h.sweep("optim.lr", [1e-3]))
    run_sweep(planned, tmp_path, Runs(), report=quiet)
    (tmp_path / planned[0].directory / "summary.json").write_text("{")
    with pytest.raises(RequestError, match=r"summary\.json: cannot be read as JSON"):
        run_sweep(planned, tmp_path, Runs(), report=quiet)
    (tmp_path / "sweep.json").write_text("[]")
    with pytest.raises(RequestError, match=r"sweep\.json: is damaged"):
        run_sweep(planned, tmp_path, Runs(), report=quiet)


def test_nan_ranks_behind_every_number(tmp_path: pathlib.Path) -> None:
    planned = plan(base(), h.sweep("optim.lr", [1e-3, 2e-3]))
    rows = run_sweep(
        planned,
        tmp_path,
        lambda config, _: summary(float("nan") if config.optim.lr == 1e-3 else 9.0),
        report=quiet,
    )
    assert rows[0].metric == 9.0


@pytest.mark.parametrize(
    "path", ["", ".", "a.", ".a", "a..b", "a[", "a[x]", "a[-1]", "a b[0", "[0]"]
)
def test_a_path_that_cannot_be_read_is_refused(path: str) -> None:
    with pytest.raises(RequestError):
        split(path)


def test_assigning_makes_sections_and_lists() -> None:
    tree: dict[str, Any] = {}
    assign(tree, "data.train[0].source", "jsonl:a")
    assign(tree, "data.train.1.source", "jsonl:b")
    assign(tree, "optim.groups['a.*'].lr_scale", 2)
    assert tree == {
        "data": {"train": [{"source": "jsonl:a"}, {"source": "jsonl:b"}]},
        "optim": {"groups": {"a.*": {"lr_scale": 2}}},
    }


@pytest.mark.parametrize(
    ("path", "text", "value"),
    [
        ("model.path", "123", "123"),
        ("model.path", "None", None),
        ("model.quantize", "none", "none"),
        ("model.remat", "none", "none"),
        ("optim.lr", "1e-3", 1e-3),
        ("optim.clip_norm", "None", None),
        ("data.packing", "true", True),
        ("data.packing", "0", False),
        ("peft.targets", "all-linear", "all-linear"),
        ("peft.targets", "['q_proj']", ["q_proj"]),
        ("peft.train", "['norm']", ["norm"]),
        ("data.train[0].source", "jsonl:1", "jsonl:1"),
        ("data.train[0].weight", "2", 2),
        ("batch_size", "many", "many"),
        ("no.such.key", "1", 1),
    ],
)
def test_flag_text_is_read_by_the_schemas_type(path: str, text: str, value: Any) -> None:
    assert parse(path, text) == value and type(parse(path, text)) is type(value)


def test_declarations_are_found_for_elements_too() -> None:
    assert declared("data.train[3].weight").kind == "float"
    assert declared("peft.rank").kind == "int"
    assert declared("nothing") is None and declared("data.train[0].no") is None
