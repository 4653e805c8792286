"""Codec of the vhost-user protocol's messages.

From QEMU's ``docs/interop/vhost-user.rst``.  All fields have the machine's byte order.  A message
is a header of 12 bytes and a payload; descriptors come with the header's first byte.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import IntEnum, IntFlag
from typing import NamedTuple

from ..limits import VHOST_USER_DESCRIPTORS_MAX, VHOST_USER_PAYLOAD_MAX_BYTES
from ..unix_server import DeviceProtocolError

HEADER = struct.Struct("=III")  #: request, flags, size of the payload
U64 = struct.Struct("=Q")
VRING_STATE = struct.Struct("=II")  #: index, number
VRING_ADDR = struct.Struct("=IIQQQQ")  #: index, flags, descriptors, used, available, log
REGION = struct.Struct("=QQQQ")  #: guest address, size, user address, offset in the file
REGIONS = struct.Struct("=II")  #: number, padding; REGIONs follow
CONFIG = struct.Struct("=III")  #: offset, size, flags; ``size`` bytes follow

#: In a header's flags: the mask and the required value of the version.
_VERSION_BITS, _VERSION = 3, 1

#: In the payload of SET_VRING_KICK, CALL and ERR: the ring's index, and that no descriptor came.
RING_BITS = 0xFF
NO_DESCRIPTOR = 0x100


class RequestType(IntEnum):
    """Type of a front end's request."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    GET_CONFIG = 24
    SET_CONFIG = 25
    RESET_DEVICE = 34
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40


class Flag(IntFlag):
    """Flags of a header."""

    REPLY = 4
    NEED_REPLY = 8


class Protocol(IntFlag):
    """Protocol features of vhost-user."""

    MQ = 1 << 0
    REPLY_ACK = 1 << 3
    CONFIG = 1 << 9
    RESET_DEVICE = 1 << 13
    CONFIGURE_MEM_SLOTS = 1 << 15
    STATUS = 1 << 16


#: The virtio feature bit that announces protocol features.
F_PROTOCOL_FEATURES = 1 << 30


class Message(NamedTuple):
    """A request of the front end."""

    request: int
    flags: int
    payload: bytes
    fds: Sequence[int] = ()  #: owned by the receiver of the message


class Decoder:
    """Decoder of messages; the caller reads at most :attr:`wanted` bytes at a time.

    So no read extends beyond the end of a message, and the descriptors that come with a read belong
    to the current message.
    """

    def __init__(self) -> None:
        self._data = b""
        self._fds: list[int] = []
        self.wanted = HEADER.size  #: maximum size of the next read, in bytes

    def receive(self, data: bytes, fds: Sequence[int] = ()) -> Message | None:
        """Add ``data`` to the current message; return the message if it is complete, else None.

        Takes ownership of ``fds``.

        Raises DeviceProtocolError when the header is invalid or the message has too many
        descriptors; :meth:`pending_fds` then returns the descriptors.
        """
        self._fds += fds
        if len(self._fds) > VHOST_USER_DESCRIPTORS_MAX:
            raise DeviceProtocolError(f"message with too many descriptors: {len(self._fds)}")
        self._data += data
        self.wanted -= len(data)
        if self.wanted:
            return None
        request, flags, size = HEADER.unpack_from(self._data)
        if len(self._data) == HEADER.size:
            if flags & _VERSION_BITS != _VERSION:
                raise DeviceProtocolError(f"message of unsupported version {flags & _VERSION_BITS}")
            if flags & Flag.REPLY:
                raise DeviceProtocolError("reply without a request")
            if size > VHOST_USER_PAYLOAD_MAX_BYTES:
                raise DeviceProtocolError(f"message of invalid size: {size} bytes")
            if size:
                self.wanted = size
                return None
        message = Message(request, flags, self._data[HEADER.size :], tuple(self._fds))
        self._data, self._fds, self.wanted = b"", [], HEADER.size
        return message

    def pending_fds(self) -> list[int]:
        """Return the descriptors of a message that is not complete, for the caller to close."""
        return self._fds


def reply(message: Message, payload: bytes) -> bytes:
    """Encode the reply to ``message``."""
    return encode(message.request, payload, int(Flag.REPLY))


def encode(request: int, payload: bytes = b"", flags: int = 0) -> bytes:
    """Encode a message of type ``request``."""
    return HEADER.pack(request, _VERSION | flags, len(payload)) + payload
