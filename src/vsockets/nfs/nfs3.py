"""NFS version 3 (RFC 1813): its types, and a table of its procedures."""

from __future__ import annotations

from enum import IntEnum
from typing import Any, NamedTuple

from . import xdr
from .xdr import Codec, structure, uint

PROGRAM, VERSION = 100003, 3

#: Maximum size of a handle, a name, a path, the data of one READ or WRITE, and a verifier, in
#: bytes.
HANDLE_SIZE, NAME_SIZE, PATH_SIZE, DATA_SIZE, VERIFIER_SIZE = 64, 4096, 4096, 65_536, 8
#: Maximum data of one READ or WRITE over UDP, whose datagrams are smaller than 64 KiB plus headers.
UDP_DATA_SIZE = 32_768
#: Entries of one directory listing: more do not fit a datagram.
_ENTRIES = 4096


class Status(IntEnum):
    """The outcome of a call (nfsstat3)."""

    OK = 0
    PERM = 1
    NOENT = 2
    IO = 5
    NXIO = 6
    ACCES = 13
    EXIST = 17
    XDEV = 18
    NODEV = 19
    NOTDIR = 20
    ISDIR = 21
    INVAL = 22
    FBIG = 27
    NOSPC = 28
    ROFS = 30
    MLINK = 31
    NAMETOOLONG = 63
    NOTEMPTY = 66
    DQUOT = 69
    STALE = 70
    BADHANDLE = 10001
    NOT_SYNC = 10002
    BAD_COOKIE = 10003
    NOTSUPP = 10004
    TOOSMALL = 10005
    SERVERFAULT = 10006
    BADTYPE = 10007
    JUKEBOX = 10008


class FileType(IntEnum):
    """The type of a file (ftype3)."""

    REGULAR = 1
    DIRECTORY = 2
    BLOCK = 3
    CHARACTER = 4
    SYMLINK = 5
    SOCKET = 6
    FIFO = 7


class StableHow(IntEnum):
    """The data that the server puts on disk before it replies to a WRITE (stable_how)."""

    UNSTABLE = 0
    DATA_SYNC = 1
    FILE_SYNC = 2


class CreateMode(IntEnum):
    """The treatment of an existing file by CREATE (createmode3)."""

    UNCHECKED = 0
    GUARDED = 1
    EXCLUSIVE = 2


class TimeHow(IntEnum):
    """The source of a new time in SETATTR (time_how)."""

    KEEP = 0
    SERVER = 1
    CLIENT = 2


class Access(IntEnum):
    """A permission that ACCESS queries, as a bit."""

    READ = 1
    LOOKUP = 2
    MODIFY = 4
    EXTEND = 8
    DELETE = 16
    EXECUTE = 32


class Time(NamedTuple):  # noqa: D101
    seconds: int
    nanoseconds: int


class DeviceNumber(NamedTuple):  # noqa: D101
    major: int
    minor: int


class Attributes(NamedTuple):
    """The attributes of a file (fattr3)."""

    kind: int
    mode: int
    nlink: int
    uid: int
    gid: int
    size: int
    used: int
    rdev: DeviceNumber
    fsid: int
    fileid: int
    atime: Time
    mtime: Time
    ctime: Time


class WccAttributes(NamedTuple):
    """Attributes before an operation, which a client compares with its cache (wcc_attr)."""

    size: int
    mtime: Time
    ctime: Time


class WccData(NamedTuple):
    """Attributes before and after an operation (wcc_data)."""

    before: WccAttributes | None = None
    after: Attributes | None = None


class NewAttributes(NamedTuple):
    """Attributes to set (sattr3); a time is a TimeHow and a Time, which is None unless CLIENT."""

    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    size: int | None = None
    atime: tuple[int, Time | None] = (TimeHow.KEEP, None)
    mtime: tuple[int, Time | None] = (TimeHow.KEEP, None)


class Target(NamedTuple):
    """A name in a directory (diropargs3)."""

    directory: bytes
    name: bytes


class Entry(NamedTuple):  # noqa: D101
    fileid: int
    name: bytes
    cookie: int


class EntryPlus(NamedTuple):  # noqa: D101
    fileid: int
    name: bytes
    cookie: int
    attributes: Attributes | None
    handle: bytes | None


