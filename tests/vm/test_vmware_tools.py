"""Guests with Debian 12's and 13's programs: their open-vm-tools, and ``vsock guestinfo serve``."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vsockets.testing import PrivateFabric, wait_until

from . import downloads, image
from .conftest import Stage
from .machine import PATIENCE, Machine

pytestmark = pytest.mark.timeout(300)

#: Functions that run tools.  ``in`` on VMware's port is allowed to all programs by VMware; under
#: emulation the guest's kernel has to allow it, to a thread and its children (ioperm(2)).
TOOLS = """
import ctypes, os, subprocess
libc = ctypes.CDLL(None, use_errno=True)
def allow_port():
    assert libc.ioperm(0x5658, 4, 1) == 0, os.strerror(ctypes.get_errno())
def tool(*words, user=0):
    allow_port()
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, user=user)
    return done.returncode, done.stdout, done.stderr
def daemon():
    allow_port()
    return subprocess.Popen(["vmtoolsd"])
common = True
result = tool("vmware-checkvm")
"""

_SHUTDOWN = b"#!/bin/busybox sh\necho shutdown $* >/dev/console\nexec poweroff -f\n"


class Service:
    """``vsock guestinfo`` on the fabric of the machines."""

    def __init__(self, fabric: PrivateFabric) -> None:
        self._program = (sys.executable, "-m", "vsockets.cli", "--dir", str(fabric.folder))

    def start(self, state: Path) -> subprocess.Popen[str]:
        """Start to serve."""
        command = [*self._program, "guestinfo", "serve", "--state", str(state)]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        assert "serving VMware Tools" in process.stderr.readline()
        return process

    def __call__(self, *arguments: object) -> str:
        """Run a command, and return what it prints."""
        command = [*self._program, "guestinfo", *map(str, arguments)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def guest(self, cid: int) -> dict[str, Any]:
        """Return what is known of a guest."""
        (found,) = [one for one in json.loads(self("ls", "--json")) if one["cid"] == cid]
        assert isinstance(found, dict)
        return found


@pytest.fixture(scope="module")
def service(
    fabric_of_machines: PrivateFabric, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    service = Service(fabric_of_machines)
    process = service.start(tmp_path_factory.mktemp("guestinfo") / "state")
    yield service
    process.terminate()
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 0


@pytest.fixture(scope="module", params=["stable", "newest"])
def machine(
    request: pytest.FixtureRequest,
    stage: Stage,
    fabric_of_machines: PrivateFabric,
    service: Service,
) -> Iterator[Machine]:
    """A machine with Debian 12's or 13's kernel, programs and tools."""
    linux, _, folder = stage.parts(request.param, "vmci")
    files = {
        **downloads.ctypes_library(),
        **downloads.vmware_tools(request.param),
        "/sbin/shutdown": _SHUTDOWN,
        "/etc/passwd": b"root:x:0:0:root:/:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n",
    }
    initrd = folder / "initrd"
    initrd.write_bytes(image.build(linux, "vmci", files, downloads.userland(request.param)))
    with Machine(fabric_of_machines, linux, initrd, folder, memory=768) as machine:
        service("enable", machine.cid)
        assert machine.run(TOOLS)[1] == "VMware software version 6 (good)\n"
        yield machine


def test_programs_of_each_release(machine: Machine) -> None:
    """The guests of all other tests have Debian 12's busybox and Python."""
    version = {"stable": (3, 11), "newest": (3, 13)}[machine.kernel]
    assert machine.run("import sys; result = sys.version_info[:2]") == version
    assert machine.run("import os; result = os.popen('busybox uname').read()") == "Linux\n"


def test_unmodified_tools(machine: Machine, service: Service) -> None:
    def ask(text: str, user: int = 0) -> tuple[int, str, str]:
        found = machine.run(
            "result = tool('vmtoolsd', '--cmd', text, user=user)", text=text, user=user
        )
        assert isinstance(found, tuple)
        return found

    service("set", machine.cid, "userdata", "#cloud-config")
    assert ask("info-get guestinfo.userdata") == (0, "#cloud-config\n", "")
    assert ask("info-get guestinfo.missing")[::2] == (1, "No value found\n")
    assert ask("info-get guestinfo.userdata", user=65534)[::2] == (1, "Permission denied\n")
    assert ask("info-set guestinfo.userdata ---")[0] == 0
    assert service("get", machine.cid, "userdata") == "---\n"
    big = "x" * 60_000
    service("set", machine.cid, "big", big)
    assert ask("info-get guestinfo.big") == (0, big + "\n", "")

    machine.run("daemon()")
    wait_until(lambda: service.guest(machine.cid)["running"], "the daemon to register", PATIENCE)
    claims = service.guest(machine.cid)["claims"]
    assert claims["tools"].startswith("open-vm-tools 1")
    service("send", machine.cid, "power-on")
    wait_until(
        lambda: service.guest(machine.cid)["claims"].get("state", "").startswith("powered on"),
        "the scripts to run",
        PATIENCE,
    )
    service("send", machine.cid, "halt")
    assert machine.qemu is not None
    machine.qemu.wait(PATIENCE)
    assert "shutdown -h now" in machine.console
