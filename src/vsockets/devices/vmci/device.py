"""The VMCI PCI device: registers, interrupts, and datagrams to and from guest memory.

Drivers carry datagrams in one of two ways.  Since Linux 5.18 the driver provides the addresses of
two buffers, one for each direction (:class:`DmaBuffers`); before, it moves single bytes through two
I/O ports (:class:`BytePorts`).  Numbers of registers are those of Linux's
``linux/vmw_vmci_defs.h``.
"""

from __future__ import annotations

import contextlib
import logging
import struct
from collections import deque
from collections.abc import Callable, Mapping
from enum import IntEnum, IntFlag
from typing import NamedTuple

from ..guest_memory import BadAddress, GuestMemory
from ..limits import (
    VMCI_DATAGRAM_QUEUE_MAX,
    VMCI_DATAGRAM_QUEUE_MAX_BYTES,
    VMCI_SCATTER_ELEMENTS_MAX,
)
from ..vfio_user import ConfigSpace, Identity, Interrupts, Irq, MappedArea, Region, pci
from .packets import HEADER, LARGEST, TERMINATOR, Code, Datagram

_BUFFER = struct.Struct("<IIIIq")
_RESULT_AT = 16
_ELEMENT = struct.Struct("<QQ")

_INLINE, _SCATTERED = 0, 1


class DmaBuffers:
    """The buffers for sending and receiving, at the addresses that the guest wrote last.

    Each buffer begins with a header: busy, operation, size, unused (32 bits each), and a 64-bit
    result.  The guest writes the address of a buffer to a register.  After sending, the guest polls
    the header with interrupts off until busy is 0; for receiving, an interrupt announces that busy
    is 1.
    """

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self.reset()

    def reset(self) -> None:
        """Clear the upper 32 bits of both buffers' addresses; forget a submitted datagram."""
        self.out_high = self.in_high = 0
        self._submitted: memoryview | None = None

    def submit(self, low: int, run: Callable[[bytes], int | None]) -> None:
        """Call ``run`` with the datagram in the buffer, and store the result in the buffer.

        ``low`` is the lower half of the buffer's address.  If the buffer is invalid, ``run`` gets
        empty bytes.  If ``run`` returns None, :meth:`finish` stores the result later.
        """
        try:
            header = self._memory.view(self.out_high | low, _BUFFER.size)
        except BadAddress:
            run(b"")
            return
        _, operation, size, _, _ = _BUFFER.unpack_from(header)
        data = b""
        if operation == _INLINE and HEADER.size <= size <= LARGEST:
            with contextlib.suppress(BadAddress):
                data = bytes(self._memory.view((self.out_high | low) + _BUFFER.size, size))
        self._submitted = header
        result = run(data)
        if result is not None:
            self.finish(result)

    def finish(self, result: int) -> None:
        """Store the result of the last submitted datagram, unless it is stored."""
        header, self._submitted = self._submitted, None
        if header is not None:
            header[_RESULT_AT:] = result.to_bytes(8, "little", signed=True)
            header[:4].cast("I")[0] = 0  # last, and in one store: the guest polls busy

    def deliver(self, low: int, waiting: deque[bytes], on_delivered: Callable[[int], None]) -> bool:
        """Move encoded datagrams from ``waiting`` to the guest's buffer, as many as fit whole.

        ``low`` is the lower half of the buffer's address.  ``on_delivered`` is called with the
        datagrams' size in bytes.  Return whether to interrupt the guest.
        """
        try:
            header = self._memory.view(self.in_high | low, _BUFFER.size)
            views = self._room(header, (self.in_high | low) + _BUFFER.size)
        except BadAddress:
            return False
        room = sum(map(len, views))
        parts: list[bytes] = []
        at = delivered = 0
        while waiting:
            size = len(waiting[0])
            if at + (size + 7 & ~7) > room:
                break
            parts.append(waiting.popleft())
            if size & 7:
                parts.append(bytes(-size & 7))
            at += size + 7 & ~7
            delivered += size
        on_delivered(delivered)
        if at + len(TERMINATOR) <= room:
            parts.append(TERMINATOR)
        data = b"".join(parts)
        at = 0
        for view in views:
            part = data[at : at + len(view)]
            view[: len(part)] = part
            at += len(part)
        header[_RESULT_AT:] = Code.SUCCESS.to_bytes(8, "little")
        header[:4].cast("I")[0] = 1
        return True

    def _room(self, header: memoryview, elements_at: int) -> list[memoryview]:
        _, operation, count, _, _ = _BUFFER.unpack_from(header)
        if operation != _SCATTERED or not 0 < count <= VMCI_SCATTER_ELEMENTS_MAX:
            raise BadAddress(f"buffer with an invalid number of elements: {count}")
        elements = bytes(self._memory.view(elements_at, count * _ELEMENT.size))
        left = LARGEST
        views = []
        for address, size in _ELEMENT.iter_unpack(elements):
            size = min(size, left)
            left -= size
            if size:
                views.append(self._memory.view(address, size))
        return views


