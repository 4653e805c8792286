"""The suite of the agent: it plays the host, and the agent runs in guest 3."""

import subprocess
import sys
from pathlib import Path

import pytest

import vsockets

AGENT = Path(__file__).with_name("agent.py")


class Host:
    """A connection to the agent."""

    def __init__(self, fabric):
        self.sock = vsockets.create_connection((3, 5000), context=fabric.host)
        self.replies = self.sock.makefile()

    def ask(self, request):
        self.sock.sendall(f"{request}\n".encode())
        return self.replies.readline().rstrip("\n")


@pytest.fixture
def fabric(vsock_fabric):
    """A fabric in which the agent serves."""
    guest = vsock_fabric.guest(3)
    command = [sys.executable, AGENT]
    agent = vsock_fabric.popen(guest, command, stdout=subprocess.PIPE, text=True)
    assert agent.stdout.readline() == "ready\n"
    return vsock_fabric


def test_replies(fabric):
    host = Host(fabric)
    assert host.ask("ping") == "pong from context 3"
    assert host.ask("add 1 2 3") == "6"
    assert host.ask("dance") == "unknown request"


def test_two_clients_at_once(fabric):
    one, two = Host(fabric), Host(fabric)
    assert [two.ask("add 2"), one.ask("add 1")] == ["2", "1"]


def test_another_guest_does_not_reach_it(fabric):
    other = fabric.guest(4)
    with pytest.raises(OSError, match="No route to host"):
        vsockets.create_connection((3, 5000), context=other)


def test_a_suspended_machine_loses_its_connections(fabric):
    host = Host(fabric)
    assert host.ask("ping") == "pong from context 3"
    fabric.control.suspend(3)
    with pytest.raises(ConnectionError):
        host.ask("ping")
    fabric.control.resume(3)
    assert Host(fabric).ask("ping") == "pong from context 3"
