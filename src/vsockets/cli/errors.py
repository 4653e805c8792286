"""From an errno to a line that says what is wrong and what to do about it."""

from __future__ import annotations

import errno
import os

#: What a failed operation on a socket means here, by errno.
CONNECT = {
    errno.ECONNRESET: "no program listens there, its backlog is full, or this context may not "
    "connect to it (vsock events denial); --wait SECONDS tries for so long",
    errno.EHOSTUNREACH: "there is no such context, or this one may not talk to it",
    errno.EADDRINUSE: "the source port is taken; vsock ls shows by whom",
    errno.EACCES: "ports below 1024 need CAP_NET_BIND_SERVICE",
    errno.EINVAL: "any is no destination, or the two sides' buffer sizes do not meet",
    errno.ETIMEDOUT: "no answer in time; -w gives it longer",
}
BIND = {
    errno.EADDRINUSE: "the port is taken; vsock ls shows by whom",
    errno.EADDRNOTAVAIL: "that CID is not this context's; leave --cid out",
    errno.EACCES: "ports below 1024 need CAP_NET_BIND_SERVICE; take one from 1024 up",
}
SEND = {
    errno.EMSGSIZE: "it is larger than a message may be",
    errno.ECONNREFUSED: "no datagram socket is bound there, or this context may not send to it "
    "(vsock events denial); --wait SECONDS tries for so long",
    errno.EHOSTUNREACH: "there is no such context, or this one may not talk to it",
    errno.ENETDOWN: "vsockd has ended",
}


class CliError(Exception):
    """A command cannot go on; the text is the line the user gets, ``status`` the exit status."""

    def __init__(self, line: str, status: int = 1) -> None:
        super().__init__(line)
        self.status = status


def cli_error(doing: str, error: OSError, meanings: dict[int, str]) -> CliError:
    """The line for ``error``, met while ``doing`` something."""
    code = error.errno or 0
    why = error.strerror or str(error)  # the library's own words, such as how to start vsockd
    if code in meanings:
        why = f"{meanings[code]} ({os.strerror(code)})"
    # Notes of the library say which transport was chosen.
    return CliError("; ".join((f"{doing}: {why}", *getattr(error, "__notes__", ()))))


def one_line(error: Exception) -> str:
    """Any exception in one line."""
    if isinstance(error, CliError):
        return str(error)
    if isinstance(error, TimeoutError) and error.strerror is None:
        return "vsockd does not answer (is its process stopped?)"
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or error}"
    return f"{error!r}: a bug; VSOCKETS_DEBUG=1 shows where"