class Register(IntEnum):
    """Offset of a register; those from 0x24 on came with DMA datagrams (Linux 5.18)."""

    STATUS = 0x00
    CONTROL = 0x04
    ICR = 0x08  #: interrupt cause; reading clears it
    IMR = 0x0C  #: interrupt mask: the enabled causes
    DATA_OUT = 0x10  #: a byte port
    DATA_IN = 0x14  #: a byte port
    CAPS = 0x18
    RESULT_LOW = 0x1C
    RESULT_HIGH = 0x20
    DATA_OUT_LOW = 0x24
    DATA_OUT_HIGH = 0x28
    DATA_IN_LOW = 0x2C
    DATA_IN_HIGH = 0x30
    GUEST_PAGE_SHIFT = 0x34


class Control(IntFlag):
    """Bits of the CONTROL register, which is write-only."""

    RESET = 1
    INT_ENABLE = 2
    INT_DISABLE = 4


class Cause(IntEnum):
    """Cause of an interrupt, as a bit of ICR; CAUSE_VECTORS has the vector of each."""

    DATAGRAM = 1
    NOTIFICATION = 2
    DMA_DATAGRAM = 4  #: a datagram read is complete


CAUSE_VECTORS = {Cause.DATAGRAM: 0, Cause.NOTIFICATION: 1, Cause.DMA_DATAGRAM: 2}


class Caps(IntFlag):
    """Capabilities in the CAPS register; the driver writes back those that it uses."""

    DATAGRAM = 4
    NOTIFICATIONS = 8
    PPN64 = 0x10
    DMA_DATAGRAM = 0x20


#: Size of BAR1, by which the driver recognizes a device with DMA datagrams.
MMIO_BAR = 0x40000
#: Offset of the registers in BAR1; the MSI-X table is at its start.
MMIO_REGISTERS = 0x20000
MSIX_TABLE, MSIX_PENDING = 0, 0x1000

#: Size of the part of the registers that clients map.
MAPPED_REGISTERS = Register.RESULT_HIGH + 4

#: The device with byte ports: registers in I/O ports, only MSI-X in BAR1.
IO_BAR = 64
OLD_MSIX_BAR = 0x2000


_PAGE = 4096
_FILLER = TERMINATOR[:1]  # every byte of a terminator but the size


