"""Settings that hold for the whole suite."""

from __future__ import annotations

import os
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def xla_flags(devices: int) -> str:
    """Returns XLA_FLAGS for so many devices on this processor.

    Most of the suite's time is the compiler's work on programs that run for milliseconds: it does
    the least.
    """
    flags = [
        "--xla_backend_optimization_level=0",
        "--xla_cpu_parallel_codegen_split_count=1",
        f"--xla_force_host_platform_device_count={devices}",
    ]
    if metadata.version("jaxlib").startswith("0.10."):  # the newest have no other emitters
        flags.append("--xla_cpu_use_fusion_emitters=false")
    return " ".join(flags)


os.environ.setdefault("XLA_FLAGS", xla_flags(devices=8))

import gc  # noqa: E402

import pytest  # noqa: E402

SHARED = ROOT.parent / "shared"
# Linux gives a process 65,530 memory maps (vm.max_map_count), and a compiled program takes several:
# the compiler crashes where there are no more.
MAPS, MOST_MAPS = Path("/proc/self/maps"), 30_000


@pytest.fixture(scope="module", autouse=True)
def room_for_programs():
    """Lets go of compiled programs between files before a worker has too many."""
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > MOST_MAPS:
        import jax

        jax.clear_caches()
        gc.collect()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow files go first: a worker that begins one last would end long after the others."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The real data and models beside the project; the test is skipped where they are absent."""
    if not (SHARED / "models").is_dir():
        pytest.skip(f"needs real data and models, and {SHARED} is absent")
    return SHARED
