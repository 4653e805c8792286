"""Streams and sequenced packets over the fabric.

The program's descriptor is a unix socket.  The first call that needs vsockd connects it to the
context's control socket; after a successful connect() it is connected to the peer's socket, and
vsockd has no descriptor of it.  So the descriptor never changes, and is a plain kernel socket in
every program that inherits it.
"""

from __future__ import annotations

import _socket
import contextlib
import errno
import os
import socket as stdlib
from socket import SO_SNDBUF, SOCK_SEQPACKET, SOCK_STREAM, SOL_SOCKET
from typing import Any

from ..._linux.sockets import (
    DESCRIPTOR_SPACE,
    HAS_PASSRIGHTS,
    SO_PASSRIGHTS,
    allow_descriptors,
    cookie_of,
    descriptor_in,
)
from ...attachment import Attachment, explain, receive_reply, send_request, wait_readable
from ...limits import (
    SEND_BUFFER_MAX_BYTES,
    STREAM_BUFFER_DEFAULT_BYTES,
    VSOCKD_REPLY_TIMEOUT_SECONDS,
)
from ...model.address import check
from ...model.buffers import DEFAULT_SIZES
from ...model.constants import VMADDR_CID_ANY
from ...protocol import RECORD_SIZE, Record, Role, client
from ...protocol.client import decode_reply
from ...socket import MSG_ERRQUEUE, SOCKET_CLASSES, UNBOUND, Phase, error, socket, switch_class

# Module aliases of enum members: hot path.
_NEW, _BOUND, _LISTENING = Phase.NEW, Phase.BOUND, Phase.LISTENING
_CONNECTING, _CONNECTED = Phase.CONNECTING, Phase.CONNECTED
_MAY_CONNECT = (_NEW, _BOUND)
_FAILED = Phase.FAILED
_DONTWAIT, _CLOEXEC = int(stdlib.MSG_DONTWAIT), int(stdlib.MSG_CMSG_CLOEXEC)
_OOB = int(stdlib.MSG_OOB)
_UNIX = int(stdlib.AF_UNIX)

# The methods of the C class, without the overrides of subclasses.
_raw = _socket.socket
_raw_send = _raw.send
#: The type as an integer; the property of the standard library returns an enum member.
_raw_type = _raw.type.__get__


class FabricSocket(socket):
    """A socket in a context of the fabric."""

    @property
    def _fabric(self) -> Attachment:
        handle = self._attachment or self._context
        assert isinstance(handle, Attachment)  # this class is chosen for an Attachment only
        return handle


