"""Rows to plant faults in, and the doctor run on a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jaxtune.data.doctor.run import Outputs, examine
from jaxtune.data.doctor.settings import Input, Settings
from tests.data.doctor import world

SHARED = Path(__file__).resolve().parents[4] / "shared/data"


@pytest.fixture(scope="session")
def clean_rows() -> list[dict[str, str]]:
    """1,600 rows without a fault, of real stories where they are at hand."""
    path = SHARED / "texts/tinystories_1000.json.gz"
    return world.story_rows(path, 1600) if path.is_file() else world.made_rows(1600, seed=1)


@pytest.fixture
def doctor(tmp_path):
    """Examines files, {name: path}, in this process."""

    def run(files: Any, format: str = "completion", outputs: Outputs | None = None, **more: Any):
        files = files if isinstance(files, dict) else {"train": files}
        inputs = tuple(Input(n, f"jsonl:{p}", format, n) for n, p in files.items())
        return examine(Settings(inputs, **more), outputs)

    return run


def lines_of(report: dict[str, Any], kind: str, name: str = "train") -> set[int]:
    """Returns the lines that a report has for a kind."""
    entry = next((e for e in report["findings"] if e["kind"] == kind), None)
    return set(entry["lines"].get(name, ())) if entry else set()
