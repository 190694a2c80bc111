"""A laptop and a cloud for each test."""

import pytest

from tests.tpu_scripts.world import build, demolish


@pytest.fixture
def world(tmp_path):
    world = build(tmp_path)
    yield world
    demolish(world)
