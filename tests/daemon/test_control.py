"""The administrator's socket: replies, access, and invalid requests."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import socket
import stat
import threading
from collections.abc import Iterator
from typing import Any

import pytest

import vsockets
from vsockets.control import Control
from vsockets.daemon.in_flight import IN_FLIGHT_MAX_BYTES
from vsockets.fabric import Limits
from vsockets.testing import PrivateFabric, wait_until

from .raw_client import (
    GUEST,
    LOCAL_CID,
    PROMPT,
    ask_once,
    assert_serves,
    enter,
    no_descriptor_left_behind,
)
from .users import NOBODY, as_root, user

HUGE = 10**30


@pytest.fixture
def line(shared_fabric: PrivateFabric) -> Iterator[socket.socket]:
    """Yield a connection to the control socket."""
    with connect_to(shared_fabric) as sock:
        yield sock


@contextlib.contextmanager
def connect_to(fabric: PrivateFabric) -> Iterator[socket.socket]:
    """Connect to a fabric's control socket."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(PROMPT)
        sock.connect(os.fspath(fabric.folder / "control"))
        yield sock


def ask_line(sock: socket.socket, text: bytes) -> dict[str, Any]:
    """Send one line and return the reply."""
    sock.sendall(text + b"\n")
    answer = b""
    while not answer.endswith(b"\n"):
        more = sock.recv(65_536)
        assert more, "vsockd closed the connection"
        answer += more
    decoded = json.loads(answer)
    assert isinstance(decoded, dict)
    return decoded


# Requests


def test_status(vsock_fabric: PrivateFabric) -> None:
    vsock_fabric.guest(7)
    with (
        vsockets.create_server((2, 5000), context=vsock_fabric.host) as server,
        vsockets.create_connection((2, 5000), context=vsock_fabric.host),
        vsockets.socket(type=socket.SOCK_DGRAM, context=vsock_fabric.host) as datagrams,
    ):
        datagrams.bind((2, 5000))
        with pytest.raises(ConnectionResetError):
            vsockets.create_connection((2, 5001), context=vsock_fabric.host)
        status = vsock_fabric.control.status()
        assert status["pid"] == vsock_fabric.pid
        assert status["folder"] == str(vsock_fabric.folder)
        assert 0 <= status["uptime"] < 60
        assert (status["contexts"], status["listeners"], status["streams"]) == (2, 1, 1)
        assert (status["datagram_sockets"], status["refusals"]) == (1, 1)
        server.accept()[0].close()


def test_sockets(vsock_fabric: PrivateFabric) -> None:
    guest = vsock_fabric.guest(7)
    with (
        vsockets.create_server((2, 5000), context=vsock_fabric.host) as server,
        vsockets.socket(context=guest) as client,
        vsockets.socket(type=socket.SOCK_DGRAM, context=guest) as datagrams,
        vsockets.socket(type=socket.SOCK_SEQPACKET, context=guest) as packets,
    ):
        client.bind((7, 6000))
        datagrams.bind((7, 6001))
        packets.bind((7, 6002))
        client.connect((2, 5000))
        accepted, _ = server.accept()
        with accepted:
            rows = vsock_fabric.control.sockets()
        shown = [
            (row["context"], row["type"], row["state"], row["cid"], row["port"], row["peer"])
            for row in rows
        ]
        assert shown == [
            (2, "stream", "listening", 2, 5000, None),
            (2, "stream", "established", 2, 5000, [7, 6000]),
            (7, "dgram", "unconnected", 7, 6001, None),
            (7, "seqpacket", "bound", 7, 6002, None),
            (7, "stream", "established", 7, 6000, [2, 5000]),
        ]
        assert {row["pid"] for row in rows} == {os.getpid()}
        assert {row["uid"] for row in rows} == {os.geteuid()}
        assert {row["buffer"] for row in rows} == {65_536}


def test_contexts(vsock_fabric: PrivateFabric) -> None:
    control = vsock_fabric.control
    row = control.add_context(7, "web", os.geteuid())
    assert row == {
        "cid": 7,
        "name": "web",
        "owner": os.geteuid(),
        "leased": False,
        "state": "running",
        "ft": False,
        "profile": "default",
        "unrestricted": False,
        "domain": "",
        "folder": str(vsock_fabric.folder / "7"),
        "hybrid": "",
        "reserved_ports": False,
        "usage": {"sockets": 0, "pending_connects": 0, "datagram_bytes": 0},
        "limits": dataclasses.asdict(Limits()),
        "denials": {},
    }
    assert [row["cid"] for row in control.contexts()] == [2, 7]
    assert ask_once(vsockets.attach(row["folder"]), LOCAL_CID).local_cid == 7
    control.remove_context(7)
    assert not (vsock_fabric.folder / "7").exists()
    assert [row["cid"] for row in control.contexts()] == [2]
    control.add_context(7)


