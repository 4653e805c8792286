"""Each denial is logged on one line, with both addresses, the process and the rule."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest

import vsockets
from vsockets import Attachment
from vsockets.control import Control
from vsockets.testing import PrivateFabric

from .raw_client import (
    adopt,
    ask,
    ask_once,
    bind,
    compiled,
    connect,
    enter,
    has_ended,
    listen,
    route,
    send_with,
    unix_datagrams,
)
from .users import NOBODY, as_root, user

EXECUTABLE = os.path.realpath(sys.executable)


@contextlib.contextmanager
def unprivileged(fabric: PrivateFabric) -> Iterator[None]:
    fabric.folder.parent.chmod(0o755)
    with user(NOBODY):
        yield


# One function for each kind of denial, with the expected contents of its line.


def another_cid(fabric: PrivateFabric) -> None:
    ask_once(fabric.guest(3), bind(5000)._replace(local_cid=2))


def reserved_port(fabric: PrivateFabric) -> None:
    with unprivileged(fabric):
        ask_once(fabric.host, bind(700))


def hypervisor_service(fabric: PrivateFabric) -> None:
    fabric.hypervisor.folder.chmod(0o755)
    (fabric.hypervisor.folder / "seqpacket").chmod(0o666)
    with unprivileged(fabric):
        ask_once(fabric.hypervisor, bind(5000))


def guest_to_guest(fabric: PrivateFabric) -> None:
    fabric.guest(4)
    ask_once(fabric.guest(3), connect(4, 5000))


def guest_to_guest_by_datagram(fabric: PrivateFabric) -> None:
    fabric.guest(4)
    guest = fabric.guest(3)
    with unix_datagrams() as sock, enter(guest, socket.SOCK_SEQPACKET) as channel:
        send_with(channel, route(4, 5000).encode(), [sock.fileno()])
        channel.recv(1000)


def restricted(fabric: PrivateFabric) -> None:
    guest = fabric.guest(3, profile="restricted")
    with unprivileged(fabric), vsockets.create_server((2, 5000), context=fabric.host), user(0):
        ask_once(guest, connect(2, 5000), socket.SOCK_STREAM)


def domain(fabric: PrivateFabric) -> None:
    fabric.guest(4, profile="legacy", unrestricted=True, domain="a")
    guest = fabric.guest(3, profile="legacy", unrestricted=True, domain="b")
    ask_once(guest, connect(4, 5000))


def suspended(fabric: PrivateFabric) -> None:
    guest = fabric.guest(3)
    fabric.control.suspend(3)
    with enter(guest) as sock:
        ask(sock, bind(6000))
        ask(sock, connect(2, 5000))


def fault_tolerance(fabric: PrivateFabric) -> None:
    fabric.guest(3)
    fabric.control.fault_tolerance(3, True)
    ask_once(fabric.host, connect(3, 5000))


def sockets(fabric: PrivateFabric) -> None:
    guest = fabric.guest(3, limits={"sockets": 1})
    with enter(guest) as sock, unix_datagrams() as another:
        ask(sock, bind(6000))
        adopt(guest, another, 6001)


def pending_connects(fabric: PrivateFabric) -> None:
    guest = fabric.guest(3, limits={"pending_connects": 1})
    with vsockets.create_server((2, 5000), context=fabric.host), enter(guest) as sock:
        ask(sock, connect(2, 5000))
        ask_once(guest, connect(2, 5000), socket.SOCK_STREAM)


def request_rate(fabric: PrivateFabric) -> None:
    guest = fabric.guest(3, limits={"request_rate": 1})
    with enter(guest) as first, enter(guest) as second:
        ask(first, bind(6000))
        ask(second, bind(6001))


def datagram_bytes(fabric: PrivateFabric) -> None:
    guest = fabric.guest(3, limits={"datagram_bytes": 1})
    with (
        vsockets.socket(type=socket.SOCK_DGRAM, context=fabric.host) as receiver,
        vsockets.socket(type=socket.SOCK_DGRAM, context=fabric.host) as another,
        vsockets.socket(type=socket.SOCK_DGRAM, context=guest) as sender,
    ):
        sender.bind((3, 6000))
        receiver.bind((2, 5000))
        another.bind((2, 5001))
        sender.sendto(b"x", (2, 5000))
        with pytest.raises(OSError, match="buffer space"):
            sender.sendto(b"x", (2, 5001))


DENIALS: dict[Callable[[PrivateFabric], None], tuple[str, str, str, str]] = {
    another_cid: ("bind 2:5000", "authentic-source", "EADDRNOTAVAIL", "3"),
    reserved_port: ("bind any:700", "reserved-port", "EACCES", "2"),
    hypervisor_service: ("bind any:5000", "hypervisor-service", "EACCES", "0"),
    guest_to_guest: ("connect 3:any to 4:5000", "guest-to-guest", "EHOSTUNREACH", "3"),
    guest_to_guest_by_datagram: (
        *("send a datagram 3:any to 4:5000", "guest-to-guest", "EHOSTUNREACH", "3"),
    ),
    restricted: ("connect 3:any to 2:5000", "restricted", "ECONNRESET", "3"),
    domain: ("connect 3:any to 4:5000", "domain", "EHOSTUNREACH", "3"),
    suspended: ("connect 3:6000 to 2:5000", "suspended", "ENETDOWN", "3"),
    fault_tolerance: ("connect 2:any to 3:5000", "fault-tolerance", "EHOSTUNREACH", "2"),
    sockets: ("bind a datagram socket any:6001", "sockets", "ENOBUFS", "3"),
    pending_connects: ("connect 3:any to 2:5000", "pending_connects", "ENOBUFS", "3"),
    request_rate: ("bind any:6001", "request_rate", "ENOBUFS", "3"),
    datagram_bytes: ("send a datagram 3:6000 to 2:5001", "datagram_bytes", "ENOBUFS", "3"),
}


@as_root
@pytest.mark.parametrize("denial", DENIALS, ids=lambda denial: denial.__name__)
def test_one_line_for_each_denial(
    vsock_fabric: PrivateFabric, denial: Callable[[PrivateFabric], None]
) -> None:
    what, rule, code, cid = DENIALS[denial]
    with vsock_fabric.control.events("denial") as events:
        denial(vsock_fabric)
        event = events.wait(10)
    (line,) = [line for line in vsock_fabric.log.splitlines() if "denied" in line]
    assert line.startswith(f"vsockd: WARNING: denied: {what}: ")
    uid = NOBODY if denial in (reserved_port, hypervisor_service) else 0
    assert f"[{rule}, {code}]; pid {os.getpid()} uid {uid} {EXECUTABLE}" in line
    assert line.endswith(event["message"])
    assert (event["rule"], event["errno"], event["context"]) == (rule, code, int(cid))
    rows = {row["cid"]: row for row in vsock_fabric.control.contexts()}
    if cid != "0":  # the hypervisor is not in the list
        assert rows[int(cid)]["denials"] == {rule: 1}
    assert vsock_fabric.control.status()["denials"] == 1


def test_a_missing_target_is_not_a_denial(vsock_fabric: PrivateFabric) -> None:
    """A wrong port or CID is an error, not a denial."""
    guest = vsock_fabric.guest(3)
    assert ask_once(guest, connect(2, 5000)).status == errno.ECONNRESET
    assert ask_once(guest, connect(77, 5000)).status == errno.EHOSTUNREACH
    assert "denied" not in vsock_fabric.log
    assert vsock_fabric.control.status()["denials"] == 0


def test_the_peer_learns_the_errno_only(vsock_fabric: PrivateFabric) -> None:
    vsock_fabric.guest(4)
    guest = vsock_fabric.guest(3)
    denied, absent = (ask_once(guest, connect(cid, 5000)) for cid in (4, 77))
    assert denied == absent


def test_lines_are_limited_per_second(vsock_fabric: PrivateFabric) -> None:
    """A guest cannot fill the host's disk; left-out lines are reported, and all are counted."""
    (vsock_fabric.configuration / "audit.toml").write_text("[audit]\nrate = 5\n")
    vsock_fabric.control.reload()
    vsock_fabric.guest(4)
    guest, other = vsock_fabric.guest(3), vsock_fabric.guest(5)
    events = vsock_fabric.control.events("denial")
    with events:
        for _ in range(200):
            ask_once(guest, connect(4, 5000))
        # Another guest's denials are logged all the same.
        ask_once(other, connect(4, 5000))
        heard = [events.wait(10)]
        while heard[-1]["context"] != 5:
            heard.append(events.wait(10))
        assert heard[-1]["left_out"] == 0
        told = len(heard) - 1
        left_out = sum(event["left_out"] for event in heard)
        assert 5 <= told < 200
        while left_out + told < 200:
            ask_once(guest, connect(4, 5000))
            try:
                event = events.wait(0.3)
            except TimeoutError:
                continue
            told += 1
            left_out += event["left_out"]
            assert f"({event['left_out']} more were left out)" in vsock_fabric.log
    rows = {row["cid"]: row for row in vsock_fabric.control.contexts()}
    assert rows[3]["denials"]["guest-to-guest"] == told + left_out


