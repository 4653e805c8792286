"""What the device's packets are in a capture, as Linux's vsockmon has them."""

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
    """A packet, to the guest or from it.  It is not to be believed: its payload may be shorter."""
    source_cid, cid, source_port, port, length, _, op, *_ = HEADER.unpack(header)
    operation = _OPERATIONS.get(op, Operation.UNKNOWN)
    if operation is not Operation.PAYLOAD:
        length = 0
    capture.record(operation, (source_cid, source_port), (cid, port), payload, length, header)
