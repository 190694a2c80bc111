"""eval, generate, export, sweep, quickstart: what they pass on, print and refuse."""

from __future__ import annotations

import csv
import json
import pathlib
import types
from typing import Any

import pytest

RESULT = {
    "loss": 1.5,
    "perplexity": 4.48,
    "tokens": 10,
    "examples": 2,
    "tasks": {"t": {"acc": 0.5}},
}


@pytest.fixture
def evaluation(recipe) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []

    def evaluate(**options: Any) -> dict[str, Any]:
        calls.append(options)
        return RESULT

    recipe("evaluation.evaluate", evaluate=evaluate)
    return calls


def test_eval_passes_on_what_was_given_and_nothing_else(cli, evaluation, config_path) -> None:
    outcome = cli("eval", "--model=/m", "--data=jsonl:x", "--format=chat", "--limit=5", "--json")
    assert outcome.code == 0 and json.loads(outcome.out) == RESULT
    assert evaluation == [{"model": "/m", "data": "jsonl:x", "format": "chat", "limit": 5}]
    cli("eval", "--model=/m", "--tasks=a,b", "--include_path=/t", "--json")
    assert evaluation[-1] == {"model": "/m", "tasks": ("a", "b"), "include_path": "/t"}
    cli("eval", f"--config={config_path}", "--config.seed=5", "--workdir=/w")
    assert set(evaluation[-1]) == {"config", "workdir"} and evaluation[-1]["config"].seed == 5


def test_json_has_no_infinity(cli, recipe) -> None:
    recipe(
        "evaluation.evaluate",
        evaluate=lambda **_: {"loss": float("nan"), "perplexity": float("inf")},
    )
    out = cli("eval", "--model=/m", "--data=jsonl:x", "--format=chat", "--json").out
    assert out == '{"loss": null, "perplexity": null}\n'


def test_eval_prints_a_table(cli, evaluation) -> None:
    out = cli("eval", "--model=/m", "--data=jsonl:x", "--format=chat").out
    assert "perplexity" in out and "4.48" in out and "acc" in out


def test_eval_shows_figures_with_their_intervals(cli, recipe) -> None:
    figure = {"value": 0.5, "low": 0.25, "high": 0.75}
    result = {
        "metrics": {"f1": figure},
        "against": {"loss": 1.0, "rise": 0.125, "low": 0.1, "high": 0.2, "kl": 0.3}
        | {"metrics": {"f1": figure | {"rise": 0.0625}}},
    }
    recipe("evaluation.evaluate", evaluate=lambda **_: result)
    out = cli("eval", "--model=/m", "--data=jsonl:x", "--format=chat", "--metrics=f1").out
    for words in ("0.5 [0.25, 0.75]", "0.5, rise 0.0625 [0.25, 0.75]", "against: kl", "0.125"):
        assert words in out, out


def test_eval_passes_on_how_answers_are_written(cli, evaluation) -> None:
    flags = ("--metrics=f1, rouge", "--labels=a,b", "--max_new_tokens=9", "--stop=x", "--top_k=3")
    cli("eval", "--model=/m", "--data=jsonl:x", "--format=chat", *flags, "--json")
    expected = {"metrics": ("f1", "rouge"), "labels": ("a", "b"), "max_new_tokens": 9}
    expected |= {"stop": ["x"], "top_k": 3}
    assert expected.items() <= evaluation[-1].items() and "seed" not in evaluation[-1]


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ([], "give --model=DIR"),
        (["--model=/m"], "--model: needs --data=SOURCE"),
        (["--model=/m", "--workdir=/w"], "--model: takes the place of"),
        (["--workdir=/w", "--adapter=/a"], "--adapter: needs --model"),
        (["--model=/m", "--data=jsonl:x"], "--data: needs --format"),
        (["--model=/m", "--format=chat"], "--format: needs --data"),
        (["--model=/m", "--data=x", "--format=chat"], "did you mean 'jsonl:x'?"),
        (["--model=/m", "--data=jsonl:x", "--format=caht"], "did you mean 'chat'?"),
        (["--model=/m", "--data=jsonl:x", "--format=chat", "--include_path=t"], "needs --tasks"),
        (["--model=/m", "--tasks=a", "--limit=0"], "expected an integer ≥ 1"),
        (["--model=/m", "--tasks=a", "--limit=few"], "--limit: invalid integer value: 'few'"),
        (["--model=/m", "--taks=a"], "did you mean '--tasks'?"),
        (["--config.seed=1", "--model=/m"], "needs --config=FILE"),
    ],
)
def test_eval_refuses(refused, evaluation, flags: list[str], text: str) -> None:
    assert text in refused("eval", *flags)
    assert not evaluation


