"""Ports below 1024 in a guest that grants them: without a privilege, in that guest only."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Sequence

import pytest

from cli.vsock import PATIENCE, PROGRAM
from vsockets import Attachment
from vsockets.testing import PrivateFabric

#: Runs a program without a capability; does nothing if this process does not have it.
WITHOUT = ("setpriv", "--bounding-set=-all", "--inh-caps=-all", "--") * (os.geteuid() == 0)

#: Binds the port in its argument with each type of socket, and prints the results.
BIND = """
import errno, socket, sys
{setup}
for kind in socket.SOCK_STREAM, socket.SOCK_SEQPACKET, socket.SOCK_DGRAM:
    try:
        socket.socket(socket.AF_VSOCK, kind).bind((socket.VMADDR_CID_ANY, int(sys.argv[1])))
        print(0)
    except OSError as error:
        print(error.errno)
"""
WITH_THE_LIBRARY = (sys.executable, "-c", BIND.format(setup="import vsockets; vsockets.install()"))
SUPERVISED = (sys.executable, "-c", BIND.format(setup=""))


def outcomes(fabric: PrivateFabric, place: Attachment, *command: str) -> list[int]:
    done = subprocess.run(
        command, env=fabric.environment(place), capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    return list(map(int, done.stdout.split()))


@pytest.mark.parametrize("supervised", [False, True], ids=["library", "supervised"])
def test_a_program_without_the_capability(vsock_fabric: PrivateFabric, supervised: bool) -> None:
    """The supervisor may have it, as root: the program does not."""

    def bind(place: Attachment, port: int) -> list[int]:
        command: Sequence[str] = (*WITHOUT, *WITH_THE_LIBRARY)
        if supervised:
            run = (*PROGRAM, "run", "--cid", str(place.cid), "--")
            command = (*run, *WITHOUT, *SUPERVISED)
        return outcomes(vsock_fabric, place, *command, str(port))

    granted, plain = vsock_fabric.guest(reserved_ports=True), vsock_fabric.guest()
    assert bind(granted, 22) == bind(granted, 0) == bind(granted, 1023) == [0, 0, 0]
    for place in (plain, vsock_fabric.host):
        assert bind(place, 1023) == [errno.EACCES] * 3
        assert bind(place, 1024) == [0, 0, 0]


def test_a_guest_of_another_user_is_refused(vsock_fabric: PrivateFabric) -> None:
    other = os.geteuid() + 1
    with pytest.raises(PermissionError, match="reserved ports: the guest belongs to user"):
        vsock_fabric.guest(3, owner=other, reserved_ports=True)
    assert not [row for row in vsock_fabric.control.contexts() if row["cid"] == 3]
    vsock_fabric.guest(3, owner=os.geteuid(), reserved_ports=True)


def test_a_lease_does_not_add_them_to_an_existing_guest(vsock_fabric: PrivateFabric) -> None:
    control = vsock_fabric.control
    control.add_context(3, lease=True)
    with pytest.raises(FileExistsError, match="without reserved ports"):
        control.add_context(3, lease=True, reserved_ports=True)
    control.add_context(4, lease=True, reserved_ports=True)
    assert control.add_context(4, lease=True, reserved_ports=True)["reserved_ports"]
    assert control.add_context(4, lease=True)["reserved_ports"]
