"""Distillation from a teacher in the step and from disk: value, C1, C11, and what is refused."""

from __future__ import annotations

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxtune
from jaxtune.cli.main import main
from jaxtune.core.errors import RequestError
from jaxtune.core.tree import flatten
from jaxtune.recipes.build import build
from jaxtune.recipes.schema.resolve import resolve
from jaxtune.recipes.write_teacher import write_teacher
from tests.correctness import interrupts
from tests.correctness.hosts import Hosts
from tests.correctness.interrupts import Workbench
from tests.correctness.pair_runs import pair_config
from tests.correctness.runs import OVERRIDES
from tests.correctness.tiny_runs import assert_same_run, rows

pytestmark = pytest.mark.slow

VOCAB = OVERRIDES["vocab_size"]
TEMPERATURE = 2.0
PEFT = {"method": "lora", "rank": 3}  # no dropout, which micro-batches would draw otherwise


def config_of(directory, objective, peft="lora", **sections):
    """A run on the chosen sides as completions."""
    config = pair_config(directory, peft, objective=objective, **sections)
    for name in ("train", "held"):
        path = directory / f"{name}_sft.jsonl"
        if not path.exists():
            rows = map(json.loads, (directory / f"{name}.jsonl").read_text().splitlines())
            made = [{"prompt": r["prompt"], "completion": r["chosen"]} for r in rows]
            path.write_text("".join(json.dumps(row) + "\n" for row in made))
    config["data"] |= {
        "train": [{"source": f"jsonl:{directory}/train_sft.jsonl", "format": "completion"}],
        "eval": [{"source": f"jsonl:{directory}/held_sft.jsonl", "format": "completion"}],
        "packing": True,
    }
    return config


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tmp_path_factory.mktemp("distill")


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    found = Hosts(tmp_path_factory.mktemp("logs"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def teacher(data):
    """The workdir of a smaller model with other weights, which serves as a teacher."""
    config = config_of(data, {"name": "sft"}, "full", seed=7, total_steps=1)
    config["model"] = config["model"] | {"overrides": OVERRIDES | {"num_layers": 1}}
    jaxtune.train(config, data / "teacher")
    return data / "teacher"


def objective_of(teacher, divergence="forward", **more):
    return {
        "name": "distill",
        "teacher": str(teacher),
        "divergence": divergence,
        "teacher_temperature": TEMPERATURE,
    } | more


@pytest.fixture(scope="module")
def finished(data, teacher):
    """divergence → (config, history) of a run of four steps, each run once."""

    @functools.cache
    def run(divergence: str):
        more = {"mixture": 0.3} if divergence == "jsd" else {}
        objective = objective_of(teacher, divergence, nll_weight=0.5, **more)
        config = config_of(data, objective, PEFT, total_steps=4, checkpoint={"every_steps": 2})
        return config, jaxtune.train(config, data / divergence).history

    return run


def by_hand(config, teacher, divergence: str) -> float:
    """The loss of the first batch from whole distributions."""
    plan = build(resolve(config))
    batch = plan.data.stream.batch(0, 4)
    student = {
        path: leaf
        for path, leaf in flatten(plan.base.load(lambda _: "float32", plan.mesh)).items()
        if not path.startswith("teacher/")
    }
    other = jaxtune.load(teacher, dtype="float32")
    logs, logt = (
        np.asarray(jax.nn.log_softmax(logits_of(c, p, batch) / TEMPERATURE), np.float64)
        for c, p in ((plan.base.config, student), (other.config, flatten(other.params)))
    )
    plain = np.asarray(jax.nn.log_softmax(logits_of(plan.base.config, student, batch)))
    s, t, m = np.exp(logs), np.exp(logt), 0.3 * np.exp(logt) + 0.7 * np.exp(logs)
    found = {
        "forward": (t * (logt - logs)).sum(-1),
        "reverse": (s * (logs - logt)).sum(-1),
        "jsd": 0.3 * (t * (logt - np.log(m))).sum(-1) + 0.7 * (s * (logs - np.log(m))).sum(-1),
    }[divergence]
    total = nll = count = 0.0
    for row, place in np.argwhere(batch["loss_mask"] > 0):
        total += TEMPERATURE**2 * found[row, place - 1]
        nll -= plain[row, place - 1, batch["input_ids"][row, place]]
        count += 1
    return total / count + 0.5 * nll / count


def logits_of(config, params, batch):
    from jaxtune.core.tree import unflatten
    from jaxtune.models.decoder import hidden_states, logits
    from jaxtune.recipes.base import BASE

    params = unflatten({p: jnp.asarray(leaf, jnp.float32) for p, leaf in params.items()})
    inputs = {n: batch[n] for n in ("input_ids", "segment_ids", "positions")}
    return logits(config, BASE, params, hidden_states(config, BASE, params, inputs).states)


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
def test_the_first_loss_by_hand(divergence, finished, teacher):
    config, history = finished(divergence)
    assert history[0]["loss"] == pytest.approx(by_hand(config, teacher, divergence), rel=1e-4)
    assert np.isfinite(history[-1]["eval/loss"]) and "eval/perplexity" not in history[-1]
    assert history[3]["loss/distill"] < history[0]["loss/distill"]


def test_c1_micro_batches_do_not_matter(data, finished):
    config, history = finished("forward")
    again = jaxtune.train(config | {"grad_accum": 2}, data / "micro").history
    for one, two in zip(history, again, strict=True):
        for name in ("loss", "loss/distill", "eval/loss"):
            if name in one:
                np.testing.assert_allclose(one[name], two[name], rtol=1e-4, err_msg=name)


def on_two_processes(hosts, config, workdir, mesh) -> None:
    """Trains a config on a mesh of two processes of one device each."""
    path = workdir.with_suffix(".json")
    path.write_text(json.dumps(config | {"mesh": mesh}))
    command = ["train", f"--config={path}", f"--workdir={workdir}"]
    assert hosts.run(command, 2) == [0, 0], hosts.all_said()


def assert_same_history(one, other) -> None:
    """Two lists of a run's rows, by what does not depend on how the run is divided."""
    assert [row["step"] for row in other] == [row["step"] for row in one]
    for ours, its in zip(one, other, strict=True):
        for name in ("loss", "loss/distill", "grad_norm", "eval/loss"):
            assert (name in ours) == (name in its)
            if name in ours:
                np.testing.assert_allclose(its[name], ours[name], rtol=1e-4, err_msg=name)


def test_c2_devices_and_processes_do_not_matter(data, finished, hosts):
    """The teacher is spread over two processes as the student is."""
    config, history = finished("forward")
    on_two_processes(hosts, config, data / "spread", {"data": 1, "fsdp": 2})
    assert_same_history(history, rows(data / "spread"))


def test_c26_a_run_that_is_stopped_is_the_undisturbed_one(data, finished):
    config, _ = finished("forward")
    bench = Workbench()
    with interrupts.after_the_row(3):
        bench.train(config, data / "stopped")
    bench.train(config, data / "stopped")
    assert len(bench.batches) == 2  # from the checkpoint of step 2
    assert_same_run(data / "forward", data / "stopped")


def test_a_checkpoint_holds_nothing_of_the_teacher_and_loads_without_it(data, finished):
    finished("forward")
    lm = jaxtune.load(data / "forward", dtype="float32")
    assert not any(path.startswith("teacher") for path in flatten(lm.params))


@pytest.fixture(scope="module")
def stored(data, teacher, finished):
    """The config of `finished("forward")` with what its teacher says read from disk.

    All tokens but one leave one token as the rest, so that nothing is lost.
    """
    config, _ = finished("forward")
    for name in ("train", "held"):
        report = write_teacher(
            model=str(teacher),
            source=f"jsonl:{data}/{name}_sft.jsonl",
            format="completion",
            out=str(data / "said"),
            top_k=VOCAB - 1,
            temperature=TEMPERATURE,
            seq_len=config["data"]["seq_len"],
            dtype="float32",
        )
        assert 0.9 < report["mass"] < 1.0
    objective = dict(config["objective"], teacher=None, teacher_data=str(data / "said"))
    return config | {"objective": objective}


def test_top_k_from_disk_is_the_teacher_in_the_step(data, finished, stored, hosts):
    """Each of two processes reads the rows of its own half of a batch."""
    on_two_processes(hosts, stored, data / "disk", {"data": 2, "fsdp": 1})
    assert_same_history(finished("forward")[1], rows(data / "disk"))


def test_what_is_on_disk_and_does_not_fit_is_refused(data, stored, tmp_path):
    run, objective = stored, stored["objective"]
    other = run | {"objective": objective | {"teacher_temperature": 1.0}}
    with pytest.raises(RequestError, match=r"teacher_temperature: was written with temperature 2"):
        build(resolve(other))
    (place,) = [p for p in (data / "said").iterdir() if p.name == fingerprint(run)]
    whole = (place / "ids.npy").read_bytes()
    (place / "ids.npy").write_bytes(whole[:-4] + b"\x01\x00\x00\x00")
    with pytest.raises(RequestError, match="is damaged"):
        build(resolve(run))
    (place / "ids.npy").write_bytes(whole)
    moved = tmp_path / "elsewhere"
    place.rename(moved)
    with pytest.raises(RequestError, match=r"teacher_data: holds nothing of data.train\[0\]"):
        build(resolve(run))
    moved.rename(place)


def fingerprint(config) -> str:
    sft = {**config, "objective": {"name": "sft"}}
    (store,) = build(resolve(sft)).data.stream.stores
    return store.fingerprint()


def test_the_verb_writes_what_a_run_reads(data, teacher, tmp_path, capsys):
    arguments = [f"--model={teacher}", f"--source=jsonl:{data}/train_sft.jsonl", "--json"]
    arguments += ["--format=completion", "--seq_len=40", "--top_k=5", f"--out={tmp_path}/said"]
    assert main(["data", "teacher", *arguments]) == 0
    report = json.loads(capsys.readouterr().out)
    ids = np.load(f"{report['directory']}/ids.npy")
    assert ids.shape == (report["targets"], 5) and ids.dtype == np.int32
    assert main(["data", "teacher", *arguments[:-2], "--top_k=98", f"--out={tmp_path}"]) == 2


def test_a_teacher_of_another_vocabulary_is_refused(data, teacher):
    config = config_of(data, objective_of(teacher))
    config["model"] = config["model"] | {"overrides": OVERRIDES | {"vocab_size": 128}}
    with pytest.raises(RequestError, match=r"objective.teacher: .*has 97 tokens"):
        build(resolve(config))


def test_virtual_tokens_are_the_students_alone(data, teacher):
    """The teacher of a prompt-tuned model reads the text without the prompt's slots."""
    objective = objective_of(teacher, teacher_quantize="int8")
    history = jaxtune.train(config_of(data, objective, "prompt", total_steps=1), data / "p").history
    assert np.isfinite(history[0]["loss"])