class BytePorts:
    """Datagrams through two I/O ports, one byte at a time: drivers before Linux 5.18.

    To send, the driver writes the bytes of a datagram; the device passes the complete datagram to
    ``submit``.

    To receive, the driver fills a buffer and then parses it: first one page; if a datagram in it
    is cut off, the driver moves the cut datagram to the front of the buffer and reads until the
    buffer holds the largest datagram.  Where no datagram begins, the driver continues at the next
    page of the buffer, and stops after the last page.  A
    datagram that starts in the middle of a read would be torn.  So this class follows the driver's
    reads; once the queue is empty, it pads the current read with terminators.
    """

    def __init__(self, submit: Callable[[bytes], object], take: Callable[[], bytes | None]) -> None:
        self._submit = submit
        self._take = take
        self.reset()

    def reset(self) -> None:
        """Discard incomplete datagrams of both directions."""
        self._sent = bytearray()
        self._start_read()
        self._rest = b""  # unread rest of the current datagram
        self._given = 0  # bytes of the current datagram that were read

    def _start_read(self) -> None:
        # Size of the driver's current read, and its remaining bytes.
        self._size = self._left = _PAGE
        self._ended = False  # the queue was empty; the driver stops after this read

    # From the guest

    def write(self, data: bytes) -> None:
        """Append bytes that the driver wrote; submit each datagram that they complete."""
        self._sent += data
        while len(self._sent) >= HEADER.size:
            size = HEADER.size + HEADER.unpack_from(self._sent)[4]
            if size > LARGEST:
                self._sent.clear()
                self._submit(b"")
                return
            if len(self._sent) < size:
                return
            datagram = bytes(self._sent[:size])
            del self._sent[:size]
            self._submit(datagram)

    # To the guest

    def read(self, count: int) -> bytes:
        """Return the next ``count`` bytes for the driver."""
        parts = []
        while count:
            part = self._read_part(min(count, self._left))
            parts.append(part)
            count -= len(part)
            self._left -= len(part)
            if not self._left:
                self._next_read()
        return b"".join(parts)

    def _read_part(self, count: int) -> bytes:
        if not self._rest and not self._ended and self._left >= HEADER.size:
            datagram = self._take()
            if datagram is None:
                self._ended = True
            else:
                self._rest = datagram + bytes(-len(datagram) % 8)
                self._given = 0
        if not self._rest:
            return _FILLER * count
        part, self._rest = self._rest[:count], self._rest[count:]
        self._given += len(part)
        return part

    def _next_read(self) -> None:
        if self._ended:
            self._start_read()
        elif self._rest:
            self._size = LARGEST
            self._left = LARGEST - self._given
        else:
            self._left = self._size


log = logging.getLogger(__name__)

# Plain integers: an enum's & costs as much as a system call.
_VECTORS = {int(cause): vector for cause, vector in CAUSE_VECTORS.items()}
_DATAGRAM, _DMA_DATAGRAM = int(Cause.DATAGRAM), int(Cause.DMA_DATAGRAM)

# Indices of registers in their memory.
_STATUS, _CONTROL = Register.STATUS >> 2, Register.CONTROL >> 2
_ICR, _IMR, _CAPS = Register.ICR >> 2, Register.IMR >> 2, Register.CAPS >> 2
_RESULT_LOW, _RESULT_HIGH = Register.RESULT_LOW >> 2, Register.RESULT_HIGH >> 2
_READABLE = (_STATUS, _IMR, _CAPS, _RESULT_LOW, _RESULT_HIGH)  # reading them has no effect

_IDENTITY = Identity(0x15AD, 0x0740, 0x15AD, 0x0740, 0x088000, 0x10)
_FOUR_KIB = 12
_LARGEST_PAGE_SHIFT = 16


class _Registers(NamedTuple):
    """Registers that the driver does not restore after the machine has slept."""

    in_use: int  # capabilities
    page_shift: int
    mask: int
    interrupting: bool
    out_high: int
    in_high: int


