"""Message formats, without I/O: vsockd's control protocol, hybrid vsock, vsockmon records."""

from .messages import (
    PADDING,
    RECORD_SIZE,
    REQUEST_SIZE,
    Op,
    ProtocolError,
    Record,
    Request,
    RequestFlag,
    Role,
    encode_stream,
)
from .names import decode_route, decode_source, encode_source, is_socket_name

__all__ = [
    "PADDING",
    "RECORD_SIZE",
    "REQUEST_SIZE",
    "Op",
    "ProtocolError",
    "Record",
    "Request",
    "RequestFlag",
    "Role",
    "decode_route",
    "decode_source",
    "encode_source",
    "encode_stream",
    "is_socket_name",
]
