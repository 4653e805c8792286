"""``vsock guestinfo``, with tools that are played by this process as guests of the fabric."""

from __future__ import annotations

import base64
import contextlib
import gzip
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

import vsockets
from vsockets.attachment import Attachment
from vsockets.guestrpc.packets import RPCI_PORT, TCLO_PORT, encode, encode_ping
from vsockets.testing import PrivateFabric, wait_until

from .played_tools import PlayedTools
from .vsock import Running, Vsock

VMX = """\
virtualHW.version = "19"
displayName = "web"
guestinfo.userdata = "c2VjcmV0"
guestinfo.userdata.encoding = "base64"
guest_rpc.rpci.auth.cmd.info-get = "FALSE"
"""


@pytest.fixture
def guest(fabric: PrivateFabric) -> Iterator[Attachment]:
    """A guest whose programs may bind reserved ports, as root of a machine may."""
    added = fabric.control.add_context(reserved_ports=True)
    yield vsockets.attach(added["folder"])
    fabric.control.remove_context(added["cid"])


@pytest.fixture
def service(vsock: Vsock, tmp_path: Path) -> Running:
    """The service, listening."""
    running = vsock.start("guestinfo", "serve", "--state", tmp_path / "state")
    assert running.error_line() == "serving VMware Tools at CID 0, ports 976 and 975"
    return running


def _children(pid: int) -> list[int]:
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def ask(guest: Attachment, request: bytes, source: int = 1023) -> bytes:
    """Return the reply to a one-shot request."""
    with PlayedTools(guest, RPCI_PORT, source) as tools:
        return tools.ask(request)


def test_a_guest_takes_part_once_it_is_enabled(
    vsock: Vsock, service: Running, guest: Attachment, tmp_path: Path
) -> None:
    cid = str(guest.cid)
    with PlayedTools(guest, RPCI_PORT) as tools, contextlib.suppress(OSError):
        assert tools.ask(b"info-get guestinfo.userdata") == b""
    refused = vsock("guestinfo", "set", cid, "a", "b", expect=1).stderr
    assert refused == f"vsock: guest {cid} is not enabled (first: vsock guestinfo enable {cid})\n"
    vmx = tmp_path / "web.vmx"
    vmx.write_text(VMX)
    vsock("guestinfo", "enable", cid, "--vmx", vmx)
    assert ask(guest, b"info-get guestinfo.userdata", vsockets.VMADDR_PORT_ANY) == b"1 c2VjcmV0"
    assert ask(guest, b"info-set guestinfo.x 1", vsockets.VMADDR_PORT_ANY) == b"0 Permission denied"
    assert ask(guest, b"info-set guestinfo.userdata ---") == b"1 "
    assert vsock("guestinfo", "get", cid, "userdata").stdout == "---\n"
    listed = json.loads(vsock("guestinfo", "ls", cid, "--json").stdout)
    assert {"name": "guestinfo.userdata", "set_by": "host", "value": "c2VjcmV0"} in listed
    assert "guestinfo.userdata.encoding" in vsock("guestinfo", "ls", cid).stdout
    vsock("guestinfo", "disable", cid)
    assert json.loads(vsock("guestinfo", "ls", "--json").stdout) == []


def test_setting_variables(
    vsock: Vsock, service: Running, guest: Attachment, tmp_path: Path
) -> None:
    cid = str(guest.cid)
    vsock("guestinfo", "enable", cid)
    data = tmp_path / "user-data"
    data.write_bytes(b"#cloud-config\n\xff\n")
    vsock("guestinfo", "set", cid, "userdata", "--file", data, "--encode", "gzip+base64")
    reply = ask(guest, b"info-get guestinfo.userdata")
    assert gzip.decompress(base64.b64decode(reply[2:])) == data.read_bytes()
    assert ask(guest, b"info-get guestinfo.userdata.encoding") == b"1 gzip+base64"
    vsock("guestinfo", "set", cid, "guestinfo.metadata", "--file", data)
    assert ask(guest, b"info-get guestinfo.metadata") == b"1 " + data.read_bytes()
    vsock("guestinfo", "unset", cid, "metadata")
    assert ask(guest, b"info-get guestinfo.metadata") == b"0 No value found"
    assert (
        "has no guestinfo.metadata" in vsock("guestinfo", "get", cid, "metadata", expect=1).stderr
    )


