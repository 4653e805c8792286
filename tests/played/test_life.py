"""Life of played machines: what is left of connections, listeners and queued data."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

import vsockets
from vsockets.testing import PlayedFailed, PrivateFabric, wait_until

from .test_machine import PATIENCE, ask, call, ended, is_quiet, joined, listen, serve, take


def test_data_and_connects_wait_in_a_paused_machine(fabric: PrivateFabric) -> None:
    machine = fabric.played("firecracker")
    host, guest = joined(machine, 52)
    with host, guest, serve(machine, 53) as server:
        machine.pause()
        host.sendall(b"a")
        guest.sendall(b"b")
        with ask(machine, b"CONNECT 53\n") as waiting:
            assert machine.state == "paused"
            assert is_quiet(host)
            assert is_quiet(guest)
            assert is_quiet(waiting)
            machine.resume()
            assert guest.recv(1) == b"a"
            assert host.recv(1) == b"b"
            assert take(waiting, 3) == b"OK "
            server.accept()[0].close()
    with pytest.raises(PlayedFailed, match="it is running"):
        machine.resume()


@pytest.mark.parametrize(
    ("hypervisor", "silent"),
    [
        ("firecracker", False),
        ("firecracker@1.9", True),
        ("cloud-hypervisor", False),
        ("cloud-hypervisor@51.1", True),
        ("kata", False),
    ],
)
def test_restore(fabric: PrivateFabric, hypervisor: str, silent: bool) -> None:
    """The host's ends close with the old process; the guest's listener stays."""
    machine = fabric.played(hypervisor)
    with serve(machine, 5000) as server:
        host = machine.connect(5000)
        guest, _ = server.accept()
        guest.settimeout(PATIENCE)
        with host, guest:
            machine.pause()
            number = machine.snapshot()
            machine.restore(number)
            if silent:
                assert is_quiet(guest)
                guest.sendall(b"x")  # succeeds, and is lost
                assert ended(guest) == "reset"
            else:
                assert ended(guest) == "end"
            assert ended(host) in ("end", "reset")
        with machine.connect(5000):
            server.accept()[0].close()


def test_the_source_of_a_snapshot(fabric: PrivateFabric) -> None:
    """Firecracker resets the source's guest, too; the host notices when it sends."""
    machine = fabric.played("firecracker")
    host, guest = joined(machine, 52)
    with host, guest:
        machine.snapshot()
        assert ended(guest) == "end"
        assert is_quiet(host)
        host.sendall(b"x")
        assert ended(host) == "end"
    machine = fabric.played("cloud-hypervisor")
    host, guest = joined(machine, 52)
    with host, guest:
        machine.snapshot()
        host.sendall(b"x")
        assert guest.recv(1) == b"x"


def test_queued_data_are_lost_by_a_restore(fabric: PrivateFabric) -> None:
    machine = fabric.played("firecracker")
    with listen(machine, 52) as server, call(machine, 52) as guest:
        host, _ = server.accept()
        with host:
            machine.pause()
            guest.sendall(b"lost")  # succeeds: the device has it
            machine.snapshot()
            machine.restore()
            assert ended(host) in ("end", "reset")
            assert ended(guest) in ("end", "reset")


def test_ports_of_host_ends_start_again(fabric: PrivateFabric) -> None:
    """The first connect after a restore collides with a connection that the guest still has."""
    machine = fabric.played("cloud-hypervisor@49")
    with serve(machine, 5000) as server:
        host = machine.connect(5000)
        guest, _ = server.accept()
        with host, guest:
            machine.snapshot()
            machine.restore()
            with pytest.raises(ConnectionResetError):
                machine.connect(5000)
            with machine.connect(5000):
                server.accept()[0].close()


def test_each_machine_has_its_own_ports_of_host_ends(fabric: PrivateFabric) -> None:
    """No connection of one machine makes a connect of another one fail."""
    machines = [fabric.played("firecracker") for _ in range(3)]
    ends = [joined(machine, 5000) for machine in machines for _ in range(2)]
    ports = [guest.getpeername()[1] for _, guest in ends]
    assert len(set(ports)) == 6
    assert min(ports) >= 1 << 30
    for host, guest in ends:
        guest.sendall(b"x")
        assert host.recv(1) == b"x"
        host.close()
        guest.close()


def test_kill_leaves_a_stale_socket(fabric: PrivateFabric) -> None:
    machine = fabric.played("firecracker")
    with pytest.raises(PlayedFailed, match="no snapshot"):
        machine.restore()
    with serve(machine, 5000) as server:
        machine.snapshot()
        host = machine.connect(5000)
        guest, _ = server.accept()
        with host, guest:
            machine.kill()
            assert ended(host) in ("end", "reset")
            with pytest.raises(ConnectionRefusedError):
                machine.connect(5000)
            with pytest.raises(ConnectionResetError):
                call(machine, 52)
        machine.restore()
        with machine.connect(5000):
            server.accept()[0].close()


