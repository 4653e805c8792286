"""``vsock connect -u`` and ``vsock listen -u``."""

from __future__ import annotations

import socket as stdlib

import vsockets
from vsockets.testing import PrivateFabric, wait_until

from .vsock import PATIENCE, PROGRAM, Vsock


def test_a_conversation(vsock: Vsock) -> None:
    listener = vsock.start("listen", "any", "-u")
    client = vsock.start("connect", "host", listener.port(), "-u", "-q", "0")
    client.write(b"ping\n")
    assert listener.read_line() == "ping"
    listener.write(b"pong\n")
    assert client.read_line() == "pong"
    client.finish()


def test_answers_go_to_the_last_sender_and_sources_are_shown(
    vsock: Vsock, fabric: PrivateFabric
) -> None:
    guest = fabric.guest()
    listener = vsock.start("listen", "5000", "-u", "-v")
    listener.error_line()
    first = vsock.start("connect", "host", "5000", "-u", "--wait", PATIENCE, "-p", "6000")
    first.write(b"1\n")
    assert listener.error_line() == "2 bytes from 2:6000"
    second = vsock.start(
        *("run", "--cid", guest.cid, *PROGRAM, "connect", "host", "5000", "-u", "-p", "7000")
    )
    second.write(b"2\n")
    assert listener.error_line() == f"2 bytes from {guest.cid}:7000"
    listener.write(b"for the second\n")
    assert second.read_line() == "for the second"
    first.write(b"1\n")
    assert listener.error_line() == "2 bytes from 2:6000"
    listener.write(b"for the first\n")
    assert first.read_line() == "for the first"


def test_datagrams_of_other_sources_are_dropped(vsock: Vsock, fabric: PrivateFabric) -> None:
    with (
        vsockets.socket(type=stdlib.SOCK_DGRAM, context=fabric.host) as peer,
        vsockets.socket(type=stdlib.SOCK_DGRAM, context=fabric.host) as stranger,
    ):
        peer.bind((2, 5001))
        peer.settimeout(PATIENCE)
        client = vsock.start("connect", "local", "5001", "-u")
        client.write(b"anybody?")
        _, source = peer.recvfrom(100)
        stranger.sendto(b"the stranger\n", source)
        peer.sendto(b"the peer\n", source)
        assert client.read_line() == "the peer"


def test_wait_for_the_receiver(vsock: Vsock, fabric: PrivateFabric) -> None:
    refusals = fabric.control.status()["refusals"]
    client = vsock.start("connect", "host", "5002", "-u", "--wait", PATIENCE, "-q", "0")
    client.write(b"hello\n")
    wait_until(lambda: fabric.control.status()["refusals"] > refusals + 1, "it to try twice")
    listener = vsock.start("listen", "5002", "-u")
    assert listener.read_line() == "hello"
    client.finish()


def test_nobody_there(vsock: Vsock) -> None:
    done = vsock("connect", "host", "5003", "-u", data=b"hello", expect=1)
    assert done.stderr.startswith("vsock: send to 2:5003: no datagram socket is bound there")


def test_timeouts_end_the_relay(vsock: Vsock, fabric: PrivateFabric) -> None:
    assert vsock.fails("listen", "5005", "-u", "-w", "0.1") == "no datagram arrived within 0.1 s"
    with vsockets.socket(type=stdlib.SOCK_DGRAM, context=fabric.host) as peer:
        peer.bind((2, 5004))
        vsock("connect", "host", "5004", "-u", "-w", "0.1", data=b"hello")
        assert peer.recv(100) == b"hello"
