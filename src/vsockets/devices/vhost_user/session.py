"""Server of one vhost-user front end: requests, guest memory, and the device's rings."""

from __future__ import annotations

import errno
import logging
import os
import socket
import stat
import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple
from typing import Protocol as Interface

from ...eventloop.loop import EventLoop
from .. import unix_server
from ..guest_memory import GuestMemory
from ..limits import (
    VHOST_USER_DESCRIPTORS_MAX,
    VHOST_USER_MEMORY_SLOTS_MAX,
    VHOST_USER_REPLY_TIMEOUT_SECONDS,
)
from ..unix_server import DeviceProtocolError
from . import messages
from .messages import F_PROTOCOL_FEATURES, Decoder, Flag, Message, Protocol, RequestType

log = logging.getLogger(__name__)

_ONE = (1).to_bytes(8, "little")

#: The largest ring (virtio 1.3, 2.7).
LARGEST_RING = 32768


class Vring:
    """Settings and eventfds of one ring; owns the eventfds."""

    def __init__(self) -> None:
        self.size = 0  #: number of entries
        #: position at which to resume: of a split ring an index, of a packed ring two indices with
        #: their wrap counters (see :class:`.PackedRing`)
        self.base = 0
        # Addresses in the front end's process, which may change while the ring is stopped.
        self.descriptors = 0
        self.available = 0
        self.used = 0
        self.enabled = False
        self.running = False
        self._fds: dict[str, int] = {}

    @property
    def kick(self) -> int | None:
        """The eventfd by which the driver announces new buffers, or None."""
        return self._fds.get("kick")

    def take(self, purpose: str, fd: int | None) -> None:
        """Replace the eventfd for ``purpose``: ``kick``, ``call`` or ``error``; None closes it."""
        old = self._fds.pop(purpose, None)
        if old is not None:
            os.close(old)
        if fd is not None:
            self._fds[purpose] = fd

    def call(self) -> None:
        """Notify the driver of used buffers."""
        self._signal("call")

    def report_error(self) -> None:
        """Report to the front end that the ring is invalid."""
        self._signal("error")

    def close(self) -> None:
        """Close all eventfds."""
        for purpose in list(self._fds):
            self.take(purpose, None)

    def _signal(self, purpose: str) -> None:
        fd = self._fds.get(purpose)
        if fd is not None:
            try:
                os.write(fd, _ONE)
            # The counter is full (2**64 unread notifications), or the descriptor is not an eventfd.
            except OSError as error:
                log.info("%s notification lost: %s", purpose, error)


#: Offered protocol features.  The device uses buffers in order and holds none back, so a front end
#: that reconnects finds the position in the rings themselves (no INFLIGHT_SHMFD).
PROTOCOL_FEATURES = int(
    Protocol.MQ
    | Protocol.REPLY_ACK
    | Protocol.CONFIG
    | Protocol.RESET_DEVICE
    | Protocol.CONFIGURE_MEM_SLOTS
    | Protocol.STATUS
)


class Device(Interface):
    """Interface of a device that a :class:`Session` connects to its front end."""

    features: int  #: the offered virtio features
    queues: int  #: number of rings
    memory: GuestMemory

    def configuration(self) -> bytes:
        """Return the device's configuration space."""

    def set_features(self, features: int) -> None:
        """Set the virtio features that the driver has accepted."""

    def start_ring(self, index: int, vring: Vring, addresses: tuple[int, int, int]) -> None:
        """Start ring ``index``.

        ``addresses`` are the guest physical addresses of the ring's descriptors, available part and
        used part.

        Raises OSError(EINVAL) when the ring is invalid.
        """

    def stop_ring(self, index: int) -> int:
        """Stop a ring, drop all views of its buffers, and return its base (:attr:`Vring.base`)."""

    def reset(self) -> None:
        """Reset the device to its state after power-on; the session has stopped all rings."""


class _Region(NamedTuple):
    guest: int
    size: int
    user: int
    offset: int


