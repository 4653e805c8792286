"""``vsock context suspend`` and so on, ``vsock events`` and ``vsock reload``."""

from __future__ import annotations

import json
import select
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

import vsockets
from vsockets import Attachment
from vsockets.testing import PrivateFabric, wait_until

from .vsock import Running, Vsock

CID = 40


@pytest.fixture
def guest(fabric: PrivateFabric) -> Iterator[Attachment]:
    """A guest that is removed after the test."""
    yield fabric.guest(CID, name="web")
    if any(row["cid"] == CID and row["state"] != "off" for row in fabric.control.contexts()):
        fabric.control.power_off(CID)
    fabric.control.remove_context(CID)


def row(fabric: PrivateFabric) -> dict[str, object]:
    return next(row for row in fabric.control.contexts() if row["cid"] == CID)


def test_each_command_and_the_state_after_it(
    vsock: Vsock, fabric: PrivateFabric, guest: Attachment
) -> None:
    for command, state, ft in (
        ("suspend 40", "suspended", False),
        ("resume 40", "running", False),
        ("migrate 40", "running", False),
        ("ft 40 on", "running", True),
        ("ft 40 off", "running", False),
        ("power-off 40", "off", False),
        ("power-on 40", "running", False),
    ):
        done = vsock("context", *command.split())
        assert (done.stdout, done.stderr) == ("", "")
        assert (row(fabric)["state"], row(fabric)["ft"]) == (state, ft)


@pytest.mark.parametrize("command", ["suspend 40", "migrate 40", "ft 40 on", "power-off 40"])
def test_commands_that_drop_connections(
    vsock: Vsock, fabric: PrivateFabric, guest: Attachment, command: str
) -> None:
    with (
        vsockets.create_server((2, 5000), context=fabric.host) as server,
        vsockets.create_connection((2, 5000), context=guest) as client,
    ):
        accepted, _ = server.accept()
        with accepted:
            assert "40 has 1 open streams" in vsock.fails("context", "rm", "40")
            vsock("context", *command.split())
            client.settimeout(20)
            assert client.recv(10) == b""
            assert accepted.recv(10) == b""


def test_invalid_arguments(vsock: Vsock, guest: Attachment) -> None:
    vsock.fail(
        ("context resume 40", 1, "cannot resume context 40: it is running"),
        ("context power-on 40", 1, "cannot power-on context 40: it is running"),
        ("context ft 40 off", 1, "context 40 is not in FT mode already"),
        ("context suspend host", 1, "cannot suspend context 2: it is the host (expected a guest)"),
        ("context migrate 4000", 1, "no context 4000"),
        ("context ft 40 maybe", 2, "maybe"),
        ("context power-off web", 2, "CID 'web': expected a number"),
    )


def test_the_list_shows_state_and_mode(
    vsock: Vsock, fabric: PrivateFabric, guest: Attachment
) -> None:
    vsock("context", "ft", "40", "on")
    (line,) = [line for line in vsock("context", "ls").stdout.splitlines() if "web" in line]
    assert "running FT" in line
    vsock("context", "power-off", "40")
    (line,) = [line for line in vsock("context", "ls").stdout.splitlines() if "web" in line]
    assert " off " in line


# Adding


def test_isolation(vsock: Vsock) -> None:
    added = vsock.json(
        *("context", "add", "--profile", "legacy", "--unrestricted", "--domain", "lab"),
    )
    assert (added["profile"], added["unrestricted"], added["domain"]) == ("legacy", True, "lab")
    added = vsock.json("context", "add", "--profile", "restricted", "--off")
    assert (added["profile"], added["state"]) == ("restricted", "off")
    vsock.fail(
        ("context add --unrestricted", 2, "--unrestricted and --domain need --profile legacy"),
        ("context add --domain lab", 2, "--unrestricted and --domain need --profile legacy"),
        ("context add --profile none", 2, "none"),
    )


class TestVmx:
    """Contexts from a VMware machine's .vmx file."""

    VMX = (
        '.encoding = "windows-1252"\nconfig.version = "8"\nvirtualHW.version = "8"\n'
        'vmci0.present = "TRUE"\nvmci0.id = "{}"\nvmci0.unrestricted = "TRUE"\n'
        'vmci0.domain = "lab"\ndisplayName = "Büro|22neu|22"\n'
    )

    @pytest.fixture
    def vmx(self, tmp_path: Path) -> str:
        path = tmp_path / "machine.vmx"
        path.write_bytes(self.VMX.format("-1791447150").encode("cp1252"))
        return str(path)

    def test_gives_cid_and_name(self, vsock: Vsock, vmx: str) -> None:
        done = vsock("context", "add", "--vmx", vmx, "--json")
        added = json.loads(done.stdout)
        assert (added["cid"], added["name"]) == (2503520146, 'Büro"neu"')
        assert (added["profile"], added["unrestricted"]) == ("default", False)
        assert "are ignored, as since ESXi 5.1" in done.stderr
        again = vsock.fails("context", "add", "--vmx", vmx, "--profile", "legacy")
        assert again == "context 2503520146 exists"
        vsock("context", "rm", "2503520146")

    def test_options_override_the_file(self, vsock: Vsock, vmx: str) -> None:
        added = vsock.json("context", "add", "50", "--vmx", vmx, "--name", "x")
        assert (added["cid"], added["name"]) == (50, "x")

    def test_with_the_legacy_profile(self, vsock: Vsock, vmx: str) -> None:
        added = vsock.json("context", "add", "51", "--vmx", vmx, "--profile", "legacy")
        assert (added["unrestricted"], added["domain"]) == (True, "lab")

    def test_mistakes(self, vsock: Vsock, tmp_path: Path) -> None:
        broken = tmp_path / "broken.vmx"
        broken.write_text(self.VMX.format("2"))
        vsock.fail(
            (f"context add --vmx {broken}", 2, f"{broken}:5: vmci0.id: '2'"),
            (f"context add --vmx {tmp_path}/none.vmx", 2, "none.vmx"),
        )


