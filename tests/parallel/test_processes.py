"""Where a process finds its place among several; what the hub of the witnesses says."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from jaxtune.core.errors import RequestError
from jaxtune.parallel import hub as hubs_of
from jaxtune.parallel import processes
from jaxtune.parallel.batches import Rows, global_batch, held_rows
from jaxtune.parallel.cluster import Place, find, parse, time_limit
from jaxtune.parallel.mesh import make_mesh

ENVIRONMENT = (
    "SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID",
    "OMPI_MCA_orte_hnp_uri", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_LOCAL_RANK", "KUBERNETES_SERVICE_HOST", "JAX_COORDINATOR_PORT",
    "JAX_COORDINATOR_ADDRESS", "JAX_LOCAL_DEVICE_IDS",
)  # fmt: skip


@pytest.fixture
def outside(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No cluster at all."""
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_a_place_is_given_as_host_port_count_and_index():
    assert parse("auto") == "auto" and parse("none") == "none"
    assert parse("10.0.0.1:8476,4,3") == Place("10.0.0.1", 8476, 4, 3)
    assert parse("[fe80::1]:8476,2,0").host == "[fe80::1]"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "auto, none or HOST:PORT,COUNT,INDEX"),
        ("Auto", "HOST:PORT,COUNT,INDEX"),
        ("host:1", "HOST:PORT,COUNT,INDEX"),
        ("host,2,0", "HOST:PORT,COUNT,INDEX"),
        ("host:80,2,-1", "HOST:PORT,COUNT,INDEX"),
        ("host:80,2,2", "index 2 is not in 0..1"),
        ("host:80,0,0", "index 0 is not in"),
        ("host:70000,2,0", "port 70000"),
    ],
)
def test_other_texts_are_refused(text, says):
    with pytest.raises(RequestError, match="--distributed: ") as error:
        parse(text)
    assert says in str(error.value)


@pytest.mark.parametrize("text", ["soon", "0", "1e9", "nan"])
def test_a_time_limit_is_a_number_of_seconds(text, monkeypatch):
    monkeypatch.setenv("JAXTUNE_HOST_TIMEOUT", text)
    with pytest.raises(RequestError, match="JAXTUNE_HOST_TIMEOUT"):
        time_limit()


def test_without_a_cluster_there_is_nothing_to_join(outside):
    assert find(1) is None
    processes.join("auto")
    assert not processes.joined() and processes.gather("x", 3) == [3]
    processes.wait_for_all("x")
    (array,) = processes.gather_arrays(np.arange(3))
    assert array.tolist() == [0, 1, 2]
    assert processes.stop_step(5) is None


def slurm(patch: pytest.MonkeyPatch, tasks: int, index: int) -> None:
    patch.setenv("SLURM_JOB_ID", "4099")
    patch.setenv("SLURM_STEP_NODELIST", "node[007-010]")
    patch.setenv("SLURM_NTASKS", str(tasks))
    patch.setenv("SLURM_PROCID", str(index))
    patch.setenv("SLURM_LOCALID", "1")


def test_slurm_says_where(outside):
    slurm(outside, 8, 5)
    assert find(1) == Place("node007", 61440 + 4099 % 4096, 8, 5, (1,))
    outside.setenv("JAX_LOCAL_DEVICE_IDS", "0,1,2,3")
    assert find(1).devices is None
    outside.setenv("JAX_COORDINATOR_ADDRESS", "10.0.0.9:77")
    assert (find(1).host, find(1).port) == ("10.0.0.9", 77)


def test_a_single_task_of_slurm_keeps_all_its_devices(outside):
    slurm(outside, 1, 0)
    assert find(1) is None


def test_open_mpi_says_where(outside):
    outside.setenv("OMPI_MCA_orte_hnp_uri", "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911")
    outside.setenv("OMPI_COMM_WORLD_SIZE", "2")
    outside.setenv("OMPI_COMM_WORLD_RANK", "1")
    outside.setenv("OMPI_COMM_WORLD_LOCAL_RANK", "0")
    found = find(1)
    assert (found.host, found.count, found.index, found.devices) == ("10.96.0.1", 2, 1, (0,))


def test_a_cluster_that_says_too_little_is_refused(outside):
    slurm(outside, 8, 5)
    outside.setenv("SLURM_NTASKS", "many")
    with pytest.raises(RequestError, match=r"--distributed: .*HOST:PORT,COUNT,INDEX, or none"):
        find(1)


