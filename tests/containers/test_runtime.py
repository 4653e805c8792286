"""The containers that other tests run in are as strict as the runtimes' own."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from .runtime import TESTS, load_profile

SCRIPT = """
import ctypes, errno, json, os, socket
libc = ctypes.CDLL(None, use_errno=True)
def call(*arguments):
    return errno.errorcode[ctypes.get_errno()] if libc.syscall(*arguments) < 0 else "done"
numbers = {"x86_64": (41, 438, 435, 272), "aarch64": (198, 438, 435, 97)}
make, getfd, clone3, unshare = numbers[os.uname().machine]
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
try:
    open("/var/written", "w")
    written = "done"
except OSError as error:
    written = errno.errorcode[error.errno]
print(json.dumps({
    "uid": os.getuid(),
    "vsock": call(make, 40, 77, 0),  # no such type: it makes no socket in any case
    "pidfd_getfd": call(getfd, -1, 0, 0),
    "clone3": call(clone3, 0, 0),
    "unshare": call(unshare, 0x10000000),
    "unknown": call(999),
    "tcp": socket.socket().fileno() > 2,
    "pid": os.getpid(),
    "capabilities": int(status["CapBnd"], 16),
    "no_new_privileges": int(status["NoNewPrivs"]),
    "written": written,
}))
"""

#: (profile, pidfd_getfd, clone3, unshare, a call that does not exist): see the facts.
ANSWERS = [
    ("docker", "EPERM", "ENOSYS", "EPERM", "EPERM"),
    ("kubernetes", "EPERM", "ENOSYS", "EPERM", "EPERM"),
    ("podman", "EBADF", "EINVAL", "done", "ENOSYS"),
]


def contained(*options: str) -> dict[str, str | int]:
    command = [sys.executable, "-m", "containers.runtime", "--read-only", *options]
    # Debian's Python is one that every user may execute.
    done = subprocess.run(
        [*command, "--", "/usr/bin/python3", "-c", SCRIPT],
        capture_output=True,
        text=True,
        check=False,
        cwd=TESTS,
    )
    if "new name spaces: " in done.stderr:
        pytest.skip("needs root, or user name spaces")
    assert done.returncode == 0, done.stderr
    answer: dict[str, str | int] = json.loads(done.stdout)
    return answer


@pytest.mark.parametrize(("profile", "getfd", "clone3", "unshare", "unknown"), ANSWERS)
def test_a_profile(profile: str, getfd: str, clone3: str, unshare: str, unknown: str) -> None:
    answer = contained("--profile", profile)
    assert answer["vsock"] == load_profile(profile)["family_errno"] == "EPERM"
    assert (answer["pidfd_getfd"], answer["clone3"]) == (getfd, clone3)
    assert (answer["unshare"], answer["unknown"]) == (unshare, unknown)
    assert answer["tcp"] and answer["pid"] == 1 and answer["uid"] == 0
    assert answer["written"] == "EROFS"


def test_dockers_capabilities() -> None:
    # What `grep CapBnd /proc/self/status` prints in a container of Docker's.
    assert contained("--profile", "docker")["capabilities"] == 0xA804_25FB


def test_kubernetes_restricted() -> None:
    options = ("--user", "1000", "--capabilities", "none", "--no-new-privileges")
    answer = contained("--profile", "kubernetes", *options)
    assert (answer["uid"], answer["capabilities"], answer["no_new_privileges"]) == (1000, 0, 1)
    assert answer["vsock"] == "EPERM"
