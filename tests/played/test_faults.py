"""Faults on demand."""

from __future__ import annotations

import os
import time

import pytest

from vsockets.testing import PlayedFailed, PlayedMachine, PrivateFabric

from .test_machine import ask, call, ended, is_quiet, joined, listen, serve, take


@pytest.fixture(scope="module")
def machine(fabric: PrivateFabric) -> PlayedMachine:
    return fabric.played("firecracker")


def test_ok_is_not_followed_by_data(machine: PlayedMachine) -> None:
    machine.fault("ok-without-data")
    host, guest = joined(machine, 52)
    with host, guest:
        guest.sendall(b"greeting")
        host.sendall(b"x")
        assert guest.recv(1) == b"x"
        assert is_quiet(host)


def test_ok_for_a_listener_that_has_closed(machine: PlayedMachine) -> None:
    machine.fault("stale-ok")
    with machine.connect(53) as host:
        assert ended(host) == "end"


def test_no_answer_then_a_late_one(machine: PlayedMachine) -> None:
    machine.fault("no-ok")
    machine.fault("late-ok", seconds=0.1)
    with serve(machine, 54) as server:
        with ask(machine, b"CONNECT 54\n") as silent:
            assert len(machine.log)
            before = time.monotonic()
            machine.connect(54).close()
            assert time.monotonic() - before >= 0.1
            assert is_quiet(silent)
        server.accept()[0].close()


def test_garbage_depends_on_the_seed(machine: PlayedMachine) -> None:
    lines = []
    for seed in (1, 1, 2):
        machine.fault("garbage", seed=seed)
        with ask(machine, b"CONNECT 55\n") as host:
            lines.append(host.makefile("rb").read())
    assert lines[0] == lines[1] != lines[2]
    machine.fault("garbage")
    with pytest.raises(ConnectionAbortedError, match="invalid reply"):
        machine.connect(55)


@pytest.mark.parametrize("name", ["early-eof", "stall"])
def test_some_bytes_and_no_more(machine: PlayedMachine, name: str) -> None:
    counts = []
    for _ in range(2):
        machine.fault(name, seed=3)
        with listen(machine, 57) as server, call(machine, 57) as guest:
            host, _ = server.accept()
            with host:
                guest.sendall(bytes(100))
                found = host.recv(100)
                counts.append(len(found))
                assert ended(host) in ("end", "reset") if name == "early-eof" else is_quiet(host)
        _unlink(machine, 57)
    assert counts[0] == counts[1] < 100


def test_slow(machine: PlayedMachine) -> None:
    machine.fault("slow", seconds=0.02)
    host, guest = joined(machine, 58)
    with host, guest:
        host.sendall(bytes(5))
        assert take(guest, 5) == bytes(5)


def test_sends_that_succeed_and_are_lost(machine: PlayedMachine) -> None:
    machine.fault("lost-writes")
    with listen(machine, 59) as server, call(machine, 59) as guest:
        host, _ = server.accept()
        with host:
            guest.sendall(b"lost")
            guest.close()
            assert host.recv(4) == b""
    _unlink(machine, 59)


def test_half_open(machine: PlayedMachine) -> None:
    machine.fault("half-open")
    host, guest = joined(machine, 60)
    with host, guest:
        assert ended(guest) == "end"
        assert is_quiet(host)
        host.sendall(b"x")
        assert ended(host) == "end"


def test_a_port_is_used_again(machine: PlayedMachine) -> None:
    with serve(machine, 61) as server:
        peers = []
        for _ in range(2):
            with machine.connect(61) as host:
                guest, peer = server.accept()
                guest.close()
                assert ended(host) == "end"
                peers.append(peer)
                machine.fault("reused-port")
        machine.connect(61).close()
    assert peers[0] == peers[1]


def test_a_fault_spares_other_ports(machine: PlayedMachine) -> None:
    machine.fault("stale-ok", port=64)
    machine.fault("garbage", port=65)
    with serve(machine, 63) as server:
        machine.connect(63).close()
        server.accept()[0].close()
    with pytest.raises(ConnectionAbortedError, match="invalid reply"):
        machine.connect(65)
    assert [one["port"] for one in machine.describe()["faults"]] == [64]
    machine.connect(64).close()
    with pytest.raises(PlayedFailed, match="port: -1 is out of range"):
        machine.fault("stall", port=-1)


def test_each_strike_is_logged(machine: PlayedMachine) -> None:
    machine.fault("stale-ok", seed=7, times=2)
    for _ in range(2):
        machine.connect(62).close()
    line = f"machine {machine.cid} (firecracker): fault stale-ok (seed 7) strikes: CONNECT 62"
    assert [one.startswith(line) for one in machine.log[-2:]] == [True, True]
    assert machine.describe()["faults"] == []


def test_invalid_faults(fabric: PrivateFabric, machine: PlayedMachine) -> None:
    with pytest.raises(PlayedFailed, match="name: 'x' is unknown, expected no-ok"):
        machine.fault("x")
    with pytest.raises(PlayedFailed, match="times: 0"):
        machine.fault("stall", times=0)
    with pytest.raises(PlayedFailed, match="need a machine with hybrid vsock"):
        fabric.played("qemu").fault("stall")


def _unlink(machine: PlayedMachine, port: int) -> None:
    os.unlink(machine.port_path(port))