class Model:
    """Stands for a language model: says the prompt backwards."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.tokenizer = types.SimpleNamespace(chat_template=None)

    def generate(self, prompts: list[str], **options: Any) -> list[str]:
        self.calls.append({"prompts": prompts, **options})
        return [prompt[::-1] for prompt in prompts]


@pytest.fixture
def model(recipe) -> Model:
    lm = Model()

    def load(path: str, adapter: str | None = None, dtype: str = "bfloat16") -> Model:
        lm.loaded = (path, adapter, dtype)
        return lm

    recipe("load", load=load)
    return lm


def test_generate_completes_prompts_in_batches(cli, model, tmp_path: pathlib.Path) -> None:
    command = ("generate", f"--model={tmp_path}", "--batch_size=2", "--json", "--dtype=float32")
    outcome = cli(*command, "ab", "cd", "--prompt=ef", "--top_k=3", "--stop=x", "--stop=y")
    assert [json.loads(line)["completion"] for line in outcome.out.splitlines()] == [
        "ba",
        "dc",
        "fe",
    ]
    assert [call["prompts"] for call in model.calls] == [["ab", "cd", "ef"]]
    assert model.calls[0]["batch_size"] == 2
    assert model.calls[0]["stop"] == ["x", "y"] and model.calls[0]["top_k"] == 3
    assert model.loaded == (str(tmp_path), None, "float32")
    assert cli("generate", f"--workdir={tmp_path}", "ab").out == "abba\n"


def test_generate_reads_and_writes_files(cli, model, tmp_path: pathlib.Path) -> None:
    prompts, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts.write_text('{"prompt": "ab"}\n\n{"prompt": "ü", "id": 3}\n', encoding="utf-8")
    assert cli("generate", f"--model={tmp_path}", f"--prompts={prompts}", f"--out={out}").code == 0
    records = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert records == [{"prompt": "ab", "completion": "ba"}, {"prompt": "ü", "completion": "ü"}]


@pytest.mark.parametrize(
    ("content", "line", "text"),
    [
        (b'{"prompt": "a"}\n{"prompt": \n', 2, "is not JSON"),
        (b'{"promt": "a"}\n', 1, "did you mean 'promt'?"),
        (b'{"prompt": 3}\n', 1, "expected"),
        (b'["a"]\n', 1, "expected"),
        (b'{"prompt": "\xff"}\n', 1, "is not JSON"),
        (b"\n\n", None, "holds no prompt"),
    ],
)
def test_a_bad_prompt_file_is_named_with_its_line(
    refused, model, tmp_path: pathlib.Path, content: bytes, line: int | None, text: str
) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(content)
    error = refused("generate", f"--model={tmp_path}", f"--prompts={path}")
    assert error.startswith(f"{path}:{line}: " if line else f"{path}: ") and text in error


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ([], "give prompts, --prompts=FILE or --chat"),
        (["a", "--chat"], "one of them"),
        (["a", "--temperature=-1"], "--temperature: expected a number ≥ 0"),
        (["a", "--top_p=0"], "--top_p"),
        (["a", "--top_k=-1"], "--top_k"),
        (["a", "--system=x"], "--system: needs --chat"),
        (["--chat", "--out=x"], "--chat: has no output file"),
        (["a", "--out=/no/such/x"], "--out: no such directory"),
        (["--prompts=/no/such"], "/no/such: no such file"),
        (["a", "--dtype=int8"], "invalid choice"),
        (["a", "--adapter=/no/such"], "--adapter: no such directory"),
    ],
)
def test_generate_refuses(refused, model, tmp_path, flags: list[str], text: str) -> None:
    assert text in refused("generate", f"--model={tmp_path}", *flags)
    assert not model.calls


def test_a_model_that_is_not_there(refused, model, tmp_path: pathlib.Path) -> None:
    assert "--model: no such directory: '/no/such'" in refused("generate", "--model=/no/such", "a")
    file = tmp_path / "f"
    file.touch()
    assert "--workdir: is not a directory" in refused("generate", f"--workdir={file}", "a")
    assert "give --model=DIR or --workdir=DIR" in refused("generate", "a")


def test_chat_keeps_the_conversation(cli, recipe, monkeypatch, tmp_path: pathlib.Path) -> None:
    seen: list[list[dict[str, str]]] = []

    class Talker:
        tokenizer = types.SimpleNamespace(chat_template="x")

        def chat(self, messages: list[dict[str, str]], **options: Any) -> str:
            seen.append([dict(message) for message in messages])
            return "answer 7"

    lines = iter(["Hi", "", "And?", "/reset", "New", "/exit", "never"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    recipe("load", load=lambda *args, **kwargs: Talker())
    outcome = cli("generate", f"--model={tmp_path}", "--chat", "--system=Be kind.")
    assert outcome.out == "answer 7\n" * 3
    assert [[m["role"] for m in messages] for messages in seen] == [
        ["system", "user"],
        ["system", "user", "assistant", "user"],
        ["system", "user"],
    ]


def test_chat_needs_a_template(refused, model, tmp_path: pathlib.Path) -> None:
    assert "no chat template" in refused("generate", f"--model={tmp_path}", "--chat")


@pytest.fixture
def exports(recipe) -> list[tuple[Any, ...]]:
    calls: list[tuple[Any, ...]] = []

    def export(source: str, format: str, out: str, **extra: Any) -> dict[str, Any]:
        calls.append((source, format, out, extra))
        return {"directory": out, "tensors": 3}

    recipe("export", export=export)
    return calls


def test_export(cli, refused, exports, tmp_path: pathlib.Path) -> None:
    out = cli("export", f"--workdir={tmp_path}", "--format=peft").out
    assert f"directory: {tmp_path}/export/peft" in out
    cli(
        "export", f"--model={tmp_path}", f"--adapter={tmp_path}", "--format=hf", "--out=o", "--json"
    )
    assert exports == [
        (str(tmp_path), "peft", f"{tmp_path}/export/peft", {}),
        (str(tmp_path), "hf", "o", {"adapter": str(tmp_path)}),
    ]
    assert "--format: is missing" in refused("export", f"--workdir={tmp_path}")
    assert "invalid choice" in refused("export", f"--workdir={tmp_path}", "--format=onnx")
    assert "--out: is missing" in refused("export", f"--model={tmp_path}", "--format=hf")


def test_a_config_beside_a_workdir_must_be_its_own(
    cli, refused, training, exports, config_path, tmp_path: pathlib.Path
) -> None:
    workdir = tmp_path / "run"
    command = ("export", f"--config={config_path}", f"--workdir={workdir}", "--format=hf")
    cli("train", f"--config={config_path}", f"--workdir={workdir}")
    assert "there is no config.json" in refused(*command)
    (workdir / "config.json").write_text(json.dumps(training.calls[0]["config"].to_dict()))
    assert cli(*command).code == 0
    assert "seed: is 3, but the run" in refused(*command, "--config.seed=3")
    (workdir / "config.json").write_text("{")
    assert "config.json: is damaged" in refused(*command)


HYPER = """

