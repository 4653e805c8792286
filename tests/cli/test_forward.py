"""``vsock forward``, in processes of its own, between real sockets: streams."""

from __future__ import annotations

import os
import re
import socket
import threading
from pathlib import Path

import pytest

import vsockets
from vsockets.testing import PrivateFabric

from .forwarding import Echo, answer_of, ask, end, read_all, start, tcp
from .vsock import PATIENCE, Vsock

ANY = vsockets.VMADDR_PORT_ANY


def test_tcp_to_vsock(vsock: Vsock, echo: int) -> None:
    running, port = start(vsock, "tcp:127.0.0.1:0", f"vsock:host:{echo}", "-v")
    data = os.urandom(1 << 20)
    with tcp(port) as sock:
        sender = threading.Thread(target=sock.sendall, args=(data,))
        sender.start()
        received = b""
        while len(received) < len(data):
            received += sock.recv(65536)
        sender.join()
    assert received == data
    text = end(running)
    assert re.search(rf"127.0.0.1:\d+ ended: {1 << 20} bytes sent, {1 << 20} received", text)


def test_from_a_guest_to_tcp(vsock: Vsock, fabric: PrivateFabric, tcp_echo: int) -> None:
    guest = fabric.guest()
    running, port = start(vsock, "vsock::any", f"tcp:localhost:{tcp_echo}", "--allow", guest.cid)
    assert ask(vsockets.create_connection((2, port), context=guest)) == b"question"
    # another guest is not allowed
    other = fabric.guest()
    with vsockets.create_connection((2, port), PATIENCE, context=other) as sock:
        assert sock.recv(1) == b""
    assert f"{other.cid}:" in running.error_line()
    end(running)


def test_unix_and_hybrid_vsock(vsock: Vsock, echo: int, tmp_path: Path) -> None:
    # A simulated device: the handshake is one line each way.
    with socket.socket(socket.AF_UNIX) as device:
        device.bind(str(tmp_path / "v.sock"))
        device.listen()
        running = vsock.start(
            "forward", f"unix:{tmp_path}/in", f"vsock-mux:{tmp_path}/v.sock:52", "-v"
        )
        assert "listening on unix:" in running.error_line()
        client = socket.socket(socket.AF_UNIX)
        client.connect(str(tmp_path / "in"))
        client.sendall(b"early")
        sock, _ = device.accept()
        sock.settimeout(PATIENCE)
        with sock:
            assert sock.recv(100) == b"CONNECT 52\n"
            sock.sendall(b"OK 1073741824\nhello")  # data may follow in the same write
            assert sock.recv(100) == b"early"
        with client:
            assert read_all(client) == b"hello"
        end(running)
    assert not (tmp_path / "in").exists()
    # The other direction: the device connects to PATH_PORT for its guest.
    running = vsock.start("forward", f"vsock-mux:{tmp_path}/v.sock:52", f"vsock:host:{echo}", "-v")
    running.error_line()
    client = socket.socket(socket.AF_UNIX)
    client.connect(str(tmp_path / "v.sock_52"))
    assert ask(client) == b"question"
    end(running)


@pytest.mark.parametrize(
    ("address", "path", "said"),
    [
        ("vsock-mux/{}/v.sock:52", "v.sock", b"CONNECT 52\n"),
        ("vsock-mux/{}/v.sock", "v.sock", b"CONNECT 22\n"),
        ("hyperkit:{}:3:52", "connect", b"00000003.00000034\n"),
        ("vsock-emu:{}:3:52", "3.52", b""),
    ],
)
def test_other_tools_conventions_to_the_guest(
    vsock: Vsock, tmp_path: Path, address: str, path: str, said: bytes
) -> None:
    """Simulate, after their documentation, the handshakes of other tools."""
    with socket.socket(socket.AF_UNIX) as device:
        device.bind(str(tmp_path / path))
        device.listen()
        running = vsock.start("forward", f"unix:{tmp_path}/in", address.format(tmp_path), "-v")
        running.error_line()
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(PATIENCE)
            client.connect(str(tmp_path / "in"))
            sock, _ = device.accept()
            with sock:
                sock.settimeout(PATIENCE)
                assert sock.recv(len(said)) == said
                if said.startswith(b"CONNECT"):
                    sock.sendall(b"OK 1024\n")
                client.sendall(b"question")
                assert sock.recv(100) == b"question"
                sock.sendall(b"answer")
                assert client.recv(100) == b"answer"
        end(running)


@pytest.mark.parametrize(
    ("address", "path"),
    [("hyperkit:{}::52", "00000002.00000034"), ("vsock-emu:{}:host:52", "2.52")],
)
def test_other_tools_conventions_from_the_guest(
    vsock: Vsock, echo: int, tmp_path: Path, address: str, path: str
) -> None:
    running = vsock.start("forward", address.format(tmp_path), f"vsock:host:{echo}", "-v")
    running.error_line()
    client = socket.socket(socket.AF_UNIX)
    client.connect(str(tmp_path / path))
    assert ask(client) == b"question"
    end(running)
    assert not (tmp_path / path).exists()