@pytest.mark.parametrize("cid", [-1, 0, 1, 2, 2**32 - 1, 2**32, HUGE])
def test_cids_outside_the_guests_range_are_refused(shared_fabric: PrivateFabric, cid: int) -> None:
    with pytest.raises(OSError, match="is out of range, expected 3 to") as refusal:
        shared_fabric.control.add_context(cid)
    assert refusal.value.errno == errno.EINVAL


def test_a_cid_in_use_is_refused(shared_fabric: PrivateFabric) -> None:
    with pytest.raises(OSError, match=f"context {GUEST} exists") as refusal:
        shared_fabric.guest(GUEST)
    assert refusal.value.errno == errno.EEXIST


def test_host_hypervisor_and_unknown_contexts_cannot_be_removed(
    shared_fabric: PrivateFabric,
) -> None:
    for cid, code in ((2, errno.EINVAL), (0, errno.EINVAL), (9, errno.ENOENT)):
        with pytest.raises(OSError) as refusal:
            shared_fabric.control.remove_context(cid)
        assert refusal.value.errno == code


def test_a_guest_with_streams_is_not_removed(vsock_fabric: PrivateFabric) -> None:
    guest = vsock_fabric.guest(7)
    with vsockets.create_server((2, 5000), context=vsock_fabric.host):
        with vsockets.create_connection((2, 5000), context=guest):
            with pytest.raises(OSError, match="has 1 open streams") as refusal:
                vsock_fabric.control.remove_context(7)
            assert refusal.value.errno == errno.EBUSY
        vsock_fabric.control.remove_context(7)


def test_a_lease_ends_with_its_connection(vsock_fabric: PrivateFabric) -> None:
    with Control(vsock_fabric.folder) as lessee:
        cids = {lessee.add_context(lease=True)["cid"] for _ in range(5)}
        assert len(cids) == 5
        copy = socket.socket(fileno=os.dup(lessee.fileno()))
    with copy:  # a duplicate of the connection keeps the leases
        assert cids < {row["cid"] for row in vsock_fabric.control.contexts()}
    wait_until(
        lambda: [row["cid"] for row in vsock_fabric.control.contexts()] == [2],
        "the leases to end",
        PROMPT,
    )
    assert not cids & {int(name) for name in os.listdir(vsock_fabric.folder) if name.isdecimal()}
    assert vsock_fabric.control.add_context()["cid"] not in cids


def test_a_removed_leased_guest_is_removed_once(vsock_fabric: PrivateFabric) -> None:
    with Control(vsock_fabric.folder) as lessee:
        cid = lessee.add_context(lease=True)["cid"]
        vsock_fabric.control.remove_context(cid)
        vsock_fabric.control.add_context(cid)
    vsock_fabric.control.status()
    assert [row["cid"] for row in vsock_fabric.control.contexts()] == [2, cid]


# Access


def test_modes_of_the_files(vsock_fabric: PrivateFabric) -> None:
    vsock_fabric.guest(7)
    modes = {
        name: stat.S_IMODE(os.lstat(vsock_fabric.folder / name).st_mode)
        for name in ("control", "private", "2", "2/stream", "2/seqpacket", "7", "7/stream")
    }
    assert modes == {
        "control": 0o600,
        "private": 0o700,
        "2": 0o755,
        "2/stream": 0o666,
        "2/seqpacket": 0o666,
        "7": 0o711,
        "7/stream": 0o600,
    }
    assert stat.S_IMODE(vsock_fabric.folder.stat().st_mode) & 0o022 == 0