class StreamSocket(FabricSocket):
    """A stream or sequenced-packet socket that is not established."""

    _has_channel = False  # connected to vsockd
    _named = False  # a listening unix socket, bound by a supervisor
    _error = 0  # SO_ERROR: the errno of a failed connect, not yet read
    _send_buffer = 0  # SO_SNDBUF before a polling connect, in bytes

    # Connections

    def bind(self, address: Any) -> None:
        """Bind to a local address; vsockd fills in wildcards (guide page 15).

        Raises OSError: EADDRINUSE, EADDRNOTAVAIL (another context's CID), EACCES (a port below 1024
        without CAP_NET_BIND_SERVICE), EINVAL (already bound).
        """
        address = check(address)
        if self._phase is not _NEW:
            raise error(errno.EINVAL, "the socket is bound")
        request = client.bind(address, sizes=self._buffers, cookie=cookie_of(self))
        self._local = self._request(request).local
        self._phase = _BOUND

    def listen(self, backlog: int | None = None, /) -> None:
        """Listen, with at most ``backlog`` connections not yet accepted (default 128).

        Buffer options apply to all connections that are made after they were set.
        """
        if backlog is None:
            backlog = min(stdlib.SOMAXCONN, 128)
        if self._phase not in (_BOUND, _LISTENING):
            raise error(errno.EINVAL, "bind the socket first")
        request = client.listen(max(0, backlog), self._buffers)
        allow_descriptors(self)  # a failed connect may have made the socket refuse descriptors
        if self._named and self._phase is _LISTENING:
            _raw.listen(self, backlog)
        elif self._phase is _LISTENING:
            _raw.send(self, request)  # not answered: a reply would look like a connection
        else:
            self._request(request)
            self._phase = _LISTENING

    def accept(self) -> tuple[socket, tuple[int, int]]:
        """Wait for a connection; return its socket and the peer's ``(cid, port)``."""
        if self._phase is not _LISTENING:
            raise error(errno.EINVAL, "the socket is not listening")
        if self._named:
            data, came = self._accept_token()
        else:
            data, came, _, _ = _raw.recvmsg(self, RECORD_SIZE, DESCRIPTOR_SPACE, _CLOEXEC)
        record = decode_reply(data)
        fd = descriptor_in(came)
        if fd is None:
            raise client.missing_descriptor()
        cls = EstablishedSocket if self.__class__ is StreamSocket else self.__class__
        accepted = cls.__new__(cls)
        stdlib.socket.__init__(accepted, _UNIX, _raw_type(self), 0, fd)
        accepted._attachment = self._attachment
        accepted._establish(record)
        return accepted, record[4:6]

    def _accept_token(self) -> Any:
        """Return the data and ancillary data of the next connection to this named socket."""
        while True:
            fd, _ = self._accept()  # type: ignore[attr-defined]  # as socket.accept()
            with stdlib.socket(_UNIX, _raw_type(self), 0, fd) as token:
                token.settimeout(VSOCKD_REPLY_TIMEOUT_SECONDS)
                data, came, _, _ = token.recvmsg(RECORD_SIZE, DESCRIPTOR_SPACE, _CLOEXEC)
            if data:
                return data, came

    def connect(self, address: Any) -> None:  # noqa: C901 - hot path
        """Connect to ``(cid, port)`` (guide page 17).

        A non-blocking socket raises BlockingIOError (EINPROGRESS), and polls as writable when the
        connect has completed; SO_ERROR is its result.  As on Linux, such a socket cannot be
        connected again after a failure.

        Raises OSError: ECONNRESET (the port has no listener, or its backlog is full), EHOSTUNREACH
        (the context does not exist, or policy denies it), EINVAL (incompatible buffer sizes, or the
        socket is listening), EISCONN, EALREADY; TimeoutError after the connect timeout.
        """
        peer = check(address)
        if self._phase not in _MAY_CONNECT:
            self._refuse_to_connect()
        if peer[0] == VMADDR_CID_ANY:
            raise error(errno.ENODEV, "VMADDR_CID_ANY is not a destination")
        timeout = self.gettimeout()
        polling, seconds = timeout == 0, self._connect_timeout
        if timeout is not None and timeout < seconds:
            seconds = timeout
        request = client.connect(peer, self._buffers, cookie_of(self), polling)
        try:
            if not self._has_channel:
                seconds = self._open_channel(seconds)
        except OSError as failure:
            explain(failure, self._context)
            raise
        if HAS_PASSRIGHTS:
            # A program needs no descriptors.  vsockd does the same at a listening program's end.
            _raw.setsockopt(self, SOL_SOCKET, SO_PASSRIGHTS, 0)
        if polling:
            self._send_polling(request)
            self._phase = _CONNECTING
            raise BlockingIOError(errno.EINPROGRESS, os.strerror(errno.EINPROGRESS))
        try:  # noqa: SIM105 - hot path
            _raw.send(self, request)
        except BrokenPipeError:
            pass  # vsockd has replied: see send_request()
        try:
            if not wait_readable(self.fileno(), seconds):
                raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
        except BaseException:
            self._phase = _CONNECTING  # the connect continues
            raise
        try:
            self._finish_connect()
        except OSError as failure:
            explain(failure, self._context)
            raise

    # Data: these complete a connect in progress, or raise ENOTCONN

    def _complete(self) -> None:
        """Complete a connect in progress.  Raises OSError(ENOTCONN) if it has not succeeded."""
        if self._phase is not _CONNECTING or not wait_readable(self.fileno(), 0):
            raise error(errno.ENOTCONN)
        try:
            self._finish_connect()
        except OSError as failure:
            self._error = failure.errno or errno.EIO
            raise error(errno.ENOTCONN) from None

    def recv(self, bufsize: int, flags: int = 0, /) -> bytes:
        """Receive data.  Raises OSError(ENOTCONN) before the connect has completed."""
        _refuse_error_queue(flags)
        self._complete()
        return _raw.recv(self, bufsize, flags)

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        """Receive data into a buffer.

        Raises OSError(ENOTCONN) before the connect has completed.
        """
        _refuse_error_queue(flags)
        self._complete()
        return _raw.recv_into(self, buffer, nbytes, flags)

    def recvmsg(self, bufsize: int, ancbufsize: int = 0, flags: int = 0, /) -> Any:
        """Receive data, as ``socket.recvmsg`` does."""
        _refuse_error_queue(flags)
        self._complete()
        return self.recvmsg(bufsize, ancbufsize, flags)

    def recvmsg_into(self, buffers: Any, ancbufsize: int = 0, flags: int = 0, /) -> Any:
        """Receive data, as ``socket.recvmsg_into`` does."""
        _refuse_error_queue(flags)
        self._complete()
        return self.recvmsg_into(buffers, ancbufsize, flags)

    def recvfrom(self, bufsize: int, flags: int = 0, /) -> tuple[bytes, None]:
        """Receive data; return it and None, as the peer's address is that of getpeername()."""
        return self.recv(bufsize, flags), None

    def recvfrom_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> tuple[int, None]:
        """Receive data into a buffer; return the number of bytes and None."""
        return self.recv_into(buffer, nbytes, flags), None

    def send(self, data: Any, flags: int = 0, /) -> int:
        """Send data.  Raises OSError(ENOTCONN) before the connect has completed."""
        _refuse_urgent(flags)
        self._complete()
        return _raw.send(self, data, flags)

    def sendall(self, data: Any, flags: int = 0, /) -> None:
        """Send all data.  Raises OSError(ENOTCONN) before the connect has completed."""
        _refuse_urgent(flags)
        self._complete()
        _raw.sendall(self, data, flags)

    def sendmsg(
        self, buffers: Any, ancdata: Any = (), flags: int = 0, address: Any = None, /
    ) -> int:
        """Send data, as ``socket.sendmsg`` does."""
        _refuse_urgent(flags)
        if address is not None:
            self.sendto(b"", address)
        self._complete()
        return _raw.sendmsg(self, buffers, ancdata, flags)

    def sendto(self, *args: Any) -> int:
        """Raise OSError: EISCONN if connected, else EOPNOTSUPP."""
        connected = self._phase is _CONNECTED
        raise error(
            errno.EISCONN if connected else errno.EOPNOTSUPP,
            "a stream has no destination (use send())",
        )

    def sendfile(self, file: Any, offset: int = 0, count: int | None = None) -> int:
        """Send a file, as ``socket.sendfile`` does."""
        self._complete()
        return super().sendfile(file, offset, count)

    def shutdown(self, how: int, /) -> None:
        """Shut the stream down, or cancel a connect in progress.

        Raises OSError(ENOTCONN) before a connect.
        """
        if not stdlib.SHUT_RD <= how <= stdlib.SHUT_RDWR:
            raise error(errno.EINVAL)
        if self._phase in (_NEW, _BOUND, _LISTENING):
            raise error(errno.ENOTCONN)
        self._is_shut = True
        if self._phase is _CONNECTING:
            self._phase = _FAILED
            how = stdlib.SHUT_RDWR
        _raw.shutdown(self, how)

    # Implementation

    def _open_channel(self, seconds: float) -> float:
        """Connect to vsockd within ``seconds``; return the remaining seconds."""
        handle: Any = self._attachment or self._context  # the fabric: it chose this class
        seconds = handle.open_channel(self, _raw_type(self), seconds)
        self._has_channel = True
        return seconds

    def _request(self, request: bytes) -> Record:
        """Send a request on the socket's own connection to vsockd; return the reply."""
        seconds = VSOCKD_REPLY_TIMEOUT_SECONDS
        if not self._has_channel:
            seconds = self._open_channel(seconds)
        send_request(self, request)
        if not wait_readable(self.fileno(), seconds):
            raise TimeoutError(errno.ETIMEDOUT, "no reply from vsockd")
        return receive_reply(self, 0)[0]

    def _refuse_to_connect(self) -> None:
        if self._phase is _LISTENING:
            raise error(errno.EINVAL, "the socket is listening")
        if self._is_shut:
            raise error(errno.EINVAL, "the socket is shut down")
        if self._phase is _CONNECTING and wait_readable(self.fileno(), 0):
            try:
                self._finish_connect()
            except OSError as failure:
                self._error = failure.errno or errno.EIO
            else:
                raise error(errno.EISCONN)
        raise error(errno.EALREADY)

    def _send_polling(self, request: bytes) -> None:
        """Send a request so that the socket polls as not writable until vsockd has read it.

        The send buffer is reduced afterwards: a small one would split the request, and vsockd could
        read the first part alone.
        """
        send_request(self, request)
        self._send_buffer = _raw.getsockopt(self, SOL_SOCKET, SO_SNDBUF)
        _raw.setsockopt(self, SOL_SOCKET, SO_SNDBUF, 0)

    def _finish_connect(self) -> None:
        """Receive vsockd's reply to a connect; the reply has already arrived."""
        polled = self._send_buffer
        if polled:
            # The kernel doubles the value, as room for its own headers.
            _raw.setsockopt(self, SOL_SOCKET, SO_SNDBUF, polled // 2)
            self._send_buffer = 0
        try:
            try:
                data = _raw.recv(self, RECORD_SIZE, _DONTWAIT)
            except ConnectionResetError:
                data = _raw.recv(self, RECORD_SIZE, _DONTWAIT)  # as in receive_reply()
            record = client.decode_reply(data)
        except OSError:
            if polled:
                self._phase = _FAILED
            else:
                self._phase = _NEW if self._local == UNBOUND else _BOUND
            raise
        self._establish(record)

    def _establish(self, record: Record) -> None:
        """Become the established stream that ``record`` describes."""
        self._record = record
        if record[10:] != DEFAULT_SIZES or self._buffers is not DEFAULT_SIZES:
            self._apply_sizes(record)
        cls = self.__class__
        if cls is StreamSocket:
            self.__class__ = EstablishedSocket  # what switch_class() does without a subclass
        elif cls is not EstablishedSocket:
            switch_class(self, EstablishedSocket)

    def _apply_sizes(self, record: Record) -> None:
        if record.size != STREAM_BUFFER_DEFAULT_BYTES:
            _raw.setsockopt(self, SOL_SOCKET, SO_SNDBUF, min(record.size, SEND_BUFFER_MAX_BYTES))
        self._buffers = record.sizes

    def _pending_error(self) -> int:
        if self._phase is _CONNECTING:
            if not wait_readable(self.fileno(), 0):
                return 0
            try:
                self._finish_connect()
            except OSError as failure:
                return failure.errno or errno.EIO
        if self._error:
            code, self._error = self._error, 0
            return code
        return _raw.getsockopt(self, SOL_SOCKET, stdlib.SO_ERROR)

    def _buffers_changed(self) -> None:
        if self._phase is _LISTENING:
            _raw.send(self, client.update(self._buffers))
        elif self._phase is _CONNECTED:
            inode = os.fstat(self.fileno()).st_ino
            request = client.resize(self._buffers.size, cookie=cookie_of(self), inode=inode)
            with contextlib.suppress(OSError):  # vsockd has ended; the stream continues
                self._fabric.request(request)

    def _recover(self) -> None:
        request = client.query(cookie=cookie_of(self), inode=os.fstat(self.fileno()).st_ino)
        try:
            record, _ = self._fabric.request(request)
        except OSError:
            with contextlib.suppress(OSError):
                _raw.getpeername(self)  # connected to a socket unknown to vsockd
                switch_class(self, EstablishedSocket)
            return
        if record.role == Role.CONNECTED:
            self._establish(record)
        else:
            self._named = record.is_named
            self._has_channel = not self._named
            self._local = record.local
            self._buffers = record.sizes
            self._phase = _LISTENING if record.role == Role.LISTENING else _BOUND


class EstablishedSocket(StreamSocket):
    """An established stream, with the C methods for data.

    The socket's addresses are decoded from vsockd's record when a program asks for them.
    """

    @property
    def _phase(self) -> Phase:  # type: ignore[override]  # constant
        return _CONNECTED

    @property
    def _local(self) -> tuple[int, int]:  # type: ignore[override]
        return self._record[2:4] if self._record is not None else UNBOUND

    @property
    def _peer(self) -> tuple[int, int] | None:  # type: ignore[override]
        return self._record[4:6] if self._record is not None else None

    recv = _raw.recv
    recv_into = _raw.recv_into
    sendfile = stdlib.socket.sendfile

    def send(self, data: Any, flags: int = 0, /) -> int:
        """Send data, as ``socket.send`` does.

        Raises OSError(EOPNOTSUPP) for MSG_OOB, which a unix stream would support.
        """
        if flags & _OOB:
            _refuse_urgent(flags)
        return _raw_send(self, data, flags)

    def sendall(self, data: Any, flags: int = 0, /) -> None:
        """Send all data, as ``socket.sendall`` does.  Raises OSError(EOPNOTSUPP) for MSG_OOB."""
        _refuse_urgent(flags)
        _raw.sendall(self, data, flags)

    def sendmsg(
        self, buffers: Any, ancdata: Any = (), flags: int = 0, address: Any = None, /
    ) -> int:
        """Send data, as ``socket.sendmsg`` does.

        Raises OSError: EOPNOTSUPP for MSG_OOB, EISCONN with an address.
        """
        _refuse_urgent(flags)
        if address is not None:
            self.sendto(b"", address)
        return _raw.sendmsg(self, buffers, ancdata, flags)

    def recvmsg(self, bufsize: int, ancbufsize: int = 0, flags: int = 0, /) -> Any:
        """Receive data, as ``socket.recvmsg`` does; the address is None."""
        _refuse_out_of_band(flags)
        return (*_raw.recvmsg(self, bufsize, ancbufsize, flags)[:3], None)

    def recvmsg_into(self, buffers: Any, ancbufsize: int = 0, flags: int = 0, /) -> Any:
        """Receive data, as ``socket.recvmsg_into`` does; the address is None."""
        _refuse_out_of_band(flags)
        return (*_raw.recvmsg_into(self, buffers, ancbufsize, flags)[:3], None)

    def connect(self, address: Any) -> None:
        """Raise OSError(EISCONN), or OSError(EINVAL) after a shutdown: streams are not reused."""
        check(address)
        raise error(errno.EINVAL if self._is_shut else errno.EISCONN)


def _refuse_urgent(flags: int) -> None:
    if flags & _OOB:
        raise error(errno.EOPNOTSUPP, "MSG_OOB is not supported")


def _refuse_error_queue(flags: int) -> None:
    if flags & MSG_ERRQUEUE:  # it is always empty
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))


def _refuse_out_of_band(flags: int) -> None:
    """Raise OSError for MSG_ERRQUEUE and MSG_OOB, for which a unix stream would return data."""
    _refuse_error_queue(flags)
    _refuse_urgent(flags)


SOCKET_CLASSES["fabric"][SOCK_STREAM] = StreamSocket
SOCKET_CLASSES["fabric"][SOCK_SEQPACKET] = StreamSocket