class TestOtherLines:
    """Other lines are limited, too, for each guest and each user of the host."""

    def test_listeners_that_shut_down_reading(self, vsock_fabric: PrivateFabric) -> None:
        """vsockd drops such a listener at the first connect, which alone causes a line."""
        guest = vsock_fabric.guest(3)
        for _ in range(300):
            with enter(guest) as server:
                ask(server, bind(6000))
                ask(server, listen())
                server.shutdown(socket.SHUT_RD)
                ask_once(guest, connect(3, 6000), socket.SOCK_STREAM)
                for _ in range(3):
                    answer = ask_once(guest, connect(3, 6000), socket.SOCK_STREAM)
                    assert answer.status == errno.ECONNRESET
        log = vsock_fabric.log
        lost = [line for line in log.splitlines() if "connection to (3, 6000) is lost" in line]
        assert 1 <= len(lost) < 150
        assert sum(map(left_out_before, log.splitlines())) > 50

    def test_malformed_requests(self, vsock_fabric: PrivateFabric) -> None:
        guest, other = vsock_fabric.guest(3), vsock_fabric.guest(4)
        for _ in range(500):
            with enter(guest) as sock:
                sock.send(bytes(100))
        with enter(other) as sock:
            sock.send(bytes(100))
            assert has_ended(sock)
        lines = vsock_fabric.log.splitlines()
        assert sum("context 3 pid" in line for line in lines) < 250
        assert sum("context 4 pid" in line for line in lines) == 1