@as_root
def test_other_users(vsock_fabric: PrivateFabric) -> None:
    vsock_fabric.folder.parent.chmod(0o755)
    guest = vsock_fabric.guest(7)
    theirs = vsock_fabric.guest(8, owner=NOBODY)
    with user(NOBODY):
        with pytest.raises(PermissionError):
            Control(vsock_fabric.folder)
        with pytest.raises(PermissionError):
            enter(guest)
        assert ask_once(vsock_fabric.host, LOCAL_CID).local_cid == 2
        assert ask_once(theirs, LOCAL_CID).local_cid == 8
        with pytest.raises(PermissionError):
            os.listdir(vsock_fabric.folder / "private")
        with pytest.raises(PermissionError):
            (theirs.folder.parent / "mine").mkdir()


def test_an_invalid_owner_leaves_no_guest(vsock_fabric: PrivateFabric) -> None:
    """Not a user id, or root's for another user: no part of the guest remains."""
    owners = [(-5, errno.EINVAL), (2**32, errno.EINVAL), (HUGE, errno.EINVAL)]
    if os.geteuid() != 0:
        owners.append((0, errno.EPERM))
    with no_descriptor_left_behind(vsock_fabric):
        for owner, code in owners:
            with pytest.raises(OSError) as refusal:
                vsock_fabric.control.add_context(7, owner=owner)
            assert refusal.value.errno == code
            assert not (vsock_fabric.folder / "7").exists()
            assert [row["cid"] for row in vsock_fabric.control.contexts()] == [2]
    vsock_fabric.control.add_context(7)


def test_an_existing_folder_is_replaced(vsock_fabric: PrivateFabric) -> None:
    (vsock_fabric.folder / "7").write_text("")
    with no_descriptor_left_behind(vsock_fabric):
        with pytest.raises(OSError, match="exists") as refusal:
            vsock_fabric.control.add_context(7)
        assert refusal.value.errno == errno.EEXIST
    (vsock_fabric.folder / "7").unlink()
    vsock_fabric.control.add_context(7)


# Reports in parts


@pytest.fixture
def busy_fabric(vsock_fabric: PrivateFabric) -> Iterator[PrivateFabric]:
    """A fabric whose list of sockets takes several parts."""
    with contextlib.ExitStack() as servers:
        for port in range(5000, 5200):
            address = 2, port
            servers.enter_context(vsockets.create_server(address, context=vsock_fabric.host))
        yield vsock_fabric


def test_a_long_report_comes_in_parts_between_which_others_are_served(
    busy_fabric: PrivateFabric,
) -> None:
    with connect_to(busy_fabric) as line:
        answer = ask_line(line, b'{"op": "sockets", "parts": true}')
        rows = []
        while "part" in answer:
            assert len(json.dumps(answer)) <= IN_FLIGHT_MAX_BYTES
            rows += answer["part"]
            vsockets.create_connection((2, 5000), context=busy_fabric.host).close()
            answer = ask_line(line, b'{"op": "continue"}')
        rows += answer["ok"]
    listening = [row["port"] for row in rows if row["state"] == "listening"]
    assert sorted(listening) == list(range(5000, 5200))


@pytest.mark.parametrize("op", ["status", "counts", "sockets", "context.list"])
def test_a_program_that_asks_for_no_parts_gets_the_whole_report(
    busy_fabric: PrivateFabric, op: str
) -> None:
    """A program of a release before, such as a `vsock web` that runs on after an upgrade."""
    with connect_to(busy_fabric) as line:
        answer = ask_line(line, json.dumps({"op": op}).encode())["ok"]
    expected = {
        "status": len(busy_fabric.control.status()),
        "counts": len({"contexts", "departed"}),
        "sockets": 200,
        "context.list": len(["the host"]),
    }
    assert len(answer) == expected[op]


def test_what_ends_during_a_report_is_left_out(busy_fabric: PrivateFabric) -> None:
    with (
        connect_to(busy_fabric) as line,
        vsockets.create_server((2, 6000), context=busy_fabric.host) as server,
    ):
        answer = ask_line(line, b'{"op": "sockets", "parts": true}')
        rows = answer["part"]
        server.close()
        busy_fabric.control.sockets()  # vsockd has released the port
        while "part" in answer:
            answer = ask_line(line, b'{"op": "continue"}')
            rows += answer.get("part", answer.get("ok"))
    ports = [row["port"] for row in rows]
    assert 6000 not in ports
    assert 5199 in ports


def test_a_replacement_ends_a_report(busy_fabric: PrivateFabric) -> None:
    with connect_to(busy_fabric) as line:
        assert "part" in ask_line(line, b'{"op": "sockets", "parts": true}')
        busy_fabric.control.replace()
        assert ask_line(line, b'{"op": "continue"}')["errno"] == errno.ESTALE
        assert "part" in ask_line(line, b'{"op": "sockets", "parts": true}')


