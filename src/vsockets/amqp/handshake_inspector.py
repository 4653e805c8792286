"""Inspection of a guest's AMQP handshake, up to the choice of a permitted virtual host.

The client's side of the handshake of AMQP 0-9-1 (section 2.2.4)::

    protocol header, start-ok, [secure-ok …], tune-ok, open

Each frame is checked before it is forwarded to the broker.  The guest's CID is added to the client
properties in start-ok, which the broker shows to its operators; a guest cannot set that property
itself.  ``open`` names the virtual host.  A client can send ``open`` only once, so later bytes are
not inspected.
"""

from __future__ import annotations

from collections.abc import Callable

from .frames import (
    HEARTBEAT,
    PROTOCOL_HEADER,
    ConnectionMethod,
    Frame,
    FrameError,
    Reply,
    connection_close,
    connection_frame,
    connection_method,
    method_arguments,
    table_end,
    table_names,
    whole_frames,
    with_integer,
)
from .limits import AMQP_HANDSHAKE_FRAME_MAX_BYTES, AMQP_HANDSHAKE_FRAMES_MAX

#: The client property with the CID of the guest that owns a connection.
CID_PROPERTY = b"vsock_cid"

_PASSED_ON = (
    ConnectionMethod.SECURE_OK,
    ConnectionMethod.TUNE_OK,
    ConnectionMethod.CLOSE,
    ConnectionMethod.CLOSE_OK,
)


class HandshakeRefused(Exception):
    """The handshake is refused; ``answer`` is to be sent to the guest before closing."""

    def __init__(self, why: str, answer: bytes) -> None:
        super().__init__(why)
        self.answer = answer


class HandshakeInspector:
    """The inspector of one guest's handshake, which is complete once ``virtual_host`` is set."""

    def __init__(self, cid: int, admits: Callable[[str], bool]) -> None:
        self.virtual_host: str | None = None  #: the virtual host that the guest has opened
        self.cid = cid
        self._admits = admits
        self._begun = False
        self._held = b""
        self._frames = 0

    def receive(self, data: bytes) -> bytes:
        """Add bytes from the guest; return the bytes to forward to the broker.

        Raises HandshakeRefused if the handshake is invalid, or the guest may not use the virtual
        host.
        """
        if self.virtual_host is not None:
            return data
        data = self._held + data
        start = 0
        passed = []
        try:
            if not self._begun:
                if not PROTOCOL_HEADER.startswith(data[: len(PROTOCOL_HEADER)]):
                    why = "the client does not speak AMQP 0-9-1"
                    raise HandshakeRefused(why, PROTOCOL_HEADER)
                if len(data) < len(PROTOCOL_HEADER):
                    self._held = data
                    return b""
                self._begun = True
                start = len(PROTOCOL_HEADER)
                passed.append(PROTOCOL_HEADER)
            for frame in whole_frames(data, AMQP_HANDSHAKE_FRAME_MAX_BYTES, start):
                self._frames += 1
                if self._frames > AMQP_HANDSHAKE_FRAMES_MAX:
                    raise _refused(Reply.NOT_ALLOWED, "too many frames before connection.open")
                passed.append(self._check(data, frame))
                start = frame.end
                if self.virtual_host is not None:
                    self._held = b""
                    return b"".join([*passed, data[start:]])
        except FrameError as error:
            raise _refused(Reply.FRAME_ERROR, str(error)) from None
        self._held = data[start:]
        return b"".join(passed)

    def _check(self, data: bytes, frame: Frame) -> bytes:
        """Check a frame of the handshake; return the bytes to forward in its place."""
        whole = data[frame.start : frame.end]
        method = connection_method(data, frame)
        if method == ConnectionMethod.START_OK:
            return self._with_cid(method_arguments(data, frame))
        if method == ConnectionMethod.OPEN:
            self._open(method_arguments(data, frame))
            return whole
        if method in _PASSED_ON or whole == _HEARTBEAT:
            return whole
        raise _refused(Reply.COMMAND_INVALID, "frame before connection.open")

    def _with_cid(self, fields: bytes) -> bytes:
        """Return the arguments of start-ok, with the guest's CID in the client properties."""
        end = table_end(fields)
        if CID_PROPERTY in table_names(fields[:end]):
            name = CID_PROPERTY.decode()
            why = f"client property {name}: reserved for the host proxy"
            raise _refused(Reply.ACCESS_REFUSED, why, ConnectionMethod.START_OK)
        properties = with_integer(fields[:end], CID_PROPERTY, self.cid)
        return connection_frame(ConnectionMethod.START_OK, properties + fields[end:])

    def _open(self, fields: bytes) -> None:
        try:
            name = fields[1 : 1 + fields[0]]
            # Two reserved fields follow: a short string and a bit.
            if len(name) != fields[0] or len(fields) != fields[0] + fields[1 + fields[0]] + 3:
                raise IndexError
            virtual_host = name.decode()
        except (IndexError, UnicodeDecodeError):
            why = "invalid arguments of connection.open (expected a virtual host)"
            raise _refused(Reply.SYNTAX_ERROR, why, ConnectionMethod.OPEN) from None
        if not self._admits(virtual_host):
            why = f"access to virtual host {virtual_host!r} is refused to context {self.cid}"
            raise _refused(Reply.NOT_ALLOWED, why, ConnectionMethod.OPEN)
        self.virtual_host = virtual_host


_HEARTBEAT = b"%c\0\0\0\0\0\0\xce" % HEARTBEAT


def _refused(reply: Reply, why: str, cause: int = 0) -> HandshakeRefused:
    return HandshakeRefused(why, connection_close(reply, why, cause))
