"""Whatever is wrong with a request: exit code 2, one line that names it, and nothing changed."""

from __future__ import annotations

import fcntl
import gzip
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxtune.cli.main import main
from tests.cli import bad_world
from tests.correctness import interrupts
from tests.correctness.tiny_runs import tree_hash
from tests.goldens.tiny import write_adapter, write_llama

NEW = ("train", "--config=config.json", "--workdir=new")
RUN = ("train", "--config=config.json", "--workdir=run")
WEIGHTS = Path("model/model.safetensors")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model, data, and in `run` a run of four steps that stopped at the second."""
    directory = tmp_path_factory.mktemp("world")
    bad_world.write_world(directory)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        with interrupts.in_the_save(2):
            main([*RUN])
    assert not (directory / "run/summary.json").exists()
    return directory


@pytest.fixture
def here(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the world, as the current directory."""
    shutil.copytree(world, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def check(capfd: pytest.CaptureFixture[str], arguments: tuple[str, ...], texts: list[str]) -> None:
    before = tree_hash(Path())
    capfd.readouterr()
    code = main(list(arguments))
    out, err = capfd.readouterr()
    assert code == 2, (code, out, err)
    assert err.startswith("jaxtune: error: ") and err.count("\n") == 1, err
    for text in texts:
        assert text in err
    assert len(err) < 700, err
    assert tree_hash(Path()) == before


# Flags on a config that works: (flags, what the line names and says).
CONFIGS: list[tuple[str, ...]] = [
    ("--config.sede=1", "sede", "did you mean 'seed'"),
    ("--config.optim.lrr=1", "optim.lrr", "'lr'"),
    ("--config.optim.learning_rate=1", "optim.learning_rate", "did you mean 'optim.lr'"),
    ("--config.model.add_tokens=[a]", "model.add_tokens", "strings of a list are quoted"),
    ("--config.seed=-1", "seed", "≥ 0"),
    ("--config.peft.rank=0", "peft.rank", "≥ 1"),
    ("--config.peft.rank=2.5", "peft.rank", "integer"),
    ("--config.peft.method=lroa", "peft.method", "did you mean 'lora'"),
    ("--config.peft.bottleneck=4", "peft.bottleneck", "not used by"),
    ("--config.peft.dropout=1.0", "peft.dropout", "< 1"),
    ("--config.peft.targets=no_proj", "peft.targets", "no_proj"),
    ("--config.peft.targets=(", "peft.targets", "not a regular expression"),
    ("--config.peft.targets=[q_proj,v_proj]", "peft.targets", "strings of a list are quoted"),
    ("--config.peft.train=['nothing/.*']", "nothing/.*", "match"),
    ("--config.peft.init_from=nowhere", "nowhere"),
    ("--config.peft.init_from=run", "run: ", "it is a run"),
    ("--config.peft.init_from=prefix", "peft.init_from", "prefix", "not lora"),
    ("--config.model.preset=tiny-1m", "model.preset", "contradicts model.path"),
    ("--config.model.path=modle", "modle"),
    ("--config.model.path=train.jsonl", "train.jsonl"),
    ("--config.model.dtype=float16", "model.dtype", "bfloat16"),
    ("--config.model.quantize=int4", "model.quantize", "int8"),
    ("--config.model.overrides.layers=2", "model.overrides.layers"),
    ("--config.model.overrides.hidden_size=64", "model.overrides"),
    ("--config.model.tokenizer=nowhere", "nowhere"),
    ("--config.objective.name=dpo", "data.train[0].format", "reads 'preference'"),
    ("--config.data.seq_len=1", "data.seq_len", "≥ 2"),
    ("--config.data.seq_len=4096", "data.seq_len", "128"),
    ("--config.data.seq_len=5", "train.jsonl:1", "data.overlong"),
    ("--config.data.overlong=cut", "data.overlong", "truncate"),
    ("--config.data.train=[]", "data.train", "empty"),
    ("--config.data.train.source=jsonl:train.jsonl", "is a list", "data.train[0].source"),
    ("--config.data.train[0].format=caht", "data.train[0].format", "'chat'"),
    ("--config.data.train[0].format=completion", "train.jsonl:1", "prompt"),
    ("--config.data.train[0].format=preference", "data.train[0].format", "is read by dpo"),
    ("--config.data.train[0].weight=0", "data.train[0].weight", "> 0"),
    ("--config.data.train[0].source=train.jsonl", "data.train[0].source", "jsonl:train.jsonl"),
    ("--config.data.train[0].source=jsonl:trian.jsonl", "trian.jsonl", "'train.jsonl'"),
    ("--config.data.train[0].source=jsonl:model", "model", "directory"),
    ("--config.data.train[0].source=tfds:nothing:train", "data.train[0].source", "'nothing'"),
    ("--config.data.eval[0].source=jsonl:no.jsonl", "data.eval[0].source", "no.jsonl"),
    ("--config.data.template=nowhere.jinja", "data.template", "nowhere.jinja"),
    ("--config.batch_size=0", "batch_size", "≥ 1"),
    ("--config.batch_size=6", "--config.mesh.fsdp=4", "batch_size", "multiple of 4"),
    ("--config.eval.batch_size=3", "--config.mesh.fsdp=4", "eval.batch_size", "4 shards"),
    ("--config.grad_accum=3", "grad_accum", "divide"),
    ("--config.total_epochs=1", "total_", "contradicts"),
    ("--config.total_steps=None", "total_steps", "missing"),
    ("--config.optim.lr=0", "optim.lr", "> 0"),
    ("--config.optim.lr=nan", "optim.lr", "number"),
    ("--config.optim.name=adam", "optim.name", "'adamw'"),
    ("--config.optim.schedule=cosin", "optim.schedule", "'cosine'"),
    ("--config.optim.warmup_steps=9", "optim.warmup_steps", "longer than the run"),
    ("--config.optim.groups=[{'pattern': 'no/.*'}]", "no/.*", "match"),
    ("--config.mesh.data=64", "mesh", "64", "8 devices"),
    ("--config.mesh.sequence=4", "--config.data.seq_len=60", "data.seq_len", "multiple of 8"),
    ("--config.model.attention=splash", "model.attention", "runs on TPU, not cpu"),
    ("--config.model.attention=cudnn", "model.attention", "NVIDIA"),
    ("--config.model.attention=ring", "model.attention", "mesh.sequence"),
    ("--config.checkpoint.keep_best=eval/loss", "checkpoint.keep_best", "eval.every_steps"),
    ("--config.checkpoint.every_steps=0", "checkpoint.every_steps", "≥ 1"),
    ("--config.log.wandb", "log.wandb", "jaxtune[wandb]"),
]


@pytest.mark.parametrize("case", CONFIGS, ids=[case[0].removeprefix("--") for case in CONFIGS])
def test_a_bad_config(here: Path, capfd, case: tuple[str, ...]) -> None:
    flags = tuple(part for part in case if part.startswith("--"))
    check(capfd, (*NEW, *flags), [part for part in case if part not in flags])


# Content of train.jsonl, format, and what the line names and says.
LINES: list[tuple[str, bytes, str, str]] = [
    ("json", b'{"messages": [\n', "chat", "train.jsonl:1: "),
    ("later_line", json.dumps(bad_world.chat()).encode() + b"\n\n{oops}\n", "chat", ":3: "),
    ("array", b'[{"text": "a"},\n', "text", "JSON array"),
    ("number", b"7\n", "text", "JSON number"),
    ("empty", b"\n \n", "text", "holds no record"),
    ("utf8", b'{"text": "a"}\n{"text": "\xff"}\n', "text", "train.jsonl:2: "),
    ("field", b'{"txet": "a"}\n', "text", "did you mean 'txet'"),
    ("type", b'{"text": 5}\n', "text", "must be a string"),
    ("blank", b'{"text": " "}\n', "text", "empty"),
    ("no_answer", b'{"prompt": "the", "completion": ""}\n', "completion", "'completion'"),
    ("no_messages", b'{"messages": []}\n', "chat", "train.jsonl:1: "),
    ("role", b'{"messages": [{"role": "bot", "content": "a"}]}\n', "chat", "bot"),
    ("only_user", b'{"messages": [{"role": "user", "content": "a"}]}\n', "chat", ":1: "),
    (
        "template_refuses",
        b'{"messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "a"},'
        b' {"role": "assistant", "content": "a"}]}\n',
        "chat",
        "no system role",
    ),
    ("output", b'{"instruction": "the", "output": null}\n', "instruction", "output"),
    ("too_long", b'{"prompt": "the", "completion": "' + b"cat " * 40 + b'"}\n', "completion", "16"),
    ("vocabulary", b'{"input_ids": [3, 97]}\n', "tokens", "0..96"),
    ("negative", b'{"input_ids": [3, -1]}\n', "tokens", "-1"),
    ("mask_length", b'{"input_ids": [3, 4], "loss_mask": [1]}\n', "tokens", "loss_mask"),
    ("mask_weight", b'{"input_ids": [3, 4], "loss_mask": [1, -2]}\n', "tokens", "loss_mask"),
    ("no_target", b'{"input_ids": [3, 4], "loss_mask": [0, 0]}\n', "tokens", "trained"),
    ("ids_type", b'{"input_ids": ["a"]}\n', "tokens", "input_ids"),
]


@pytest.mark.parametrize("case", LINES, ids=[case[0] for case in LINES])
def test_a_bad_data_line(here: Path, capfd, case: tuple[str, bytes, str, str]) -> None:
    _, content, format, text = case
    Path("train.jsonl").write_bytes(content)
    flag = f"--config.data.train[0].format={format}"
    check(capfd, (*NEW, flag), ["train.jsonl", "data.train[0]", text])


def test_a_damaged_gzip_file(here: Path, capfd) -> None:
    packed = gzip.compress(Path("train.jsonl").read_bytes())
    flag = "--config.data.train[0].source=jsonl:train.jsonl.gz"
    Path("train.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    check(capfd, (*NEW, flag), ["train.jsonl.gz", "damaged gzip"])
    Path("train.jsonl.gz").write_bytes(b"{}")
    check(capfd, (*NEW, flag), ["train.jsonl.gz", "not a gzip"])


def tensors(change: Callable[[dict[str, np.ndarray]], None]) -> Callable[[], None]:
    def write() -> None:
        held = load_file(WEIGHTS)
        change(held)
        save_file(held, WEIGHTS, metadata={"format": "pt"})

    return write


def model_config(**fields: object) -> Callable[[], None]:
    def write() -> None:
        path = Path("model/config.json")
        kept = json.loads(path.read_text()) | fields
        path.write_text(json.dumps({k: v for k, v in kept.items() if v is not ...}))

    return write


def cut(path: str | Path, keep: float = 0.6) -> Callable[[], None]:
    def write() -> None:
        data = Path(path).read_bytes()
        Path(path).write_bytes(data[: int(len(data) * keep)])

    return write


def text(path: str, content: str) -> Callable[[], None]:
    return lambda: Path(path).write_text(content) and None


def remove(*paths: str) -> Callable[[], None]:
    def act() -> None:
        for path in paths:
            shutil.rmtree(path) if Path(path).is_dir() else Path(path).unlink()

    return act


def only_bin() -> None:
    WEIGHTS.rename("model/pytorch_model.bin")


def missing_shard() -> None:
    shutil.rmtree("model")
    write_llama(Path("model"), shards=3)
    bad_world.write_tokenizer(Path("model"))
    Path("model/model-00002-of-00003.safetensors").unlink()


def many_words() -> None:
    bad_world.write_tokenizer(Path("model"), [f"w{i}" for i in range(200)])


NORM = "model.layers.1.input_layernorm.weight"
# What is done to the model's directory, and what the line names and says.
MODELS: list[tuple[str, Callable[[], None], list[str]]] = [
    ("truncated", cut(WEIGHTS), ["model.safetensors"]),
    ("header_cut", cut(WEIGHTS, 0.01), ["model.safetensors"]),
    ("no_safetensors", text(str(WEIGHTS), "hello"), ["model.safetensors"]),
    ("missing", tensors(lambda t: t.pop(NORM)), [NORM]),
    ("extra", tensors(lambda t: t.update({"model.extra": np.ones(3)})), ["model.extra"]),
    ("shape", tensors(lambda t: t.update({NORM: np.ones(5, "f")})), [NORM, "5"]),
    ("integers", tensors(lambda t: t.update({NORM: np.ones(32, "i4")})), [NORM]),
    ("only_bin", only_bin, ["model", ".bin"]),
    ("no_weights", remove(str(WEIGHTS)), ["model"]),
    ("missing_shard", missing_shard, ["model-00002-of-00003.safetensors"]),
    ("no_config", remove("model/config.json"), ["config.json"]),
    ("config_cut", cut("model/config.json"), ["config.json"]),
    ("config_array", text("model/config.json", "[1]"), ["config.json"]),
    ("model_type", model_config(model_type="mamba"), ["config.json", "mamba"]),
    ("no_model_type", model_config(model_type=...), ["config.json", "model_type"]),
    (
        "rope",
        model_config(rope_scaling={"rope_type": "spiral", "factor": 2.0}),
        ["config.json", "spiral"],
    ),
    ("activation", model_config(hidden_act="cubic"), ["config.json", "hidden_act"]),
    ("no_width", model_config(hidden_size=...), ["config.json", "hidden_size"]),
    ("width_text", model_config(hidden_size="wide"), ["config.json", "hidden_size"]),
    ("no_heads", model_config(num_attention_heads=0), ["config.json", "num_attention_heads"]),
    ("odd_heads", model_config(num_key_value_heads=3), ["config.json"]),
    ("no_tokenizer", remove("model/tokenizer.json", "model/tokenizer_config.json"), ["tokenizer"]),
    ("tokenizer_cut", cut("model/tokenizer.json"), ["tokenizer.json"]),
    ("tokenizer_other", text("model/tokenizer.json", '{"a": 1}'), ["model"]),
    ("many_words", many_words, ["203", "97"]),
    ("jinja", text("model/chat_template.jinja", "{% for %}"), ["template"]),
    ("no_template", remove("model/chat_template.jinja"), ["data.template"]),
]


@pytest.mark.parametrize("case", MODELS, ids=[case[0] for case in MODELS])
def test_a_bad_model(here: Path, capfd, case: tuple[str, Callable[[], None], list[str]]) -> None:
    _, damage, texts = case
    damage()
    check(capfd, NEW, texts)


def biggest(item: str, step: int = 2) -> Path:
    files = [path for path in Path(f"run/checkpoints/{step}/{item}").rglob("*") if path.is_file()]
    return max((path for path in files if path.parent.name == "d"), key=lambda p: p.stat().st_size)


def other_weights() -> None:
    WEIGHTS.write_bytes((write_llama(Path("other"), seed=5) / "model.safetensors").read_bytes())
    shutil.rmtree("other")


def more_words() -> None:
    bad_world.write_tokenizer(Path("model"), [*bad_world.WORDS, "new"])


def finished_without_end() -> None:
    Path("run/summary.json").write_text('{"stop_reason": "fini')


def none_whole() -> None:
    """The run's checkpoints are 1 and 2; one damaged alone is passed over (test_damage.py)."""
    for step in (1, 2):
        cut(biggest("model", step))()


# What is done to the stopped run (its newest checkpoint is 2), flags, and what the line says.
RUNS: list[tuple[str, Callable[[], object], tuple[str, ...], list[str]]] = [
    ("none_whole", none_whole, (), ["checkpoints/2", "damaged", "no checkpoint of the run"]),
    ("no_config", remove("run/config.json"), (), ["run", "config.json"]),
    ("config_cut", cut("run/config.json"), (), ["run/config.json"]),
    ("config_other", text("run/config.json", '{"model_type": "llama"}'), (), ["another thing"]),
    ("config_array", text("run/config.json", "[]"), (), ["run/config.json"]),
    ("metrics", text("run/metrics.jsonl", '{"step": 1}\n{"st\n{"step": 2}\n'), (), ["jsonl:2"]),
    ("metrics_other", text("run/metrics.jsonl", "[3]\n"), (), ["run/metrics.jsonl:1"]),
    ("summary", finished_without_end, (), ["run/summary.json"]),
    ("lr", lambda: None, ("--config.optim.lr=0.5",), ["optim.lr", "0.01", "--allow_change"]),
    ("seed", lambda: None, ("--config.seed=5",), ["seed", "--allow_change"]),
    ("rank", lambda: None, ("--config.peft.rank=8", "--allow_change"), ["checkpoints/2/model"]),
    ("method", lambda: None, ("--config.peft={'method': 'ia3'}", "--allow_change"), ["array"]),
    ("length", lambda: None, ("--config.total_steps=1", "--allow_change"), ["step 2"]),
    ("base", other_weights, (), ["model", "base changed"]),
    ("data", text("train.jsonl", json.dumps(bad_world.chat()) + "\n"), (), ["data.train"]),
    ("eval", text("held.jsonl", json.dumps(bad_world.chat()) + "\n"), (), ["data.eval"]),
    ("tokenizer", more_words, (), ["model.tokenizer", "--allow_change"]),
]


@pytest.mark.parametrize("case", RUNS, ids=[case[0] for case in RUNS])
def test_a_bad_run(here: Path, capfd, case: tuple) -> None:
    _, damage, flags, texts = case
    damage()
    Path("run/checkpoints/3.orbax-checkpoint-tmp").mkdir()  # what a kill leaves
    check(capfd, (*RUN, *flags), texts)


BAD_WORKDIRS = {
    "train.jsonl": "train.jsonl",
    "train.jsonl/below": "train.jsonl",
    "/proc/new": "/proc",
    "/sys/new": "/sys",
}


@pytest.mark.parametrize("workdir", BAD_WORKDIRS)
def test_a_bad_workdir(here: Path, capfd, workdir: str) -> None:
    check(capfd, (*NEW[:2], f"--workdir={workdir}"), ["--workdir", BAD_WORKDIRS[workdir]])


def test_a_workdir_in_which_another_process_trains(here: Path, capfd) -> None:
    with Path("run/.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        check(capfd, RUN, ["--workdir", "another process"])


def adapter_cut() -> None:
    cut("adapter/adapter_model.safetensors")()


def adapter_config(**fields: object) -> Callable[[], None]:
    def write() -> None:
        path = Path("adapter/adapter_config.json")
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return write


def adapter_of_another_base() -> None:
    write_adapter(Path("adapter"), "lora", write_llama(Path("other"), num_hidden_layers=1))
    shutil.rmtree("other")


def foreign_file() -> None:
    Path("out").mkdir()
    Path("out/thesis.tex").write_text("mine")


ADAPTED = ("eval", "--model=model", "--adapter=adapter", "--data=jsonl:held.jsonl", "--format=chat")
PREPARE = ("data", "prepare", "--format=chat", "--name=mine", "--out=sets")
GENERATE = ("generate", "--model=model")
SWEEP = ("sweep", "--config=config.json")
TEACHER = ("data", "teacher", "--model=model", "--source=jsonl:train.jsonl", "--format=chat")
nothing = lambda: None  # noqa: E731
# What is done, the command, and what the line names and says.
VERBS: list[tuple[str, Callable[[], None], tuple[str, ...], list[str]]] = [
    ("verb", nothing, ("tune",), ["'tune'"]),
    ("plan", nothing, ("plan", "--config=config.json", "--devices=8xH10"), ["--devices", "H100"]),
    ("plan_place", nothing, ("plan", "--config=config.json", "--topology=v5e"), ["v5e:4x4"]),
    ("budget", nothing, ("train", "--config=config.json", "--workdir=w", "--budget=9"), ["20USD"]),
    ("eval_model", nothing, ("eval", "--model=no", *ADAPTED[3:]), ["no"]),
    ("eval_data", nothing, (*ADAPTED[:3], "--data=jsonl:no", "--format=chat"), ["--data", "no"]),
    ("eval_labels", nothing, (*ADAPTED, "--labels="), ["--labels", "names"]),
    ("eval_tasks", nothing, ("eval", "--model=model", "--tasks=arc"), ["--tasks"]),
    ("eval_run", remove("run/checkpoints"), ("eval", "--workdir=run"), ["run"]),
    (
        "eval_damaged",
        lambda: cut(biggest("model"))(),
        ("eval", "--workdir=run"),
        ["checkpoints/2", "damaged"],
    ),
    ("adapter", nothing, (*ADAPTED[:2], "--adapter=no", *ADAPTED[3:]), ["no"]),
    ("adapter_cut", adapter_cut, ADAPTED, ["adapter_model.safetensors"]),
    ("adapter_weights", remove("adapter/adapter_model.safetensors"), ADAPTED, ["adapter"]),
    ("adapter_type", adapter_config(peft_type="OFT"), ADAPTED, ["adapter_config.json", "OFT"]),
    ("adapter_rank", adapter_config(r=7), ADAPTED, ["adapter"]),
    ("adapter_base", adapter_of_another_base, ADAPTED, ["adapter", "names 'other' as its base"]),
    ("adapter_extra", adapter_config(rank_pattern={"q": 0.5}), ADAPTED, ["rank_pattern"]),
    ("generate_prompt", nothing, (*GENERATE, "--prompts=no.jsonl"), ["no.jsonl"]),
    ("generate_empty", nothing, (*GENERATE, ""), ["prompt"]),
    (
        "generate_long",
        nothing,
        (*GENERATE, "cat", "--max_new_tokens=500"),
        ["--max_new_tokens", "128"],
    ),
    (
        "generate_no_tokenizer",
        remove("model/tokenizer.json", "model/tokenizer_config.json"),
        (*GENERATE, "cat"),
        ["tokenizer"],
    ),
    (
        "export_foreign",
        foreign_file,
        ("export", "--workdir=run", "--format=hf", "--out=out"),
        ["tex"],
    ),
    ("export_base", nothing, ("export", "--model=model", "--format=peft", "--out=x"), ["--format"]),
    ("export_empty", nothing, ("export", "--model=sets", "--format=hf", "--out=x"), ["--model"]),
    ("prepare_line", text("bad", "{}"), (*PREPARE, "--source=jsonl:bad"), ["bad:1", "messages"]),
    ("prepare_name", nothing, (*PREPARE, "--source=jsonl:train.jsonl", "--name=A b"), ["A b"]),
    (
        "prepare_splits",
        nothing,
        (*PREPARE, "--source=jsonl:train.jsonl", "--splits=a=0.5,b=x"),
        ["--splits"],
    ),
    (
        "inspect",
        nothing,
        ("data", "inspect", "--source=jsonl:no", "--format=chat", "--model=model"),
        ["no"],
    ),
    ("inspect_config", nothing, ("data", "inspect", "--config=no.py"), ["no.py"]),
    ("sweep", nothing, ("sweep", "--config=config.json", "--workdir=s"), ["nothing to sweep"]),
    ("sweep_key", nothing, (*SWEEP, "--sweep.optim.lrr=1,2", "--workdir=s"), ["--sweep.optim.lrr"]),
    ("sweep_value", nothing, (*SWEEP, "--sweep.optim.lr=", "--workdir=s"), ["--sweep.optim.lr"]),
    ("sweep_run", nothing, (*SWEEP, "--sweep.seed=1,2", "--workdir=run"), ["run: --workdir"]),
    ("teacher_out", nothing, (*TEACHER, "--out=train.jsonl"), ["train.jsonl: --out"]),
    ("distributed", nothing, (*NEW, "--distributed=here"), ["--distributed", "HOST:PORT"]),
    ("store", nothing, (*NEW[:2], "--workdir=ftp://a/b"), ["--workdir", "gs://"]),
    (
        "dry_run",
        nothing,
        ("train", "--config=config.json", "--dry_run", "--config.peft.rank=0"),
        ["peft.rank"],
    ),
]


@pytest.mark.parametrize("case", VERBS, ids=[case[0] for case in VERBS])
def test_a_bad_command(here: Path, capfd, case: tuple) -> None:
    _, damage, arguments, texts = case
    damage()
    check(capfd, arguments, texts)


def test_there_are_at_least_sixty_cases() -> None:
    assert len(CONFIGS) + len(LINES) + len(MODELS) + len(RUNS) + len(VERBS) >= 60


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["weights", "tokenizer", "checkpoints"])
def test_a_process_says_one_line_too(here: Path, damage: str) -> None:
    """Libraries that log to stderr behind Python's back would be seen only here."""
    {
        "weights": cut(WEIGHTS),
        "tokenizer": cut("model/tokenizer.json"),
        "checkpoints": none_whole,
    }[damage]()
    before = tree_hash(here)
    done = subprocess.run(
        [sys.executable, "-m", "jaxtune.cli", *(RUN if damage == "checkpoints" else NEW)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout == "" and done.stderr.count("\n") == 1, done.stderr
    assert tree_hash(here) == before
