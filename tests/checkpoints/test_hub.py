"""`hub:` ids: what is asked of the Hub, and what is said when it does not answer."""

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects

from jaxtune.checkpoints.hub import local_directory
from jaxtune.core.errors import RequestError

# Of a Llama 3, a Mistral and a gpt-oss together.
REPOSITORY = [
    "config.json",
    "model-00001-of-00002.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "chat_template.jinja",
    "consolidated.safetensors",
    "original/consolidated.00.pth",
    "original/model.safetensors",
    "original/params.json",
    "metal/model.bin",
    "modeling_x.py",
]


def test_a_directory_is_itself(tmp_path):
    assert local_directory(tmp_path) == tmp_path
    assert str(local_directory("some/hub:name")) == "some/hub:name"


def test_an_id_is_fetched_without_anything_that_could_be_executed(monkeypatch, tmp_path):
    asked = {}

    def fetch(name, *, revision, allow_patterns, ignore_patterns):
        asked.update(name=name, revision=revision, patterns=allow_patterns)
        patterns = {"allow_patterns": allow_patterns, "ignore_patterns": ignore_patterns}
        asked["files"] = list(filter_repo_objects(REPOSITORY, **patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert local_directory("hub:org/some-model.v2@refs/pr/1") == tmp_path
    assert (asked["name"], asked["revision"]) == ("org/some-model.v2", "refs/pr/1")
    assert "*.safetensors" in asked["patterns"]
    assert not any(p.endswith((".py", ".bin", ".pt", "*")) for p in asked["patterns"])
    assert asked["files"] == REPOSITORY[:5]  # the weights once, and no code


@pytest.mark.parametrize("name", ["hub:", "hub:name", "hub:a/b/c", "hub:org/na me", "hub:org/x@"])
def test_an_id_that_is_not_well_formed_is_refused(name):
    with pytest.raises(RequestError, match="hub:ORG/NAME"):
        local_directory(name, "model.path")


def test_without_a_network_one_line_says_so(monkeypatch, tmp_path):
    """The suite runs with HF_HUB_OFFLINE=1, as a machine without a network does."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(RequestError) as error:
        local_directory("hub:nobody/nothing", "model.path")
    assert error.value.key == "model.path"
    assert "is there a network?" in str(error.value) and "\n" not in str(error.value)