def get_hyper(h):
    return h.product([h.sweep("optim.lr", [1e-3, 5e-4]), h.sweep("peft.rank", [4])])
"""


def test_sweep_runs_and_ranks_the_files_trials(cli, training, config_path, tmp_path) -> None:
    config_path.write_text(config_path.read_text() + HYPER)
    workdir = tmp_path / "sweep"
    outcome = cli("sweep", f"--config={config_path}", f"--workdir={workdir}")
    assert outcome.code == 0, outcome.err
    assert [call["config"].optim.lr for call in training.calls] == [1e-3, 5e-4]
    assert [call["workdir"].name for call in training.calls] == [
        "000-lr=0.001,rank=4",
        "001-lr=0.0005,rank=4",
    ]
    assert "trials, best first" in outcome.out and "finished" in outcome.out
    with (workdir / "results.csv").open() as file:
        assert [row["optim.lr"] for row in csv.DictReader(file)] == ["0.0005", "0.001"]
    assert cli("sweep", f"--config={config_path}", f"--workdir={workdir}").code == 0
    assert len(training.calls) == 2


def test_sweep_takes_its_keys_from_flags_too(cli, training, config_path, tmp_path) -> None:
    command = ("sweep", f"--config={config_path}", f"--workdir={tmp_path / 's'}")
    flags = ("--sweep.optim.lr=1e-3,2e-3", "--sweep.peft.variant", "lora,dora", "--config.seed=9")
    outcome = cli(*command, *flags, "--dry_run")
    assert outcome.code == 0 and len(outcome.out.splitlines()) == 4 and not training.calls
    assert cli(*command, *flags).code == 0
    assert len(training.calls) == 4 and training.calls[0]["config"].seed == 9


def test_a_failed_trial_is_exit_code_1(cli, training, config_path, tmp_path) -> None:
    training.stop = "non_finite"
    outcome = cli(
        "sweep", f"--config={config_path}", f"--workdir={tmp_path / 's'}", "--sweep.seed=1,2"
    )
    assert outcome.code == 1 and len(training.calls) == 2


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ([], "nothing to sweep"),
        (["--sweep.peft.rnak=1,2"], "peft.rnak: unknown key (did you mean 'rank'?)"),
        (["--sweep.peft.rank=0,2"], "peft.rank: expected an integer ≥ 1; got 0"),
        (["--sweep.seed=1,1"], "is the same as trial 0"),
        (["--sweep=1"], "expected --sweep.KEY"),
        (["--sweep.seed=1,2", "--mode=best"], "--mode"),
    ],
)
def test_sweep_refuses_before_anything_runs(
    refused, training, config_path, tmp_path, flags: list[str], text: str
) -> None:
    workdir = tmp_path / "s"
    assert text in refused("sweep", f"--config={config_path}", f"--workdir={workdir}", *flags)
    assert not training.calls and not workdir.exists()


def test_a_get_hyper_that_raises_is_one_line(refused, training, config_path, tmp_path) -> None:
    config_path.write_text(
        config_path.read_text() + "\n\ndef get_hyper(h):\n    return h.sweeep()\n"
    )
    line = refused("sweep", f"--config={config_path}", f"--workdir={tmp_path}")
    last = len(config_path.read_text().splitlines())
    assert line.startswith(f"{config_path}:{last}: AttributeError")


def test_quickstart_returns_its_code(cli, refused, recipe, tmp_path: pathlib.Path) -> None:
    calls: list[str] = []
    recipe("quickstart", main=lambda workdir: calls.append(str(workdir)) or 0)
    assert cli("quickstart", f"--workdir={tmp_path}").code == 0
    assert calls == [str(tmp_path)]
    assert "unknown flag --fast" in refused("quickstart", "--fast")
