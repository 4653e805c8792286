"""``/dev/vsock``: the machine's own is opened, but its ioctls are answered by the fabric."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from cli.vsock import PROGRAM, Vsock
from vsockets.supervisor.arch import this_architecture

#: Creates a mount namespace whose /dev/vsock is a copy of /dev/null.
MACHINE = """
set -e
mount -t tmpfs -o mode=755,dev none "$0"
for name in null zero urandom tty; do cp -a /dev/$name "$0"; done
cp -a /dev/null "$0/vsock"
mount --bind "$0" /dev
exec "$@"
"""
PROGRAM_IN_IT = """
import fcntl, os
fd = os.open("/dev/vsock", os.O_RDWR)
cid = bytearray(4)
fcntl.ioctl(fd, 0x7b9, cid)
print(os.readlink(f"/proc/self/fd/{fd}"), fcntl.ioctl(fd, 0x7b8, bytes(4))[0])
print(int.from_bytes(cid, "little"))
"""


def test_the_fabric_answers_the_devices_ioctls(vsock: Vsock, tmp_path: os.PathLike[str]) -> None:
    isolated = ["unshare", "--mount", "--propagation", "private"]
    machine = [*isolated, "sh", "-c", MACHINE, str(tmp_path)]
    if os.getuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("only root has a mount namespace")
    if subprocess.run([*machine, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("no mount namespace, or no device, may be made here")
    command = [*PROGRAM, "run", "--cid", "79", sys.executable, "-c", PROGRAM_IN_IT]
    done = subprocess.run(
        [*machine, *command], env=vsock.environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["/dev/vsock", "40", "79"]


#: All ways of a C program to check for it.
LOOK = """
import ctypes, errno, os, stat, sys
numbers = dict(pair.split("=") for pair in sys.argv[1:])
libc = ctypes.CDLL(None, use_errno=True)
here, path, buffer = -100, b"/dev/vsock", ctypes.create_string_buffer(256)
def call(name, *arguments):
    if int(numbers[name]) < 0: return "ok"
    failed = libc.syscall(ctypes.c_long(int(numbers[name])), *arguments) != 0
    return errno.errorcode[ctypes.get_errno()] if failed else "ok"
print(call("stat", path, buffer), call("lstat", path, buffer))
print(call("statx", here, path, 0, 0x7ff, buffer), call("newfstatat", here, path, None, 0))
print(call("access", path, 6), call("faccessat", here, path, 6), call("faccessat", here, path, 1))
print(call("faccessat2", here, path, 6, 0x200), call("faccessat2", here, path, 6, 1))
found = os.stat("/dev/vsock")
assert os.lstat("/dev/vsock") == found == os.stat(b"/dev/vsock")
assert os.path.exists("/dev/vsock") and os.path.samefile("/dev/vsock", "/dev/vsock")
print(stat.filemode(found.st_mode), os.major(found.st_rdev), found.st_nlink, found.st_uid)
for other in ("/dev/vsock2", "/dev/vsoc", "/dev/null/vsock"):
    try: os.stat(other)
    except OSError as error: print(errno.errorcode[error.errno])
print(os.stat("/dev/null").st_rdev == os.makedev(1, 3), os.access("/dev/null", os.W_OK))
"""


def test_programs_find_the_device(vsock: Vsock) -> None:
    machine = this_architecture()
    names = ("stat", "lstat", "newfstatat", "statx", "access", "faccessat", "faccessat2")
    numbers = [f"{name}={getattr(machine, name)}" for name in names]
    done = vsock("run", "--device", sys.executable, "-c", LOOK, *numbers)
    assert done.stdout.splitlines() == [
        *("ok ok", "ok EFAULT", "ok ok EACCES", "ok EINVAL"),
        "crw-rw-rw- 10 1 0",
        *("ENOENT", "ENOENT", "ENOTDIR"),
        "True True",
    ]


def test_programs_in_a_shell_find_the_device(vsock: Vsock) -> None:
    script = "test -c /dev/vsock && test -w /dev/vsock && stat -c %A,%t /dev/vsock"
    assert vsock("run", "--device", "sh", "-c", script).stdout == "crw-rw-rw-,a\n"