class VmciDevice:
    """The VMCI device of one virtual machine.

    Linux's driver reads RESULT_LOW twice after each datagram.  The client maps the registers up to
    RESULT_HIGH (:class:`.MappedArea`), so that these reads send no message.  The driver also writes
    some of them, when it starts and when it ends: the device reads CAPS and IMR when it needs them,
    and notices a change of CONTROL at the next message or interrupt.  Messages follow soon when a
    driver ends, because it releases the interrupts before its memory; but not when it starts.

    ``perform`` is called with each datagram from the guest and returns the result for the guest, or
    None if :meth:`finish` is called with the result before or later.
    ``pio_device`` selects the device with I/O ports, for drivers before Linux 5.18.  ``on_reset``
    is called when the guest restarts, ``on_unmap`` with address and size of memory that the client
    unmaps, ``on_wake`` when the guest wakes up from sleep, ``on_blocked`` when a datagram has to
    wait until the guest enables interrupts: call :meth:`follow_control` from time to time then.
    """

    def __init__(
        self,
        perform: Callable[[Datagram], int | None],
        pio_device: bool = False,
        on_reset: Callable[[], None] = lambda: None,
        on_unmap: Callable[[int, int], None] = lambda address, size: None,
        on_wake: Callable[[], None] = lambda: None,
        on_blocked: Callable[[], None] = lambda: None,
    ) -> None:
        self.memory = GuestMemory()
        self._perform = perform
        self._on_reset = on_reset
        self._on_unmap = on_unmap
        self._on_wake = on_wake
        self._on_blocked = on_blocked
        self._saved_registers: _Registers | None = None
        vectors = 2 if pio_device else 3
        self.interrupts = Interrupts({Irq.INTX: 1, Irq.MSI: 1, Irq.MSIX: vectors})
        self.regions: Mapping[Region, int]
        self.mapped: Mapping[Region, MappedArea] = {}
        self._share_nothing()
        if pio_device:
            self.regions = {Region.BAR0: IO_BAR, Region.BAR1: OLD_MSIX_BAR}
            self._base, self._registers = 0, Region.BAR0
            self._caps = Caps.DATAGRAM | Caps.NOTIFICATIONS | Caps.PPN64
        else:
            self.regions = {Region.BAR1: MMIO_BAR}
            area = MappedArea(MMIO_REGISTERS, MAPPED_REGISTERS)
            self.mapped = {Region.BAR1: area}
            self._words = area.view.cast("I")
            self._base, self._registers = MMIO_REGISTERS, Region.BAR1
            self._caps = Caps.DATAGRAM | Caps.NOTIFICATIONS | Caps.PPN64 | Caps.DMA_DATAGRAM
        self.regions = {**self.regions, Region.CONFIG: pci.SIZE}
        capabilities = [pci.msix(vectors, 1, MSIX_TABLE, MSIX_PENDING), pci.msi()]
        self._config = ConfigSpace(_IDENTITY, capabilities, io_bars=[0] if pio_device else [])
        #: encoded datagrams for the guest: control packets, events, and datagrams of programs
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0
        self.is_unfinished = False  #: the guest waits for the result of its last datagram
        self._dma = DmaBuffers(self.memory)
        self._ports = BytePorts(self._run, self._pop_datagram)
        self._power_on()

    # Called by the hypervisor

    @property
    def may_finish_later(self) -> bool:
        """Flag: true if the guest waits for a result without a wait of the device.

        A driver with DMA datagrams polls its buffer.  With byte ports the next access of the driver
        reads the result.
        """
        return self._base != 0

    def finish(self, result: int) -> None:
        """Report the result of a datagram for which ``perform`` returns None."""
        if self.is_unfinished:
            self.is_unfinished = False
            self._store_result(result)
            self._dma.finish(result)

    @property
    def page_size(self) -> int:
        """The guest's page size, in bytes."""
        return 1 << self._page_shift

    @property
    def wide_pages(self) -> bool:
        """Flag: true if the driver's page numbers have 64 bits, false if they have 32."""
        return bool(self._words[_CAPS] & Caps.PPN64)

    @property
    def has_room(self) -> bool:
        """Flag: true while the queue for the guest has room for datagrams of programs."""
        return self._waiting_bytes < VMCI_DATAGRAM_QUEUE_MAX_BYTES

    @property
    def backpressured(self) -> bool:
        """Backpressure flag: true while too many datagrams wait for the guest.

        While the flag is true, control packets of the guest are refused.
        """
        return len(self._waiting) >= VMCI_DATAGRAM_QUEUE_MAX

    def deliver(self, datagram: bytes) -> None:
        """Queue an encoded datagram for the guest.

        This method enforces no limit: callers check :attr:`has_room` or :attr:`backpressured`.
        """
        self._waiting.append(datagram)
        self._waiting_bytes += len(datagram)
        if len(self._waiting) == 1 or not self._interrupting:
            self._interrupt(_DATAGRAM)
            if not self._interrupting:
                self._on_blocked()

    def follow_control(self) -> bool:
        """Notice that the guest has enabled interrupts by a mapped register.

        Returns whether datagrams still wait for that.
        """
        self._follow_control(may_reset=False)
        return bool(self._waiting) and not self._interrupting

    def notify(self) -> None:
        """Interrupt the guest after a change of the notification bitmap."""
        self._interrupt(Cause.NOTIFICATION)

    # Called by the vfio-user session

    def read(self, region: int, offset: int, count: int) -> bytes:
        """Implement :class:`vsockets.devices.vfio_user.Device`."""
        self._follow_control()
        if region == Region.CONFIG:
            return self._config.read(offset, count)
        if region == self._registers:
            register = offset - self._base
            if count == 4:
                return self._load(register).to_bytes(4, "little")
            if register == Register.DATA_IN and self._base == 0:
                return self._ports.read(count)
        return bytes(count)

    def write(self, region: int, offset: int, data: bytes, posted: bool = False) -> None:
        """Implement :class:`vsockets.devices.vfio_user.Device`."""
        self._follow_control()
        if region == Region.CONFIG:
            was_master = self._config.bus_master
            self._config.write(offset, data)
            if was_master and not self._config.bus_master:
                self._on_bus_master_off()
            elif self._config.bus_master and not was_master:
                self._on_bus_master_on()
        elif region == self._registers:
            register = offset - self._base
            if len(data) == 4:
                self._store(register, int.from_bytes(data, "little"), posted)
            elif register == Register.DATA_OUT and self._base == 0:
                self._ports.write(data)

    def reset(self) -> None:
        """Implement :class:`vsockets.devices.vfio_user.Device`."""
        self._config.reset()
        self._restart()

    def on_disconnect(self) -> None:
        """Implement :class:`vsockets.devices.vfio_user.Device`.

        The memory of the mapped registers is left to the former client, whose guest may still write
        there; the sandbox allows no other shared memory.
        """
        self.mapped = {}
        self._share_nothing()
        self.reset()

    def _share_nothing(self) -> None:
        # The registers up to RESULT_HIGH.
        self._words = memoryview(bytearray(MAPPED_REGISTERS)).cast("I")

    def release_memory(self, address: int, size: int) -> None:
        """Implement :class:`vsockets.devices.vfio_user.Device`."""
        self.finish(Code.SUCCESS)  # the buffer may be in this memory
        self._on_unmap(address, size)

    # Registers

    def _power_on(self) -> None:
        words = self._words
        words[_STATUS] = words[_CONTROL] = words[_ICR] = words[_IMR] = 0
        words[_CAPS] = self._caps
        self._store_result(0)
        self._last_control = 0
        self._page_shift = _FOUR_KIB
        self._interrupting = False
        self.is_unfinished = False
        self._dma.reset()
        self._ports.reset()
        self._waiting.clear()
        self._waiting_bytes = 0

    def _restart(self) -> None:
        self._on_reset()
        self._power_on()

    # The right to access memory (PCI bus master)

    def _on_bus_master_off(self) -> None:
        """Save the registers and reset the device, which must no longer access guest memory.

        Either the machine goes to sleep, and Linux's driver expects the registers to persist; or
        kexec passes the memory to another kernel without a reset of the device.
        """
        kept = _Registers(
            *(self._words[_CAPS], self._page_shift, self._words[_IMR], self._interrupting),
            *(self._dma.out_high, self._dma.in_high),
        )
        self._restart()
        self._saved_registers = kept

    def _on_bus_master_on(self) -> None:
        """Restore the saved registers if the guest has woken up.

        A kernel that wakes up restores message-signalled interrupts before it makes the device a
        bus master; a kernel that starts enables them later.  So the state of the interrupts
        distinguishes the two.
        """
        kept, self._saved_registers = self._saved_registers, None
        if kept is None or not self.interrupts.message_signalled:
            return
        self._words[_CAPS], self._page_shift, self._words[_IMR], self._interrupting = kept[:4]
        self._words[_STATUS] = int(self._interrupting)
        self._dma.out_high, self._dma.in_high = kept[4:]
        self._on_wake()
        self._interrupt(_DATAGRAM)  # also for datagrams that arrived meanwhile

    def _load(self, register: int) -> int:
        if register == Register.ICR:
            cause, self._words[_ICR] = self._words[_ICR], 0
            return cause
        word = register >> 2
        return self._words[word] if word in _READABLE else 0

    def _store(self, register: int, value: int, posted: bool) -> None:
        if register == Register.DATA_OUT_LOW:
            self.finish(Code.SUCCESS)  # the guest has not waited, as all drivers do
            self._dma.submit(value, self._run)
        elif register == Register.DATA_IN_LOW:
            self._words[_ICR] &= ~_DATAGRAM  # a mapped register is not cleared by reading
            self._deliver_dma(value, posted)
            if self._waiting:
                self._interrupt(_DATAGRAM)
        elif register == Register.DATA_OUT_HIGH:
            self._dma.out_high = value << 32
        elif register == Register.DATA_IN_HIGH:
            self._dma.in_high = value << 32
        elif register == Register.CONTROL:
            self._control(value)
        elif register in (Register.IMR, Register.CAPS):
            self._words[register >> 2] = value
        elif register == Register.GUEST_PAGE_SHIFT and _FOUR_KIB <= value <= _LARGEST_PAGE_SHIFT:
            self._page_shift = value

    def _follow_control(self, may_reset: bool = True) -> None:
        """Apply a change of CONTROL that the guest has written to the mapped register.

        A reset ends all streams, so it waits for a message.
        """
        value = self._words[_CONTROL]
        if value != self._last_control and (may_reset or not value & Control.RESET):
            self._last_control = value
            self._control(value)

    def _control(self, value: int) -> None:
        if value & Control.RESET:
            self._restart()
        if value & Control.INT_DISABLE:
            self._interrupting = False
            self._words[_STATUS] = 0
        if value & Control.INT_ENABLE:
            self._interrupting = True
            self._words[_STATUS] = 1
            if self._waiting:
                self._signal(_DATAGRAM)

    def _interrupt(self, cause: int) -> None:
        self._follow_control(may_reset=False)
        self._signal(cause)

    def _signal(self, cause: int) -> None:
        self._words[_ICR] |= cause
        if self._interrupting and self._words[_IMR] & cause:
            self.interrupts.trigger(_VECTORS[cause])

    # Datagrams

    def _run(self, data: bytes) -> int | None:
        datagram = Datagram.decode(data)
        self.is_unfinished = True
        result = Code.INVALID_ARGS if datagram is None else self._perform(datagram)
        if result is not None:
            self.is_unfinished = False
            self._store_result(result)
        return result

    def _store_result(self, result: int) -> None:
        self._words[_RESULT_LOW] = result & 0xFFFF_FFFF
        self._words[_RESULT_HIGH] = result >> 32 & 0xFFFF_FFFF

    def _deliver_dma(self, low: int, posted: bool) -> None:
        if not posted:
            # The driver reads the buffer when its write completes, after this returns.  Until the
            # interrupt has passed through the monitor, the buffer is filled: 15 % of a round trip.
            self._interrupt(_DMA_DATAGRAM)
        if self._dma.deliver(low, self._waiting, self._on_delivered) and posted:
            self._interrupt(_DMA_DATAGRAM)

    def _on_delivered(self, size: int) -> None:
        self._waiting_bytes -= size

    def _pop_datagram(self) -> bytes | None:
        """Remove and return the next encoded datagram for the byte port, or None."""
        if not self._waiting:
            return None
        datagram = self._waiting.popleft()
        self._waiting_bytes -= len(datagram)
        return datagram
