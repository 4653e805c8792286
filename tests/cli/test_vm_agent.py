"""``vsock vm exec``, ``copy`` and ``reboot``: with Debian's qemu-ga, and with hostile agents."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import socket as stdlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import vsockets
from vm import downloads
from vsockets.testing import PrivateFabric
from vsockets.vm.limits import VM_AGENT_CHUNK_BYTES, VM_AGENT_SYNC_SKIPPED_MAX
from vsockets.vm.qemu_agent import AGENT_PORT, AgentFailed, QemuAgent

from .vsock import Vsock


@pytest.fixture
def guest(
    fabric: PrivateFabric, vsock: Vsock, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """The name of a guest with qemu-ga."""
    try:
        program = downloads.qemu_agent()
    except downloads.Unavailable as error:
        pytest.skip(str(error))
    cid = fabric.control.add_context(name="Agent", reserved_ports=True)["cid"]
    path = f"{vsockets.VMADDR_CID_ANY}:{AGENT_PORT}"
    running = vsock.start(
        *("run", "--cid", cid, "--", *program, "--method", "vsock-listen", "--path", path),
        *("--statedir", tmp_path_factory.mktemp("agent")),
    )
    vsock("connect", "--wait", 20, cid, AGENT_PORT)
    yield "agent"
    running.process.terminate()
    running.process.wait()
    fabric.control.remove_context(cid)


def test_programs(vsock: Vsock, guest: str) -> None:
    done = vsock("vm", "exec", guest, "--", "sh", "-c", "echo out; echo err >&2; exit 3", expect=3)
    assert (done.stdout, done.stderr) == ("out\n", "err\n")
    vsock("vm", "exec", guest, "--", "sh", "-c", "kill -TERM $$", expect=143)
    said = vsock("vm", "exec", guest, "/no/such", expect=1).stderr
    assert said.startswith("vsock: guest agent: guest-exec: the guest agent refuses: Guest agent")
    counted = vsock("vm", "exec", "-i", guest, "wc", "-c", data=b"x" * 300_000)
    assert counted.stdout == "300000\n"
    cut = vsock("vm", "exec", guest, "head", "-c", str(17 << 20), "/dev/zero")
    assert "has not kept all" in cut.stderr


def test_files(vsock: Vsock, guest: str, tmp_path: Path) -> None:
    data = os.urandom(3 * VM_AGENT_CHUNK_BYTES + 5)
    for size in (0, 1, VM_AGENT_CHUNK_BYTES, len(data)):
        (tmp_path / "data").write_bytes(data[:size])
        vsock("vm", "copy", tmp_path / "data", f"{guest}:{tmp_path}/in the guest")
        assert (tmp_path / "in the guest").read_bytes() == data[:size]
        (tmp_path / "back").mkdir(exist_ok=True)
        vsock("vm", "copy", f"{guest}:{tmp_path}/in the guest", tmp_path / "back")
        assert (tmp_path / "back" / "in the guest").read_bytes() == data[:size]
    said = vsock("vm", "copy", f"{guest}:/dev/zero", tmp_path / "zero", "--limit", "1", expect=1)
    assert "larger than 1048576 bytes" in said.stderr
    assert sorted(os.listdir(tmp_path)) == ["back", "data", "in the guest"]


def test_usage(vsock: Vsock) -> None:
    vsock.fail(
        ("vm copy a b", 2, "expected one of SOURCE and DESTINATION as GUEST:PATH"),
        ("vm copy 3:a 4:b", 2, "expected one of SOURCE and DESTINATION as GUEST:PATH"),
        ("vm exec 3 --", 2, "expected a PROGRAM"),
        ("vm exec nobody true", 1, "no context has this name"),
        ("vm exec 3999 true", 1, "connect to vsock:3999:970"),
        ("vm reboot nobody", 1, "no context has this name"),
        (
            "vm reboot 3999",
            1,
            "guest 3999: no VMware Tools run in it, and connect to vsock:3999:970",
        ),
    )


# Hostile agents


def synchronized(request: dict[str, Any]) -> bytes:
    return b"\xff" + json.dumps({"return": request["arguments"]["id"]}).encode() + b"\n"


def session(
    fabric: PrivateFabric,
    use: Callable[[QemuAgent], object],
    *replies: bytes | None,
    before: bytes = b"",
) -> list[dict[str, Any]]:
    """Use an agent that sends ``replies``, one for each request; None is the expected reply.

    Returns the requests.
    """
    guest = fabric.guest()
    server = vsockets.create_server((guest.cid, 5000), context=guest)
    asked: list[dict[str, Any]] = []

    def play() -> None:
        sock, _ = server.accept()
        with sock, sock.makefile("rb") as requests, contextlib.suppress(OSError):
            sock.sendall(before)
            for reply in replies:
                request = json.loads(requests.readline().lstrip(b"\xff"))
                asked.append(request)
                sock.sendall(synchronized(request) if reply is None else reply)
            sock.shutdown(stdlib.SHUT_WR)
            requests.read()

    thread = threading.Thread(target=play)
    thread.start()
    try:
        sock = vsockets.create_connection((guest.cid, 5000), 20, context=fabric.host)
        with QemuAgent(sock) as agent:
            use(agent)
    finally:
        thread.join()
        server.close()
    return asked


def result(value: object) -> bytes:
    return json.dumps({"return": value}).encode() + b"\n"


CHUNK = base64.b64encode(bytes(VM_AGENT_CHUNK_BYTES + 1)).decode()


@pytest.mark.parametrize(
    ("replies", "problem"),
    [
        ((b"",), "has closed the connection"),
        ((b"{}\n" * (VM_AGENT_SYNC_SKIPPED_MAX + 1),), "does not answer what it was asked"),
        ((b'\xff{"return": 1}\n' * 20,), "does not answer what it was asked"),
        ((b"\xff" + b"[" * 100_000 + b"\n",), "malformed reply"),
        ((None, b"\xfe\n"), "malformed reply"),
        ((None, b"[]\n"), "expected return or error"),
        ((None, b'{"error": {"desc": 7}}\n'), "expected return or error"),
        ((None, b'{"error": {"desc": "\\u001b[2J' + b"x" * 5000 + b'"}}\n'), r"\\x1b\[2Jx"),
        ((None, result({"pid": True})), "no valid pid"),
        ((None, result({"pid": -1})), "pid -1"),
        ((None, result([])), "no valid pid"),
        ((None, result({"pid": 1}), result({"exited": 1})), "no valid exited"),
        ((None, result({"pid": 1}), result({"exited": True})), "no valid exitcode"),
        (
            (None, result({"pid": 1}), result({"exited": True, "exitcode": 0, "out-data": "*"})),
            "no valid out-data",
        ),
        (
            (None, result({"pid": 1}), result({"exited": True, "exitcode": 0, "err-data": [1]})),
            "no valid err-data",
        ),
    ],
)
def test_hostile_replies_to_exec(
    fabric: PrivateFabric, replies: tuple[bytes | None, ...], problem: str
) -> None:
    with pytest.raises(AgentFailed, match=problem) as failed:
        session(fabric, lambda agent: agent.run(["true"]), *replies)
    assert len(str(failed.value)) < 500


@pytest.mark.parametrize(
    ("replies", "problem"),
    [
        ((result({"handle": 1}),), "no valid handle"),
        ((result(1 << 70),), "no valid handle"),
        ((result(1), result({"buf-b64": "", "eof": False})), "has sent 0 bytes"),
        ((result(1), result({"buf-b64": CHUNK, "eof": False})), "bytes of a file"),
        ((result(1), result({"buf-b64": "eA=="})), "no valid eof"),
    ],
)
def test_hostile_replies_to_reading(
    fabric: PrivateFabric, replies: tuple[bytes, ...], problem: str
) -> None:
    with pytest.raises(AgentFailed, match=problem):
        session(fabric, lambda agent: list(agent.read_file("/a", 1 << 30)), None, *replies)


@pytest.mark.parametrize("count", [0, -1, 5, "4", None])
def test_hostile_replies_to_writing(fabric: PrivateFabric, count: object) -> None:
    with pytest.raises(AgentFailed, match=r"written|no valid count|count -1"):
        replies = (None, result(1), result({"count": count, "eof": False}))
        session(fabric, lambda agent: agent.write_file("/a", [b"data"]), *replies)


REFUSAL = b'{"error": {"desc": "not now"}}\n'


@pytest.mark.parametrize("replies", [(b"", result({})), (b"",)])
def test_a_reboot_has_no_reply(fabric: PrivateFabric, replies: tuple[bytes, ...]) -> None:
    """The guest has agreed when the next request has a reply, or the connection ends."""
    asked = session(fabric, lambda agent: agent.reboot(), None, *replies)
    assert (asked[1]["execute"], asked[1]["arguments"]) == ("guest-shutdown", {"mode": "reboot"})


@pytest.mark.parametrize(
    ("reply", "problem"),
    [
        (REFUSAL, "guest-shutdown: the guest agent refuses: not now"),
        (b"[]\n", "guest-shutdown: malformed reply"),
        (b"{\n", "malformed reply"),
    ],
)
def test_a_reboot_that_fails(fabric: PrivateFabric, reply: bytes, problem: str) -> None:
    with pytest.raises(AgentFailed, match=problem):
        session(fabric, lambda agent: agent.reboot(), None, reply)


def test_replies_to_an_earlier_client_are_skipped(fabric: PrivateFabric) -> None:
    found: list[object] = []
    stale = result("stale") + b'{"error": {}}\n'
    session(
        fabric,
        lambda agent: found.append(agent.call("guest-ping", {})),
        None,
        result({}),
        before=stale,
    )
    assert found == [{}]


def test_an_endless_reply(fabric: PrivateFabric, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vsockets.vm.qemu_agent.VM_AGENT_REPLY_MAX_BYTES", 1 << 20)
    with pytest.raises(AgentFailed, match="more than 1048576 bytes"):
        session(fabric, lambda agent: agent.run(["true"]), None, b"x" * (2 << 20))
