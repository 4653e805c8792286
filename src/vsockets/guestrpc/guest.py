"""A guest with VMware Tools: its permissions, its tools' claims, and its requests.

What the tools report is a claim of the guest.  A claim is shown as text without control characters,
at most :data:`GUESTRPC_CLAIM_MAX_CHARACTERS` of each, and never interpreted by the host.
"""

from __future__ import annotations

import logging
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

from .. import logs
from ..model.text import printable
from ..vmware import Vmx
from .limits import (
    GUESTRPC_CAPABILITIES_MAX,
    GUESTRPC_CLAIM_MAX_CHARACTERS,
    GUESTRPC_OPTION_MAX_BYTES,
)
from .variables import PREFIX, VariableRefused, Variables, Writer, full_name

log = logging.getLogger("vsockets.guestinfo")

#: The first port that users other than root may bind, in the guest's kernel.
_FIRST_UNPRIVILEGED = 1024

_REFUSED, _UNKNOWN = b"0 Permission denied", b"0 Unknown command"
#: The text that cloud-init and scripts compare.
_NO_VALUE = b"0 No value found"

#: Types of ``SetGuestInfo`` whose value is text, with the claim they are.
_TEXTS = {1: "host name", 4: "tools build", 5: "OS", 6: "OS short name"}
#: The type whose value is a structure: a version, a short name and a full name of fixed sizes.
_DETAILS = 11
_DETAILS_LAYOUT = struct.Struct("<I129s513s")
_UPTIME = 7  # in hundredths of a second

#: Variables of the tools that are claims, too.
_CLAIMS = {
    "guestinfo.ip": "address",
    "guestinfo.vmtools.versionstring": "tools version",
    "guestinfo.vmtools.description": "tools",
}

_STATES = {1: "halting", 2: "rebooting", 3: "powered on", 4: "resumed", 5: "suspending"}


@dataclass(frozen=True)
class Permissions:
    """The rights of a guest; ``users_`` are those of users other than root, by the guest's kernel.

    ``most`` is the limit in bytes of the variables that the guest sets.
    """

    users_get: bool = False
    users_set: bool = False
    may_set: bool = True
    most: int | None = None

    @classmethod
    def of(cls, vmx: Vmx) -> Permissions:
        """Return the permissions that a ``.vmx`` file gives.

        ``guest_rpc.rpci.auth.cmd.info-get`` and ``info-set`` are TRUE where root alone is allowed.
        That is the default here, while VMware's is FALSE: secrets are in ``guestinfo.userdata``.

        Raises VmxError for an invalid value.
        """
        limit = vmx.number("tools.setInfo.sizeLimit")
        if limit is not None and limit < 0:
            raise vmx.error("tools.setInfo.sizeLimit", "expected a number of bytes")
        return cls(
            users_get=not vmx.boolean("guest_rpc.rpci.auth.cmd.info-get", True),
            users_set=not vmx.boolean("guest_rpc.rpci.auth.cmd.info-set", True),
            may_set=not vmx.boolean("isolation.tools.setInfo.disable", False),
            most=limit,
        )


def variables_of(vmx: Vmx) -> dict[str, bytes]:
    """Return the ``guestinfo`` variables of a ``.vmx`` file, with their full names.

    Raises VmxError for a name that no guest could ask for.
    """
    found = {}
    for key, value in vmx.values.items():
        if key.startswith(PREFIX):
            try:
                found[full_name(key)] = value.encode()
            except VariableRefused as error:
                raise vmx.error(key, str(error)) from None
    return found


@dataclass
class Guest:
    """A guest that is enabled: its tools are served."""

    cid: int
    permissions: Permissions = field(default_factory=Permissions)
    claims: dict[str, str] = field(default_factory=dict)  #: what its tools say, by what it is
    capabilities: dict[str, str] = field(default_factory=dict)
    heard: float = 0.0  #: monotonic time of the last sign of life; 0 without one
    is_suspended: bool = False  #: its tools have yet to be notified of the resume
    changed: Callable[[], object] = lambda: None  #: called when its scripts for a change have run

    def claim(self, name: str, value: bytes) -> None:
        """Record a claim of the guest about itself."""
        self.claims[name] = _shown(value)


def _shown(value: bytes) -> str:
    text = value[: 4 * GUESTRPC_CLAIM_MAX_CHARACTERS].rstrip(b"\0").decode(errors="replace")
    return printable(text[:GUESTRPC_CLAIM_MAX_CHARACTERS].strip())