class FsStat(NamedTuple):  # noqa: D101
    attributes: Attributes | None
    total: int
    free: int
    available: int
    files: int
    files_free: int
    files_available: int
    seconds_unchanged: int


class FsInfo(NamedTuple):  # noqa: D101
    attributes: Attributes | None
    read_max: int
    read_preferred: int
    read_multiple: int
    write_max: int
    write_preferred: int
    write_multiple: int
    directory_preferred: int
    file_size_max: int
    time_delta: Time
    properties: int


class PathConf(NamedTuple):  # noqa: D101
    attributes: Attributes | None
    link_max: int
    name_max: int
    no_truncation: bool
    chown_restricted: bool
    case_insensitive: bool
    case_preserving: bool


class Procedure(NamedTuple):
    """One procedure: codecs of its arguments, and of its results after OK and after an error.

    Arguments and results are tuples in the order of RFC 1813; a single one is not wrapped in a
    tuple.
    """

    name: str
    arguments: Codec[Any]
    ok: Codec[Any]
    failed: Codec[Any]
    no_attributes: Any  #: the value of ``failed`` that reports no attributes
    modifies: bool = False  #: not idempotent; refused in a read-only export


def _tuple(*members: Codec[Any]) -> Codec[tuple[Any, ...]]:
    return structure(lambda *values: values, *members)


def _attributes(*of: int) -> Attributes:
    kind, mode, nlink, uid, gid, size, used, major, minor, fsid, fileid, *times = of
    device = DeviceNumber(major, minor)
    atime, mtime, ctime = (Time(*times[at : at + 2]) for at in (0, 2, 4))
    return Attributes(
        *(kind, mode, nlink, uid, gid, size, used), device, fsid, fileid, atime, mtime, ctime
    )


def _numbers(of: Attributes) -> tuple[int, ...]:
    return (*of[:7], *of.rdev, *of[8:10], *of.atime, *of.mtime, *of.ctime)


hyper, boolean, void = xdr.hyper, xdr.boolean, xdr.void
handle, verifier = xdr.opaque(HANDLE_SIZE), xdr.fixed(VERIFIER_SIZE)
# The bounds of names are checked by the server, which replies NAMETOOLONG.
name, path, data = xdr.opaque(NAME_SIZE), xdr.opaque(PATH_SIZE), xdr.data(DATA_SIZE)
time = xdr.numbers("II", Time, tuple)
device = structure(DeviceNumber, uint, uint)
# One operation for all numbers: every reply has attributes.
attributes = xdr.numbers("5I 2Q 2I 2Q 6I", _attributes, _numbers)
wcc_attributes = structure(WccAttributes, hyper, time, time)
maybe_attributes, maybe_handle = xdr.optional(attributes), xdr.optional(handle)
wcc_data = structure(WccData, xdr.optional(wcc_attributes), maybe_attributes)
_maybe_uint = xdr.optional(uint)
_new_time = xdr.union({TimeHow.KEEP: void, TimeHow.SERVER: void, TimeHow.CLIENT: time})
new_attributes = structure(
    NewAttributes,
    *(_maybe_uint, _maybe_uint, _maybe_uint, xdr.optional(hyper), _new_time, _new_time),
)
target = structure(Target, handle, name)
_create_how = xdr.union(
    {
        CreateMode.UNCHECKED: new_attributes,
        CreateMode.GUARDED: new_attributes,
        CreateMode.EXCLUSIVE: verifier,
    }
)
_special = xdr.union(
    {
        **dict.fromkeys((FileType.CHARACTER, FileType.BLOCK), _tuple(new_attributes, device)),
        **dict.fromkeys((FileType.SOCKET, FileType.FIFO), new_attributes),
    },
    void,
)
_made = _tuple(maybe_handle, maybe_attributes, wcc_data)
_entry = structure(Entry, hyper, name, hyper)
_entry_plus = structure(EntryPlus, hyper, name, hyper, maybe_attributes, maybe_handle)
_stat = structure(FsStat, maybe_attributes, *[hyper] * 6, uint)
_info = structure(FsInfo, maybe_attributes, *[uint] * 7, hyper, time, uint)
_conf = structure(PathConf, maybe_attributes, uint, uint, *[boolean] * 4)
_UNKNOWN = WccData()


def _reading(label: str, arguments: Codec[Any], ok: Codec[Any]) -> Procedure:
    return Procedure(label, arguments, ok, maybe_attributes, None)


