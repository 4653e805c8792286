"""Complaints of users of microVMs, each as a test of the agent and of its host."""

import sys
from pathlib import Path

import pytest
from host import Inbox, connect, expect

from vsockets.testing import wait_until

AGENT = Path(__file__).with_name("agent.py")

#: The first resets a restored guest's connections at once; with the second they fall silent.
HYPERVISORS = ["firecracker", "cloud-hypervisor@51"]


class Machine:
    """A played machine with the agent in it."""

    def __init__(self, fabric, hypervisor, fault=None):
        self.played = fabric.played(hypervisor)
        self.path = self.played.socket
        self.inbox = Inbox(self.path)
        if fault is not None:
            self.played.fault(fault)
        self.played.popen([sys.executable, AGENT])

    def ask(self, request):
        """Return a connection on which the agent has done what ``request`` says."""
        sock = connect(self.path, 5000)
        sock.settimeout(20)
        sock.sendall(request)
        expect(sock, b"done")
        return sock


@pytest.fixture
def machine(vsock_fabric, request):
    return Machine(vsock_fabric, getattr(request, "param", "firecracker"))


def test_the_host_connects_before_the_agent_listens(machine):
    machine.ask(b"report 1\n").close()
    assert machine.inbox.wait(1) == ["report 0"]


def test_ok_does_not_mean_that_the_agent_answers(machine):
    """OK for a closed listener, OK without data, an invalid line, end of stream, silence."""
    machine.ask(b"ready\n").close()
    for name in ("stale-ok", "ok-without-data", "garbage", "early-eof", "no-ok"):
        machine.played.fault(name, seed=1)
    machine.ask(b"done\n").close()
    assert not machine.played.describe()["faults"]


def test_the_agents_connection_falls_silent(vsock_fabric):
    """Its writes succeed; no acknowledgement comes, and no end of stream."""
    machine = Machine(vsock_fabric, "firecracker", fault="lost-writes")
    wait_until(lambda: not machine.played.describe()["faults"], "the agent's connect", 20)
    machine.ask(b"report 1\n").close()
    assert machine.inbox.wait(1) == ["report 0"]


@pytest.mark.parametrize("machine", HYPERVISORS, indirect=True)
def test_no_report_is_lost_or_repeated_by_restores(machine):
    """Half-open connections, writes that succeed and are lost, a port that collides."""
    open_during_restore = machine.ask(b"report 1\n")
    assert machine.inbox.wait(1) == ["report 0"]
    for round in range(1, 3):
        machine.played.fault("lost-writes")
        machine.played.snapshot()
        machine.played.restore()
        machine.ask(b"report 5\n").close()
        machine.played.pause()
        machine.played.snapshot()
        machine.played.resume()  # the source goes on; with Firecracker it sees a reset, too
        assert len(machine.inbox.wait(1 + 5 * round)) == 1 + 5 * round
    assert machine.inbox.reports[1:] == [f"report {number}" for number in range(5)] * 2
    assert open_during_restore.recv(1) == b""


def test_a_crash_of_the_hypervisor(machine):
    machine.ask(b"ready\n").close()
    machine.played.snapshot()
    machine.played.kill()
    with pytest.raises(ConnectionRefusedError):
        connect(machine.path, 5000, seconds=0.1)
    machine.played.restore()
    machine.ask(b"report 2\n").close()
    assert machine.inbox.wait(2) == ["report 0", "report 1"]


def test_each_machine_has_an_inbox_of_its_own(vsock_fabric):
    """All agents report to port 52."""
    machines = [Machine(vsock_fabric, "firecracker") for _ in range(2)]
    for count, machine in enumerate(machines, 1):
        machine.ask(b"report %d\n" % count).close()
    assert [len(machine.inbox.wait(count)) for count, machine in enumerate(machines, 1)] == [1, 2]
