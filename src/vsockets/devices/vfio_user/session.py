"""One client's requests, answered: what vfio-user says of a device, without any socket."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Mapping
from enum import IntEnum
from struct import Struct
from typing import Protocol

from ..guest_memory import GuestMemory
from ..limits import VFIO_USER_TRANSFER_MAX_BYTES
from ..message_protocol import DeviceProtocolError
from . import messages
from .interrupts import Interrupts, Irq
from .messages import Command, Flag, Message

log = logging.getLogger(__name__)

_READ, _WRITE = int(Command.REGION_READ), int(Command.REGION_WRITE)
_NO_REPLY = int(Flag.NO_REPLY)


class Region(IntEnum):
    """A PCI device's regions, by their index in ``linux/vfio.h``."""

    BAR0 = 0
    BAR1 = 1
    BAR2 = 2
    BAR3 = 3
    BAR4 = 4
    BAR5 = 5
    ROM = 6
    CONFIG = 7
    VGA = 8


class Device(Protocol):
    """What a device must do to be served.

    Offsets and counts were checked against the regions' sizes.
    """

    regions: Mapping[Region, int]  #: sizes in bytes of those there are
    interrupts: Interrupts
    memory: GuestMemory

    def read(self, region: int, offset: int, count: int) -> bytes:
        """What is there: ``count`` bytes."""

    def write(self, region: int, offset: int, data: bytes, posted: bool) -> None:
        """The guest, or the client, writes ``data`` there, and goes on when this returns; or at
        once, if it is ``posted``.
        """

    def reset(self) -> None:
        """As after power-on."""

    def release_memory(self, address: int, size: int) -> None:
        """This memory goes away now: nothing of it may be touched after this returns."""


class Session:
    """Everything one client asks of a device, from its version on."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._negotiated = False
        self._others = {
            Command.DMA_MAP: self._map,
            Command.DMA_UNMAP: self._unmap,
            Command.DEVICE_GET_INFO: self._device_info,
            Command.DEVICE_GET_REGION_INFO: self._region_info,
            Command.DEVICE_GET_IRQ_INFO: self._irq_info,
            Command.DEVICE_SET_IRQS: self._set_irqs,
            Command.DEVICE_RESET: self._reset,
        }

    def handle(self, message: Message) -> bytes | None:
        """Do what ``message`` asks; returns the answer, None if none is wanted.

        DeviceProtocolError when the client must not go on.
        """
        try:
            if message.fds and message.command not in (Command.DMA_MAP, Command.DEVICE_SET_IRQS):
                for fd in message.fds:
                    os.close(fd)
            payload = self._perform(message)
        except OSError as error:
            log.info("vfio-user: command %d: %s", message.command, error)
            return messages.refusal(message, error.errno or errno.EIO)
        if message.flags & _NO_REPLY:
            return None
        return messages.reply(message, payload)

    def close(self) -> None:
        """The client has gone, and its guest with it."""
        self._device.reset()
        self._device.interrupts.close()
        self._device.memory.clear()

    def _perform(self, message: Message) -> bytes:
        command = message.command
        if command == _WRITE and self._negotiated:
            return self._write(message.payload, bool(message.flags & _NO_REPLY))
        if command == _READ and self._negotiated:
            return self._read(message.payload)
        if command == Command.VERSION:
            if self._negotiated:
                raise DeviceProtocolError("a second version")
            answer = messages.encode_version(message.payload)
            self._negotiated = True
            return answer
        if not self._negotiated:
            _close(message)
            raise DeviceProtocolError(f"command {command} before the version")
        other = self._others.get(command)  # type: ignore[call-overload]
        if other is None:
            raise OSError(errno.ENOTSUP, "an unknown command")
        return other(message)  # type: ignore[no-any-return]

    # Access

    def _read(self, payload: bytes) -> bytes:
        if len(payload) != messages.ACCESS.size:
            raise OSError(errno.EINVAL, f"a read request of {len(payload)} bytes")
        offset, region, count = messages.ACCESS.unpack(payload)
        self._check_range(region, offset, count)
        return payload + self._device.read(region, offset, count)

    def _write(self, payload: bytes, posted: bool) -> bytes:
        if len(payload) < messages.ACCESS.size:
            raise OSError(errno.EINVAL, f"a write request of {len(payload)} bytes")
        offset, region, count = messages.ACCESS.unpack_from(payload)
        data = payload[messages.ACCESS.size :]
        if len(data) != count:
            raise OSError(errno.EINVAL, f"a write of {count} bytes with {len(data)}")
        self._check_range(region, offset, count)
        self._device.write(region, offset, data, posted)
        return payload[: messages.ACCESS.size]

    def _check_range(self, region: int, offset: int, count: int) -> None:
        size = self._device.regions.get(region, 0)  # type: ignore[call-overload]
        if not 0 < count <= VFIO_USER_TRANSFER_MAX_BYTES or offset + count > size:
            raise OSError(errno.EINVAL, f"{count} bytes at {offset:#x} of region {region}")

    # Set-up

    def _map(self, message: Message) -> bytes:
        try:
            fields = _unpack(messages.DMA_MAP, message)
            _, flags, offset, address, size = fields
            if len(message.fds) > 1:
                raise OSError(errno.EINVAL, "a region of several files")
            fd = message.fds[0] if message.fds else None
            self._device.memory.map(address, size, bool(flags & 2), fd, offset)
        finally:
            _close(message)  # the mapping has a copy
        return b""

    def _unmap(self, message: Message) -> bytes:
        _, flags, address, size = _unpack(messages.DMA_UNMAP, message)
        if flags:
            raise OSError(errno.ENOTSUP, f"unmapping with flags {flags:#x}")
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
        index = _unpack(messages.REGION_INFO, message)[2]
        if index >= len(Region):
            raise OSError(errno.EINVAL, f"no region {index}")
        size = self._device.regions.get(Region(index), 0)
        read_and_write = 3 if size else 0
        return messages.REGION_INFO.pack(
            messages.REGION_INFO.size, read_and_write, index, 0, size, 0
        )

    def _irq_info(self, message: Message) -> bytes:
        index = _unpack(messages.IRQ_INFO, message)[2]
        counts = list(self._device.interrupts.counts.items())
        if index >= len(counts):
            raise OSError(errno.EINVAL, f"no interrupt {index}")
        kind, count = counts[index]
        # As Linux answers for a device without PCIe's errors. QEMU warns of an answer of zero.
        if kind is Irq.ERR and not count:
            raise OSError(errno.EINVAL, "no interrupt for errors")
        # An eventfd can be given; INTx can be masked and masks itself; a vector's number of
        # MSI-X and MSI is not changed while in use.
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
        raise OSError(errno.EINVAL, f"a payload of {len(message.payload)} bytes")
    return form.unpack_from(message.payload)


def _close(message: Message) -> None:
    for fd in message.fds:
        os.close(fd)
