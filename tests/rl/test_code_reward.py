"""Completions run as programs, and what they are kept from."""

from __future__ import annotations

import os
import socket
import time

import numpy as np
import pytest

from jaxtune.core.errors import RequestError
from jaxtune.rl.rewards import jail, sandbox
from jaxtune.rl.rewards.code import program
from jaxtune.rl.rewards.named import build_rewards
from jaxtune.rl.rewards.scores import score

LIMITS = sandbox.Limits(seconds=20.0)
HAS_JAIL = sandbox.strongest() == "full"
jailed = pytest.mark.skipif(not HAS_JAIL, reason="needs seccomp and Landlock")


def why(text, isolation="full", limits=LIMITS, tests=("pass",)):
    return sandbox.run(text, list(tests), limits, isolation).failures[0]


@pytest.mark.parametrize("isolation", ["full", "syscalls", "none"])
def test_tests_run_one_after_the_other_in_the_programs_namespace(isolation):
    if isolation != "none" and not HAS_JAIL:
        pytest.skip("needs seccomp and Landlock")
    text = "import dataclasses\n@dataclasses.dataclass\nclass A:\n    x: int\na = A(1)\nprint(a)"
    tests = ["assert a.x == 1", "assert a == 2, 'differs'", "a.x = 5", "assert a == A(5)", "1/"]
    outcome = sandbox.run(text, tests, LIMITS, isolation)
    assert outcome.finished
    assert outcome.failures[:4] == [None, "AssertionError: differs", None, None]
    assert outcome.failures[4].startswith("SyntaxError")


@pytest.mark.parametrize(
    "text",
    [
        "import os; os._exit(0)",
        "raise SystemExit(0)",
        "import sys; sys.exit()",
        "1 / 0",
        "def f(:",
        "x = 'a\0b'",
        "import os; os.write(1, b'null'); os.kill(os.getpid(), 9)",
        "import os\nfor fd in range(3, 9):\n try: os.write(fd, b'x\\n[null]')\n except OSError: 0",
    ],
)
def test_a_program_that_does_not_come_to_its_tests_passes_none(text):
    assert why(text, sandbox.strongest()) is not None


def test_time_is_limited():
    limits = sandbox.Limits(seconds=0.5)
    for text in ("while True: pass", "import time; time.sleep(600)"):
        start = time.monotonic()
        assert "did not end" in why(text, sandbox.strongest(), limits)
        assert time.monotonic() - start < 60  # far below the program's own time


def test_memory_and_files_are_limited():
    isolation = sandbox.strongest()
    assert why("x = bytearray(300 << 20)", isolation) is None
    assert why("x = bytearray(600 << 20)", isolation) == "MemoryError: "
    assert why("open('small', 'wb').write(bytes(15 << 20))", isolation) is None
    assert "File too large" in why("open('large', 'wb').write(bytes(17 << 20))", isolation)
    assert "Too many open files" in why("a = [open('f', 'w') for _ in range(99)]", isolation)