class Session:
    """State of one front end's connection to a device."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._rings = [Vring() for _ in range(device.queues)]
        self._regions: list[_Region] = []
        self._features = 0
        self._status = 0
        queries: dict[int, Callable[[bytes], bytes]] = {
            RequestType.GET_FEATURES: self._get_features,
            RequestType.GET_PROTOCOL_FEATURES: self._get_protocol_features,
            RequestType.GET_QUEUE_NUM: self._get_queue_num,
            RequestType.GET_VRING_BASE: self._get_vring_base,
            RequestType.GET_CONFIG: self._get_config,
            RequestType.GET_MAX_MEM_SLOTS: self._get_max_mem_slots,
            RequestType.GET_STATUS: self._get_status,
        }
        handlers: dict[int, Callable[[bytes, list[int]], None]] = {
            RequestType.SET_FEATURES: self._set_features,
            RequestType.SET_PROTOCOL_FEATURES: self._set_protocol_features,
            RequestType.SET_OWNER: self._ignore,
            RequestType.RESET_OWNER: self._ignore,  # the specification recommends to ignore it
            RequestType.SET_MEM_TABLE: self._set_mem_table,
            RequestType.ADD_MEM_REG: self._add_mem_reg,
            RequestType.REM_MEM_REG: self._rem_mem_reg,
            RequestType.SET_VRING_NUM: self._set_vring_num,
            RequestType.SET_VRING_ADDR: self._set_vring_addr,
            RequestType.SET_VRING_BASE: self._set_vring_base,
            RequestType.SET_VRING_KICK: self._set_vring_kick,
            RequestType.SET_VRING_CALL: self._set_vring_call,
            RequestType.SET_VRING_ERR: self._set_vring_err,
            RequestType.SET_VRING_ENABLE: self._set_vring_enable,
            RequestType.RESET_DEVICE: self._reset_device,
            RequestType.SET_STATUS: self._set_status,
        }
        self._queries, self._handlers = queries, handlers

    def handle(self, message: Message) -> bytes | None:
        """Handle ``message``; return the reply, or None if the front end expects none.

        Raises DeviceProtocolError when the connection cannot continue.
        """
        fds = list(message.fds)
        try:
            query = self._queries.get(message.request)
            if query is not None:
                return messages.reply(message, query(message.payload))
            handler = self._handlers.get(message.request)
            # A front end that sets NEED_REPLY waits, whether or not it negotiated REPLY_ACK in
            # this session: one that reconnects to a restarted device does not negotiate again.
            acknowledged = message.flags & Flag.NEED_REPLY
            try:
                if handler is None:
                    raise OSError(errno.ENOTSUP, "unknown request")
                handler(message.payload, fds)
            except OSError as error:
                log.warning("vhost-user: request %d: %s", message.request, error)
                if not acknowledged:
                    raise DeviceProtocolError(f"request {message.request}: {error}") from None
                return messages.reply(message, messages.U64.pack(error.errno or errno.EIO))
            return messages.reply(message, messages.U64.pack(0)) if acknowledged else None
        finally:
            for fd in fds:  # handlers remove the descriptors that they keep
                os.close(fd)

    def close(self) -> None:
        """Reset the device after the front end has disconnected: the virtual machine has ended."""
        self._stop_all()
        self._device.reset()
        for vring in self._rings:
            vring.close()
        self._device.memory.clear()

    # Features

    def _get_features(self, payload: bytes) -> bytes:
        return messages.U64.pack(self._device.features | F_PROTOCOL_FEATURES)

    def _set_features(self, payload: bytes, fds: list[int]) -> None:
        (features,) = _unpack(messages.U64, payload)
        unknown = features & ~(self._device.features | F_PROTOCOL_FEATURES)
        if unknown:
            raise OSError(errno.EINVAL, f"features {unknown:#x} were not offered")
        self._features = features
        self._device.set_features(features & ~F_PROTOCOL_FEATURES)

    def _get_protocol_features(self, payload: bytes) -> bytes:
        return messages.U64.pack(PROTOCOL_FEATURES)

    def _set_protocol_features(self, payload: bytes, fds: list[int]) -> None:
        (features,) = _unpack(messages.U64, payload)
        if features & ~PROTOCOL_FEATURES:
            raise OSError(errno.EINVAL, f"protocol features {features:#x} were not all offered")

    def _get_queue_num(self, payload: bytes) -> bytes:
        return messages.U64.pack(self._device.queues)

    def _get_config(self, payload: bytes) -> bytes:
        if len(payload) < messages.CONFIG.size:
            return b""  # the specification's reply for an error
        offset, size, flags = messages.CONFIG.unpack_from(payload)
        space = self._device.configuration()
        if offset + size > len(space):
            return b""
        return messages.CONFIG.pack(offset, size, flags) + space[offset : offset + size]

    def _get_status(self, payload: bytes) -> bytes:
        return messages.U64.pack(self._status)

    def _set_status(self, payload: bytes, fds: list[int]) -> None:
        (self._status,) = _unpack(messages.U64, payload)
        if not self._status:
            # QEMU also resets the status when it pauses: the bases of restarted rings show whether
            # the guest was reset.
            self._stop_all()

    def _ignore(self, payload: bytes, fds: list[int]) -> None:
        pass

    def _reset_device(self, payload: bytes, fds: list[int]) -> None:
        self._stop_all()
        self._device.reset()

    # Memory

    def _set_mem_table(self, payload: bytes, fds: list[int]) -> None:
        if len(payload) < messages.REGIONS.size:
            raise OSError(errno.EINVAL, "SET_MEM_TABLE without a table")
        number, _ = messages.REGIONS.unpack_from(payload)
        table = payload[messages.REGIONS.size :]
        if number > VHOST_USER_DESCRIPTORS_MAX or len(table) < number * messages.REGION.size:
            raise OSError(errno.EINVAL, f"invalid table of {number} regions")
        if len(fds) != number:
            raise OSError(errno.EINVAL, f"{len(fds)} descriptors for {number} regions")
        with _Pause(self):
            self._device.memory.clear()
            self._regions.clear()
            for place, fd in enumerate(fds):
                self._map(messages.REGION.unpack_from(table, place * messages.REGION.size), fd)

    def _get_max_mem_slots(self, payload: bytes) -> bytes:
        return messages.U64.pack(VHOST_USER_MEMORY_SLOTS_MAX)

    def _add_mem_reg(self, payload: bytes, fds: list[int]) -> None:
        fields = _unpack_region(payload)
        if len(fds) != 1:
            raise OSError(errno.EINVAL, f"{len(fds)} descriptors for a region")
        if len(self._regions) >= VHOST_USER_MEMORY_SLOTS_MAX:
            raise OSError(errno.ENOSPC, f"more than {VHOST_USER_MEMORY_SLOTS_MAX} regions")
        self._map(fields, fds[0])

    def _rem_mem_reg(self, payload: bytes, fds: list[int]) -> None:
        wanted = _unpack_region(payload)[:3]
        for region in self._regions:
            if region[:3] == wanted:
                with _Pause(self):
                    self._device.memory.unmap(region.guest, region.size)
                    self._regions.remove(region)
                return
        raise OSError(errno.EINVAL, f"no region of {wanted[1]} bytes at {wanted[0]:#x}")

    def _map(self, fields: tuple[int, ...], fd: int) -> None:
        region = _Region(*fields)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "memory region whose descriptor is not a regular file")
        self._device.memory.map(region.guest, region.size, True, fd, region.offset)
        self._regions.append(region)

    def _guest_address(self, user: int) -> int:
        for region in self._regions:
            if region.user <= user < region.user + region.size:
                return region.guest + user - region.user
        raise OSError(errno.EINVAL, f"no region contains the user address {user:#x}")

    # Rings

    def _vring(self, index: int) -> Vring:
        if index >= len(self._rings):
            raise OSError(
                errno.EINVAL, f"invalid ring {index} (expected less than {len(self._rings)})"
            )
        return self._rings[index]

    def _stopped(self, index: int) -> Vring:
        vring = self._vring(index)
        if vring.running:
            raise OSError(errno.EBUSY, f"ring {index} is running")
        return vring

    def _set_vring_num(self, payload: bytes, fds: list[int]) -> None:
        index, number = _unpack(messages.VRING_STATE, payload)
        if not 0 < number <= LARGEST_RING:
            raise OSError(errno.EINVAL, f"invalid ring size {number}")
        self._stopped(index).size = number

    def _set_vring_addr(self, payload: bytes, fds: list[int]) -> None:
        index, _, descriptors, used, available, _ = _unpack(messages.VRING_ADDR, payload)
        vring = self._vring(index)
        if vring.running:  # front ends repeat the request to start or stop dirty logging
            if (vring.descriptors, vring.used, vring.available) != (descriptors, used, available):
                raise OSError(errno.EBUSY, f"ring {index} is running")
            return
        vring.descriptors, vring.used, vring.available = descriptors, used, available

    def _set_vring_base(self, payload: bytes, fds: list[int]) -> None:
        index, base = _unpack(messages.VRING_STATE, payload)
        self._stopped(index).base = base

    def _get_vring_base(self, payload: bytes) -> bytes:
        try:
            index, _ = _unpack(messages.VRING_STATE, payload)
            vring = self._vring(index)
        except OSError as error:
            raise DeviceProtocolError(f"request {RequestType.GET_VRING_BASE}: {error}") from None
        self._stop(index)
        vring.take("kick", None)
        return messages.VRING_STATE.pack(index, vring.base)

    def _set_vring_kick(self, payload: bytes, fds: list[int]) -> None:
        index = self._take_descriptor("kick", payload, fds)
        vring = self._rings[index]
        if vring.kick is None:
            raise OSError(
                errno.ENOTSUP, f"ring {index} without a kick descriptor: polling is not supported"
            )
        if not self._features & F_PROTOCOL_FEATURES:
            vring.enabled = True
        self._start(index)

    def _set_vring_call(self, payload: bytes, fds: list[int]) -> None:
        # Notify of buffers that were used before the eventfd arrived.
        self._rings[self._take_descriptor("call", payload, fds)].call()

    def _set_vring_err(self, payload: bytes, fds: list[int]) -> None:
        self._take_descriptor("error", payload, fds)

    def _take_descriptor(self, purpose: str, payload: bytes, fds: list[int]) -> int:
        (number,) = _unpack(messages.U64, payload)
        index = number & messages.RING_BITS
        vring = self._vring(index)
        if purpose == "kick":
            self._stop(index)
        if number & messages.NO_DESCRIPTOR:
            vring.take(purpose, None)
        elif len(fds) == 1:
            os.set_blocking(fds[0], False)
            vring.take(purpose, fds.pop())
        else:
            raise OSError(errno.EINVAL, f"{len(fds)} descriptors to {purpose} a ring")
        return index

    def _set_vring_enable(self, payload: bytes, fds: list[int]) -> None:
        index, enabled = _unpack(messages.VRING_STATE, payload)
        vring = self._vring(index)
        vring.enabled = bool(enabled)
        if enabled:
            self._start(index)
        else:
            self._stop(index)

    def _start(self, index: int) -> None:
        vring = self._rings[index]
        if vring.running or not vring.enabled or vring.kick is None:
            return
        parts = (vring.descriptors, vring.available, vring.used)
        descriptors, available, used = map(self._guest_address, parts)
        self._device.start_ring(index, vring, (descriptors, available, used))
        vring.running = True

    def _stop(self, index: int) -> None:
        vring = self._rings[index]
        if vring.running:
            vring.running = False
            vring.base = self._device.stop_ring(index)

    def _stop_all(self) -> None:
        for index, vring in enumerate(self._rings):
            self._stop(index)
            vring.enabled = False


class _Pause:
    """Context manager that stops all running rings while the memory map changes.

    The rings restart after the with block, unless it raised an error.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._running: list[int] = []

    def __enter__(self) -> None:
        session = self._session
        self._running = [n for n, vring in enumerate(session._rings) if vring.running]
        for index in self._running:
            session._stop(index)

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        if error is None:
            for index in self._running:
                self._session._start(index)


