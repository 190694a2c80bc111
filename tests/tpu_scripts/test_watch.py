"""watch: preemption → delete → create → setup → resume, and the ways in which it ends."""

import os
import signal

import pytest

pytestmark = pytest.mark.slow
WORKDIR = "gs://bucket/runs/first"
TRAIN = [
    "train",
    "--config.data.train[0].source=jsonl:data/my file.jsonl",
    f"--workdir={WORKDIR}",
]
WATCH = ("watch", "--poll=0", "--wait=0")
COMMAND = ("--", "jaxtune", *TRAIN)


def verbs(world):
    """The calls that change something, in order: create, delete, and what is asked of workers."""
    found = []
    for call in world.calls("gcloud"):
        verb = call[4] if len(call) > 4 else ""
        if verb in ("create", "delete"):
            found.append(verb)
        for word in ("setup", "start", "stop", "result"):
            if f"jaxtune/tpu_scripts/worker {word}" in call[-1]:
                found.append(word)
    return found


def summary(world, reason):
    path = world.cloud / "bucket" / WORKDIR.removeprefix("gs://")
    path.mkdir(parents=True)
    (path / "summary.json").write_text(f'{{\n  "stop_reason": "{reason}",\n  "step": 7\n}}\n')


def test_a_run_from_nothing_to_its_end(world):
    done = world.run(*WATCH, "--delete_after", *COMMAND)
    assert done.code == 0, done
    assert verbs(world) == ["create", "setup", "start", "delete"]
    assert f"done: {WORKDIR}" in done.err and "jaxtune is gone" in done.err
    assert not (world.cloud / "node").exists()


@pytest.mark.parametrize("queued", ["false", "true"])
def test_a_preempted_slice_is_made_again_and_the_run_resumed(world, queued):
    """Taken away while it trains; the second time it trains to the end."""
    world.settings(QUEUED=queued, SPOT="true")
    world.plan(after_preemption="0")
    world.behave("train")
    if queued == "true":
        world.plan(queue_states=[None] * 3 + ["ACTIVE"])
    process = world.start(*WATCH, *COMMAND)
    first = world.arguments(0), world.arguments(1)
    # Said at one place, since watch looks at both one after the other, and may do so in between.
    if queued == "true":
        world.plan(queue_states=["SUSPENDED", None, None, None, None, "ACTIVE"])
    else:
        world.plan(node_states=["PREEMPTED"])
    done = process.end()
    assert done.code == 0, done
    round_trip = ["create", "setup", "start"]
    assert verbs(world) == [*round_trip, "delete", *round_trip]
    assert "restart 1 of 20" in done.err
    second = world.arguments(0), world.arguments(1)
    assert set(first + second) == {"\n".join([*TRAIN, ""])}
    assert "is billed until tpu_scripts/delete" in done.err


def test_a_full_zone_does_not_end_it(world):
    world.plan(create=["There is no more capacity in the zone"] * 3)
    done = world.run(*WATCH, *COMMAND)
    assert done.code == 0 and verbs(world).count("create") == 4
    world.run("delete", "--yes")
    world.forget()
    world.plan(create=["PERMISSION_DENIED"])
    done = world.run(*WATCH, *COMMAND)
    assert done.code == 1 and "no slice to be had" in done.err
    assert verbs(world) == ["create"]


def test_a_preemption_during_setup(world):
    """The slice is gone before the run has begun; nothing is counted as the run's failure."""
    world.plan(ssh=[None, "the TPU is in an unusable state"], workers=1)
    done = world.run(*WATCH, *COMMAND)
    assert done.code == 0, done
    assert verbs(world)[-2:] == ["setup", "start"]


def test_a_run_that_fails_by_itself_ends_it(world):
    world.behave(1)
    summary(world, "non_finite")
    done = world.run(*WATCH, "--delete_after", *COMMAND)
    assert done.code == 1 and "the run failed (non_finite)" in done.err
    assert "[0] training on" in done.out
    assert verbs(world) == ["create", "setup", "start", "result", "delete"]


def test_a_run_that_was_stopped_as_preempted_is_continued(world):
    """SIGTERM comes before the slice's state says so, or without a preemption (maintenance)."""
    world.behave(1)
    summary(world, "preempted")
    done = world.run(*WATCH, "--restarts=2", *COMMAND)
    assert done.code == 1 and "that would be restart 3 of 2" in done.err
    assert verbs(world) == ["create", "setup", *["start"] * 3]


def test_a_run_that_someone_stops_is_left_alone(world):
    world.behave("train")
    process = world.start(*WATCH, *COMMAND)
    world.arguments(0)
    assert world.run("stop").code == 0
    done = process.end()
    assert done.code == 1 and "stopped by hand" in done.err
    assert verbs(world) == ["create", "setup", "start", "stop"]
    assert (world.cloud / "node").exists()


def test_a_slice_that_someone_deletes_is_not_made_again(world):
    world.behave("train")
    process = world.start(*WATCH, *COMMAND)
    world.arguments(0)
    assert world.run("delete", "--yes").code == 0
    done = process.end()
    assert done.code == 1 and "deleted by someone else" in done.err
    assert verbs(world) == ["create", "setup", "start", "delete"]


def test_a_run_that_is_going_on_is_taken_over(world):
    world.ready()
    world.behave("train")
    world.run("run", "--no_follow", "--", "jaxtune", *TRAIN)
    world.arguments(0)
    process = world.start(*WATCH, *COMMAND)
    process.wait_for("taking over the run")
    world.behave(0)
    assert process.end().code == 0
    assert verbs(world) == ["start"]


def test_workers_that_were_restarted_get_the_run_again(world):
    world.ready()
    world.behave("train")
    process = world.start(*WATCH, *COMMAND)
    for number in (0, 1):
        world.arguments(number)
    world.behave(0)  # of the processes that come; the others are gone, and leave no exit code
    for number in (0, 1):
        (group,) = (world.worker(number) / ".tmux").iterdir()
        os.killpg(int(group.read_text()), signal.SIGKILL)
    done = process.end()
    assert done.code == 0 and "the workers were restarted" in done.err, done
    assert verbs(world) == ["setup", "start", "stop", "start"]


def test_a_slice_that_does_not_answer_is_made_again(world):
    world.ready()
    world.behave("train")
    process = world.start(*WATCH, *COMMAND)
    world.arguments(0)
    world.plan(ssh=["connection timed out"] * 6)
    process.wait_for("no answer")
    world.behave(0)
    done = process.end()
    assert done.code == 0 and "connection timed out" in done.err, done
    assert verbs(world) == ["setup", "start", "delete", "create", "setup", "start"]


def test_a_slice_that_cannot_be_set_up_does_not_cost_for_ever(world):
    (world.cloud / "worker_bin" / "uv").write_text("#!/bin/sh\nexit 1\n")
    done = world.run(*WATCH, "--delete_after", *COMMAND)
    assert done.code == 1 and "cannot be set up" in done.err
    assert verbs(world) == ["create", *["setup"] * 3, "delete"]
