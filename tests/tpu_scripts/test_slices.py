"""create, queue, delete: exact arguments, full zones, states."""

import pytest

from tests.tpu_scripts.world import WHERE

pytestmark = pytest.mark.slow
NODE = ["gcloud", "compute", "tpus", "tpu-vm"]
QUEUE = ["gcloud", "compute", "tpus", "queued-resources"]
FULL = 'There is no more capacity in the zone "us-west4-a"; you can try in another zone [EID: 0x1]'
TYPE = "--accelerator-type=v5litepod-16"


def test_create_asks_for_what_the_env_file_says(world):
    world.settings(
        SPOT="true",
        NETWORK="net",
        SUBNETWORK="sub",
        SERVICE_ACCOUNT="me@p.iam.gserviceaccount.com",
        SSH="internal",
    )
    done = world.run("create")
    assert done.code == 0 and "is billed until tpu_scripts/delete" in done.err
    describe, create = world.calls()
    assert describe == [*NODE, "describe", "jaxtune", *WHERE, "--format=value(state)"]
    assert create == [
        *[*NODE, "create", "jaxtune", *WHERE, TYPE, "--version=v2-alpha-tpuv5-lite"],
        *["--spot", "--network=net", "--subnetwork=sub"],
        "--service-account=me@p.iam.gserviceaccount.com",
        "--scopes=https://www.googleapis.com/auth/cloud-platform",
        *["--internal-ips", "--quiet"],
    ]
    dry = world.run("create", "--dry_run")
    assert dry.out.split() == create


def test_create_tries_again_while_the_zone_is_full(world):
    world.plan(create=[FULL, "RESOURCE_EXHAUSTED: try later", "code 13: an internal error"])
    done = world.run("create", "--wait=0")
    assert done.code == 0
    assert len(world.calls("tpu-vm", "create")) == 4
    assert done.err.count("next attempt in 0 s") == 3 and FULL in done.err
    assert (world.cloud / "node").read_text() == "READY"


def test_create_gives_up_after_its_attempts(world):
    world.plan(create=[FULL] * 9)
    done = world.run("create", "--wait=0", "--attempts=3")
    assert done.code == 1 and "no capacity after 3 attempts" in done.err
    assert len(world.calls("tpu-vm", "create")) == 3


def test_the_wait_doubles_up_to_ten_minutes(world):
    sleep = world.laptop / "bin" / "sleep"
    sleep.write_text(f'#!/bin/sh\necho "$1" >>{world.cloud}/slept\n')
    sleep.chmod(0o755)
    world.plan(create=[FULL] * 7)
    assert world.run("create").code == 0
    slept = (world.cloud / "slept").read_text().split()
    assert slept == ["30", "60", "120", "240", "480", "600", "600"]


def test_create_ends_at_once_where_waiting_does_not_help(world):
    quota = "RESOURCE_EXHAUSTED: Quota limit 'TPUV5sLitepodPerProjectPerZone' has been exceeded"
    world.plan(create=[quota, "PERMISSION_DENIED: no"])
    done = world.run("create", "--wait=0")
    assert done.code == 1 and "iam-admin/quotas" in done.err
    done = world.run("create", "--wait=0")
    assert done.code == 1 and "PERMISSION_DENIED" in done.err
    assert len(world.calls("tpu-vm", "create")) == 2


def test_a_slice_that_came_half_way_is_deleted_before_the_next_attempt(world):
    world.plan(create=["half: " + FULL])
    assert world.run("create", "--wait=0").code == 0
    verbs = [call[4] for call in world.calls("tpu-vm") if call[4] != "describe"]
    assert verbs == ["create", "delete", "create"]


def test_a_slice_that_is_there_is_not_made_twice(world):
    (world.cloud / "node").write_text("READY")
    done = world.run("create")
    assert done.code == 0 and "ready already" in done.err
    (world.cloud / "node").write_text("PREEMPTED")
    done = world.run("create")
    assert done.code == 1 and "PREEMPTED" in done.err and "tpu_scripts/delete" in done.err
    assert world.calls("create") == []


def test_gcloud_that_cannot_tell_the_state_ends_the_script(world):
    world.plan(node_states=["broken"])
    done = world.run("create")
    assert done.code == 1 and "connection reset" in done.err
    assert world.calls("create") == []


