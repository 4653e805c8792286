"""ONC RPC version 2, RFC 5531: calls, replies, and who says he is calling."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

from . import xdr
from .xdr import Reader, XdrError

VERSION = 2
CALL, REPLY = 0, 1
ACCEPTED, DENIED = 0, 1
#: Bytes of credentials and verifiers; bytes of a machine's name; groups beside one's own.
_AUTH_SIZE, _MACHINE_NAME, MOST_GROUPS = 400, 255, 16


class Flavor(IntEnum):
    """How a caller says who he is."""

    NONE = 0
    SYS = 1


class Accepted(IntEnum):
    """What became of a call that was understood."""

    SUCCESS = 0
    PROG_UNAVAIL = 1
    PROG_MISMATCH = 2
    PROC_UNAVAIL = 3
    GARBAGE_ARGS = 4
    SYSTEM_ERR = 5


class Denied(IntEnum):
    """Why a call was not listened to."""

    RPC_MISMATCH = 0
    AUTH_ERROR = 1


#: Credentials that are not what their flavor says (auth_stat).
AUTH_BADCRED = 1


class Auth(NamedTuple):
    """Credentials or a verifier, undecoded."""

    flavor: int
    body: bytes


class AuthSys(NamedTuple):
    """A unix process, by its own account."""

    stamp: int
    machine: bytes
    uid: int
    gid: int
    groups: tuple[int, ...]


class Call(NamedTuple):
    """A call without its arguments."""

    xid: int
    version: int
    program: int
    program_version: int
    procedure: int
    credentials: Auth
    verifier: Auth


class RpcRefused(Exception):
    """The server did not do what was asked; says why."""


_auth = xdr.structure(Auth, xdr.uint, xdr.opaque(_AUTH_SIZE))
NO_AUTH = Auth(Flavor.NONE, b"")
auth_sys = xdr.structure(
    AuthSys,
    *(xdr.uint, xdr.opaque(_MACHINE_NAME), xdr.uint, xdr.uint),
    xdr.array(xdr.uint, MOST_GROUPS),
)
_version_range = xdr.structure(lambda *ends: ends, xdr.uint, xdr.uint)
_accepted = xdr.union({Accepted.PROG_MISMATCH: _version_range}, xdr.void)
_denied = xdr.union({Denied.RPC_MISMATCH: _version_range, Denied.AUTH_ERROR: xdr.uint})


def encode_call(call: Call, arguments: bytes) -> bytes:
    """The datagram that a call is."""
    out = bytearray()
    numbers = call.xid, CALL, call.version, call.program, call.program_version, call.procedure
    for number in numbers:
        xdr.uint.encode(number, out)
    _auth.encode(call.credentials, out)
    _auth.encode(call.verifier, out)
    return bytes(out) + arguments


def decode_call(data: bytes) -> tuple[Call, bytes]:
    """A call and its arguments.  Raises XdrError for what is none.

    Of a call in another version of RPC only ``xid`` and ``version`` are read.
    """
    reader = Reader(data)
    xid = xdr.uint.decode(reader)
    if xdr.uint.decode(reader) != CALL:
        raise XdrError("not a call")
    version = xdr.uint.decode(reader)
    if version != VERSION:
        return Call(xid, version, 0, 0, 0, NO_AUTH, NO_AUTH), b""
    program, program_version, procedure = (xdr.uint.decode(reader) for _ in range(3))
    credentials, verifier = _auth.decode(reader), _auth.decode(reader)
    call = Call(xid, version, program, program_version, procedure, credentials, verifier)
    return call, data[reader.position :]


def encode_accepted(
    xid: int,
    how: Accepted,
    results: bytes = b"",
    versions: tuple[int, int] | None = None,
) -> bytes:
    """The reply to a call that was understood; ``versions`` are those of PROG_MISMATCH."""
    out = bytearray()
    for number in (xid, REPLY, ACCEPTED):
        xdr.uint.encode(number, out)
    _auth.encode(NO_AUTH, out)
    _accepted.encode((how, versions), out)
    return bytes(out) + results


def encode_denied(xid: int, why: Denied) -> bytes:
    """The reply to a call in another version of RPC, or with senseless credentials."""
    out = bytearray()
    for number in (xid, REPLY, DENIED):
        xdr.uint.encode(number, out)
    detail = (VERSION, VERSION) if why is Denied.RPC_MISMATCH else AUTH_BADCRED
    _denied.encode((why, detail), out)
    return bytes(out)


def reply_to(data: bytes) -> int:
    """The ``xid`` of a reply.  Raises XdrError for what is none."""
    reader = Reader(data)
    xid = xdr.uint.decode(reader)
    if xdr.uint.decode(reader) != REPLY:
        raise XdrError("not a reply")
    return xid


def decode_reply(data: bytes) -> bytes:
    """The results in a reply.  Raises RpcRefused, and XdrError for what is no reply."""
    reply_to(data)
    reader = Reader(data)
    reader.take(8)
    answer = xdr.uint.decode(reader)
    if answer == DENIED:
        why, detail = _denied.decode(reader)
        raise RpcRefused(f"{Denied(why).name} ({detail})")
    if answer != ACCEPTED:
        raise XdrError(f"a reply of kind {answer}")
    _auth.decode(reader)
    how, versions = _accepted.decode(reader)
    if how != Accepted.SUCCESS:
        known = Accepted(how).name if how in list(Accepted) else str(how)
        raise RpcRefused(f"{known} {versions}" if versions else known)
    return data[reader.position :]
