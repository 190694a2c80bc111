"""A workdir in an object store holds what one on disk holds, against servers on this host.

moto answers as Amazon's S3 does, gcp-storage-emulator as Google's store; the packages s3fs and
gcsfs and TensorStore's own drivers talk to them.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import logging
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from jaxtune.checkpoints import s3
from jaxtune.cli.main import main
from jaxtune.core.errors import RequestError
from jaxtune.core.places import is_remote, place
from tests.correctness import interrupts
from tests.correctness.interrupts import Workbench
from tests.correctness.tiny_runs import rows, run_config

pytestmark = pytest.mark.slow


def test_a_path_is_on_disk_or_in_a_store():
    assert place("runs/a") == Path("runs/a") and not is_remote("runs/a")
    assert is_remote("gs://bucket/a")
    with pytest.raises(RequestError, match="--workdir: 'ftp://x' is neither a path nor gs:// or"):
        place("ftp://x", "--workdir")


def test_a_store_without_its_package_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RequestError, match=r"package gcsfs: pip install 'jaxtune\[gs\]'"):
        place("gs://bucket/a", "--workdir")


def test_the_spec_of_an_s3_path(monkeypatch):
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    plain = {"driver": "s3", "bucket": "b", "path": "runs/one"}
    assert s3.spec("s3://b/runs/one") == s3.spec("s3://b/runs/one/") == plain
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://localhost:1")
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    more = {"endpoint": "http://localhost:1", "aws_region": "eu-west-1"}
    assert s3.spec("s3://b/runs/one") == plain | more


@contextlib.contextmanager
def amazon(url: str, port: int) -> Iterator[None]:
    """A server with Amazon's interface and an empty bucket."""
    pytest.importorskip("s3fs", reason="needs s3fs")
    server_of = pytest.importorskip("moto.server", reason="needs moto and flask")
    boto3 = pytest.importorskip("boto3", reason="needs boto3")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = server_of.ThreadedMotoServer("127.0.0.1", port, verbose=False)
    server.start()
    boto3.client("s3", endpoint_url=url).create_bucket(Bucket="bucket")
    yield
    server.stop()


@contextlib.contextmanager
def google(url: str, port: int) -> Iterator[None]:
    """A server with Google's interface and an empty bucket."""
    pytest.importorskip("gcsfs", reason="needs gcsfs")
    pytest.importorskip("google.cloud.storage", reason="needs google-cloud-storage")
    server_of = pytest.importorskip("gcp_storage_emulator.server", reason="needs its package")
    logging.getLogger("gcp_storage_emulator").setLevel(logging.ERROR)
    from gcp_storage_emulator import exceptions
    from gcp_storage_emulator.handlers import objects

    handle, lock = server_of.Router.handle, threading.Lock()
    download = objects.download

    def one_at_a_time(router: Any, method: str) -> None:
        with lock:  # its store is a dictionary that its handlers walk through and change
            handle(router, method)

    def with_generation(request: Any, response: Any, storage: Any, *args: Any, **more: Any) -> None:
        """Google says which version it sends, and TensorStore writes the next one only over that.

        It does so where a database has more than one commit: on a busy machine, now and then.
        """
        with contextlib.suppress(exceptions.NotFound):
            file = storage.get_file_obj(request.params["bucket_name"], request.params["object_id"])
            response["x-goog-generation"] = file["generation"]
        download(request, response, storage, *args, **more)

    # Each of the clients keeps a connection open, for which a server of one thread would wait.
    with (
        mock.patch.object(server_of.Router, "handle", one_at_a_time),
        mock.patch.object(objects, "download", with_generation),
    ):
        with mock.patch.object(http.server, "HTTPServer", http.server.ThreadingHTTPServer):
            server = server_of.create_server(
                "127.0.0.1", port, in_memory=True, default_bucket="bucket"
            )
            server.start()
        yield
        server.stop()


STORES = {"s3": amazon, "gs": google}


@pytest.fixture(scope="module", params=STORES)
def bucket(request: pytest.FixtureRequest) -> Iterator[str]:
    """A bucket in a server that lives as long as the module."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    settings = {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": url,
        "FSSPEC_S3_ENDPOINT_URL": url,
        "STORAGE_EMULATOR_HOST": url,
        "TENSORSTORE_GCS_HTTP_URL": url,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "test",
        "GOOGLE_CLOUD_PROJECT": "test",
        "FSSPEC_GS_TOKEN": "anon",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks Google's own servers
        "NO_PROXY": "127.0.0.1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        with STORES[request.param](url, port):
            yield f"{request.param}://bucket"


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Workbench, Path]:
    """(config, bench, workdir) of a run on disk."""
    directory = tmp_path_factory.mktemp("disk")
    config = run_config(directory / "data", log__tensorboard=True, total_steps=9)
    bench = Workbench()
    bench.train(config, directory / "run")
    return config, bench, directory / "run"


def test_a_run_in_a_store_is_the_run_on_disk(
    bucket: str, on_disk: tuple[dict, Workbench, Path], tmp_path: Path, capfd, caplog
) -> None:
    config, bench, disk = on_disk
    workdir = place(f"{bucket}/runs/one")
    with interrupts.after_the_save(6):
        bench.train(config, str(workdir))
    assert len(bench.batches) == 6
    result = bench.train(config, str(workdir))
    assert result.summary["stop_reason"] == "finished" and len(bench.batches) == 3
    for name in ("config.json", "summary.json", "metrics.jsonl"):
        (tmp_path / name).write_bytes((workdir / name).read_bytes())
    assert rows(tmp_path) == rows(disk)
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["6", "9"]
    assert len(list((workdir / "tensorboard").iterdir())) == 2

    # What it trained can be used from there.
    told = []
    for where in (str(workdir), str(disk)):
        capfd.readouterr()
        assert main(["eval", f"--workdir={where}", "--json"]) == 0
        told.append(json.loads(capfd.readouterr().out))
    assert told[0] == told[1] and np.isfinite(told[0]["loss"])

    # A save that was cut short has no mark that it is whole; a damaged one is passed over.
    (workdir / "checkpoints/9/commit_success.txt").unlink()
    for path in (workdir / "checkpoints/6/model/d").iterdir():
        path.write_bytes(b"")
    with pytest.raises(RequestError, match=r"checkpoints/6: .*no checkpoint of the run is whole"):
        bench.train(config | {"total_steps": 10}, str(workdir), allow_change=True)


def test_a_damaged_checkpoint_in_a_store_is_put_aside(
    bucket: str, on_disk: tuple[dict, Workbench, Path], tmp_path: Path
) -> None:
    config, bench, disk = on_disk
    workdir = place(f"{bucket}/runs/two")
    with interrupts.after_the_save(6):
        bench.train(config, str(workdir))
    for path in (workdir / "checkpoints/6/model/d").iterdir():
        path.write_bytes(b"")
    result = bench.train(config, str(workdir))
    assert result.summary["stop_reason"] == "finished" and len(bench.batches) == 6
    assert list(result.summary["damaged_checkpoints"]) == ["6"]
    assert (workdir / "damaged/6/commit_success.txt").exists()
    (tmp_path / "metrics.jsonl").write_bytes((workdir / "metrics.jsonl").read_bytes())
    assert rows(tmp_path) == rows(disk)


def test_a_store_that_cannot_be_reached_is_refused(bucket: str, tmp_path: Path) -> None:
    config = run_config(tmp_path / "data")
    elsewhere = f"{bucket[:5]}no-such-bucket/run"
    with pytest.raises(RequestError, match=f"{elsewhere}: --workdir: cannot be reached"):
        Workbench().train(config, elsewhere)
