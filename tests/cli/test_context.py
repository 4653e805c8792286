"""``vsock context``."""

from __future__ import annotations

import dataclasses
import os
import pwd
import socket
from pathlib import Path

from vsockets.fabric import Limits
from vsockets.testing import PrivateFabric

from .vsock import Vsock


def test_add_prints_the_cid_alone(vsock: Vsock) -> None:
    done = vsock("context", "add")
    assert int(done.stdout) >= 3
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""


def test_add_with_hybrid_vsock(vsock: Vsock, tmp_path: Path) -> None:
    added = vsock.json("context", "add", "501", "--hybrid", f"{tmp_path}/v.sock")
    assert added["hybrid"] == f"{tmp_path}/v.sock"
    with socket.socket(socket.AF_UNIX) as tool:
        tool.connect(added["hybrid"])
        tool.sendall(b"CONNECT 52\n")
        assert tool.recv(100) == b""
    line = vsock.fails("context", "add", "--hybrid", f"{tmp_path}/{'x' * 100}")
    assert "hybrid: socket name too long" in line
    vsock("context", "rm", "501")
    assert not (tmp_path / "v.sock").exists()


def test_twenty_at_once_get_twenty_cids(vsock: Vsock) -> None:
    added = [vsock.start("context", "add") for _ in range(20)]
    assert len({int(running.finish()[0]) for running in added}) == 20


def test_add_list_and_remove(vsock: Vsock) -> None:
    me = pwd.getpwuid(os.geteuid())
    added = vsock.json("context", "add", "500", "--name", "web [1]", "--owner", me.pw_name)
    assert added == {
        "cid": 500,
        "name": "web [1]",
        "owner": me.pw_uid,
        "leased": False,
        "state": "running",
        "ft": False,
        "profile": "default",
        "unrestricted": False,
        "domain": "",
        "folder": str(vsock.folder / "500"),
        "hybrid": "",
        "reserved_ports": False,
        "usage": {"sockets": 0, "pending_connects": 0, "datagram_bytes": 0},
        "limits": dataclasses.asdict(Limits()),
        "denials": {},
    }
    assert added in vsock.json("context", "ls")
    table = vsock("context", "ls").stdout
    assert "web [1]" in table
    assert me.pw_name in table
    assert vsock("context", "rm", "500").stdout == ""
    assert added not in vsock.json("context", "ls")


def test_reserved_ports(vsock: Vsock) -> None:
    vsock("context", "add", "502", "--reserved-ports")
    lines = vsock("context", "ls", "-v").stdout.splitlines()
    (row,) = (line for line in lines if line.startswith("502"))
    assert "granted" in row and str(vsock.folder / "502") in row
    assert sum("granted" in line for line in lines) == 1
    assert "granted" not in vsock("context", "ls").stdout
    vsock("context", "add", "503")
    vsock.fail(
        ("run --cid 503 --reserved-ports true", 1, "context 503 exists, without reserved ports"),
        ("run --cid host --reserved-ports true", 2, "--reserved-ports: not allowed for the host"),
        (
            f"context add --reserved-ports --owner {os.geteuid() + 1}",
            1,
            f"reserved ports: the guest belongs to user {os.geteuid() + 1} (expected the "
            f"fabric's owner, user {os.geteuid()})",
        ),
    )
    vsock("run", "--cid", "502", "--reserved-ports", "true")
    running = vsock.start("run", "--cid", "504", "sh", "-c", "echo ready; read line")
    running.read_line()
    vsock.fail(
        ("run --cid 504 --reserved-ports true", 1, "context 504 exists, without reserved ports")
    )
    for cid in (502, 503):
        vsock("context", "rm", cid)


def test_owner_may_be_a_number(vsock: Vsock) -> None:
    added = vsock.json("context", "add", "--owner", os.geteuid())
    assert added["owner"] == os.geteuid()


def test_refusals(vsock: Vsock, fabric: PrivateFabric) -> None:
    fabric.guest(600)
    vsock.fail(
        ("context add 600", 1, "context 600 exists"),
        ("context add 2", 2, "CID: '2': expected a guest's CID, 3 to 4294967294"),
        ("context add host", 2, "CID: 'host': expected a guest's CID, 3 to 4294967294"),
        ("context rm 4000", 1, "no context 4000"),
        ("context rm host", 1, "context 2 is the host: it cannot be removed"),
        ("context add many", 2, "CID: 'many': expected a guest's CID"),
        ("context add --owner no-such-user", 2, "no such user: 'no-such-user'"),
    )
