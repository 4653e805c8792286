"""Capture records of virtio-vsock packets, as Linux's vsockmon makes them."""

from __future__ import annotations

from collections.abc import Sequence

from ...protocol.vsockmon import Operation
from ..capture import CaptureSink
from .packet import HEADER, Op

_OPERATIONS = {
    Op.REQUEST: Operation.CONNECT,
    Op.RESPONSE: Operation.CONNECT,
    Op.RST: Operation.DISCONNECT,
    Op.SHUTDOWN: Operation.DISCONNECT,
    Op.RW: Operation.PAYLOAD,
    Op.CREDIT_UPDATE: Operation.CONTROL,
    Op.CREDIT_REQUEST: Operation.CONTROL,
}


def record(capture: CaptureSink, header: bytes, payload: Sequence[memoryview] = ()) -> None:
    """Record a packet to or from the guest, whose payload may be shorter than the header claims."""
    source_cid, cid, source_port, port, length, _, op, *_ = HEADER.unpack(header)
    operation = _OPERATIONS.get(op, Operation.UNKNOWN)
    if operation is not Operation.PAYLOAD:
        length = 0
    capture.record(operation, (source_cid, source_port), (cid, port), payload, length, header)
