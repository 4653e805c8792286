"""Complaints of users of microVMs: the careful agent comes through each, a naive one does not."""

import sys
from pathlib import Path

import naive
import pytest
from host import Client, Inbox, listen
from scenarios import SCENARIOS
from stage import Failed, Stage

from vsockets.testing import PrivateFabric

#: Seconds that a naive agent is given: what it waits for does not come.
IMPATIENCE = 0.4

#: The mistake that each scenario shows.
MISTAKES = {
    "host-connects-first": {"client": naive.AsksOnce},
    "guest-connects-first": {"agent": naive.ConnectsOnce},
    "parent-is-three": {"agent": naive.HostIsTwo},
    "no-attempt": {"client": naive.SubtractsTimeout},
    "ok-without-agent": {"client": naive.OkIsReady},
    "no-ok": {"client": naive.WaitsForReply},
    "first-bytes": {"client": naive.BuffersOk},
    "line-in-pieces": {"client": naive.WritesPieces},
    "next-client": {"agent": naive.ListensForEach},
    "lost-sends": {"agent": naive.TrustsSend},
    "churn": {"client": naive.AsksOnce},
    "stalled": {"client": naive.WaitsForReply},
    "late-reply": {"agent": naive.RunsRepetitions},
    "half-close-of-the-host": {"client": naive.EndsRequestsByShutdown},
    "half-close-of-the-guest": {"agent": naive.EndsReportsByShutdown},
    "silent-after-restore": {"agent": naive.WaitsForOrders},
    "first-connect-after-restore": {"client": naive.AsksOnce},
    "source-of-a-snapshot": {"client": naive.AsksOnce},
    "half-open-at-the-host": {"inbox": naive.ServesInTurn},
    "reset-without-restore": {"agent": naive.ResetMeansRestored},
    "numbers-of-a-restored-agent": {"agent": naive.KeepsItsName},
    "names-of-clones": {"agent": naive.KeepsItsName},
    "clock-stands": {"agent": naive.OwnClock},
    "deaf-after-pause": {"client": naive.WaitsForReply},
    "file-of-a-dead-machine": {"client": naive.FileIsUp},
    "cid-again": {"setup": naive.KnowsByCid},
    "one-port-for-all": {"inbox": naive.AnyIsReady},
}

CASES = [(name, vmm) for name, (_, hypervisors) in SCENARIOS.items() for vmm in hypervisors]


@pytest.fixture(scope="module")
def fabric():
    with PrivateFabric() as fabric:
        yield fabric


@pytest.mark.parametrize(("name", "hypervisor"), CASES)
def test_careful(fabric, name, hypervisor):
    play(name, Stage(fabric.played(hypervisor)))


@pytest.mark.parametrize(("name", "hypervisor"), CASES)
def test_naive(fabric, name, hypervisor):
    stage = Stage(fabric.played(hypervisor), **MISTAKES[name], patience=IMPATIENCE)
    with pytest.raises(Failed):
        play(name, stage)


def play(name, stage):
    try:
        SCENARIOS[name][0](stage)
    finally:
        stage.close()


def test_the_agent_is_a_program_in_a_guest(vsock_fabric):
    machine = vsock_fabric.played("firecracker")
    inbox = Inbox(listen(machine.socket, 52))
    machine.popen([sys.executable, Path(__file__).with_name("agent.py")])
    assert Client(machine.socket).ask("report 2") == "done"
    machine.snapshot()
    machine.restore()
    assert Client(machine.socket).ask("report 1") == "done"
    assert inbox.wait(3) == ["report 0", "report 1", "report 0"]
