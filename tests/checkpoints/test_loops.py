"""What is still being read when one array of a damaged checkpoint fails is read to its end."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxtune.checkpoints import loops
from jaxtune.checkpoints.runs import DamagedCheckpoint, RunCheckpoints


def test_nothing_is_printed_when_many_arrays_fail_at_once(
    tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = RunCheckpoints(tmp_path / "checkpoints", async_save=False)
    keys = jax.random.split(jax.random.key(0), 10)
    arrays = {f"a{i}": jax.random.normal(key, (8, 8)) for i, key in enumerate(keys)}
    checkpoints.save(1, arrays, {"b": jnp.zeros(3)}, {}, {})
    checkpoints.wait()
    for path in (tmp_path / "checkpoints/1/model/d").iterdir():
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    shapes = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
        for name, leaf in arrays.items()
    }
    told = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)  # pytest has one that does not print
    monkeypatch.setattr(sys, "excepthook", lambda *error: told.append(error))
    capfd.readouterr()
    for _ in range(10):  # without `finishing`, each prints three tracebacks
        with pytest.raises(DamagedCheckpoint, match="OUT_OF_RANGE"):
            checkpoints.restore(1, "model", shapes)
    checkpoints.close()
    assert capfd.readouterr().err == "" and told == []


def test_a_loop_waits_for_what_it_began() -> None:
    done = []

    async def slow(name: str) -> None:
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        done.append(name)
        raise OSError(name)

    async def gather() -> None:
        left = asyncio.ensure_future(slow("left"))
        assert not left.done()
        raise ValueError("first")

    before = asyncio.get_event_loop_policy()
    with loops.finishing():
        loop = asyncio.new_event_loop()
        with pytest.raises(ValueError, match="first"):
            loop.run_until_complete(gather())
        assert done == []
        loop.close()
    assert done == ["left"] and loop.is_closed()
    assert asyncio.get_event_loop_policy() is before