def test_the_daemon_of_a_guest(vsock: Vsock, service: Running, guest: Attachment) -> None:
    cid = str(guest.cid)
    vsock("guestinfo", "enable", cid)
    with PlayedTools(guest, TCLO_PORT) as tools:
        assert tools.receive() == b"reset"
        tools.send(encode(b"OK ATR toolbox\0") + encode_ping())
        for expected in (b"Capabilities_Register", b"Set_Option synctime 0"):
            assert tools.receive() == expected
            tools.send(encode(b"OK "))
        assert tools.receive() == b"Set_Option broadcastIP 1"
        assert ask(guest, b"info-set guestinfo.ip 192.0.2.7") == b"1 "
        assert ask(guest, b"SetGuestInfo  1 web.example") == b"1 "
        tools.send(encode(b"OK "))
        assert service.error_line() == f"guest {cid}: VMware Tools are running"
        table = vsock("guestinfo", "ls").stdout.split("\n")[1].split()
        assert table == [cid, "running", "web.example", "192.0.2.7", "-"]
        assert "running, web.example, 192.0.2.7" in vsock("context", "ls", "-v").stdout
        halting = vsock.start("guestinfo", "send", cid, "halt")
        assert tools.receive() == b"OS_Halt"
        tools.send(encode(b"OK "))
        halting.finish()
        refused = vsock.start("guestinfo", "send", cid, "reboot")
        assert tools.receive() == b"OS_Reboot"
        tools.send(encode(b"ERROR not now"))
        assert "the tools refuse OS_Reboot: b'not now'" in refused.finish(expect=1)[1]
        rebooting = vsock.start("vm", "reboot", cid)
        assert tools.receive() == b"OS_Reboot"
        tools.send(encode(b"OK "))
        rebooting.finish()
        refused = vsock.start("vm", "reboot", cid)
        assert tools.receive() == b"OS_Reboot"
        tools.send(encode(b"ERROR not now"))
        said = refused.finish(expect=1)[1]
        assert "refuse OS_Reboot: b'not now', and connect to vsock:" in said
    assert service.error_line() == f"guest {cid}: VMware Tools have disconnected"
    said = vsock("guestinfo", "send", cid, "halt", expect=1).stderr
    assert said == f"vsock: guest {cid}: no VMware Tools are connected\n"


def test_connections_wait_while_the_service_is_replaced(
    vsock: Vsock, service: Running, guest: Attachment
) -> None:
    """The tools exit when a single reconnect fails."""
    vsock("guestinfo", "enable", guest.cid)
    assert ask(guest, b"info-set guestinfo.kept yes") == b"1 "
    (child,) = _children(service.process.pid)
    os.kill(child, signal.SIGSTOP)
    with PlayedTools(guest, RPCI_PORT, 1022) as tools:
        tools.send(encode(b"info-get guestinfo.kept"))
        os.kill(child, signal.SIGKILL)
        assert tools.receive() == b"1 yes"
    assert "was ended by signal 9; starting another one" in service.error_line()
    service.process.send_signal(signal.SIGTERM)
    service.finish()
    assert not (vsock.folder / "guestinfo").exists()


