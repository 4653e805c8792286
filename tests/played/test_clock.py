"""Signs of a restore that a guest has: the time that its host sends, and its VMClock."""

from __future__ import annotations

import mmap
import struct
import time
from pathlib import Path

import pytest

from vsockets.testing import PlayedFailed, PlayedMachine, PrivateFabric

DAY = 86_400


@pytest.mark.parametrize(
    ("hypervisor", "behind"),
    [("firecracker", True), ("cloud-hypervisor@52", True), ("cloud-hypervisor", False)],
)
def test_a_restored_guests_clock_is_behind(
    fabric: PrivateFabric, hypervisor: str, behind: bool
) -> None:
    machine = fabric.played(hypervisor)
    assert abs(machine.time() - time.time()) < 60
    machine.snapshot()
    machine.restore(asleep=3 * DAY)
    machine.restore(asleep=DAY)
    assert abs(machine.time() - time.time() - 4 * DAY * behind) < 60
    assert behind == any("clock is 345600 s behind" in line for line in machine.log[-2:])
    with pytest.raises(PlayedFailed, match="invalid seconds: -1"):
        machine.restore(asleep=-1)
    machine.reboot()
    assert abs(machine.time() - time.time()) < 60


def read(machine: PlayedMachine) -> tuple[bytes, int, int, int]:
    """Return magic, sequence, disruption marker and generation, as a guest's program reads them."""
    with open(machine.vmclock, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as m:
        assert struct.unpack_from("<IH", m, 4) == (112, 1)
        assert struct.unpack_from("<Q", m, 24) == (1 << 8,)
        return (m[:4], *struct.unpack_from("<IQ", m, 12), *struct.unpack_from("<Q", m, 104))


def test_the_vmclock_reports_restores_and_clones(fabric: PrivateFabric) -> None:
    machine = fabric.played("firecracker@1.15")
    assert read(machine) == (b"VCLK", 0, 0, 0)
    machine.snapshot()
    assert read(machine) == (b"VCLK", 0, 0, 0)  # the source is not a copy
    clones = machine.clone(2)
    machine.restore()
    found = [read(one) for one in (machine, *clones)]
    assert [one[:2] for one in found] == [(b"VCLK", 2)] * 3
    assert len({one[2] for one in found} | {0}) == len({one[3] for one in found} | {0}) == 4
    path = Path(machine.vmclock)
    assert fabric.played("firecracker@1.14").vmclock == fabric.played("qemu").vmclock == ""
    fabric.end_played()
    assert not path.exists()
