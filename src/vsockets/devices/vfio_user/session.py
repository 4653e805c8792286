"""Server of one vfio-user client: its requests, and the device that serves them."""

from __future__ import annotations

import errno
import fcntl
import logging
import mmap
import os
import socket
import weakref
from collections.abc import Callable, Iterable, Mapping
from enum import IntEnum
from fcntl import F_ADD_SEALS, F_SEAL_GROW, F_SEAL_SEAL, F_SEAL_SHRINK
from struct import Struct
from typing import Protocol

from ...eventloop.loop import EventLoop
from .. import unix_server
from ..guest_memory import GuestMemory
from ..limits import (
    VFIO_USER_DESCRIPTORS_MAX,
    VFIO_USER_REPLY_TIMEOUT_SECONDS,
    VFIO_USER_TRANSFER_MAX_BYTES,
)
from ..unix_server import DescriptorReply, DeviceProtocolError
from . import messages
from .messages import LARGEST_MESSAGE, Command, Decoder, Flag, Message
from .pci import Interrupts, Irq

log = logging.getLogger(__name__)

_READ, _WRITE = int(Command.REGION_READ), int(Command.REGION_WRITE)
_TAKE_DESCRIPTORS = int(Command.DMA_MAP), int(Command.DEVICE_SET_IRQS)
_REPLY, _NO_REPLY = int(Flag.REPLY), int(Flag.NO_REPLY)
_ACCESS_BYTES, _HEADER_BYTES = messages.ACCESS.size, messages.HEADER.size
_unpack_access, _pack_header = messages.ACCESS.unpack_from, messages.HEADER.pack


class Region(IntEnum):
    """Region of a PCI device; values are indices of ``linux/vfio.h``."""

    BAR0 = 0
    BAR1 = 1
    BAR2 = 2
    BAR3 = 3
    BAR4 = 4
    BAR5 = 5
    ROM = 6
    CONFIG = 7
    VGA = 8


_PAGE = 4096
_READ_AND_WRITE, _MMAP, _HAS_CAPABILITIES = 3, 4, 8
_SPARSE_MMAP = 1