def test_the_tools_are_told_of_suspend_and_resume(
    vsock: Vsock, service: Running, guest: Attachment
) -> None:
    """The scripts for a suspend have run before the streams end."""
    cid = guest.cid
    vsock("guestinfo", "enable", cid)
    with PlayedTools(guest, TCLO_PORT) as tools:
        _become_daemon(tools)
        assert "are running" in service.error_line()
        suspending = vsock.start("context", "suspend", cid)
        assert tools.receive() == b"OS_Suspend"
        tools.send(encode(b"OK "))
        assert json.loads(vsock("context", "ls", "--json").stdout)[-1]["state"] == "running"
        assert ask(guest, b"tools.os.statechange.status 1 5") == b"1 "
        suspending.finish()
        with contextlib.suppress(OSError):
            assert tools.receive() == b""
    vsock("context", "resume", cid)
    with PlayedTools(guest, TCLO_PORT) as tools:
        _become_daemon(tools)
        assert tools.receive() == b"OS_Resume"
        tools.send(encode(b"ERROR State change already in progress"))
        assert ask(guest, b"tools.os.statechange.status 1 5") == b"1 "
        assert tools.receive() == b"OS_Resume"
        tools.send(encode(b"OK "))
        refused = vsock.start("context", "suspend", cid)
        assert tools.receive() == b"OS_Suspend"
        tools.send(encode(b"ERROR busy"))
        said = "the tools refuse OS_Suspend: b'busy'; suspending the guest nevertheless"
        assert said in refused.finish()[1]


def test_another_process_takes_over(vsock: Vsock, service: Running, guest: Attachment) -> None:
    """At SIGUSR2, as of the other services: the tools connect again, and nothing is lost."""
    vsock("guestinfo", "enable", guest.cid)
    with PlayedTools(guest, RPCI_PORT, 1023) as tools, contextlib.suppress(OSError):
        assert tools.ask(b"info-set guestinfo.kept yes") == b"1 "
        (before,) = _children(service.process.pid)
        service.process.send_signal(signal.SIGUSR2)
        assert tools.receive() == b""
    assert ask(guest, b"info-get guestinfo.kept", 1022) == b"1 yes"
    lines = sorted((service.error_line(), service.error_line()))
    assert lines[0].startswith("replaced by process ")
    assert lines[1] == "serving VMware Tools at CID 0, ports 976 and 975"
    wait_until(lambda: before not in _children(service.process.pid), "the old process to end")
    assert len(_children(service.process.pid)) == 1


def test_hostile_guests_end_themselves_only(
    vsock: Vsock, service: Running, guest: Attachment
) -> None:
    vsock("guestinfo", "enable", guest.cid)
    with PlayedTools(guest, RPCI_PORT) as bad, PlayedTools(guest, RPCI_PORT, 1022) as good:
        bad.send(b"\xff" * 100)
        with contextlib.suppress(OSError):
            assert bad.receive() == b""
        assert good.ask(b"info-get guestinfo.a") == b"0 No value found"
        # Longer than any value: a reply, and not the end, which would kill the tools by SIGPIPE.
        good.send(encode(b"info-set guestinfo.a " + bytes(2_200_000)))
        assert good.receive() == b"0 Value too long"
        assert good.ask(b"info-get guestinfo.a") == b"0 No value found"
    assert "disconnected: a packet of 4294967295 bytes" in service.error_line()


def test_many_connections_of_one_guest(vsock: Vsock, service: Running, guest: Attachment) -> None:
    vsock("guestinfo", "enable", guest.cid)
    with contextlib.ExitStack() as stack:
        all_ = [stack.enter_context(PlayedTools(guest, RPCI_PORT)) for _ in range(80)]

        def served() -> int:
            number = 0
            for tools in all_:
                with contextlib.suppress(OSError):
                    number += tools.ask(b"log x") == b"1 "
            return number

        assert served() == 64

    def is_served() -> bool:
        with contextlib.suppress(OSError):  # reset while there are too many
            return ask(guest, b"log x") == b"1 "
        return False

    wait_until(is_served, "connections to be counted down")


