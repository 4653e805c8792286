"""The requests of guests, the permissions of a ``.vmx`` file, and the host's commands."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vsockets.guestrpc import limits
from vsockets.guestrpc.commands import CommandChannel, CommandFailed
from vsockets.guestrpc.guest import Guest, Permissions, Requests, variables_of
from vsockets.guestrpc.packets import Decoder, Packet
from vsockets.guestrpc.variables import Variables, Writer
from vsockets.vmware import VmxError, parse_vmx

ROOT, USER = 1023, 1024


class Stage:
    """Guest 7, and the requests it may make."""

    def __init__(self) -> None:
        self.variables = Variables()
        self.variables.admit(7, "", "{}")
        self.options: list[bytes] = []
        self.guest = Guest(7)
        self.requests = Requests(self.variables, lambda guest, text: self.options.append(text))

    def ask(self, request: bytes, port: int = ROOT) -> bytes:
        return self.requests.answer(self.guest, port, request)


@pytest.fixture
def stage() -> Iterator[Stage]:
    stage = Stage()
    with stage.variables:
        yield stage


def test_getting_and_setting(stage: Stage) -> None:
    # The exact text is compared by cloud-init and by scripts.
    assert stage.ask(b"info-get guestinfo.missing") == b"0 No value found"
    assert stage.ask(b"info-set guestinfo.x y z") == b"1 "
    assert stage.ask(b"info-get guestinfo.X\0") == b"1 y z"
    assert stage.ask(b"info-set guestinfo.empty ") == b"1 "
    assert stage.ask(b"info-get guestinfo.empty") == b"1 "
    assert stage.variables.all(7) == [
        ("guestinfo.empty", Writer.GUEST, b""),
        ("guestinfo.x", Writer.GUEST, b"y z"),
    ]


@pytest.mark.parametrize(
    "request_", [b"info-get ide0:0.fileName", b"info-get ", b"info-get", b"info-get guestinfo."]
)
def test_other_names_do_not_exist(stage: Stage, request_: bytes) -> None:
    assert stage.ask(request_) == b"0 No value found"


def test_only_guestinfo_can_be_set(stage: Stage) -> None:
    assert b"expected a name that begins with guestinfo." in stage.ask(b"info-set memsize 4")
    assert stage.ask(b"info-set guestinfo.x " + b"x" * 2_000_000)[:2] == b"0 "


def test_root_alone_is_allowed_unless_the_vmx_file_says_so(stage: Stage) -> None:
    stage.variables.set(7, Writer.HOST, "guestinfo.userdata", b"password")
    for request in (b"info-get guestinfo.userdata", b"info-set guestinfo.x 1"):
        assert stage.ask(request, USER) == b"0 Permission denied"
        assert stage.ask(request, ROOT)[:2] == b"1 "
    stage.guest.permissions = Permissions(users_get=True)
    assert stage.ask(b"info-get guestinfo.userdata", USER) == b"1 password"
    assert stage.ask(b"info-set guestinfo.x 1", USER) == b"0 Permission denied"
    stage.guest.permissions = Permissions(may_set=False, users_set=True)
    assert stage.ask(b"info-set guestinfo.x 1", ROOT) == b"0 Permission denied"


def test_permissions_of_a_vmx_file() -> None:
    def permissions(text: str) -> Permissions:
        return Permissions.of(parse_vmx(text.encode(), "a.vmx"))

    assert permissions("") == Permissions()
    assert permissions(
        'guest_rpc.rpci.auth.cmd.info-get = "FALSE"\n'
        'guest_rpc.rpci.auth.cmd.info-set = "TRUE"\n'
        'isolation.tools.setInfo.disable = "TRUE"\n'
        'tools.setInfo.sizeLimit = "4096"\n'
    ) == Permissions(users_get=True, may_set=False, most=4096)
    with pytest.raises(VmxError, match="expected TRUE or FALSE"):
        permissions('guest_rpc.rpci.auth.cmd.info-get = "maybe"')
    with pytest.raises(VmxError, match="expected a number of bytes"):
        permissions('tools.setInfo.sizeLimit = "-1"')


def test_variables_of_a_vmx_file() -> None:
    vmx = parse_vmx(
        b'guestinfo.userdata = "H4sI|22"\nguestInfo.userdata.encoding = "gzip+base64"\n'
        b'displayName = "web"\n',
        "a.vmx",
    )
    assert variables_of(vmx) == {
        "guestinfo.userdata": b'H4sI"',
        "guestinfo.userdata.encoding": b"gzip+base64",
    }


def test_claims_are_shown_as_text(stage: Stage) -> None:
    details = struct.pack("<I129s513s", 1, b"debian12-64", b"Debian GNU/Linux \x1b[31m12")
    for request in (
        b"SetGuestInfo  1 web\x1b[2J\n\xff" + b"x" * 5000,
        b"SetGuestInfo  11 " + details + b"bitness='64'",
        b"SetGuestInfo  7 123456",
        b"info-set guestinfo.ip 10.0.2.15",
        b"tools.os.statechange.status 1 3",
        b"tools.capability.softpowerop_retry ",
        b"SetGuestDiskInfo {}",
        b"log toolbox: Version: 12.2.0",
        b"tools.set.versiontype 12352 4",
    ):
        assert stage.ask(request) == b"1 ", request
    claims = stage.guest.claims
    assert claims["host name"].startswith("web\\x1b[2J\\n\ufffdxxx")
    assert len(claims["host name"]) < limits.GUESTRPC_CLAIM_MAX_CHARACTERS + 10
    assert claims["OS"] == "Debian GNU/Linux \\x1b[31m12"
    assert (claims["uptime"], claims["address"]) == ("1234 s", "10.0.2.15")
    assert (claims["state"], claims["tools version number"]) == ("powered on", "12352")
    assert stage.guest.capabilities == {"tools.capability.softpowerop_retry": ""}


def test_an_option_of_a_guest_is_short(stage: Stage) -> None:
    """An option is queued for the guest's own tools, which may read nothing."""
    assert stage.ask(b"vmx.set_option synctime " + b"x" * 2000) == b"0 Permission denied"


