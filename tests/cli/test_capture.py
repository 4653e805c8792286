"""``vsock capture``, read by tshark."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import stat
import subprocess
from pathlib import Path

import pytest

import vsockets
from capture.dissecting import CONNECT, DISCONNECT, PAYLOAD, dissect
from vsockets.testing import PrivateFabric, wait_until

from .vsock import PATIENCE, Running, Vsock

pytestmark = pytest.mark.skipif(shutil.which("tshark") is None, reason="needs tshark")


def start(vsock: Vsock, *arguments: object) -> tuple[Running, int]:
    running = vsock.start("capture", *arguments)
    found = re.fullmatch(r"listening on \S+:(\d+)", running.error_line())
    assert found
    return running, int(found[1])


def end(running: Running) -> None:
    running.process.send_signal(signal.SIGTERM)
    running.finish()


def test_a_stream(vsock: Vsock, fabric: PrivateFabric, tmp_path: Path) -> None:
    guest = fabric.guest()
    file = tmp_path / "stream.pcap"
    running, port = start(vsock, "-w", file, "vsock::any", "exec:cat", "-s", 8)
    with vsockets.create_connection((2, port), PATIENCE, context=guest) as sock:
        client = "{}:{}".format(*sock.getsockname())
        for question in (b"first", b"second, cut"):
            sock.sendall(question)
            assert sock.recv(100) == question
        sock.shutdown(socket.SHUT_WR)
        assert sock.recv(1) == b""
    end(running)
    host = f"2:{port}"
    assert dissect(file) == [
        (CONNECT, client, host, 32, b""),
        (PAYLOAD, client, host, 32 + 5, b"first"),
        (PAYLOAD, host, client, 32 + 5, b"first"),
        (PAYLOAD, client, host, 32 + 11, b""),  # tshark shows no truncated payload
        (PAYLOAD, host, client, 32 + 11, b""),
        (DISCONNECT, client, host, 32, b""),
        (DISCONNECT, host, client, 32, b""),
    ]
    assert stat.S_IMODE(os.stat(file).st_mode) == 0o600


def test_much_data_is_all_there(vsock: Vsock, fabric: PrivateFabric, tmp_path: Path) -> None:
    file = tmp_path / "much.pcap"
    with vsockets.create_server((2, vsockets.VMADDR_PORT_ANY), context=fabric.host) as server:
        service = f"2:{server.getsockname()[1]}"
        running, port = start(vsock, "-w", file, "tcp:127.0.0.1:0", f"vsock:{service}")
        data = os.urandom(1 << 20)
        with socket.create_connection(("127.0.0.1", port)) as client:
            far, _ = server.accept()
            with far:
                far.settimeout(PATIENCE)
                far.sendall(b"go")
                assert client.recv(10) == b"go"
                received = b""
                for begin in range(0, len(data), 65536):
                    client.sendall(data[begin : begin + 65536])
                    while len(received) < begin + 65536:
                        received += far.recv(65536)
        end(running)
    records = dissect(file)
    sent = b"".join(payload for _, _, destination, _, payload in records if destination == service)
    assert sent == received == data


def test_datagrams_on_standard_output(vsock: Vsock, fabric: PrivateFabric, tmp_path: Path) -> None:
    guest = fabric.guest()
    file = tmp_path / "datagrams.pcap"
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as service,
        vsockets.socket(type=socket.SOCK_DGRAM, context=guest) as client,
        open(file, "wb") as out,
    ):
        service.bind(("127.0.0.1", 0))
        service.settimeout(PATIENCE)
        client.settimeout(PATIENCE)
        target = f"udp:127.0.0.1:{service.getsockname()[1]}"
        running = vsock.start("capture", "-w", "-", "vsock-dgram::any", target, stdout=out.fileno())
        found = re.search(r":(\d+)$", running.error_line())
        assert found
        host = (2, int(found[1]))
        client.sendto(b"question", host)
        _, source = service.recvfrom(100)
        service.sendto(b"answer", source)
        assert client.recv(100) == b"answer"
        address = "{}:{}".format(*client.getsockname())
        end(running)
    assert dissect(file) == [
        (PAYLOAD, address, f"2:{host[1]}", 40, b"question"),
        (PAYLOAD, f"2:{host[1]}", address, 38, b"answer"),
    ]


def test_capture_ends_with_its_reader(vsock: Vsock, fabric: PrivateFabric) -> None:
    running, port = start(vsock, "-w", "-", "vsock::any", "exec:cat")
    with vsockets.create_connection((2, port), PATIENCE, context=fabric.host) as sock:
        assert running.process.stdout is not None
        running.process.stdout.close()
        sock.sendall(b"x")
        assert sock.recv(100) in (b"x", b"")
        wait_until(lambda: running.process.poll() is not None, "its end", PATIENCE)
    assert running.process.returncode == 1


def test_invalid_arguments(vsock: Vsock, tmp_path: Path) -> None:
    vsock.fail(
        ("capture -w x tcp::1 tcp:a:1", 2, "FROM and TO: expected vsock:"),
        (f"capture -w {tmp_path}/none/x vsock::1 tcp:a:1", 1, "No such file or directory"),
        ("capture -w - stdio: vsock:2:1", 2, "standard output is used by stdio:"),
    )


def test_tshark_itself_reads_along(vsock: Vsock, fabric: PrivateFabric) -> None:
    """Run tshark as Wireshark is run: ``vsock capture -w - … | wireshark -k -i -``."""
    reader, writer = os.pipe()
    tshark = subprocess.Popen(
        ["tshark", "-n", "-l", "-r", "-", "-T", "fields", "-e", "vsock.payload"],
        stdin=reader,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    os.close(reader)
    running = vsock.start("capture", "-w", "-", "vsock::any", "exec:cat", stdout=writer)
    os.close(writer)
    found = re.search(r":(\d+)$", running.error_line())
    assert found
    with vsockets.create_connection((2, int(found[1])), PATIENCE, context=fabric.host) as sock:
        sock.sendall(b"live")
        assert sock.recv(100) == b"live"
    end(running)
    out, _ = tshark.communicate(timeout=PATIENCE)
    assert out.split() == [b"live".hex().encode()] * 2
