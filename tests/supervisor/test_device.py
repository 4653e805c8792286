"""A machine that has a ``/dev/vsock`` of its own: it is opened, and never asked anything."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from tools.vsock import PROGRAM, Vsock

#: A mount namespace whose /dev has a /dev/vsock, which is /dev/null by another name.
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


def test_its_answers_are_the_fabrics(vsock: Vsock, tmp_path: os.PathLike[str]) -> None:
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