# Following


def test_events_as_json(vsock: Vsock, fabric: PrivateFabric, guest: Attachment) -> None:
    following = vsock.start("events", "--json")
    # It has subscribed once it prints its first event.

    def is_heard() -> bool:
        fabric.control.migrate(CID)
        return has_said_something(following)

    wait_until(is_heard, "it to subscribe")
    fabric.control.suspend(CID)
    event = json.loads(following.read_line())
    while event["change"] == "migrate":
        event = json.loads(following.read_line())
    assert (event["topic"], event["cid"], event["name"]) == ("context", CID, "web")
    assert (event["change"], event["state"], event["missed"]) == ("suspend", "suspended", 0)
    with vsockets.socket(context=guest) as client, pytest.raises(OSError, match="down"):
        client.connect((2, 5000))
    event = json.loads(following.read_line())
    assert (event["topic"], event["rule"]) == ("denial", "suspended")
    assert event["destination"] == [2, 5000]


def has_said_something(running: Running) -> bool:
    assert running.process.stdout is not None
    return bool(select.select([running.process.stdout], [], [], 0)[0])


def test_events_of_one_topic_in_words(
    vsock: Vsock, fabric: PrivateFabric, guest: Attachment
) -> None:
    following = vsock.start("events", "denial")

    def is_heard() -> bool:
        fabric.control.suspend(CID)
        with (
            vsockets.socket(type=socket.SOCK_DGRAM, context=guest) as sender,
            pytest.raises(OSError, match="down"),
        ):
            sender.sendto(b"x", (2, 5000))
        fabric.control.resume(CID)
        return has_said_something(following)

    wait_until(is_heard, "it to subscribe")
    line = following.read_line()
    assert " context 40: denied: send a datagram 40:any to 2:5000: " in line
    assert "[suspended, ENETDOWN]" in line


def test_events_end_with_vsockd(alone: Vsock) -> None:
    alone("up")
    following = alone.start("events", "context")

    def is_heard() -> bool:
        alone("context", "add")
        return has_said_something(following)

    wait_until(is_heard, "it to subscribe")
    alone("down")
    following.finish()


def test_unknown_topics(vsock: Vsock) -> None:
    vsock.fail(("events weather", 2, "weather"))


# Reloading, and limits


def test_reload(vsock: Vsock, fabric: PrivateFabric) -> None:
    configured = fabric.configuration / "guests.toml"
    configured.write_text("[[context]]\ncid = 60\nlimits = { sockets = 1 }\n")
    assert vsock("reload").stdout == ""
    guest = Attachment(fabric.folder / "60")
    with vsockets.socket(context=guest) as sock, vsockets.socket(context=guest) as another:
        sock.bind((60, 5000))
        with pytest.raises(OSError, match="buffer space"):
            another.bind((60, 5001))
        # Every listing shows the limit.
        status = [line.split() for line in vsock("status").stdout.splitlines()]
        assert ["limits", "met", "1"] in status
        (line,) = [
            line.split()
            for line in vsock("ls", "--context", "60").stdout.splitlines()
            if line.startswith("60 ")
        ]
        assert (line[:4], line[-1]) == (["60", "1", "of", "1"], "1")
        (line,) = [
            line.split()
            for line in vsock("context", "ls").stdout.splitlines()
            if line.split()[:1] == ["60"]
        ]
        assert "1/1" in line
    configured.write_text("[[context]]\ncid = 60\nlimit = 1\n")
    assert vsock.fails("reload").startswith(f"{configured}:3: context.limit: unknown key")
    configured.unlink()
    fabric.control.remove_context(60)


def test_disconnect(vsock: Vsock, fabric: PrivateFabric, guest: Attachment) -> None:
    with (
        vsockets.create_server((2, 5000), context=fabric.host) as server,
        vsockets.create_connection((2, 5000), context=guest) as client,
    ):
        accepted, (_, port) = server.accept()
        with accepted:
            done = vsock("disconnect", f"40:{port}", "2:5000")
            assert (done.stdout, done.stderr) == ("", "")
            client.settimeout(10)
            assert client.recv(1) == b""
        gone = vsock.fails("disconnect", f"40:{port}", "2:5000")
        assert gone == f"no stream between 40:{port} and 2:5000 (see: vsock ls)"
        assert "expected CID:PORT" in vsock.fails("disconnect", "40", "2:5000", status=2)
