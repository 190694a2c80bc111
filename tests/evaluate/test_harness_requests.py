"""What `--tasks` refuses, before a model is loaded."""

import builtins
import functools
import json

import pytest

from jaxtune.core.errors import RequestError
from jaxtune.recipes.evaluation import harness


def test_without_lm_eval_the_extra_is_named(monkeypatch):
    load = builtins.__import__

    def without(name, *rest, **more):
        if name.partition(".")[0] == "lm_eval":
            raise ImportError("No module named 'lm_eval'")
        return load(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(RequestError, match=r"--tasks: needs .*pip install 'jaxtune\[eval\]'"):
        harness.find_tasks(["arc_easy"])


def test_a_directory_that_is_not_there(tmp_path):
    with pytest.raises(RequestError, match=f"--include_path: no such directory: '{tmp_path}/no'"):
        harness.find_tasks(["a"], tmp_path / "no")


def test_no_name():
    with pytest.raises(RequestError, match="--tasks: names no task"):
        harness.find_tasks([])


@pytest.mark.slow
class TestTasks:
    """With lm_eval."""

    @pytest.fixture(autouse=True)
    def directory(self, tmp_path, monkeypatch):
        pytest.importorskip("lm_eval")
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
        rows = "".join(json.dumps({"q": f"{n}", "c": ["a", "b"], "g": 0}) + "\n" for n in range(3))
        (tmp_path / "rows.jsonl").write_text(rows)
        for name, data in (("mine", "rows.jsonl"), ("mine_too", "rows.jsonl"), ("broken", "no")):
            task = {
                "task": name,
                "dataset_path": "json",
                "dataset_kwargs": {"data_files": {"test": str(tmp_path / data)}},
                "test_split": "test",
                "output_type": "multiple_choice",
                "doc_to_text": "{{q}}",
                "doc_to_choice": "c",
                "doc_to_target": "g",
                "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
            }
            (tmp_path / f"{name}.yaml").write_text(json.dumps(task))
        group = {"group": "both", "task": ["mine", "mine_too"]}
        (tmp_path / "both.yaml").write_text(json.dumps(group))
        return tmp_path

    @pytest.mark.parametrize(
        ("asked", "names"),
        [
            (["mine"], ["mine"]),
            (["mine*"], ["mine", "mine_too"]),
            (["mine", "mine"], ["mine"]),
            (["both"], ["both"]),
        ],
    )
    def test_names_patterns_and_groups(self, directory, asked, names):
        found = harness.find_tasks(asked, directory).loaded
        assert [getattr(task, "task_name", None) or task.name for task in found] == names

    def test_a_name_that_is_unknown_is_told_with_the_nearest(self, directory, monkeypatch):
        from lm_eval.tasks import TaskManager

        # Looking through all of lm_eval's own tasks takes ten seconds.
        own = functools.partial(TaskManager, include_defaults=False)
        monkeypatch.setattr(
            "lm_eval.tasks.TaskManager", lambda include_path, **_: own(include_path=include_path)
        )
        with pytest.raises(RequestError, match=r"'mine_to' .*did you mean 'mine_too'"):
            harness.find_tasks(["mine", "mine_to"], directory)

    def test_data_that_cannot_be_read_is_told_with_the_task(self, directory):
        with pytest.raises(RequestError, match="--tasks: cannot load 'broken': "):
            harness.find_tasks(["broken"], directory)
