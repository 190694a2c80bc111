"""A vLLM server for a test, and the environment of any vLLM that a test starts."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

PYTHON = os.environ.get("JAXTUNE_VLLM", "")
START = 600  # seconds that it may take to start


def environment() -> dict[str, str]:
    """Returns an environment for a small model on the CPU, without network or telemetry."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }


@contextlib.contextmanager
def serving(model: Path, log: Path, *arguments: str) -> Iterator[str]:
    """Yields the URL of a server that holds `model` under the name `base`.

    Args:
        model: a Hugging Face directory.
        log: where the server's output goes.
        arguments: added to those of docs/rollouts.md.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--served-model-name", "base", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "float32", "--enforce-eager", "--generation-config", "vllm"]
    command += ["--enable-lora", "--max-lora-rank", "16", "--max-loras", "2", *arguments]
    env = environment() | {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
    with log.open("w") as out:
        server = subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        _wait(server, url, log)
        yield url
    finally:
        server.terminate()
        server.wait(60)


def _wait(server: subprocess.Popen, url: str, log: Path) -> None:
    end = time.monotonic() + START
    while time.monotonic() < end:
        if server.poll() is not None:
            raise RuntimeError(f"vLLM ended: {log.read_text()[-2000:]}")
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
            return
        time.sleep(1)
    raise RuntimeError(f"vLLM did not start within {START} s: {log.read_text()[-2000:]}")
