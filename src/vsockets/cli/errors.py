"""One-line error messages that name the cause and the remedy."""

from __future__ import annotations

import errno
import os

_UNREACHABLE = (
    "no such context, it is suspended or off, or this one may not communicate with it (see: vsock "
    "context ls, vsock events denial)"
)

#: Causes of a failed connect, by errno; below, those of a failed bind and a failed send.
CONNECT = {
    errno.ECONNRESET: "no program listens there, its backlog is full, or this context may not "
    "connect to it (see: vsock events denial); --wait SECONDS retries",
    errno.EHOSTUNREACH: _UNREACHABLE,
    errno.EADDRINUSE: "the source port is in use (see: vsock ls)",
    errno.EACCES: "the guest is isolated from this program (see: vsock events denial), or the "
    "source port is below 1024, which needs CAP_NET_BIND_SERVICE",
    errno.EINVAL: "any is not a destination, or the buffer sizes of both sides do not overlap",
    errno.ETIMEDOUT: "no answer in time; -w SECONDS sets a longer timeout",
}
BIND = {
    errno.EADDRINUSE: "the port is in use (see: vsock ls)",
    errno.EADDRNOTAVAIL: "the CID is not that of this context; omit --cid",
    errno.EACCES: "ports below 1024 need CAP_NET_BIND_SERVICE; use 1024 or above",
}
SEND = {
    errno.EACCES: "the guest is isolated from this program (see: vsock events denial)",
    errno.EMSGSIZE: "the message is too large",
    errno.ECONNREFUSED: "no datagram socket is bound there, or this context may not send to it "
    "(see: vsock events denial); --wait SECONDS retries",
    errno.EHOSTUNREACH: _UNREACHABLE,
    errno.ENETDOWN: "vsockd has ended",
}


class CliError(Exception):
    """Failure of a command: the line printed to the user, and the exit status."""

    def __init__(self, line: str, status: int = 1) -> None:
        super().__init__(line)
        self.status = status


def cli_error(doing: str, error: OSError, meanings: dict[int, str]) -> CliError:
    """Return the CliError for an OSError of an operation, such as ``connect to 3:22``.

    ``doing`` names the operation.  ``meanings`` has the likely causes, by errno.
    """
    code = error.errno or 0
    why = error.strerror or str(error)  # may be text of the library, such as how to start vsockd
    if code in meanings:
        why = f"{meanings[code]} ({os.strerror(code)})"
    # The library's notes name the transport that was chosen.
    return CliError("; ".join((f"{doing}: {why}", *getattr(error, "__notes__", ()))))


def one_line(error: Exception) -> str:
    """Return the message of any exception as one line."""
    if isinstance(error, CliError):
        return str(error)
    if isinstance(error, TimeoutError) and error.strerror is None:
        return "vsockd does not answer (is its process stopped?)"
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or error}"
    return f"{error!r}: a bug; VSOCKETS_DEBUG=1 shows where"
