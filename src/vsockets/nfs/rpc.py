"""ONC RPC version 2 (RFC 5531): calls, replies and credentials."""

from __future__ import annotations

import struct as packing
from enum import IntEnum
from typing import NamedTuple

from . import xdr
from .xdr import Reader, XdrError

VERSION = 2
CALL, REPLY = 0, 1
ACCEPTED, DENIED = 0, 1
#: Maximum size of credentials and verifiers and of a machine name, in bytes; supplementary groups.
_AUTH_SIZE, _MACHINE_NAME, GROUPS_MAX = 400, 255, 16


class Flavor(IntEnum):
    """The kind of a caller's credentials (auth_flavor)."""

    NONE = 0
    SYS = 1


class AcceptStat(IntEnum):
    """The outcome of an accepted call (accept_stat)."""

    SUCCESS = 0
    PROG_UNAVAIL = 1
    PROG_MISMATCH = 2
    PROC_UNAVAIL = 3
    GARBAGE_ARGS = 4
    SYSTEM_ERR = 5


class RejectStat(IntEnum):
    """The reason for rejecting a call (reject_stat)."""

    RPC_MISMATCH = 0
    AUTH_ERROR = 1


#: Credentials that do not match their flavor (auth_stat).
AUTH_BADCRED = 1


class Auth(NamedTuple):
    """Encoded credentials or an encoded verifier (opaque_auth)."""

    flavor: int
    body: bytes


class AuthSys(NamedTuple):
    """A unix user and groups as claimed by the client (authsys_parms)."""

    stamp: int
    machine: bytes
    uid: int
    gid: int
    groups: tuple[int, ...]


class CallHeader(NamedTuple):
    """The header of a call, without its arguments."""

    xid: int
    version: int
    program: int
    program_version: int
    procedure: int
    credentials: Auth
    verifier: Auth


class RpcRejected(Exception):
    """The server rejected the call; the message is the reason."""


_auth = xdr.structure(Auth, xdr.uint, xdr.opaque(_AUTH_SIZE))
NO_AUTH = Auth(Flavor.NONE, b"")
auth_sys = xdr.structure(
    AuthSys,
    *(xdr.uint, xdr.opaque(_MACHINE_NAME), xdr.uint, xdr.uint),
    xdr.array(xdr.uint, GROUPS_MAX),
)
_version_range = xdr.structure(lambda *ends: ends, xdr.uint, xdr.uint)
_accepted = xdr.union({AcceptStat.PROG_MISMATCH: _version_range}, xdr.void)
_CALL = packing.Struct(">6I")  # xid, CALL and four more numbers
_XID_AND_KIND = packing.Struct(">II")
#: A reply to a successful call, without a verifier: what follows its xid.
_SUCCESS = packing.pack(">5I", REPLY, ACCEPTED, Flavor.NONE, 0, AcceptStat.SUCCESS)
_denied = xdr.union({RejectStat.RPC_MISMATCH: _version_range, RejectStat.AUTH_ERROR: xdr.uint})


def encode_call(call: CallHeader, arguments: bytes) -> bytes:
    """Return a call as one datagram."""
    xid, version, program, program_version, procedure, _, _ = call
    out = bytearray(_CALL.pack(xid, CALL, version, program, program_version, procedure))
    _auth.encode(call.credentials, out)
    _auth.encode(call.verifier, out)
    return bytes(out) + arguments


def decode_call(data: bytes) -> tuple[CallHeader, bytes | memoryview]:
    """Return a call and its arguments.

    Of a call in another version of RPC, only ``xid`` and ``version`` are decoded.

    Raises XdrError if ``data`` is not a call.
    """
    reader = Reader(data)
    xid = xdr.uint.decode(reader)
    if xdr.uint.decode(reader) != CALL:
        raise XdrError("not a call")
    version = xdr.uint.decode(reader)
    if version != VERSION:
        return CallHeader(xid, version, 0, 0, 0, NO_AUTH, NO_AUTH), b""
    program, program_version, procedure = (xdr.uint.decode(reader) for _ in range(3))
    credentials, verifier = _auth.decode(reader), _auth.decode(reader)
    call = CallHeader(xid, version, program, program_version, procedure, credentials, verifier)
    return call, memoryview(data)[reader.position :]


def decode_credentials(auth: Auth) -> AuthSys | None:
    """Return the user of AUTH_SYS credentials, or None for AUTH_NONE.

    Raises XdrError for malformed credentials and for those of another flavor.
    """
    if auth.flavor == Flavor.SYS:
        return auth_sys.unpack(auth.body)
    if auth.flavor != Flavor.NONE:
        raise XdrError(f"unsupported credentials of flavor {auth.flavor}")
    return None


def encode_accepted(
    xid: int,
    status: AcceptStat,
    results: bytes = b"",
    versions: tuple[int, int] | None = None,
) -> bytes:
    """Return the reply to an accepted call; PROG_MISMATCH reports the ``versions`` supported."""
    out = bytearray()
    for number in (xid, REPLY, ACCEPTED):
        xdr.uint.encode(number, out)
    _auth.encode(NO_AUTH, out)
    _accepted.encode((status, versions), out)
    return bytes(out) + results


def encode_rejected(xid: int, reason: RejectStat) -> bytes:
    """Return the reply to a call in another version of RPC, or with invalid credentials."""
    out = bytearray()
    for number in (xid, REPLY, DENIED):
        xdr.uint.encode(number, out)
    detail = (VERSION, VERSION) if reason is RejectStat.RPC_MISMATCH else AUTH_BADCRED
    _denied.encode((reason, detail), out)
    return bytes(out)


def reply_xid(data: bytes) -> int:
    """Return the ``xid`` of a reply.

    Raises XdrError if ``data`` is not a reply.
    """
    if len(data) < _XID_AND_KIND.size:
        raise XdrError("not a reply")
    xid, kind = _XID_AND_KIND.unpack_from(data)
    if kind != REPLY:
        raise XdrError("not a reply")
    return int(xid)


def decode_reply(data: bytes) -> memoryview:
    """Return the results in a reply, as a view of it.

    Raises RpcRejected if the server rejected the call, and XdrError for a malformed reply.
    """
    if data[4 : 4 + len(_SUCCESS)] == _SUCCESS:
        return memoryview(data)[4 + len(_SUCCESS) :]
    reply_xid(data)
    reader = Reader(data)
    reader.take(8)
    answer = xdr.uint.decode(reader)
    if answer == DENIED:
        reason, detail = _denied.decode(reader)
        raise RpcRejected(f"{RejectStat(reason).name} ({detail})")
    if answer != ACCEPTED:
        raise XdrError(f"invalid reply status {answer}")
    _auth.decode(reader)
    status, versions = _accepted.decode(reader)
    if status != AcceptStat.SUCCESS:
        known = AcceptStat(status).name if status in list(AcceptStat) else str(status)
        raise RpcRejected(f"{known} {versions}" if versions else known)
    return memoryview(data)[reader.position :]