def test_capabilities_are_limited(stage: Stage) -> None:
    for number in range(1000):
        assert stage.ask(b"vmx.capability.%d 1" % number) == b"1 "
    assert len(stage.guest.capabilities) == limits.GUESTRPC_CAPABILITIES_MAX


def test_options_are_sent_back(stage: Stage) -> None:
    assert stage.ask(b"vmx.set_option synctime 0 1") == b"1 "
    assert stage.options == [b"synctime 1"]
    assert stage.ask(b"vmx.set_option synctime 0 1", USER) == b"0 Permission denied"
    assert len(stage.options) == 1


def test_unknown_requests(stage: Stage) -> None:
    for request in (b"", b"Vix_1_Whatever", b"guestlib.info.get 3", b"\xff\0\xff"):
        assert stage.ask(request) == b"0 Unknown command"


WORDS = st.sampled_from(
    [b"info-get guestinfo.", b"info-set ", b"SetGuestInfo ", b"tools.", b"vmx.", b"log ", b"11 "]
)


@given(st.lists(st.one_of(WORDS, st.binary(max_size=40))), st.integers(0, 0xFFFF_FFFF))
def test_every_request_has_a_reply(parts: list[bytes], port: int) -> None:
    stage = Stage()
    with stage.variables:
        reply = stage.ask(b"".join(parts), port)
    assert reply[:2] in (b"0 ", b"1 ")


# Commands


class Tools:
    """A guest's tools, as the channel sees them."""

    def __init__(self) -> None:
        self.commands: list[bytes] = []
        self.ready = 0
        self.channel = CommandChannel(self._receive, self._become_ready)

    def _receive(self, data: bytes) -> None:
        self.commands += [packet.payload for packet in Decoder().feed(data)]

    def _become_ready(self) -> None:
        self.ready += 1

    def answer(self, text: bytes) -> None:
        self.channel.receive(Packet(text))

    def register(self) -> None:
        self.answer(b"OK ATR toolbox\0")
        for _ in range(3):
            self.answer(b"OK ")


def test_the_tools_are_reset_and_register_before_they_are_ready() -> None:
    tools = Tools()
    assert tools.commands == [b"reset"]
    tools.channel.receive(Packet(is_ping=True))
    assert tools.commands == [b"reset"]
    tools.register()
    assert tools.commands[1:] == [
        b"Capabilities_Register",
        b"Set_Option synctime 0",
        b"Set_Option broadcastIP 1",
    ]
    assert tools.ready == 1
    assert not tools.channel.is_waiting


def test_one_command_at_a_time() -> None:
    tools = Tools()
    tools.register()
    answers: list[bytes | CommandFailed] = []
    tools.channel.command(b"OS_Halt", answers.append)
    tools.channel.command(b"OS_Reboot", answers.append)
    assert tools.commands[-1] == b"OS_Halt"
    tools.answer(b"OK done\0")
    assert tools.commands[-1] == b"OS_Reboot"
    tools.answer(b"ERROR Unknown Command")
    assert answers[0] == b"done"
    assert str(answers[1]) == "the tools refuse OS_Reboot: b'Unknown Command'"
    tools.answer(b"OK unasked")  # ignored


def test_a_closed_connection_fails_what_waits() -> None:
    tools = Tools()
    answers: list[bytes | CommandFailed] = []
    for _ in range(limits.GUESTRPC_COMMANDS_MAX):
        tools.channel.command(b"OS_Halt", answers.append)
    with pytest.raises(CommandFailed, match="16 commands wait"):
        tools.channel.command(b"OS_Halt", answers.append)
    tools.channel.close()
    assert [str(one) for one in answers] == ["the tools have closed the connection"] * 16


def test_the_tools_of_a_users_session_get_no_commands() -> None:
    tools = Tools()
    tools.answer(b"OK ATR toolbox-dnd")
    assert (tools.commands, tools.ready) == ([b"reset"], 0)