def test_connects_that_wait_are_reset_by_a_kill(fabric: PrivateFabric) -> None:
    machine = fabric.played("cloud-hypervisor")
    machine.pause()
    with ThreadPoolExecutor(20) as pool, ask(machine, b"CONNECT 5000\n") as host:
        calls = [pool.submit(call, machine, 52) for _ in range(20)]
        machine.kill()
        assert ended(host) in ("end", "reset")
        for one in calls:
            with pytest.raises(ConnectionResetError):
                one.result()
    machine.reboot()
    with listen(machine, 52) as server, call(machine, 52):
        server.accept()[0].close()


@pytest.mark.parametrize("hypervisor", ["firecracker", "qemu", "nitro"])
def test_reboot_ends_listeners(fabric: PrivateFabric, hypervisor: str) -> None:
    machine = fabric.played(hypervisor)
    host, guest = joined(machine, 5000)
    with host, guest, serve(machine, 5001):
        machine.reboot()
        assert ended(host) in ("end", "reset")
        assert ended(guest) in ("end", "reset")
        with pytest.raises(ConnectionResetError):
            machine.connect(5001)
        with serve(machine, 5001) as server, machine.connect(5001):
            server.accept()[0].close()


@pytest.mark.parametrize("hypervisor", ["firecracker", "qemu"])
def test_another_machine_has_the_cid(fabric: PrivateFabric, hypervisor: str) -> None:
    machine = fabric.played(hypervisor)
    host, guest = joined(machine, 5000)
    with host, guest, serve(machine, 5001):
        machine.snapshot()
        before = machine.cid, machine.socket
        machine.replace()
        assert ended(host) in ("end", "reset")
        assert ended(guest) in ("end", "reset")
        assert (machine.cid, machine.socket) == before
        with pytest.raises(ConnectionResetError):
            machine.connect(5001)
        with pytest.raises(PlayedFailed, match="no snapshot"):
            machine.restore()
    host, guest = joined(machine, 5000)
    host.close()
    guest.close()


def test_a_pause_without_a_snapshot_leaves_the_guest_deaf(fabric: PrivateFabric) -> None:
    """Firecracker 1.16 waits for the guest to acknowledge a reset that it has not sent."""
    machine = fabric.played("firecracker@1.16")
    host, guest = joined(machine, 52)
    with host, guest, serve(machine, 53) as server:
        machine.pause()
        machine.resume()
        host.sendall(b"lost?")
        guest.sendall(b"heard")
        assert take(host, 5) == b"heard"
        with ask(machine, b"CONNECT 53\n") as waiting:
            assert machine.state == "running"
            assert is_quiet(guest)
            assert is_quiet(waiting)
        machine.pause()
        machine.snapshot()
        machine.restore()
        machine.connect(53).close()
        server.accept()[0].close()


@pytest.mark.parametrize(
    ("hypervisor", "again"),
    [
        ("firecracker", False),
        ("firecracker@1.15", False),
        ("firecracker@1.14", True),
        ("cloud-hypervisor", True),
    ],
)
def test_ports_of_host_ends_after_a_restore(
    fabric: PrivateFabric, hypervisor: str, again: bool
) -> None:
    machine = fabric.played(hypervisor)
    ports = []
    with serve(machine, 5000) as server:
        for _ in range(2):
            with machine.connect(5000):
                guest, peer = server.accept()
                ports.append(peer[1])
                guest.close()
            machine.snapshot()
            machine.restore()
    assert (ports[0] == ports[1]) == again


def test_qemu_migrates(fabric: PrivateFabric) -> None:
    machine = fabric.played("qemu")
    with serve(machine, 5000) as server:
        host = machine.connect(5000)
        guest, _ = server.accept()
        with host, guest:
            machine.snapshot()
            machine.kill()
            machine.restore()
            assert ended(host) in ("end", "reset")
            assert ended(guest) in ("end", "reset")
        with machine.connect(5000):
            server.accept()[0].close()
    with pytest.raises(PlayedFailed, match="qemu has no pause"):
        machine.pause()


def test_clones_have_paths_of_their_own(fabric: PrivateFabric) -> None:
    machine = fabric.played("firecracker")
    with pytest.raises(PlayedFailed, match="expected one before clone"):
        machine.clone()
    machine.snapshot()
    clones = machine.clone(3)
    assert len({one.socket for one in [machine, *clones]}) == 4
    for clone in clones:
        host, guest = joined(clone, 5000)
        host.close()
        guest.close()


def test_programs_end_with_the_guest(fabric: PrivateFabric) -> None:
    machine = fabric.played("cloud-hypervisor")
    program = machine.popen(["sleep", "600"])
    machine.change_cid(770)
    assert program.poll() is not None
    assert vsockets.get_local_cid(context=machine.context) == machine.cid == 770
    host, guest = joined(machine, 5000)
    host.close()
    guest.close()
    wait_until(lambda: machine.describe()["connections"] == 0, "the device", PATIENCE)