class MappedArea:
    """Shared memory for ``size`` bytes of a region, from ``offset`` on.

    A client may map the memory.  Its guest's accesses to the area then send no message; those to
    the rest of the page do.  Clients map whole pages of a file, so ``offset`` is a multiple of a
    page; ``size`` is at most a page.
    """

    def __init__(self, offset: int, size: int) -> None:
        self.offset, self.size = offset, size
        #: file of the memory, which has the area at its offset in the region
        self.fd = os.memfd_create("vfio-user-region", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        weakref.finalize(self, os.close, self.fd)
        os.ftruncate(self.fd, offset + _PAGE)
        # Access to memory beyond the end of a file would end the device by SIGBUS.
        fcntl.fcntl(self.fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)
        self.view = memoryview(mmap.mmap(self.fd, _PAGE, offset=offset))[:size]


class Device(Protocol):
    """Interface of a device that a :class:`Session` connects to its client.

    The session checks offsets and counts against the regions' sizes before it calls the device.
    """

    regions: Mapping[Region, int]  #: sizes of the existing regions, in bytes
    mapped: Mapping[Region, MappedArea]  #: areas that the client may map
    interrupts: Interrupts
    memory: GuestMemory

    def read(self, region: int, offset: int, count: int) -> bytes:
        """Return ``count`` bytes from ``offset`` of ``region``."""

    def write(self, region: int, offset: int, data: bytes, posted: bool) -> None:
        """Write ``data`` at ``offset`` of ``region``.

        If the write is ``posted``, the guest's processor does not wait for it; otherwise the
        processor stands still until this method returns.
        """

    def reset(self) -> None:
        """Reset the device to its state after power-on."""

    def on_disconnect(self) -> None:
        """Reset the device after the client has disconnected, and share no memory with it."""

    def release_memory(self, address: int, size: int) -> None:
        """Drop all views of ``size`` bytes at ``address``; the client unmaps them afterwards."""


class Session:
    """State of one client's connection to a device."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._negotiated = False
        self._others: Mapping[int, Callable[[Message], bytes]] = {
            Command.DMA_MAP: self._map,
            Command.DMA_UNMAP: self._unmap,
            Command.DEVICE_GET_INFO: self._device_info,
            Command.DEVICE_GET_REGION_INFO: self._region_info,
            Command.DEVICE_GET_IRQ_INFO: self._irq_info,
            Command.DEVICE_SET_IRQS: self._set_irqs,
            Command.DEVICE_RESET: self._reset,
        }

    def handle(self, message: Message) -> bytes | None:
        """Handle ``message``; return the reply, or None if the client expects none.

        Raises DeviceProtocolError when the connection cannot continue.
        """
        number, command, flags, payload, fds = message
        try:
            if fds and not (self._negotiated and command in _TAKE_DESCRIPTORS):
                _close(message)
            if not self._negotiated:
                payload = self._negotiate(message)
            elif command == _WRITE:
                payload = self._write(payload, bool(flags & _NO_REPLY))
            elif command == _READ:
                payload = self._read(payload)
            else:
                payload = self._perform(message)
        except OSError as error:
            log.info("vfio-user: command %d: %s", command, error)
            return messages.refusal(message, error.errno or errno.EIO)
        if flags & _NO_REPLY:
            return None
        reply = _pack_header(number, command, _HEADER_BYTES + len(payload), _REPLY, 0) + payload
        if type(payload) is DescriptorReply:
            return DescriptorReply(reply, payload.fd)
        return reply

    def close(self) -> None:
        """Reset the device after the client has disconnected: the virtual machine has ended."""
        self._device.on_disconnect()
        self._device.interrupts.close()
        self._device.memory.clear()

    def _negotiate(self, message: Message) -> bytes:
        if message.command != Command.VERSION:
            raise DeviceProtocolError(f"command {message.command} before VERSION")
        answer = messages.encode_version(message.payload)
        self._negotiated = True
        return answer

    def _perform(self, message: Message) -> bytes:
        if message.command == Command.VERSION:
            raise DeviceProtocolError("VERSION was already negotiated")
        other = self._others.get(message.command)
        if other is None:
            raise OSError(errno.ENOTSUP, "unknown command")
        return other(message)

    # Access

    def _read(self, payload: bytes) -> bytes:
        if len(payload) != _ACCESS_BYTES:
            raise OSError(errno.EINVAL, f"read request of invalid size: {len(payload)} bytes")
        offset, region, count = _unpack_access(payload)
        self._check_range(region, offset, count)
        return payload + self._device.read(region, offset, count)

    def _write(self, payload: bytes, posted: bool) -> bytes:
        if len(payload) < _ACCESS_BYTES:
            raise OSError(errno.EINVAL, f"write request of invalid size: {len(payload)} bytes")
        offset, region, count = _unpack_access(payload)
        data = payload[_ACCESS_BYTES:]
        if len(data) != count:
            raise OSError(errno.EINVAL, f"write of {count} bytes with {len(data)} bytes of data")
        self._check_range(region, offset, count)
        self._device.write(region, offset, data, posted)
        return payload[:_ACCESS_BYTES]

    def _check_range(self, region: int, offset: int, count: int) -> None:
        size = self._device.regions.get(region, 0)  # type: ignore[call-overload]
        if not 0 < count <= VFIO_USER_TRANSFER_MAX_BYTES or offset + count > size:
            raise OSError(
                errno.EINVAL, f"invalid access: {count} bytes at {offset:#x} of region {region}"
            )

    # Set-up

    def _map(self, message: Message) -> bytes:
        try:
            fields = _unpack(messages.DMA_MAP, message)
            _, flags, offset, address, size = fields
            if len(message.fds) > 1:
                raise OSError(
                    errno.EINVAL,
                    f"DMA_MAP with {len(message.fds)} descriptors (expected at most 1)",
                )
            fd = message.fds[0] if message.fds else None
            self._device.memory.map(address, size, bool(flags & 2), fd, offset)
        finally:
            _close(message)  # the mapping has its own reference
        return b""

    def _unmap(self, message: Message) -> bytes:
        _, flags, address, size = _unpack(messages.DMA_UNMAP, message)
        if flags:
            raise OSError(errno.ENOTSUP, f"DMA_UNMAP with unsupported flags {flags:#x}")
        self._device.memory.unmap(address, size)
        self._device.release_memory(address, size)
        return message.payload

    def _device_info(self, message: Message) -> bytes:
        _unpack(messages.DEVICE_INFO, message)
        interrupts = len(self._device.interrupts.counts)
        resets_and_is_pci = 3
        return messages.DEVICE_INFO.pack(
            messages.DEVICE_INFO.size, resets_and_is_pci, len(Region), interrupts
        )

    def _region_info(self, message: Message) -> bytes:
        room, _, index, *_ = _unpack(messages.REGION_INFO, message)
        if index >= len(Region):
            raise OSError(errno.EINVAL, f"no region {index}")
        size = self._device.regions.get(Region(index), 0)
        flags = _READ_AND_WRITE if size else 0
        needed = messages.REGION_INFO.size
        area = self._device.mapped.get(Region(index))
        if area is None:
            return messages.REGION_INFO.pack(needed, flags, index, 0, size, 0)
        flags |= _MMAP | _HAS_CAPABILITIES
        capability_at = needed
        needed += messages.MAPPED_AREA.size
        info = messages.REGION_INFO.pack(needed, flags, index, capability_at, size, 0)
        if room < needed:  # the client asks again; QEMU 11.1 refuses an offset of 0 here
            return info
        capability = messages.MAPPED_AREA.pack(_SPARSE_MMAP, 1, 0, 1, 0, area.offset, area.size)
        return DescriptorReply(info + capability, area.fd)

    def _irq_info(self, message: Message) -> bytes:
        index = _unpack(messages.IRQ_INFO, message)[2]
        counts = list(self._device.interrupts.counts.items())
        if index >= len(counts):
            raise OSError(errno.EINVAL, f"no interrupt {index}")
        kind, count = counts[index]
        # As Linux replies for a device without PCIe errors.  QEMU warns on a reply of zero.
        if kind is Irq.ERR and not count:
            raise OSError(errno.EINVAL, "no interrupt for errors")
        # Bit 0: eventfds are supported.  INTx can be masked (1) and masks itself (2); the number
        # of MSI-X and MSI vectors cannot change while in use (3).
        flags = 1 if not count else 7 if kind == 0 else 9
        return messages.IRQ_INFO.pack(messages.IRQ_INFO.size, flags, index, count)

    def _set_irqs(self, message: Message) -> bytes:
        try:
            fields = _unpack(messages.SET_IRQS, message)
        except OSError:
            _close(message)
            raise
        _, flags, index, start, count = fields
        self._device.interrupts.set(flags, index, start, count, message.fds)
        return b""

    def _reset(self, message: Message) -> bytes:
        self._device.reset()
        return b""


def _unpack(form: Struct, message: Message) -> tuple[int, ...]:
    if len(message.payload) < form.size:
        raise OSError(errno.EINVAL, f"payload of invalid size: {len(message.payload)} bytes")
    return form.unpack_from(message.payload)


def _close(message: Message) -> None:
    for fd in message.fds:
        os.close(fd)


class VfioUserServer(unix_server.UnixServer):
    """Server of ``device``; takes ownership of ``listener``."""

    def __init__(
        self,
        loop: EventLoop,
        listener: socket.socket,
        device: Device,
        after_message: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(
            loop,
            listener,
            lambda: _Connection(device),
            descriptors=VFIO_USER_DESCRIPTORS_MAX,
            reply_timeout=VFIO_USER_REPLY_TIMEOUT_SECONDS,
            after_message=after_message,
        )


class _Connection:
    wanted = LARGEST_MESSAGE

    def __init__(self, device: Device) -> None:
        self._session = Session(device)
        self._decoder = Decoder()

    def receive(self, data: bytes, fds: list[int]) -> Iterable[bytes]:
        # One reply after the other: the next message is handled after a reply is sent.
        return filter(None, map(self._session.handle, self._decoder.receive(data, fds)))

    def close(self) -> None:
        for fd in self._decoder.pending_fds():
            os.close(fd)
        self._session.close()
