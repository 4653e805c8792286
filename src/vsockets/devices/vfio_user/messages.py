"""Codec of the vfio-user protocol's messages.

From QEMU's ``docs/interop/vfio-user.rst`` and Linux's ``linux/vfio.h``.  All fields are
little-endian.  A message is a header of 16 bytes and a payload; descriptors come as ancillary
data.
"""

from __future__ import annotations

import errno
import json
import struct
from collections.abc import Iterable, Iterator, Sequence
from enum import IntEnum, IntFlag
from typing import NamedTuple

from ..limits import DMA_REGIONS_MAX, VFIO_USER_DESCRIPTORS_MAX, VFIO_USER_TRANSFER_MAX_BYTES
from ..unix_server import DeviceProtocolError

HEADER = struct.Struct("<HHIII")  #: id, command, size with the header, flags, errno
DMA_MAP = struct.Struct("<IIQQQ")  #: argsz, flags, offset in the file, address, size
DMA_UNMAP = struct.Struct("<IIQQ")  #: argsz, flags, address, size
DEVICE_INFO = struct.Struct("<IIII")  #: argsz, flags, regions, interrupts
REGION_INFO = struct.Struct("<IIIIQQ")  #: argsz, flags, index, capabilities, size, offset
#: Capability of a region with one area that the client may map: id (SPARSE_MMAP), version, next
#: capability, number of areas, reserved, offset and size of the area.
MAPPED_AREA = struct.Struct("<HHIIIQQ")
IRQ_INFO = struct.Struct("<IIII")  #: argsz, flags, index, count
SET_IRQS = struct.Struct("<IIIII")  #: argsz, flags, index, start, count
ACCESS = struct.Struct("<QII")  #: offset, region, count
_VERSION = struct.Struct("<HH")

#: The longest valid message: a write of as much as one message may transfer.
LARGEST_MESSAGE = HEADER.size + ACCESS.size + VFIO_USER_TRANSFER_MAX_BYTES


class Command(IntEnum):
    """Command of a message."""

    VERSION = 1
    DMA_MAP = 2
    DMA_UNMAP = 3
    DEVICE_GET_INFO = 4
    DEVICE_GET_REGION_INFO = 5
    DEVICE_GET_IRQ_INFO = 7
    DEVICE_SET_IRQS = 8
    REGION_READ = 9
    REGION_WRITE = 10
    DEVICE_RESET = 13


class Flag(IntFlag):
    """Flags of a header."""

    REPLY = 1
    NO_REPLY = 0x10
    ERROR = 0x20


class IrqFlag(IntFlag):
    """Flags of SET_IRQS: the kind of data, and the action."""

    DATA_NONE = 1
    DATA_BOOL = 2
    DATA_EVENTFD = 4
    MASK = 8
    UNMASK = 0x10
    TRIGGER = 0x20


# A plain integer: an enum's & costs as much as a system call.
_NO_REQUEST = int(Flag.REPLY | Flag.ERROR) | 0xF

_HEADER_BYTES, _unpack_header = HEADER.size, HEADER.unpack_from


class Message(NamedTuple):
    """A request of the client."""

    number: int
    command: int
    flags: int
    payload: bytes
    fds: Sequence[int] = ()  #: owned by the receiver of the message


class Decoder:
    """Decoder of a stream of messages.

    Descriptors belong to the last message that begins in the ``data`` of the same call of
    :meth:`receive`: the kernel ends a read where the data that carried descriptors ends.
    """

    def __init__(self) -> None:
        self._data = b""
        self._fds: dict[int, Sequence[int]] = {}  # by the offset of their message
        self._unclaimed: Sequence[int] = ()  # descriptors that belong to no message yet

    def receive(self, data: bytes, fds: Sequence[int] = ()) -> Iterable[Message]:
        """Return the messages that ``data`` completes; take ownership of ``fds``.

        Raises DeviceProtocolError, when the messages are iterated or before, when a header is
        invalid or a message has too many descriptors; :meth:`pending_fds` then returns the
        descriptors.
        """
        if not self._data and not fds and len(data) >= _HEADER_BYTES:
            # Nearly every read is one whole message: a client waits for each reply.
            number, command, size, flags, _ = _unpack_header(data)
            if size == len(data) <= LARGEST_MESSAGE and not flags & _NO_REQUEST:
                return (Message(number, command, flags, data[_HEADER_BYTES:]),)
        return self._decode(data, fds)

    def _decode(self, data: bytes, fds: Sequence[int]) -> Iterator[Message]:
        self._unclaimed = fds
        data = self._data + data if self._data else data
        self._data = b""
        at, messages = 0, []
        while len(data) - at >= HEADER.size:
            number, command, size, flags, _ = HEADER.unpack_from(data, at)
            if not HEADER.size <= size <= LARGEST_MESSAGE:
                raise DeviceProtocolError(f"message of invalid size: {size} bytes")
            if flags & _NO_REQUEST:
                raise DeviceProtocolError("reply without a request")
            if len(data) - at < size:
                break
            messages.append((number, command, flags, data[at + HEADER.size : at + size], at))
            at += size
        self._data = data[at:]
        if fds:
            where = at if self._data else messages[-1][4]
            self._fds[where] = [*self._fds.get(where, ()), *fds]
            self._unclaimed = ()
            if len(self._fds[where]) > VFIO_USER_DESCRIPTORS_MAX:
                raise DeviceProtocolError(
                    f"message with too many descriptors: {len(self._fds[where])}"
                )
        for number, command, flags, payload, began in messages:
            yield Message(number, command, flags, payload, self._fds.pop(began, ()))
        # The incomplete message is at offset 0 now.
        self._fds = {where - at: waiting for where, waiting in self._fds.items()}

    def pending_fds(self) -> list[int]:
        """Return the descriptors of all messages not yet yielded, for the caller to close."""
        return [fd for fds in (*self._fds.values(), self._unclaimed) for fd in fds]


def refusal(message: Message, code: int) -> bytes:
    """Encode the reply that ``message`` failed with the errno ``code``."""
    flags = Flag.REPLY | Flag.ERROR
    return HEADER.pack(message.number, message.command, HEADER.size, flags, code)


def encode_version(payload: bytes) -> bytes:
    """Encode the reply to VERSION with the client's ``payload``.

    Raises OSError(EINVAL) when the version is unsupported or the capabilities are malformed.
    """
    if len(payload) < _VERSION.size:
        raise OSError(errno.EINVAL, "VERSION without a version")
    major, _ = _VERSION.unpack_from(payload)
    if major != 0:
        raise OSError(errno.EINVAL, f"unsupported version {major} (expected 0)")
    if len(payload) > _VERSION.size:
        try:
            wanted = json.loads(payload[_VERSION.size :].rstrip(b"\0"))
        except (ValueError, RecursionError):
            raise OSError(errno.EINVAL, "the capabilities are not JSON") from None
        if not isinstance(wanted, dict):
            raise OSError(errno.EINVAL, "the capabilities are not a JSON object")
    capabilities = {
        "max_msg_fds": VFIO_USER_DESCRIPTORS_MAX,
        "max_data_xfer_size": VFIO_USER_TRANSFER_MAX_BYTES,
        "max_dma_maps": DMA_REGIONS_MAX,
        "pgsizes": 4096,
    }
    return _VERSION.pack(0, 0) + json.dumps({"capabilities": capabilities}).encode() + b"\0"