def test_bad_command_lines(vsock: Vsock, tmp_path: Path) -> None:
    vmx = tmp_path / "bad.vmx"
    vmx.write_text('guest_rpc.rpci.auth.cmd.info-get = "perhaps"\n')
    vsock.fail(
        ("guestinfo get 7", 2, "NAME"),
        ("guestinfo set 7 a", 2, "expected either VALUE or --file"),
        ("guestinfo set 7 a b --file /c", 2, "expected either VALUE or --file"),
        ("guestinfo set 7 a --file /none/such", 2, "--file /none/such: No such file"),
        ("guestinfo get 7 a=b", 2, "NAME 'a=b': expected at most 256 printable ASCII"),
        ("guestinfo send 7 fly", 2, "CHANGE"),
        (f"guestinfo enable 7 --vmx {vmx}", 2, "expected TRUE or FALSE"),
        ("guestinfo ls", 1, "start it: vsock guestinfo serve"),
    )


def test_a_state_file_that_is_no_database(vsock: Vsock, tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.write_bytes(b"something else" * 100)
    said = vsock("guestinfo", "serve", "--state", state, expect=1).stderr
    assert "not a database" in said


def test_a_second_service_is_refused(vsock: Vsock, service: Running, tmp_path: Path) -> None:
    said = vsock("guestinfo", "serve", "--state", tmp_path / "other", expect=1).stderr
    assert "cannot listen on vsock:0:976: Address already in use" in said


def test_the_end_of_a_service_that_is_about_to_be_restarted(vsock: Vsock, service: Running) -> None:
    """A signal that arrives while no process serves is not lost."""
    for _ in range(2):
        wait_until(lambda: bool(_children(service.process.pid)), "a process that serves")
        os.kill(_children(service.process.pid)[0], signal.SIGKILL)
        while "was ended by signal 9" not in service.error_line():
            pass  # the other process may have begun to serve
    service.process.send_signal(signal.SIGTERM)
    service.finish()
    assert not (vsock.folder / "guestinfo").exists()


def _become_daemon(tools: PlayedTools) -> None:
    assert tools.receive() == b"reset"
    tools.send(encode(b"OK ATR toolbox\0"))
    for _ in range(3):
        assert tools.receive()
        tools.send(encode(b"OK "))


def test_a_guest_that_is_enabled_twice_and_disabled(
    vsock: Vsock, service: Running, guest: Attachment
) -> None:
    cid = str(guest.cid)
    vsock("guestinfo", "enable", cid)
    with PlayedTools(guest, TCLO_PORT) as tools:
        _become_daemon(tools)
        assert "are running" in service.error_line()
        vsock("guestinfo", "enable", cid)
        assert json.loads(vsock("guestinfo", "ls", "--json").stdout)[0]["running"]
        vsock("guestinfo", "disable", cid)
        with contextlib.suppress(OSError):
            assert tools.receive() == b""
    vsock("guestinfo", "enable", cid)
    assert "no VMware Tools" in vsock("guestinfo", "send", cid, "halt", expect=1).stderr


def _restart(service: Running) -> None:
    os.kill(_children(service.process.pid)[0], signal.SIGKILL)
    assert "starting another one" in service.error_line()
    while "serving" not in (line := service.error_line()):
        assert "was removed: disabled" in line


@pytest.mark.parametrize("has_file", [False, True])
def test_a_cid_that_another_guest_gets(
    fabric: PrivateFabric, vsock: Vsock, service: Running, tmp_path: Path, has_file: bool
) -> None:
    """Another guest gets none of the variables; the same machine has its own again."""
    vmx = tmp_path / "web.vmx"
    vmx.write_text('displayName = "web"\n')
    enable = ("--vmx", vmx) if has_file else ()
    added = fabric.control.add_context(reserved_ports=True)
    cid = added["cid"]
    vsock("guestinfo", "enable", cid, *enable)
    assert ask(vsockets.attach(added["folder"]), b"info-set guestinfo.userdata secret") == b"1 "
    fabric.control.remove_context(cid)
    again = vsockets.attach(fabric.control.add_context(cid=cid, reserved_ports=True)["folder"])
    with contextlib.suppress(OSError):
        assert ask(again, b"info-get guestinfo.userdata") == b""
    assert "was removed: disabled" in service.error_line()
    assert "is not enabled" in vsock("guestinfo", "get", cid, "userdata", expect=1).stderr
    _restart(service)
    vsock("guestinfo", "enable", cid, *enable)
    expected = b"1 secret" if has_file else b"0 No value found"
    assert ask(again, b"info-get guestinfo.userdata") == expected
    fabric.control.remove_context(cid)


def test_a_context_that_is_removed_while_no_process_serves(
    fabric: PrivateFabric, vsock: Vsock, service: Running
) -> None:
    cid = fabric.control.add_context()["cid"]
    vsock("guestinfo", "enable", cid)
    (child,) = _children(service.process.pid)
    os.kill(child, signal.SIGSTOP)
    fabric.control.remove_context(cid)
    _restart(service)
    assert json.loads(vsock("guestinfo", "ls", "--json").stdout) == []


def test_a_guest_with_many_requests_delays_no_other(
    fabric: PrivateFabric, vsock: Vsock, guest: Attachment, tmp_path: Path
) -> None:
    service = vsock.start("guestinfo", "serve", "--verbose", "--state", tmp_path / "state")
    assert "serving" in service.error_line()
    other = fabric.control.add_context()
    for cid in (guest.cid, other["cid"]):
        vsock("guestinfo", "enable", cid)
    busy = PlayedTools(guest, RPCI_PORT, 1000)
    with busy, PlayedTools(vsockets.attach(other["folder"]), RPCI_PORT) as tools:
        assert tools.ask(b"log first") == b"1 "
        assert "first" in service.error_line()
        (child,) = _children(service.process.pid)
        os.kill(child, signal.SIGSTOP)
        busy.send(encode(b"info-set guestinfo.a 1") * 500 + encode(b"log last"))
        tools.send(encode(b"info-get guestinfo.a"))
        tools.send(encode(b"log second"))
        os.kill(child, signal.SIGCONT)
        assert "second" in service.error_line()
        assert "last" in service.error_line()
    fabric.control.remove_context(other["cid"])


def test_a_binary_value_of_nearly_the_largest_size(
    vsock: Vsock, service: Running, guest: Attachment, tmp_path: Path
) -> None:
    vsock("guestinfo", "enable", guest.cid)
    data = tmp_path / "data"
    data.write_bytes(b"\xff" * 1_000_000)
    vsock("guestinfo", "set", guest.cid, "a", "--file", data)
    assert ask(guest, b"info-get guestinfo.a") == b"1 " + data.read_bytes()
    data.write_bytes(b"\xff" * 2_000_000)
    said = vsock("guestinfo", "set", guest.cid, "a", "--file", data, expect=1).stderr
    assert said == "vsock: too many bytes of variables, expected at most 1048576\n"


def test_the_file_is_private_and_of_one_fabric(vsock: Vsock, tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.touch(0o644)
    service = vsock.start("guestinfo", "serve", "--state", state)
    assert "serving" in service.error_line()
    found = {one.name: one.stat().st_mode & 0o777 for one in tmp_path.iterdir()}
    assert found == dict.fromkeys(found, 0o600)
    assert (vsock.folder / "guestinfo").stat().st_mode & 0o777 == 0o600
    service.process.send_signal(signal.SIGTERM)
    service.finish()
    said = vsock("guestinfo", "serve", "--state", "/dev/null", expect=1).stderr
    assert said == "vsock: --state /dev/null: not a regular file\n"
    vsock.environment["XDG_STATE_HOME"] = os.fspath(tmp_path)  # VSOCKETS_DIR is set
    service = vsock.start("guestinfo", "serve")
    assert "serving" in service.error_line()
    assert list((tmp_path / "vsock").glob("guestinfo-*"))
    assert not (tmp_path / "vsock" / "guestinfo").exists()