def _unpack(form: struct.Struct, payload: bytes) -> tuple[int, ...]:
    if len(payload) != form.size:
        raise OSError(errno.EINVAL, f"payload of {len(payload)} bytes (expected {form.size})")
    return form.unpack(payload)


def _unpack_region(payload: bytes) -> tuple[int, ...]:
    padding = messages.U64.size
    return _unpack(messages.REGION, payload[padding:])


class VhostUserServer(unix_server.UnixServer):
    """Server of ``device``; takes ownership of ``listener``."""

    def __init__(self, loop: EventLoop, listener: socket.socket, device: Device) -> None:
        super().__init__(
            loop,
            listener,
            lambda: _Connection(device),
            descriptors=VHOST_USER_DESCRIPTORS_MAX,
            reply_timeout=VHOST_USER_REPLY_TIMEOUT_SECONDS,
        )


class _Connection:
    def __init__(self, device: Device) -> None:
        self._session = Session(device)
        self._decoder = Decoder()

    @property
    def wanted(self) -> int:
        return self._decoder.wanted

    def receive(self, data: bytes, fds: list[int]) -> Iterator[bytes]:
        message = self._decoder.receive(data, fds)
        if message is not None:
            reply = self._session.handle(message)
            if reply is not None:
                yield reply

    def close(self) -> None:
        for fd in self._decoder.pending_fds():
            os.close(fd)
        self._session.close()
