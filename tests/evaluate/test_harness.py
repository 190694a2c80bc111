"""lm-evaluation-harness: the same figures as its own `hf` model, from the verb and the command."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import harness, harness_tasks

pytest.importorskip("lm_eval")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
LIMIT = 6


@pytest.fixture(scope="module")
def model(shared) -> Path:
    return shared / "models" / "stories260k"


@pytest.fixture(scope="module")
def tasks(shared, tmp_path_factory) -> Path:
    """The directory of the local tasks, with the first records of each."""
    directory = tmp_path_factory.mktemp("tasks")
    with pytest.MonkeyPatch.context() as patch:
        records = harness_tasks.records
        patch.setattr(harness_tasks, "records", lambda path: records(path)[:LIMIT])
        harness_tasks.write(shared / "data" / "eval", directory)
    return directory


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path_factory):
    cache = tmp_path_factory.getbasetemp() / "datasets"
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(cache))
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


@pytest.fixture(scope="module")
def ours(model):
    return harness.our_model(model)


@pytest.fixture(scope="module")
def theirs(model):
    pytest.importorskip("torch")
    return harness.hf_model(model, 4)


@pytest.fixture
def manager(tasks):
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(tasks), include_defaults=False)


def test_figures_and_answers_are_those_of_lm_evals_own_model(manager, ours, theirs):
    """One call each for all tasks: their requests share programs."""
    found = harness.run(ours, manager, harness_tasks.TASKS, LIMIT)
    expected = harness.run(theirs, manager, harness_tasks.TASKS, LIMIT)
    harness.check(found.metrics, expected.metrics)
    assert len(found.answers) == LIMIT * (4 + 2 + 2 + 2 + 4 + 1 + 1 + 1)
    assert harness.distance(found, expected) <= 1e-3


def test_the_tokens_are_those_of_lm_evals_own_model(ours, theirs):
    """BOS once; a space at the end of a context belongs to the continuation; contexts cut left."""
    from lm_eval.api.instance import Instance

    pairs = [
        ("Once upon", " a time"),
        ("Once upon ", "a time"),
        ("Once upon", "a time"),
        ("", "Once upon a time"),
        ("<s>Once upon", " a time"),
        ("Once upon a time " * 90, " there was"),
        ("  ", "x"),
    ]
    asked = [
        Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=0) for pair in pairs
    ]
    # One by one: lm_eval 0.4.13's own model scores the wrong places of a request whose tokens are
    # those of another one with a longer continuation.
    expected = [theirs.loglikelihood([one])[0] for one in asked]
    for (value, greedy), (same, too) in zip(ours.loglikelihood(asked), expected, strict=True):
        assert value == pytest.approx(same, abs=1e-3) and greedy == too
    for text in ("Once", "<s>Once", ""):
        assert ours.tok_encode(text) == theirs.tok_encode(text)
        assert ours.tok_encode(text, add_special_tokens=False) == theirs.tok_encode(
            text, add_special_tokens=False
        )


def test_a_long_text_is_read_in_windows(ours, theirs):
    from lm_eval.api.instance import Instance

    rng = np.random.default_rng(0)
    text = " ".join(rng.choice(["the", "dog", "ran", "to", "a", "big", "red", "house"], 700))
    asked = [Instance("loglikelihood_rolling", {}, (text,), 0)]
    assert len(ours.tok_encode(text)) > 512
    assert ours.loglikelihood_rolling(asked) == pytest.approx(
        theirs.loglikelihood_rolling(asked), abs=2e-3
    )


def test_a_continuation_longer_than_the_model_reads_is_scored_in_pieces(ours):
    """The oracle: all of it, each piece behind what fits of the text before."""
    tokens = ours.tok_encode("The dog ran to a big red house. " * 60)
    assert len(tokens) > 520
    ((value, greedy),) = ours._loglikelihood_tokens([(None, tokens[:3], tokens[3:])])
    pieces = [
        ours._loglikelihood_tokens([(None, tokens[:n], tokens[n : n + 256])])[0][0]
        for n in range(3, len(tokens), 256)
    ]
    assert value == pytest.approx(sum(pieces), abs=1e-3) and not greedy


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, (256, (), 0.0, 1.0, 0)),
        ({"until": "\n", "max_gen_toks": 5}, (5, ("\n",), 0.0, 1.0, 0)),
        ({"until": ["a", ""], "do_sample": False, "temperature": 0.7}, (256, ("a",), 0.0, 1.0, 0)),
        ({"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 3}, (256, (), 0.7, 0.9, 3)),
        ({"temperature": 0.2, "num_beams": 1, "max_new_tokens": 9}, (9, (), 0.2, 1.0, 0)),
    ],
)
def test_settings_of_a_task_that_writes(settings, expected):
    from jaxtune.recipes.evaluation.harness_model import Writing, writing

    assert writing(settings) == Writing(*expected)


def test_a_setting_that_is_not_known_is_refused():
    from jaxtune.core.errors import RequestError
    from jaxtune.recipes.evaluation.harness_model import writing

    with pytest.raises(RequestError, match=r"num_beams.*4"):
        writing({"num_beams": 4})


def test_draws_differ_from_batch_to_batch(ours, monkeypatch):
    """A task that asks for many samples of one prompt gets many."""
    from jaxtune.recipes.evaluation.harness_model import Writing

    monkeypatch.setattr(ours, "rows", 4)
    written = ours._write(Writing(8, (), 9.0, 1.0, 0), [ours.tok_encode("Once")] * 12)
    assert len(set(written)) == 12


def command(*arguments: object, module: str = "jaxtune.cli") -> subprocess.CompletedProcess:
    words = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, cwd=harness.ROOT)


def test_the_verb_prints_one_json_object(model, tasks):
    names = "local_copa,local_lambada"
    done = command(
        *("eval", f"--model={model}", "--dtype=float32", f"--tasks={names}"),
        *(f"--include_path={tasks}", "--limit=4", "--json"),
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result.keys() == {"tasks"} and list(result["tasks"]) == names.split(",")
    copa = result["tasks"]["local_copa"]
    assert copa.keys() == {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr"}
    assert copa["acc"] in (0.0, 0.25, 0.5, 0.75, 1.0)
    assert result["tasks"]["local_lambada"]["perplexity"] > 1


def test_the_command_lm_eval_knows_the_model(model, tasks, tmp_path):
    done = command(
        *("--model", "jaxtune", "--model_args", f"pretrained={model},dtype=float32"),
        *("--tasks", "local_copa", "--include_path", tasks, "--limit", 4),
        *("--output_path", tmp_path),
        module="jaxtune.cli.lm_eval",
    )
    assert done.returncode == 0, done.stderr
    assert "jaxtune (" in done.stdout and "local_copa" in done.stdout
    (path,) = tmp_path.rglob("results_*.json")
    assert json.loads(path.read_text())["results"]["local_copa"]["acc,none"] <= 1.0


def test_the_command_says_one_line_about_a_wrong_request(monkeypatch, capsys):
    from jaxtune.cli import lm_eval
    from jaxtune.core.errors import RequestError

    def refuse() -> None:
        raise RequestError("no such directory", where="nowhere")

    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", refuse)
    assert lm_eval.main() == 2
    assert capsys.readouterr().err == "jaxtune: error: nowhere: no such directory\n"
