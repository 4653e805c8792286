"""``vsock perf``: every measurement over every kind of address.  No value is judged."""

from __future__ import annotations

import errno
import importlib.util
import json
import socket
from pathlib import Path

import pytest

import vsockets
from vsockets.perf.protocol import REQUEST_SIZE
from vsockets.testing import PrivateFabric

from .vsock import PATIENCE, Running, Vsock

BRIEFLY = ("--time", 0.05, "--rounds", 1)


def serve(vsock: Vsock, *addresses: str) -> tuple[Running, list[str]]:
    running = vsock.start("perf", "serve", *addresses)
    lines = [running.error_line() for _ in addresses]
    return running, [line.removeprefix("listening on ") for line in lines]


def test_everything_within_this_machine(vsock: Vsock) -> None:
    measurements = vsock.json("perf", "run", *BRIEFLY)
    names = [measurement["name"] for measurement in measurements]
    assert names == [
        *("send", "receive", "round trip", "connects"),
        *("datagrams", "datagram round trip"),
    ]
    for measurement in measurements:
        schemes = [result["address"].partition(":")[0] for result in measurement["results"]]
        datagrams = "datagram" in measurement["name"]
        assert schemes == (
            ["vsock-dgram", "unix-dgram", "udp"] if datagrams else ["vsock", "unix", "tcp"]
        )
        assert measurement["results"][0]["ratio"] == 1
        for result in measurement["results"]:
            assert result["value"] > 0
            details = result["details"]
            if "p50" in details:
                assert details["min"] <= details["p50"] <= details["p99"] <= details["max"]
            if "sent" in details:
                assert 0 <= details["lost"] <= details["sent"]
        if measurement["name"] == "datagrams":
            for result in measurement["results"][:2]:  # senders wait for a full receiver
                assert result["details"]["lost"] == 0


def test_from_a_guest_and_in_words(vsock: Vsock, fabric: PrivateFabric, tmp_path: Path) -> None:
    running, (address, hybrid) = serve(vsock, "vsock::any", f"unix:{tmp_path}/p")
    guest = fabric.guest()
    vsock.environment["VSOCKETS_CONTEXT"] = str(guest.folder)
    text = vsock("perf", "run", address, *BRIEFLY, "--test", "round-trip").stdout
    title, heading, row = text.splitlines()
    assert title == "round trip, 64 bytes, us (less is better)"
    assert heading.split()[-3:] == ["P99", "P99.9", "MAX"]
    assert row.split()[0] == address
    assert hybrid == f"unix:{tmp_path}/p"
    running.process.terminate()
    running.finish(expect=130)


def test_through_a_hybrid_vsock(vsock: Vsock, tmp_path: Path) -> None:
    """A simulated hybrid device: one line each way, then the server."""
    _, (address,) = serve(vsock, f"unix:{tmp_path}/server")
    with socket.socket(socket.AF_UNIX) as device:
        device.bind(str(tmp_path / "v.sock"))
        device.listen()
        device.settimeout(PATIENCE)
        running = vsock.start(
            *("perf", "run", f"vsock-mux:{tmp_path}/v.sock:52", "--test", "receive", "--json"),
            *BRIEFLY,
        )
        client, _ = device.accept()
        with client, socket.socket(socket.AF_UNIX) as server:
            client.settimeout(PATIENCE)
            assert client.recv(100) == b"CONNECT 52\n"
            client.sendall(b"OK 1073741824\n")
            server.connect(address.removeprefix("unix:"))
            server.settimeout(PATIENCE)
            server.sendall(client.recv(REQUEST_SIZE))
            count = 0
            while data := server.recv(65536):
                client.sendall(data)
                count += len(data)
        printed, _ = running.finish()
    (measurement,) = json.loads(printed)
    assert measurement["results"][0]["details"]["bytes"] == count > 0


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="an extra")
def test_plots(vsock: Vsock, tmp_path: Path) -> None:
    _, (address,) = serve(vsock, "vsock::any")
    file = tmp_path / "plot.svg"
    vsock("perf", "run", address, *BRIEFLY, "--test", "send", "--plot", file)
    assert file.read_bytes().startswith(b"<?xml")


def test_silent_and_foreign_servers_are_reported(vsock: Vsock, fabric: PrivateFabric) -> None:
    with (
        vsockets.create_server((2, vsockets.VMADDR_PORT_ANY), context=fabric.host) as other,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent,
    ):
        silent.bind(("127.0.0.1", 0))
        something_else = vsock.start(
            *("perf", "run", f"vsock:host:{other.getsockname()[1]}", "--test", "send"),
            *("--time", 0.01, "--rounds", 1),
        )
        sock, _ = other.accept()
        sock.settimeout(PATIENCE)
        with sock:
            while sock.recv(65536):
                pass
        assert "the server has closed the stream" in something_else.finish(expect=1)[1]
        vsock.fail(
            ("perf run vsock:host:9 --time 0.1", 1, "no server listens there"),
            (
                f"perf run udp:127.0.0.1:{silent.getsockname()[1]} --time 0.1 --rounds 1",
                1,
                "the server does not reply",
            ),
            ("perf run udp:127.0.0.1:1 --test send", 2, "--test: not supported"),
        )


def test_invalid_clients_do_not_disturb_the_server(vsock: Vsock) -> None:
    running, (stream, datagram) = serve(vsock, "tcp:127.0.0.1:0", "udp:127.0.0.1:0")
    port = int(stream.rpartition(":")[2])
    for nonsense in (b"", b"GET / HTTP/1.1\r\n\r\n", b"VSP1\x09" + bytes(11)):
        with socket.create_connection(("127.0.0.1", port), PATIENCE) as sock:
            sock.sendall(nonsense)
            try:
                sock.shutdown(socket.SHUT_WR)
                assert sock.recv(1) == b""
            except OSError as error:
                if error.errno not in (errno.ECONNRESET, errno.ENOTCONN):
                    raise  # the server closed with unread bytes
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for nonsense in (b"", b"VSP1", b"VSP1\x09" + bytes(30)):
            sock.sendto(nonsense, ("127.0.0.1", int(datagram.rpartition(":")[2])))
    results = vsock.json("perf", "run", stream, datagram, *BRIEFLY, "--test", "connects")
    assert results[0]["results"][0]["value"] > 0
    assert running.process.poll() is None
