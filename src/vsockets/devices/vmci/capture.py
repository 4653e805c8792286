"""Capture records of control packets: VMCI has no header that dissectors know."""

from __future__ import annotations

from ...protocol.vsockmon import Operation
from .packets import Kind

_OPERATIONS = {
    **dict.fromkeys(
        (Kind.WROTE, Kind.READ, Kind.WAITING_READ, Kind.WAITING_WRITE), Operation.CONTROL
    ),
    **dict.fromkeys((Kind.SHUTDOWN, Kind.RST, Kind.INVALID), Operation.DISCONNECT),
}


def operation_of(kind: int) -> Operation:
    """Return the operation of ``kind``; kinds outside the table belong to the handshake."""
    return _OPERATIONS.get(kind, Operation.CONNECT)  # type: ignore[call-overload,no-any-return]
