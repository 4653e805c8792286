"""A played VMClock: a file with the layout of the device that reports restores to a guest.

The layout is ``struct vmclock_abi`` of Linux (``include/uapi/linux/vmclock-abi.h``).  A guest's
program maps ``/dev/vmclock0``, or this file, and compares the counters with those that it has seen.
Unlike the device, the file does not report changes by poll().
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

_MAGIC, _VERSION = 0x4B4C4356, 1  # "VCLK"
_COUNTER_INVALID, _TIME_UTC = 0xFF, 0
_GENERATION_PRESENT = 1 << 8

#: Fields up to the flags: magic, size, version, counter, time, sequence, disruption, flags.
_HEAD = struct.Struct("<IIHBBIQQ")
#: Size of the structure; the generation is its last field, 64 bits.
_SIZE, _GENERATION = 112, 104
_SEQUENCE, _DISRUPTION = 12, 16

#: Size of the file, a page.
_PAGE = 4096


class VMClock:
    """The VMClock of one machine; the file is removed by :meth:`close`."""

    def __init__(self, path: Path) -> None:
        """Create the file.  Raises OSError if that is not possible."""
        self.path = path
        head = _HEAD.pack(
            *(_MAGIC, _SIZE, _VERSION, _COUNTER_INVALID, _TIME_UTC, 0, 0, _GENERATION_PRESENT)
        )
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        os.pwrite(self._fd, head.ljust(_PAGE, b"\0"), 0)
        self._sequence = 0

    def disrupt(self, generation: int) -> None:
        """Report that the machine has been restored, with another generation."""
        self._write("<I", _SEQUENCE, self._sequence + 1)  # odd: an update is in progress
        self._write("<Q", _DISRUPTION, generation)
        self._write("<Q", _GENERATION, generation)
        self._sequence += 2
        self._write("<I", _SEQUENCE, self._sequence)

    def _write(self, form: str, offset: int, value: int) -> None:
        os.pwrite(self._fd, struct.pack(form, value), offset)

    def close(self) -> None:
        """Close and remove the file."""
        os.close(self._fd)
        self.path.unlink(missing_ok=True)