class Requests:
    """The requests of guests (RPCI) and their replies, without input and output."""

    def __init__(self, variables: Variables, set_option: Callable[[Guest, bytes], object]) -> None:
        """Answer from ``variables``.

        ``set_option`` sends a guest's tools a command with an option that the guest itself changed.
        """
        self._variables = variables
        self._set_option = set_option

    def answer(self, guest: Guest, port: int, request: bytes) -> bytes:
        """Return the reply to a request from ``port`` of the guest; never empty.

        Raises sqlite3.Error when a variable cannot be read or written.
        """
        request = request.rstrip(b"\0")  # a daemon's requests end with it, one-shot ones do not
        is_root = port < _FIRST_UNPRIVILEGED
        word, _, rest = request.partition(b" ")
        match word:
            case b"info-get":
                return self._get(guest, is_root, rest)
            case b"info-set":
                return self._set(guest, is_root, rest)
            case b"vmx.set_option" if is_root and len(rest) <= GUESTRPC_OPTION_MAX_BYTES:
                name, _, values = rest.partition(b" ")
                self._set_option(guest, name + b" " + values.rpartition(b" ")[2])
                return b"1 "
            case b"vmx.set_option":
                return _REFUSED
        if _note(guest, word, rest):
            return b"1 "
        log.debug("guest %d: unknown request %s", guest.cid, _shown(word))
        return _UNKNOWN

    def _get(self, guest: Guest, is_root: bool, rest: bytes) -> bytes:
        if not (is_root or guest.permissions.users_get):
            return _REFUSED
        try:
            value = self._variables.get(guest.cid, _name(rest))
        except VariableRefused:
            value = None
        return _NO_VALUE if value is None else b"1 " + value

    def _set(self, guest: Guest, is_root: bool, rest: bytes) -> bytes:
        allowed = guest.permissions
        if not (allowed.may_set and (is_root or allowed.users_set)):
            return _REFUSED
        text, _, value = rest.lstrip(b" ").partition(b" ")
        try:
            name = _name(text)
            self._variables.set(guest.cid, Writer.GUEST, name, value, allowed.most)
        except VariableRefused as error:
            log.warning("guest %d: %s", guest.cid, error, extra=logs.rare(guest.cid))
            return b"0 " + str(error).encode()
        if name in _CLAIMS:
            guest.claim(_CLAIMS[name], value)
        return b"1 "


def _name(text: bytes) -> str:
    """Return the full name of a variable that a guest names.  Raises VariableRefused."""
    name = text.strip(b" ").decode("ascii", "replace")
    if not name.lower().startswith(PREFIX):
        raise VariableRefused(f"{name[:60]!a}: expected a name that begins with {PREFIX}")
    return full_name(name)


def _note(guest: Guest, word: bytes, rest: bytes) -> bool:
    """Record a claim of the tools about their guest; return False for any other request."""
    match word:
        case b"log":
            log.info("guest %d: %s", guest.cid, _shown(rest), extra=logs.by(guest.cid))
        case b"SetGuestInfo":
            _set_guest_info(guest, rest)
        case b"tools.set.versiontype" | b"tools.set.version":
            guest.claim("tools version number", rest.partition(b" ")[0])
        case b"tools.os.statechange.status":
            _note_state(guest, rest)
        case _ if word.startswith((b"tools.capability.", b"vmx.capability.")):
            _set_capability(guest, _shown(word), _shown(rest))
        case _:
            return word == b"SetGuestDiskInfo"  # not shown
    return True


def _note_state(guest: Guest, rest: bytes) -> None:
    found = re.fullmatch(rb"(\d{1,3}) (\d{1,3})", rest)
    if found and (name := _STATES.get(int(found[2]))):
        guest.claims["state"] = name if found[1] == b"1" else f"{name}: the scripts have failed"
        guest.changed()


def _set_guest_info(guest: Guest, rest: bytes) -> None:
    """Record a claim; all that is invalid is left out, as the tools expect no other reply."""
    found = re.match(rb" *(\d{1,3}) ", rest)
    if not found:
        return
    type_, value = int(found[1]), rest[found.end() :]
    if type_ in _TEXTS:
        guest.claim(_TEXTS[type_], value)
    elif type_ == _DETAILS and len(value) >= _DETAILS_LAYOUT.size:
        _, short, full = _DETAILS_LAYOUT.unpack_from(value)
        guest.claim("OS short name", short.partition(b"\0")[0])
        guest.claim("OS", full.partition(b"\0")[0])
    elif type_ == _UPTIME and re.fullmatch(rb"\d{1,18}", value):
        guest.claims["uptime"] = f"{int(value) // 100} s"


def _set_capability(guest: Guest, name: str, value: str) -> None:
    if name in guest.capabilities or len(guest.capabilities) < GUESTRPC_CAPABILITIES_MAX:
        guest.capabilities[name] = value