@jailed
def test_no_server_is_reached():
    """The very program connects without the jail."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        text = f"import socket; socket.create_connection(('127.0.0.1', {port}), timeout=5)"
        assert why(text, "none") is None
        for isolation in ("full", "syscalls"):
            assert "PermissionError" in why(text, isolation)
            for family in ("AF_UNIX", "AF_INET6", "AF_NETLINK", "AF_VSOCK"):
                assert "PermissionError" in why(
                    f"import socket; socket.socket(socket.{family})", isolation
                )
        server.settimeout(5)
        server.accept()[0].close()  # the one without a jail
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()


@jailed
@pytest.mark.parametrize(
    "text",
    [
        "import os; os.fork()",
        "import os; os.posix_spawn('/bin/true', ['true'], {})",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.execv('/bin/true', ['true'])",
        "import multiprocessing as m; m.get_context('fork').Process(target=print).start()",
    ],
)
def test_no_process_is_started(text):
    assert "PermissionError" in why(text, "syscalls")


@jailed
def test_a_fork_bomb_is_one_process():
    bomb = "import os\nwhile True:\n    try: os.fork()\n    except OSError: break\nn = 1"
    assert why(bomb, tests=["assert n == 1"]) is None


@jailed
def test_threads_are_allowed_within_the_memory():
    assert why("import threading as t\nx = t.Thread(target=print)\nx.start(); x.join()") is None
    bomb = "import threading as t, time\nwhile True: t.Thread(target=time.sleep, args=(9,)).start()"
    assert "can't start new thread" in why(bomb)


@jailed
@pytest.mark.parametrize(
    "text",
    [
        "import os; os.kill(os.getppid(), 0)",
        "import os; os.kill(-1, 0)",
        "import os; os.killpg(0, 0)",
        "import os; os.pidfd_open(os.getppid())",
        "import os; os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)",
        "import os; os.sched_setaffinity(os.getppid(), {0})",
        "import os, resource; resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE)",
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
        "import os; os.setsid()",
        "import os; os.chroot('.')",
        "import os; os.mknod('device', 0o020666, os.makedev(1, 1))",
    ],
)
def test_other_processes_and_the_machine_are_out_of_reach(text):
    assert why(text, "syscalls") is not None


@jailed
def test_the_trainers_secrets_are_out_of_reach(monkeypatch, tmp_path):
    monkeypatch.setenv("JAXTUNE_TEST_SECRET", "hunter2")
    (tmp_path / "secret").write_text("hunter2")
    home = os.path.expanduser("~")
    read = [
        "import os; assert 'JAXTUNE_TEST_SECRET' not in os.environ; raise KeyError",
        f"open({str(tmp_path / 'secret')!r}).read()",
        f"open({str(tmp_path / 'new')!r}, 'w')",
        f"import os; os.unlink({str(tmp_path / 'secret')!r})",
        f"open('/proc/{os.getpid()}/environ').read()",
        f"open('/proc/{os.getpid()}/mem', 'rb').read()",
        f"import os; os.listdir({home!r})",
        "import os; os.listdir('/')",
        "import os; os.listdir('..')",
        "open('/etc/passwd').read()",
        "open('/dev/shm/jaxtune-test', 'w')",
        "import sys; open(sys.executable, 'ab')",
    ]
    said = [why(text) for text in read]
    assert [s for s in said if s is None or "Error" not in s] == []
    assert (tmp_path / "secret").read_text() == "hunter2" and not (tmp_path / "new").exists()


def test_a_program_has_a_directory_of_its_own():
    text = "import os, tempfile\nassert os.listdir('.') == []\nopen('a/b', 'w') if 0 else 0\n"
    text += "os.makedirs('d/e'); open('d/e/f', 'w').write('x'); os.chmod('d/e', 0)\n"
    text += "assert open('/dev/null').read() == ''; tempfile.TemporaryFile().write(b'x')"
    before = {n for n in os.listdir("/tmp") if n.startswith("jaxtune-code-")}
    assert why(text, sandbox.strongest()) is None
    assert {n for n in os.listdir("/tmp") if n.startswith("jaxtune-code-")} <= before


def test_the_order_of_sets_is_the_same_each_time():
    text = "raise ValueError(list({'a', 'b', 'c', 'd', 'e'}))"
    assert why(text, "none") == why(text, "none")


@pytest.mark.parametrize("column", [0, 1])
def test_the_filter_is_whole_on_both_machines(column):
    """Every jump lands inside, and no number stands twice."""
    text = jail.call_filter(column, 1)
    steps = [text[i : i + 8] for i in range(0, len(text), 8)]
    assert len(steps) < 4096
    for i, step in enumerate(steps):
        if step[0] & 7 == 5:  # a jump
            assert i + 1 + max(step[2], step[3]) < len(steps)
    assert steps[-1][0] == 6
    numbers = [n[column] for n in jail.DENIED.values() if n[column] is not None]
    numbers += [n[column] for n in (jail.CLONE, jail.CLONE3, jail.KILL, jail.TGKILL, jail.PRLIMIT)]
    assert len(set(numbers)) == len(numbers)


def test_a_machine_without_a_jail_is_refused(monkeypatch):
    def none(*_):
        raise sandbox.NoSandbox("Landlock: Function not implemented")

    monkeypatch.setattr(sandbox, "run", none)
    with pytest.raises(RequestError, match=r"isolation: 'full' .* \(Landlock: Function"):
        build_rewards([{"function": "code"}])


def test_the_last_block_is_the_program():
    text = "First\n```python\nx = 1\n```\nor\n  ```py\ny = 2\n```\n```\nz = 3\n```\n```text\nq\n```"
    assert program(text) == "z = 3\n"
    assert program("x = 1") == "x = 1"
    assert program("```python\nx = 1\n") == "```python\nx = 1\n"


def test_the_reward():
    completions = [
        "```python\ndef double(x):\n    return 2 * x\n```",
        "```python\ndef double(x):\n    return x * x\n```",
        "def double(x): return x + x",
        "I cannot.",
        "anything",
    ]
    tests = ["assert double(2) == 4", "assert double(3) == 6"]
    columns = {"tests": [tests, tests, "\n".join(tests), tests, None]}
    for how, expected in (("all", [1, 0, 1, 0]), ("share", [1, 0.5, 1, 0])):
        entry = {
            "function": "code",
            "arguments": {"score": how, "seconds": 20, "isolation": sandbox.strongest()},
        }
        out = score(build_rewards([entry]), [""] * 5, completions, columns)
        np.testing.assert_array_equal(out.by_function["code"], [*expected, np.nan])