def test_reports_are_complete_while_vsockd_is_replaced(busy_fabric: PrivateFabric) -> None:
    ended = threading.Event()

    def replace() -> None:
        with Control(busy_fabric.folder) as control:
            for _ in range(3):
                control.replace()
        ended.set()

    replacing = threading.Thread(target=replace)
    replacing.start()
    while not ended.is_set():
        ports = [row["port"] for row in busy_fabric.control.sockets()]
        assert ports == list(range(5000, 5200))
    replacing.join()


# Invalid requests

NOT_REQUESTS = {
    "nothing": b"",
    "no JSON": b"hello",
    "half an object": b'{"op": "status"',
    "no UTF-8": b'{"op": "\xff\xfe"}',
    "binary": bytes(range(11, 256)),
    "a number": b"1",
    "a list": b'["status"]',
    "null": b"null",
    "a string": b'"status"',
    "no op": b"{}",
    "unknown op": b'{"op": "reboot"}',
    "op is null": b'{"op": null}',
    "op is a number": b'{"op": 1}',
    "op is a list": b'{"op": ["status"]}',
    "op is an object": b'{"op": {}}',
    "nested too deeply": b"[" * 60_000,
    "a number without end": b'{"op": "context.remove", "cid": ' + b"9" * 10_000 + b"}",
}


@pytest.mark.parametrize("what", NOT_REQUESTS)
def test_invalid_requests_get_an_error(line: socket.socket, what: str) -> None:
    answer = ask_line(line, NOT_REQUESTS[what])
    assert set(answer) == {"error", "errno"}
    assert answer["errno"] in (errno.EINVAL, errno.ENOENT)
    assert answer["error"]
    assert "ok" in ask_line(line, b'{"op": "status"}')


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"op": "context.add", "cid": "7"}, "cid"),
        ({"op": "context.add", "cid": 7.5}, "cid"),
        ({"op": "context.add", "cid": True}, "cid"),
        ({"op": "context.add", "cid": False}, "cid"),
        ({"op": "context.add", "cid": [7]}, "cid"),
        ({"op": "context.add", "name": 7}, "name"),
        ({"op": "context.add", "name": ["web"]}, "name"),
        ({"op": "context.add", "owner": "root"}, "owner"),
        ({"op": "context.add", "owner": False}, "owner"),
        ({"op": "context.add", "lease": 1}, "lease"),
        ({"op": "context.add", "lease": "yes"}, "lease"),
        ({"op": "context.remove"}, "cid"),
        ({"op": "context.remove", "cid": None}, "cid"),
        ({"op": "context.remove", "cid": {}}, "cid"),
    ],
)
def test_arguments_of_another_type(
    line: socket.socket, arguments: dict[str, Any], key: str
) -> None:
    answer = ask_line(line, json.dumps(arguments).encode())
    assert answer["errno"] == errno.EINVAL
    assert answer["error"].startswith(f"{key}: ")
    assert "expected a" in answer["error"]
    contexts = ask_line(line, b'{"op": "context.list"}')
    assert [row["cid"] for row in contexts["ok"]] == [2, GUEST]


def test_a_line_without_end(line: socket.socket) -> None:
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        for _ in range(100):
            line.sendall(b"x" * 65_536)
    with contextlib.suppress(ConnectionResetError):
        assert line.recv(1) == b""


def test_requests_in_pieces_and_in_bundles(line: socket.socket) -> None:
    for byte in b'{"op": "context.list"':
        line.send(bytes([byte]))
    assert ask_line(line, b"}")["ok"][0]["cid"] == 2
    line.sendall(b'{"op": "context.list"}\n' * 3)
    answers = b""
    while answers.count(b"\n") < 3:
        answers += line.recv(65_536)
    assert len({*answers.splitlines()}) == 1


def test_an_incomplete_request_delays_nobody(
    line: socket.socket, shared_fabric: PrivateFabric
) -> None:
    line.send(b'{"op":')
    assert_serves(shared_fabric)


def test_clients_that_do_not_wait_for_replies(shared_fabric: PrivateFabric) -> None:
    for _ in range(50):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(os.fspath(shared_fabric.folder / "control"))
            sock.send(b'{"op": "sockets"}\n{"op": "status"}\n{"op": ')
