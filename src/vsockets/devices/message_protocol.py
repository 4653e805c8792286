"""Interface of the protocols between a virtual machine's monitor and a device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol


class DeviceProtocolError(Exception):
    """The monitor sent a message after which the connection cannot continue."""


class MessageConnection(Protocol):
    """The device's side of a connection to one monitor."""

    @property
    def wanted(self) -> int:
        """Maximum size of the next read, in bytes."""

    def receive(self, data: bytes, fds: list[int]) -> Iterator[bytes]:
        """Handle received data and yield the replies; takes ownership of ``fds``.

        Raises DeviceProtocolError or OSError.
        """

    def close(self) -> None:
        """Release the device after the monitor has disconnected."""