def _modifying(label: str, arguments: Codec[Any], ok: Codec[Any]) -> Procedure:
    return Procedure(label, arguments, ok, wcc_data, _UNKNOWN, True)


#: By number.  NULL has no status; server and client handle it themselves.
PROCEDURES: dict[int, Procedure] = {
    1: Procedure("getattr", handle, attributes, void, None),
    2: _modifying("setattr", _tuple(handle, new_attributes, xdr.optional(time)), wcc_data),
    3: _reading("lookup", target, _tuple(handle, maybe_attributes, maybe_attributes)),
    4: _reading("access", _tuple(handle, uint), _tuple(maybe_attributes, uint)),
    5: _reading("readlink", handle, _tuple(maybe_attributes, path)),
    6: _reading(
        *("read", _tuple(handle, hyper, uint)),
        _tuple(maybe_attributes, uint, boolean, data),
    ),
    7: _modifying(
        *("write", _tuple(handle, hyper, uint, uint, data)),
        _tuple(wcc_data, uint, uint, verifier),
    ),
    8: _modifying("create", _tuple(target, _create_how), _made),
    9: _modifying("mkdir", _tuple(target, new_attributes), _made),
    10: _modifying("symlink", _tuple(target, new_attributes, path), _made),
    11: _modifying("mknod", _tuple(target, _special), _made),
    12: _modifying("remove", target, wcc_data),
    13: _modifying("rmdir", target, wcc_data),
    14: Procedure(
        *("rename", _tuple(target, target), _tuple(wcc_data, wcc_data)),
        *(_tuple(wcc_data, wcc_data), (_UNKNOWN, _UNKNOWN), True),
    ),
    15: Procedure(
        *("link", _tuple(handle, target), _tuple(maybe_attributes, wcc_data)),
        *(_tuple(maybe_attributes, wcc_data), (None, _UNKNOWN), True),
    ),
    16: _reading(
        *("readdir", _tuple(handle, hyper, verifier, uint)),
        _tuple(maybe_attributes, verifier, xdr.chain(_entry, _ENTRIES), boolean),
    ),
    17: _reading(
        *("readdirplus", _tuple(handle, hyper, verifier, uint, uint)),
        _tuple(maybe_attributes, verifier, xdr.chain(_entry_plus, _ENTRIES), boolean),
    ),
    18: _reading("fsstat", handle, _stat),
    19: _reading("fsinfo", handle, _info),
    20: _reading("pathconf", handle, _conf),
    21: _modifying("commit", _tuple(handle, hyper, uint), _tuple(wcc_data, verifier)),
}
NUMBERS = {procedure.name: number for number, procedure in PROCEDURES.items()}


def encode_result(procedure: Procedure, status: Status, content: Any) -> bytes:
    """Return the encoded status and results of a call; only OK needs ``content``."""
    out = bytearray()
    uint.encode(status, out)
    if status is Status.OK:
        procedure.ok.encode(content, out)
    else:
        procedure.failed.encode(procedure.no_attributes, out)
    return bytes(out)


def decode_result(procedure: Procedure, data: bytes | memoryview) -> tuple[int, Any]:
    """Return the status and the results of a call.

    Raises XdrError if ``data`` is malformed.
    """
    reader = xdr.Reader(data)
    status = uint.decode(reader)
    codec = procedure.ok if status == Status.OK else procedure.failed
    return status, codec.decode(reader)


def status_error(status: int) -> OSError:
    """Return the OSError that corresponds to an NFS status."""
    import errno
    import os

    table = {
        Status.NAMETOOLONG: errno.ENAMETOOLONG,
        Status.NOTEMPTY: errno.ENOTEMPTY,
        Status.DQUOT: errno.EDQUOT,
        Status.STALE: errno.ESTALE,
        Status.BADHANDLE: errno.ESTALE,
        Status.NOTSUPP: errno.EOPNOTSUPP,
        Status.BADTYPE: errno.EINVAL,
        Status.TOOSMALL: errno.EINVAL,
    }
    code = table.get(status) if status in list(Status) else errno.EIO  # type: ignore[call-overload]
    if code is None:  # below NAMETOOLONG they are errno values; the rest are server errors
        code = status if status < Status.NAMETOOLONG else errno.EIO
    return OSError(code, os.strerror(code))