def left_out_before(line: str) -> int:
    found = re.search(r"\((\d+) more were left out\)$", line)
    return int(found[1]) if found else 0


def test_a_programs_name_is_escaped(vsock_fabric: PrivateFabric, tmp_path: Path) -> None:
    """A program's path is chosen by its user, and cannot forge a line or a colour."""
    folder = tmp_path / "a\nvsockd: WARNING: denied: forged\x1b[2K\u202e (7 more were left out)"
    folder.mkdir()
    program = compiled("request_client.c", tmp_path).rename(folder / "x")
    guest, _ = vsock_fabric.guest(3), vsock_fabric.guest(4)
    with vsock_fabric.control.events("denial") as events:
        subprocess.run(
            [program, guest.folder / "seqpacket"],
            input=connect(4, 5000).encode(),
            stdout=subprocess.DEVNULL,
            check=True,
        )
        event = events.wait(10)
    assert event["executable"] == os.fspath(program)
    (line,) = [line for line in vsock_fabric.log.splitlines() if "denied" in line]
    shown = r"a\nvsockd: WARNING: denied: forged\x1b[2K\u202e (7 more were left out)/x'"
    assert line.isprintable() and line.endswith(f"{shown}")
    assert event["message"].endswith(shown)


# Formats


@contextlib.contextmanager
def logging_vsockd(
    *options: str, stderr: IO[bytes], environment: dict[str, str] | None = None
) -> Iterator[Control]:
    with tempfile.TemporaryDirectory(prefix="vsock-", dir="/tmp") as scratch:
        reader, writer = os.pipe()
        command = [sys.executable, "-m", "vsockets.daemon", "--dir", f"{scratch}/fabric"]
        process = subprocess.Popen(
            [*command, "--config", scratch, "--ready-fd", str(writer), *options],
            stderr=stderr,
            pass_fds=[writer],
            env={**os.environ, **(environment or {})},
        )
        os.close(writer)
        try:
            assert os.read(reader, 10) == b"ready\n"
            os.close(reader)
            with Control(Path(scratch, "fabric")) as control:
                yield control
        finally:
            process.terminate()
            assert process.wait(10) == 0


def deny_something(control: Control) -> None:
    control.add_context(4)
    ask_once(Attachment(control.add_context(3)["folder"]), connect(4, 5000))


def test_one_json_object_per_line(tmp_path: Path) -> None:
    with open(tmp_path / "log", "w+b") as log:
        with logging_vsockd("--log-format", "json", "--log-level", "debug", stderr=log) as control:
            deny_something(control)
            ask_once(Attachment(control.folder / "3"), connect(2, 5000))
        log.seek(0)
        lines: list[dict[str, Any]] = [json.loads(line) for line in log]
    assert len(lines) > 1  # what is no denial has the same shape
    assert all({"time", "level", "message"} <= set(line) for line in lines)
    (denial,) = [line for line in lines if "rule" in line]
    assert denial.pop("time") > 1e9
    assert "guest to guest" in denial.pop("message")
    assert denial == {
        "level": "warning",
        "context": 3,
        "operation": "connect",
        "source": [3, 2**32 - 1],
        "destination": [4, 5000],
        "rule": "guest-to-guest",
        "reason": "guest to guest: only host to guest is allowed",
        "errno": "EHOSTUNREACH",
        "pid": os.getpid(),
        "uid": os.getuid(),
        "gid": os.getgid(),
        "executable": EXECUTABLE,
        "left_out": 0,
    }


@pytest.mark.parametrize("options", [[], ["--log-format", "json"]])
def test_lines_for_the_journal_have_priorities(tmp_path: Path, options: list[str]) -> None:
    """JOURNAL_STREAM tells that standard error is the journal (systemd.exec(5))."""
    with open(tmp_path / "log", "w+b") as log:
        found = os.fstat(log.fileno())
        stream = {"JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino}"}
        with logging_vsockd(*options, stderr=log, environment=stream) as control:
            deny_something(control)
        log.seek(0)
        (line,) = log.read().decode().splitlines()
    assert line.startswith("<4>")
    if options:
        assert json.loads(line.removeprefix("<4>"))["rule"] == "guest-to-guest"
    else:
        assert line.startswith("<4>vsockd: WARNING: denied: connect 3:any to 4:5000: ")


def test_lines_for_a_file_have_no_priorities(tmp_path: Path) -> None:
    """The variable is inherited; standard error may have been redirected since."""
    with open(tmp_path / "log", "w+b") as log:
        environment = {"JOURNAL_STREAM": "1:1"}
        with logging_vsockd(stderr=log, environment=environment) as control:
            deny_something(control)
        log.seek(0)
        assert log.read().startswith(b"vsockd: WARNING: denied: ")
