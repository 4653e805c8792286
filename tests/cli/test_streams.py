"""``vsock connect`` and ``vsock listen``, with streams and sequenced packets."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import re
import signal
import socket
import subprocess
from pathlib import Path

import pytest

import vsockets
from vsockets.cli.errors import BIND, CONNECT, cli_error
from vsockets.testing import PrivateFabric, wait_until

from .vsock import PATIENCE, PROGRAM, Vsock


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("options", [[], ["--seqpacket"]])
def test_megabytes_both_ways(vsock: Vsock, tmp_path: Path, options: list[str]) -> None:
    files = {name: tmp_path / name for name in ("there", "back", "arrived", "returned")}
    files["there"].write_bytes(random.Random(1).randbytes(8_000_000))
    files["back"].write_bytes(random.Random(2).randbytes(5_000_000))
    with (
        files["there"].open("rb") as there,
        files["back"].open("rb") as back,
        files["arrived"].open("wb") as arrived,
        files["returned"].open("wb") as returned,
    ):
        listener = vsock.start(
            "listen", "any", *options, stdin=back.fileno(), stdout=arrived.fileno()
        )
        client = vsock.start(
            *("connect", "host", listener.port(), *options),
            stdin=there.fileno(),
            stdout=returned.fileno(),
        )
        client.finish()
        listener.finish()
    assert digest(files["arrived"]) == digest(files["there"])
    assert digest(files["returned"]) == digest(files["back"])


def test_the_end_of_input_is_passed_on_and_the_answer_still_received(vsock: Vsock) -> None:
    # The command replies after the end of its input.
    listener = vsock.start("listen", "any", "-e", "sh -c 'sort; echo from $VSOCK_PEER_CID'")
    done = vsock("connect", "host", listener.port(), data=b"b\na\n")
    assert done.stdout == "a\nb\nfrom 2\n"
    listener.finish()


def test_the_listener_may_go_on_after_the_client_has_ended_its_side(vsock: Vsock) -> None:
    listener = vsock.start("listen", "any")
    client = vsock.start("connect", "host", listener.port())
    client.write(b"question\n")
    client.end_of_input()
    assert listener.read_line() == "question"
    listener.write(b"answer\n")
    assert client.read_line() == "answer"
    listener.end_of_input()
    client.finish()
    listener.finish()


def test_verbose_shows_the_peer_on_both_sides(vsock: Vsock, fabric: PrivateFabric) -> None:
    guest = fabric.guest()
    listener = vsock.start("listen", "any", "-v", "-d")
    port = listener.port()
    client = vsock.start(
        *("run", "--cid", guest.cid, *PROGRAM, "connect", "host", port, "-v", "-p", "6000")
    )
    user = f"user .*, uid {os.geteuid()}"
    line = client.error_line()
    assert re.fullmatch(
        rf"connected to 2:{port} \(pid {listener.process.pid}, {user}\) from {guest.cid}:6000", line
    )
    line = listener.error_line()
    # Not the pid of ``vsock run``, which waits for the program.
    found = re.fullmatch(rf"connection from {guest.cid}:6000 \(pid (\d+), {user}\)", line)
    assert found
    assert int(found[1]) != client.process.pid
    client.finish()
    listener.finish()


def test_several_at_a_time_share_input_and_output(vsock: Vsock) -> None:
    listener = vsock.start("listen", "any", "-k")
    port = listener.port()
    clients = [vsock.start("connect", "host", port) for _ in range(2)]
    for number, client in enumerate(clients):
        client.write(f"client {number}\n".encode())
        assert listener.read_line() == f"client {number}"
    listener.write(b"to all\n")
    assert [client.read_line() for client in clients] == ["to all", "to all"]
    for client in clients:
        client.process.kill()  # a failing stream does not affect the others
    late = vsock.start("connect", "host", port)
    late.write(b"still there?\n")
    assert listener.read_line() == "still there?"
    listener.end_of_input()
    late.finish()


def test_a_command_for_each_of_several_at_a_time(vsock: Vsock) -> None:
    listener = vsock.start("listen", "any", "-k", "-e", "cat")
    port = listener.port()
    clients = [vsock.start("connect", "host", port) for _ in range(3)]
    for client in reversed(clients):
        client.write(b"hello\n")
        assert client.read_line() == "hello"
    for client in clients:
        client.finish()
    listener.process.send_signal(signal.SIGINT)
    assert listener.finish(expect=130) == (b"", "")


def test_a_command_serves_megabytes(vsock: Vsock, tmp_path: Path) -> None:
    sent, received = tmp_path / "sent", tmp_path / "received"
    sent.write_bytes(random.Random(3).randbytes(4_000_000))
    listener = vsock.start("listen", "any", "--exec", "cat")
    with sent.open("rb") as source, received.open("wb") as sink:
        arguments = ("connect", "host", listener.port())
        vsock.start(*arguments, stdin=source.fileno(), stdout=sink.fileno()).finish()
    assert digest(sent) == digest(received)
    listener.finish()


def test_the_connecting_side_may_run_a_command_too(vsock: Vsock) -> None:
    listener = vsock.start("listen", "any")
    vsock("connect", "host", listener.port(), "-e", "sh -c 'echo hi; exit 3'", expect=3)
    assert listener.finish(b"")[0] == b"hi\n"


def test_a_listener_bound_to_the_local_cid_is_for_its_own_context(vsock: Vsock) -> None:
    listener = vsock.start("listen", "any", "--cid", "local")
    line = listener.error_line()
    port = line.removeprefix("listening on 1:")
    guest_fails = vsock("run", *PROGRAM, "connect", "host", port, expect=1)
    assert "no program listens there" in guest_fails.stderr
    listener.end_of_input()
    vsock("connect", "local", port, data=b"here\n")
    assert listener.read_line() == "here"


def test_wait_for_the_listener(vsock: Vsock, fabric: PrivateFabric) -> None:
    refusals = fabric.control.status()["refusals"]
    client = vsock.start("connect", "host", "5555", "--wait", PATIENCE, "-w", PATIENCE)
    wait_until(lambda: fabric.control.status()["refusals"] > refusals + 1, "it to try twice")
    listener = vsock.start("listen", "5555")
    listener.end_of_input()
    assert client.finish(b"at last\n")[0] == b""
    assert listener.read_line() == "at last"
    listener.finish()


def test_every_wait_can_be_limited(vsock: Vsock, fabric: PrivateFabric) -> None:
    with vsockets.create_server((2, 5558), context=fabric.host) as silent:
        vsock.fail(
            ("connect host 5556 --wait 0.1", 1, "no program listens"),
            ("listen 5557 -w 0.1", 1, "no client connected within 0.1 s"),
            ("connect host 5558 -w 0.1", 1, "no data was sent or received for 0.1 s"),
        )
        vsock("connect", "host", "5558", "-q", "0.1", data=b"that is all")
        for _ in range(2):
            silent.accept()[0].close()


def test_no_stdin_only_receives(vsock: Vsock, fabric: PrivateFabric) -> None:
    with vsockets.create_server((2, 5559), context=fabric.host) as server:
        client = vsock.start("connect", "host", "5559", "-d")
        connection, _ = server.accept()
        with connection:
            connection.sendall(b"data")
        assert client.process.wait(PATIENCE) == 0
        assert client.finish()[0] == b"data"


def test_data_that_was_not_delivered_is_a_failure(vsock: Vsock) -> None:
    listener = vsock.start("listen", "any", "-e", "true")
    port = listener.port()
    done = vsock("connect", "host", port, data=bytes(4_000_000), expect=1)
    assert done.stderr.startswith("vsock: the peer closed the stream")
    assert done.stderr.count("\n") == 1
    listener.finish()


def test_closed_standard_output_ends_connect(vsock: Vsock) -> None:
    listener = vsock.start("listen", "any", "-e", "yes")
    reader, writer = os.pipe()
    client = vsock.start("connect", "host", listener.port(), "-d", stdout=writer)
    os.close(writer)
    assert os.read(reader, 2) == b"y\n"
    os.close(reader)
    assert client.finish(expect=1)[1] == ""


def test_interrupted(vsock: Vsock) -> None:
    listener = vsock.start("listen", "any")
    listener.port()
    listener.process.send_signal(signal.SIGINT)
    assert listener.finish(expect=130) == (b"", "")


def test_standard_input_that_is_closed(vsock: Vsock) -> None:
    listener = vsock.start("listen", "any", "-e", "echo hello")
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" <&-', "sh", *PROGRAM, "connect", "host", str(listener.port())],
        env=vsock.environment,
        capture_output=True,
        timeout=PATIENCE,
        check=True,
    )
    assert done.stdout == b"hello\n"


def test_errors_name_a_remedy(vsock: Vsock, fabric: PrivateFabric) -> None:
    with vsockets.create_server((2, 5561), context=fabric.host):
        vsock.fail(
            ("connect host 5560", 1, "connect to 2:5560: no program listens there"),
            ("connect host 5560", 1, "(Connection reset by peer)"),
            ("connect 4000 5000", 1, "connect to 4000:5000: no such context"),
            ("listen 5561", 1, "bind to any:5561: the port is in use (see: vsock ls)"),
            ("connect host 5561 -p 5561", 1, "the source port is in use"),
            ("listen --cid 77 5000", 1, "omit --cid"),
            ("listen 5000 -e no-such", 127, "no-such: program not found"),
        )


def test_errors_name_the_isolation_and_state_of_a_guest(
    vsock: Vsock, fabric: PrivateFabric
) -> None:
    guest = fabric.guest(profile="legacy", domain="lab", unrestricted=True)
    address = (vsockets.VMADDR_CID_ANY, 5562)
    with (
        vsockets.create_server(address, context=guest),
        vsockets.socket(type=socket.SOCK_DGRAM, context=guest) as datagrams,
    ):
        datagrams.bind(address)
        line = vsock.fails("connect", guest.cid, 5562)
        assert line.startswith(f"connect to {guest.cid}:5562: the guest is isolated from this")
        done = vsock("connect", guest.cid, 5562, "-u", data=b"hello", expect=1)
        assert done.stderr.startswith(f"vsock: send to {guest.cid}:5562: the guest is isolated")
        fabric.control.suspend(guest.cid)
        assert "it is suspended or off" in vsock.fails("connect", guest.cid, 5562)


def test_no_vsockd(vsock: Vsock) -> None:
    vsock.environment["VSOCKETS_CONTEXT"] = "/nowhere/3"
    line = vsock.fails("connect", "host", "5000")
    assert line == (
        "connect to 2:5000: vsockd is not running in /nowhere/3 (start it: vsock --dir /nowhere up)"
    )


def test_reserved_ports() -> None:
    # Root may bind them, so the error is simulated.
    refused = OSError(errno.EACCES, "Permission denied")
    assert "CAP_NET_BIND_SERVICE" in str(cli_error("bind to any:80", refused, BIND))
    assert "CAP_NET_BIND_SERVICE" in str(cli_error("connect to 2:80", refused, CONNECT))