def test_a_stale_unix_socket_is_replaced_and_a_live_one_is_not(
    vsock: Vsock, echo: int, tmp_path: Path
) -> None:
    path = tmp_path / ("long-" * 25) / "s"  # more than fits a unix address
    path.parent.mkdir()
    running = vsock.start("forward", f"unix:{path}", f"vsock:host:{echo}", "-v")
    running.error_line()
    line = vsock.fails("forward", f"unix:{path}", f"vsock:host:{echo}")
    assert line == f"cannot listen on unix:{path}: Address already in use"
    running.process.kill()
    running.process.wait()
    assert path.exists()
    running = vsock.start("forward", f"unix:{path}", f"vsock:host:{echo}", "-v")
    running.error_line()
    end(running)


def test_a_program_for_each_connection(vsock: Vsock, fabric: PrivateFabric) -> None:
    guest = fabric.guest()
    running, port = start(vsock, "vsock::any", "exec:sh -c 'echo $VSOCK_PEER_CID; cat'")
    for _ in range(2):
        answer = ask(vsockets.create_connection((2, port), context=guest))
        assert answer == b"%d\nquestion" % guest.cid
    end(running)


def test_standard_input_and_output(vsock: Vsock, echo: int) -> None:
    """Forward as ssh's ProxyCommand does."""
    done = vsock("forward", "stdio:", f"vsock:host:{echo}", data=b"through")
    assert done.stdout == "through"
    running, port = start(vsock, "tcp:127.0.0.1:0", "stdio:")
    with tcp(port) as sock:
        sock.sendall(b"to stdout\n")
        assert running.read_line() == "to stdout"
        running.write(b"from stdin")
        running.end_of_input()
        assert read_all(sock) == b"from stdin"
    running.finish()


def test_invalid_command_lines_are_one_line(vsock: Vsock, tmp_path: Path) -> None:
    bad = tmp_path / "bad.toml"
    bad.write_text('[[forward]]\nfrom = "tcp::0"\nto = "vsock:3"\n')
    vsock.fail(
        ("forward", 2, "FROM and TO: missing"),
        ("forward tcp::1 http-proxy:", 2, "no hosts allowed"),
        ("forward stdio: vsock:host:9", 1, "no program listens there"),
        (f"forward --config {bad}", 1, "bad.toml:3: forward.to: 'vsock:3': expected vsock:CID"),
    )


def test_a_target_that_refuses_and_one_that_dies(
    vsock: Vsock, fabric: PrivateFabric, tcp_echo: int
) -> None:
    running, port = start(vsock, "tcp:127.0.0.1:0", "vsock:host:7001")
    assert answer_of(port) == b""
    with vsockets.create_server((2, 7001), context=fabric.host) as server:
        client = tcp(port)
        client.sendall(b"x")
        sock, _ = server.accept()
        sock.settimeout(PATIENCE)
        assert sock.recv(1) == b"x"
        sock.close()
        assert read_all(client) == b""
        client.close()
    end(running)


def test_a_burst_of_clients_and_a_short_backlog(vsock: Vsock, fabric: PrivateFabric) -> None:
    """Use socketserver's backlog of 5: for TCP the kernel retries, for vSockets nothing does."""
    with vsockets.create_server((2, ANY), backlog=5, context=fabric.host) as server:
        Echo(server)
        target = f"vsock:host:{server.getsockname()[1]}"
        running, port = start(vsock, "tcp:127.0.0.1:0", target)
        assert ask(tcp(port)) == b"question"
        clients = [tcp(port) for _ in range(50)]
        for client in clients:
            client.sendall(b"question")
            client.shutdown(socket.SHUT_WR)
        for client in clients:
            with client:
                assert read_all(client) == b"question"
        end(running)


def test_wait_for_the_target(vsock: Vsock, fabric: PrivateFabric) -> None:
    running, port = start(vsock, "tcp:127.0.0.1:0", "vsock:host:7002", "--wait", 30)
    with tcp(port) as client:
        client.sendall(b"patience")
        with vsockets.create_server((2, 7002), context=fabric.host) as server:
            sock, _ = server.accept()
            with sock:
                sock.settimeout(PATIENCE)
                assert sock.recv(100) == b"patience"
    end(running)


def test_idle_connections_end(vsock: Vsock, echo: int) -> None:
    running, port = start(vsock, "tcp:127.0.0.1:0", f"vsock:host:{echo}", "--idle", 0.1)
    assert answer_of(port) == b""
    end(running)
