"""Fixtures of virtual machines that are booted once for all tests of this directory."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from vsockets.testing import PrivateFabric
from vsockets.vm.guest_image import KernelImage

from . import downloads, image
from .machine import GuestError, Machine
from .rust_machine import RustMachine

#: The common beginning of the guest programs in these tests.
COMMON = """
import os, select, signal, socket, struct, time
AF, ANY = 40, 0xffffffff
def stream(): return socket.socket(AF, socket.SOCK_STREAM)
def dgram(port=ANY):
    s = socket.socket(AF, socket.SOCK_DGRAM); s.bind((ANY, port)); return s
def listener(port, backlog=128):
    s = stream(); s.bind((ANY, port)); s.listen(backlog); return s
def connect(port, cid=2):
    s = stream(); s.connect((cid, port)); return s
def echo(s):
    n = 0
    while data := s.recv(1 << 18):
        s.sendall(data); n += len(data)
    s.shutdown(1)
    while s.recv(4096): pass
    s.close()
    return n
def sizes(s, size, least=128, most=1 << 26):
    for option, value in ((2, most), (1, least), (0, size)):
        s.setsockopt(AF, option, value)
common = True
"""


#: Guest program that sets up the network of :func:`network_card`; ``modules`` are image.NETWORK.
NETWORK_UP = """
for name in modules:
    if os.path.exists(f"/modules/{name}.ko") and not os.path.exists(f"/sys/module/{name}"):
        assert not os.system(f"insmod /modules/{name}.ko")
assert not os.system("ifconfig lo up && ifconfig eth0 10.0.2.15 up")
"""


def network_card(port: int, to: int) -> tuple[str, ...]:
    """Return QEMU arguments for a network card that forwards TCP ``port`` to the guest's ``to``."""
    network = f"user,id=net,hostfwd=tcp:127.0.0.1:{port}-:{to}"
    return ("-netdev", network, "-device", "virtio-net-pci,netdev=net,romfile=")


class Stage:
    """A factory of machines, each with its own directory."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._images: dict[str, Path] = {}
        self._number = 0

    def machine(
        self,
        fabric: PrivateFabric,
        kernel: str,
        *options: str,
        cid: int = 0,
        device: str = "vmci",
        kind: type[Machine] = Machine,
        memory: int = 512,
        arguments: Sequence[str] = (),
        packed: bool = False,
    ) -> Machine:
        """Return a machine that is not running yet; skip the test without QEMU."""
        return kind(
            fabric,
            *self.parts(kernel, device, kind),
            *options,
            cid=cid,
            device=device,
            memory=memory,
            arguments=arguments,
            packed=packed,
        )

    def parts(
        self, kernel: str, device: str, kind: type[Machine] = Machine
    ) -> tuple[KernelImage, Path, Path]:
        """Return a machine's kernel, initrd and directory; skip the test without QEMU."""
        try:
            linux = downloads.kernel(kernel)
            downloads.qemu()
            if issubclass(kind, RustMachine):
                downloads.rust_back_end()
            initrd = self._image(linux, device)
        except downloads.Unavailable as error:
            if os.environ.get("VSOCKETS_REQUIRE_VM"):
                raise
            pytest.skip(f"virtual machines are not available: {error}")
        self._number += 1
        folder = self._folder / str(self._number)
        folder.mkdir()
        return linux, initrd, folder

    def _image(self, linux: KernelImage, device: str) -> Path:
        name = f"{linux.name}-{device}"
        if name not in self._images:
            path = self._folder / f"initrd-{name}"
            path.write_bytes(image.build(linux, device))
            self._images[name] = path
        return self._images[name]


@pytest.fixture(scope="session")
def stage() -> Iterator[Stage]:
    # Paths of Unix sockets are limited to 107 bytes.
    with tempfile.TemporaryDirectory(prefix="vm-", dir="/tmp") as folder:
        yield Stage(Path(folder))


@pytest.fixture(scope="session")
def fabric_of_machines() -> Iterator[PrivateFabric]:
    with PrivateFabric() as fabric:
        yield fabric


class Machines:
    """The running guests that tests share, by kernel and device."""

    def __init__(self, stage: Stage, fabric: PrivateFabric) -> None:
        self._stage = stage
        self._fabric = fabric
        self._running: dict[tuple[str, str], Machine] = {}

    def get(self, kernel: str, device: str = "vmci") -> Machine:
        """Return a running guest; boot it unless an earlier test has left it in order."""
        key = kernel, device
        machine = self._running.pop(key, None)
        if machine is not None and not _is_in_order(machine):
            machine.kill()
            machine = None
        if machine is None:
            machine = self._stage.machine(self._fabric, kernel, device=device).__enter__()
            machine.run(COMMON)
        self._running[key] = machine
        return machine

    def close(self) -> None:
        """Power all guests off."""
        for machine in self._running.values():
            machine.kill()


def _is_in_order(machine: Machine) -> bool:
    with contextlib.suppress(GuestError, TimeoutError, OSError):
        machine.run(COMMON)
        return True
    return False


def unload(machine: Machine, *modules: str) -> None:
    """Remove modules that a test has loaded into a guest's kernel."""
    machine.run(
        """
        for name in modules:
            # A socket holds them for up to eight seconds after its close.
            deadline = time.monotonic() + 30
            while os.path.exists(f"/sys/module/{name}/refcnt") and os.system(f"rmmod {name}"):
                assert time.monotonic() < deadline, open("/proc/modules").read()
                time.sleep(0.1)
        """,
        modules=modules,
    )


@pytest.fixture(scope="session")
def machines(stage: Stage, fabric_of_machines: PrivateFabric) -> Iterator[Machines]:
    """The guests that tests share."""
    machines = Machines(stage, fabric_of_machines)
    yield machines
    machines.close()


@pytest.fixture(scope="module", params=["stable", "newest"])
def machine(request: pytest.FixtureRequest, machines: Machines) -> Machine:
    """A running guest with a VMCI device, with Debian 12's kernel and with the newest backport."""
    return machines.get(request.param)
