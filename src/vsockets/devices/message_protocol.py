"""What a protocol between a virtual machine's monitor and a device is to its server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol


class DeviceProtocolError(Exception):
    """The monitor sent something after which nothing it sends can be relied on."""


class MessageConnection(Protocol):
    """With one monitor."""

    @property
    def wanted(self) -> int:
        """Bytes that the next read may take."""

    def receive(self, data: bytes, fds: list[int]) -> Iterator[bytes]:
        """Hear what came; yields the answers.  Takes ``fds``.  DeviceProtocolError, OSError."""

    def close(self) -> None:
        """The monitor has gone."""
