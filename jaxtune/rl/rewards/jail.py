"""Runs a program on its tests inside limits; started by `sandbox` as a process of its own.

It imports the standard library only, and is never imported by the trainer. It reads a job from
its standard input and writes to its standard output the job's token, a line end, and a JSON list
of what each test came to: null for passed, else what went wrong.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import platform
import resource
import struct
import sys
import types

# System calls that a program is refused, by number on x86_64 and aarch64 (None: it has none).
# What opens a socket, makes a process, becomes another program, touches other processes, asks the
# kernel by a side door (io_uring), or is for administrators.
DENIED = {
    "socket": (41, 198), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "process_madvise": (440, 440), "process_mrelease": (448, 448), "kcmp": (312, 272),
    "pidfd_open": (434, 434), "pidfd_getfd": (438, 438), "pidfd_send_signal": (424, 424),
    "tkill": (200, 130), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    "setrlimit": (160, 164), "setpriority": (141, 140), "ioprio_set": (251, 30),
    "sched_setparam": (142, 118), "sched_setscheduler": (144, 119),
    "sched_setaffinity": (203, 122), "sched_setattr": (314, 274),
    "migrate_pages": (256, 238), "move_pages": (279, 239),
    "setpgid": (109, 154), "setsid": (112, 157),
    "shmget": (29, 194), "shmat": (30, 196), "shmctl": (31, 195), "semget": (64, 190),
    "semop": (65, 193), "semctl": (66, 191), "semtimedop": (220, 192), "msgget": (68, 186),
    "msgsnd": (69, 189), "msgrcv": (70, 188), "msgctl": (71, 187), "mq_open": (240, 180),
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39),
    "pivot_root": (155, 41), "chroot": (161, 51), "open_tree": (428, 428),
    "move_mount": (429, 429), "fsopen": (430, 430), "fsmount": (432, 432),
    "mount_setattr": (442, 442), "mknod": (133, None), "mknodat": (259, 33),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106),
    "kexec_load": (246, 104), "reboot": (169, 142), "swapon": (167, 224), "swapoff": (168, 225),
    "sethostname": (170, 161), "setdomainname": (171, 162), "settimeofday": (164, 170),
    "clock_settime": (227, 112), "clock_adjtime": (305, 266), "adjtimex": (159, 171),
    "quotactl": (179, 60), "acct": (163, 89), "syslog": (103, 116), "vhangup": (153, 58),
    "iopl": (172, None), "ioperm": (173, None), "personality": (135, 92),
}  # fmt: skip
# Those that depend on their arguments.
CLONE, CLONE3, KILL, TGKILL, PRLIMIT = (56, 220), (435, 435), (62, 129), (234, 131), (302, 261)
AUDIT = (0xC000003E, 0xC00000B7)
X32 = 0x40000000  # x86_64: numbers above are the same calls by another name
CLONE_THREAD = 0x10000

_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_LOAD, _AND, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x06
_NUMBER, _ARCH, _ARGUMENTS = 0, 4, 16


class NoJail(Exception):
    """The machine lacks what a jail is built from."""


def machine() -> int:
    """Returns the column of the numbers above."""
    name = platform.machine()
    if sys.platform != "linux" or name not in ("x86_64", "aarch64"):
        raise NoJail(f"system calls are filtered on Linux on x86_64 and aarch64, not on {name}")
    return ("x86_64", "aarch64").index(name)


def call_filter(column: int, pid: int) -> bytes:
    """Returns the BPF program of seccomp(2) that refuses the calls above.

    Args:
        column: of the table.
        pid: of the process; it may send signals to itself.
    """
    refuse = (_RETURN, 0, 0, _ERRNO | errno.EPERM)
    steps = [(_LOAD, 0, 0, _ARCH), (_EQUAL, 1, 0, AUDIT[column]), (_RETURN, 0, 0, _KILL)]
    steps.append((_LOAD, 0, 0, _NUMBER))
    if column == 0:
        steps += [(_AT_LEAST, 0, 1, X32), (_RETURN, 0, 0, _KILL)]
    for numbers in DENIED.values():
        if numbers[column] is not None:
            steps += [(_EQUAL, 0, 1, numbers[column]), refuse]
    # glibc falls back from clone3, whose flags a filter cannot see, to clone.
    steps += [(_EQUAL, 0, 1, CLONE3[column]), (_RETURN, 0, 0, _ERRNO | errno.ENOSYS)]
    allow = (_RETURN, 0, 0, _ALLOW)
    threads = [
        (_LOAD, 0, 0, _ARGUMENTS), (_AND, 0, 0, CLONE_THREAD), (_EQUAL, 0, 1, CLONE_THREAD),
        allow, refuse,
    ]  # fmt: skip
    itself = [(_LOAD, 0, 0, _ARGUMENTS), (_EQUAL, 0, 1, pid), allow, refuse]
    # Limits may be read (process 0, itself; no new limit: both words of the pointer are 0).
    read = []
    for word in (0, 4, 16, 20):
        read += [(_LOAD, 0, 0, _ARGUMENTS + word), (_EQUAL, 1, 0, 0), refuse]
    read.append(allow)
    for numbers, body in ((CLONE, threads), (KILL, itself), (TGKILL, itself), (PRLIMIT, read)):
        steps += [(_EQUAL, 0, len(body), numbers[column]), *body]
    steps.append(allow)
    return b"".join(struct.pack("=HBBI", *step) for step in steps)


def filter_calls(libc: ctypes.CDLL) -> None:
    """Applies the filter to this process, for good."""
    program = call_filter(machine(), os.getpid())
    memory = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("@HP", len(program) // 8, ctypes.addressof(memory))
    if libc.prctl(22, 2, ctypes.c_char_p(header), 0, 0):
        raise NoJail(f"seccomp: {os.strerror(ctypes.get_errno())}")


def fence_files(libc: ctypes.CDLL, readable: list[str], writable: str) -> None:
    """Hides the file system but for some of it, and other processes, with Landlock.

    Args:
        libc: of this process.
        readable: paths to be read; those that do not exist are passed over.
        writable: directory to be read and written.
    """
    version = libc.syscall(444, None, ctypes.c_size_t(0), 1)
    if version < 1:
        raise NoJail(f"Landlock: {os.strerror(ctypes.get_errno())}")
    files = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1
    ports = 3 if version >= 4 else 0
    scopes = 3 if version >= 6 else 0
    attributes = struct.pack("=QQQ", files, ports, scopes)
    size = 8 if version < 4 else 16 if version < 6 else 24
    rules = libc.syscall(444, ctypes.c_char_p(attributes), ctypes.c_size_t(size), 0)
    if rules < 0:
        raise NoJail(f"Landlock: {os.strerror(ctypes.get_errno())}")
    write, read, list_directory, truncate = 1 << 1, 1 << 2, 1 << 3, 1 << 14
    wanted = {path: read | list_directory for path in readable}
    wanted |= {"/dev/null": read | write | truncate, "/dev/urandom": read, writable: files}
    for path, rights in wanted.items():
        if not os.path.exists(path):
            continue
        if not os.path.isdir(path):
            rights &= write | read | truncate
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("=Qi", rights & files, place)
        if libc.syscall(445, rules, 1, ctypes.c_char_p(rule), 0):
            raise NoJail(f"Landlock: {path}: {os.strerror(ctypes.get_errno())}")
        os.close(place)
    if libc.syscall(446, rules, 0):
        raise NoJail(f"Landlock: {os.strerror(ctypes.get_errno())}")
    os.close(rules)


def drop_privileges(libc: ctypes.CDLL) -> None:
    """Gives up every capability, and the means to get new ones."""
    if libc.prctl(38, 1, 0, 0, 0):
        raise NoJail(f"no_new_privs: {os.strerror(ctypes.get_errno())}")
    header = struct.pack("=Ii", 0x20080522, 0)
    number = (126, 91)[machine()]
    if libc.syscall(number, ctypes.c_char_p(header), ctypes.c_char_p(bytes(24))):
        raise NoJail(f"capset: {os.strerror(ctypes.get_errno())}")


def limit(cpu_seconds: int, memory: int, file_size: int) -> None:
    """Sets the limits of the process: seconds, bytes, bytes; 64 open files; no core dump."""
    for what, most in (
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, file_size),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (most, most))


def judge(program: str, tests: list[str]) -> list[str | None]:
    """Returns what each test came to, run one after the other in the program's namespace."""
    module = types.ModuleType("solution")
    sys.modules["solution"] = module  # dataclasses and pickle look it up
    try:
        exec(compile(program, "solution.py", "exec"), module.__dict__)
    except BaseException as error:
        return [_said(error)] * len(tests)
    found: list[str | None] = []
    for test in tests:
        try:
            exec(compile(test, "test.py", "exec"), module.__dict__)
            found.append(None)
        except BaseException as error:
            found.append(_said(error))
    return found


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:200]


def main() -> None:
    """Does the job on standard input."""
    job = json.loads(sys.stdin.buffer.read())
    token, out = job.pop("token"), os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if job["isolation"] != "none":
            drop_privileges(libc)
        if job["isolation"] == "full":
            fence_files(libc, job["readable"], os.getcwd())
        limit(**job["limits"])
        if job["isolation"] != "none":
            filter_calls(libc)
    except NoJail as error:
        os.write(out, f"no jail\n{error}".encode())
        os._exit(1)
    text = json.dumps(judge(job["program"], job["tests"]))
    os.write(out, f"{token}\n{text}".encode())
    os._exit(0)  # threads of the program's are not waited for


if __name__ == "__main__":
    main()