def test_rows_that_a_process_holds_become_the_global_batch():
    mesh = make_mesh({"fsdp": 4, "data": 2})
    rows = np.arange(16 * 3, dtype=np.int32).reshape(16, 3)
    assert held_rows(16, 3, mesh) is None  # one process holds all
    placed = global_batch({"x": rows}, mesh, Rows(16, tuple(range(16))))["x"]
    assert np.array_equal(placed, rows)
    for shard in placed.addressable_shards:
        assert np.array_equal(shard.data, rows[shard.index])


class Told:
    """A witness of this test's own, and what it hears."""

    def __init__(self, port: int, index: int, limit: float):
        self.lines = hubs_of.Lines(socket.create_connection(("localhost", port)), limit)
        self.messages = self.lines.receive()
        self.lines.send({"hello": index, "host": f"host{index}"})

    def hear(self) -> dict:
        return next(self.messages)


@pytest.fixture
def open_hub() -> Iterator:
    """Returns a function that starts a hub for some processes; (hub, its port)."""
    hubs = []

    def start(count: int, limit: float) -> tuple[hubs_of.Hub, int]:
        listener = hubs_of.listen(0)
        port = listener.getsockname()[1]
        hub = hubs_of.Hub(listener, count, limit)
        thread = threading.Thread(target=hub.run)
        thread.start()
        hubs.append((hub, thread))
        return hub, port

    yield start
    for hub, thread in hubs:
        hub.over.set()
        thread.join()


@pytest.fixture
def three(open_hub) -> list[Told]:
    """Three witnesses that have found each other."""
    _, port = open_hub(3, 60)
    all_ = [Told(port, i, 60) for i in (2, 0, 1)]
    for one in all_:
        assert one.hear() == {"all": ["host0", "host1", "host2"]}
    return [all_[1], all_[2], all_[0]]


def test_values_are_gathered_in_the_order_of_the_processes(three):
    for index in (1, 2, 0):
        three[index].lines.send({"gather": "x", "value": index * 10, "limit": None})
    for one in three:
        assert one.hear() == {"gathered": "x", "values": [0, 10, 20]}


def test_all_stop_behind_the_step_of_the_furthest(three):
    three[1].lines.send({"stop": "SIGTERM"})
    three[2].lines.send({"stop": "SIGTERM"})  # a second request changes nothing
    for one, step in zip(three, (7, 6, 8), strict=True):
        assert one.hear() == {"ask": True}
        one.lines.send({"at": step})
    told = [one.hear() for one in three]
    assert told[0] == told[1] == told[2]
    assert told[0]["stop_at"] == 9 and told[0]["signal"] == "SIGTERM"


def test_who_does_not_come_in_time_is_named(three):
    for index in (0, 2):
        three[index].lines.send({"gather": "start #3", "value": None, "limit": 0.1})
    lost = three[0].hear()
    assert lost["reason"] == "process 1 of 3 (host host1) did not come to 'start' within 0.1 s"
    assert lost["writer"] == 0


@pytest.mark.parametrize(("index", "writer"), [(0, 1), (2, 0)])
def test_who_dies_is_named_and_the_lowest_of_the_others_writes(three, index, writer):
    three[index].lines.send({"died": "was killed"})
    for one in three:
        lost = one.hear()
        assert lost["lost"] == index and lost["writer"] == writer
        assert f"process {index} of 3 (host host{index}) was killed" == lost["reason"]


def test_a_connection_that_breaks_is_an_end(three):
    three[1].lines.link.close()
    assert "process 1 of 3 (host host1) does not answer" in three[0].hear()["reason"]


def test_who_has_said_goodbye_is_not_missed(three):
    three[1].lines.send({"bye": True})
    three[1].lines.link.close()
    three[2].lines.send({"failed": "OSError: disk", "summary": False, "code": 1})
    lost = three[0].hear()
    assert lost["reason"] == "process 2 of 3 (host host2) failed: OSError: disk"
    assert lost["writer"] is None and lost["code"] == 1


def test_who_does_not_start_is_named(open_hub):
    _, port = open_hub(3, 0.5)
    one = Told(port, 2, 60)
    threading.Timer(0.25, one.lines.send, ({},)).start()  # a sign of life
    assert one.hear()["missing"] == (
        "process 0 and process 1 of 3 did not start within 0.5 s; here are process 2 of 3 "
        "(host host2)"
    )


def test_two_processes_of_one_index_are_refused(open_hub):
    _, port = open_hub(2, 60)
    first = Told(port, 1, 60)
    second = Told(port, 1, 60)
    assert "two processes 1 of 2" in second.hear()["missing"]
    third = Told(port, 0, 60)
    assert first.hear() == third.hear() == {"all": ["host0", "host1"]}