def test_queue_asks_and_waits(world):
    world.settings(SPOT="true", VALID_UNTIL="6h")
    waiting = "WAITING_FOR_RESOURCES"
    world.plan(queue_states=[None, None, waiting, "PROVISIONING", "ACTIVE"])
    done = world.run("queue", "--poll=0")
    assert done.code == 0, done
    for state in (waiting, "PROVISIONING", "ACTIVE"):
        assert done.err.count(f"jaxtune is {state}\n") == 1
    (create,) = world.calls("queued-resources", "create")
    assert create == [
        *[*QUEUE, "create", "jaxtune", *WHERE, "--node-id=jaxtune", TYPE],
        *["--runtime-version=v2-alpha-tpuv5-lite", "--spot", "--valid-until-duration=6h"],
        "--quiet",
    ]
    describe = world.calls("queued-resources", "describe")[0]
    assert describe == [*QUEUE, "describe", "jaxtune", *WHERE, "--format=value(state.state)"]


def test_queue_with_a_limited_life_is_flex_start(world):
    world.settings(MAX_RUN="12h")
    assert world.run("queue", "--no_wait").code == 0
    (create,) = world.calls("queued-resources", "create")
    assert create[:5] == ["gcloud", "alpha", "compute", "tpus", "queued-resources"]
    assert create[-3:-1] == ["--provisioning-model=flex-start", "--max-run-duration=12h"]
    assert "--spot" not in create
    done = world.run("create")
    assert done.code == 2 and "MAX_RUN needs tpu_scripts/queue" in done.err


def test_a_request_that_failed_for_want_of_capacity_is_made_again(world):
    world.plan(queue_states=[None, "FAILED", None, None, None, None, "ACTIVE"], queue_errors=[FULL])
    done = world.run("queue", "--poll=0", "--wait=0")
    assert done.code == 0 and FULL in done.err, done
    verbs = [call[4] for call in world.calls("queued-resources") if call[4] != "describe"]
    assert verbs == ["create", "delete", "create"]
    (delete,) = world.calls("delete")
    assert delete == [*QUEUE, "delete", "jaxtune", *WHERE, "--force", "--quiet"]


def test_a_request_that_failed_for_another_reason_is_not(world):
    world.plan(queue_states=[None, "FAILED"], queue_errors=["the network does not exist"])
    done = world.run("queue", "--poll=0", "--wait=0")
    assert done.code == 1 and "the network does not exist" in done.err
    assert len(world.calls("queued-resources", "create")) == 1


def test_queue_waits_for_a_request_that_is_there(world):
    (world.cloud / "queue").write_text("PROVISIONING")
    world.plan(queue_states=[None, None, "ACTIVE"])
    done = world.run("queue", "--poll=0")
    assert done.code == 0 and "in the queue already" in done.err
    assert world.calls("create") == []
    (world.cloud / "queue").write_text("SUSPENDED")
    done = world.run("queue")
    assert done.code == 1 and "tpu_scripts/delete" in done.err


def test_delete_takes_the_request_and_the_slice(world):
    world.run("create")
    (world.cloud / "queue").write_text("ACTIVE")
    done = world.run("delete", "--yes")
    assert done.code == 0 and "jaxtune is gone" in done.err
    assert not (world.cloud / "node").exists() and not (world.cloud / "queue").exists()


def test_delete_of_a_slice_alone_and_of_nothing(world):
    world.run("create")
    assert world.run("delete", "--yes").code == 0
    (delete,) = world.calls("delete")
    assert delete == [*NODE, "delete", "jaxtune", *WHERE, "--quiet"]
    assert world.run("delete", "--yes").code == 0
    assert len(world.calls("delete")) == 1


def test_delete_asks_first(world):
    world.run("create")
    done = world.run("delete")
    assert done.code == 2 and "--yes" in done.err
    assert (world.cloud / "node").exists()


def test_delete_says_so_if_something_is_left(world):
    world.run("create")
    world.plan(node_states=[None, "DELETING"])
    done = world.run("delete", "--yes")
    assert done.code == 1 and "still there (DELETING), and may be billed" in done.err
