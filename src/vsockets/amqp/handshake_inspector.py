"""What a guest may say to the broker until it is in a virtual host that it may use.

The handshake of AMQP 0-9-1 (section 2.2.4), as the client says it::

    protocol header, start-ok, [secure-ok …], tune-ok, open

Every frame of it is read here before the broker has it.  To start-ok, whose client properties
the broker shows to its operators, the guest's CID is added, which the guest cannot say itself.
``open`` names the virtual host; it can be said once, so what follows is not looked at.
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
    arguments,
    connection_close,
    connection_frame,
    connection_method,
    whole_frames,
)
from .limits import AMQP_HANDSHAKE_FRAME_MAX_BYTES, AMQP_HANDSHAKE_FRAMES_MAX
from .tables import names, table_end, with_number

#: The client property that says which guest a connection is of.
CID_PROPERTY = b"vsock_cid"

_PASSED_ON = (
    ConnectionMethod.SECURE_OK,
    ConnectionMethod.TUNE_OK,
    ConnectionMethod.CLOSE,
    ConnectionMethod.CLOSE_OK,
)


class HandshakeRefused(Exception):
    """The guest's connection ends here; ``answer`` is what to tell it."""

    def __init__(self, why: str, answer: bytes) -> None:
        super().__init__(why)
        self.answer = answer


class HandshakeInspector:
    """Reads along with one guest, until ``virtual_host`` is there."""

    def __init__(self, cid: int, admits: Callable[[str], bool]) -> None:
        self.virtual_host: str | None = None  #: where the guest is
        self.cid = cid
        self._admits = admits
        self._begun = False
        self._held = b""
        self._frames = 0

    def receive(self, data: bytes) -> bytes:
        """What of it the broker may have.  Raises HandshakeRefused."""
        if self.virtual_host is not None:
            return data
        data = self._held + data
        start = 0
        passed = []
        try:
            if not self._begun:
                if not PROTOCOL_HEADER.startswith(data[: len(PROTOCOL_HEADER)]):
                    raise HandshakeRefused("it does not speak AMQP 0-9-1", PROTOCOL_HEADER)
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
                passed.append(self._look_at(data, frame))
                start = frame.end
                if self.virtual_host is not None:
                    self._held = b""
                    return b"".join([*passed, data[start:]])
        except FrameError as error:
            raise _refused(Reply.FRAME_ERROR, str(error)) from None
        self._held = data[start:]
        return b"".join(passed)

    def _look_at(self, data: bytes, frame: Frame) -> bytes:
        """What the broker gets for it."""
        whole = data[frame.start : frame.end]
        method = connection_method(data, frame)
        if method == ConnectionMethod.START_OK:
            return self._marked(arguments(data, frame))
        if method == ConnectionMethod.OPEN:
            self._open(arguments(data, frame))
            return whole
        if method in _PASSED_ON or whole == _HEARTBEAT:
            return whole
        raise _refused(Reply.COMMAND_INVALID, "expected the connection to be opened first")

    def _marked(self, said: bytes) -> bytes:
        """start-ok, with the guest's CID among the client's properties."""
        end = table_end(said)
        if CID_PROPERTY in names(said[:end]):
            name = CID_PROPERTY.decode()
            why = f"the client property {name} is not the client's to set"
            raise _refused(Reply.ACCESS_REFUSED, why, ConnectionMethod.START_OK)
        properties = with_number(said[:end], CID_PROPERTY, self.cid)
        return connection_frame(ConnectionMethod.START_OK, properties + said[end:])

    def _open(self, said: bytes) -> None:
        try:
            name = said[1 : 1 + said[0]]
            # Two fields follow that mean nothing any more: a short string, and a bit.
            if len(name) != said[0] or len(said) != said[0] + said[1 + said[0]] + 3:
                raise IndexError
            virtual_host = name.decode()
        except (IndexError, UnicodeDecodeError):
            why = "expected a virtual host"
            raise _refused(Reply.SYNTAX_ERROR, why, ConnectionMethod.OPEN) from None
        if not self._admits(virtual_host):
            why = f"access to virtual host {virtual_host!r} is refused to context {self.cid}"
            raise _refused(Reply.NOT_ALLOWED, why, ConnectionMethod.OPEN)
        self.virtual_host = virtual_host


_HEARTBEAT = b"%c\0\0\0\0\0\0\xce" % HEARTBEAT


def _refused(reply: Reply, why: str, cause: int = 0) -> HandshakeRefused:
    return HandshakeRefused(why, connection_close(reply, why, cause))
