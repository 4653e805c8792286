"""Locators: endpoints as they are written on a command line.

=============================  ========================================================
``vsock:CID:PORT``             a vSockets stream
``vsock-dgram:CID:PORT``       vSockets datagrams
``vsock-mux:PATH:PORT``        a port of a guest behind a hybrid-vsock unix socket
``vsock-mux/PATH:PORT``        the same, as systemd-ssh-proxy writes it; by default its port 22
``hyperkit:DIR:CID:PORT``      an address whose unix sockets are in a folder of HyperKit's
``vsock-emu:DIR:CID:PORT``     the same in a folder of vsock-emulation-layer's
``tcp:HOST:PORT``              TCP; an IPv6 address stands in square brackets
``udp:HOST:PORT``              UDP
``unix:PATH``                  a unix stream socket; a leading ``@`` means the abstract name
``unix-dgram:PATH``            a unix datagram socket
``exec:COMMAND``               a program's standard input and output
``stdio:``                     standard input and output
``fd:N``, ``fd:NAME``          an inherited listening socket (systemd's LISTEN_FDS)
``http-proxy:``, ``socks5:``   the target that the client requests in that protocol
=============================  ========================================================

An empty CID or host means any, which is valid for listening only.  In a folder an empty CID means
that of the host, to which the guest's programs connect.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass

from ..limits import HYBRID_PATH_MAX_BYTES
from .address import parse_cid, parse_port
from .constants import VMADDR_CID_ANY, VMADDR_PORT_ANY

#: The prefix of systemd-ssh-proxy(1), and its default port.
_SYSTEMD = "vsock-mux/"
_SSH = 22

#: The largest port of TCP and UDP.
_LARGEST_INET_PORT = 0xFFFF


@dataclass(frozen=True, slots=True)
class Vsock:
    """A vSockets endpoint."""

    cid: int
    port: int
    datagram: bool = False

    def __str__(self) -> str:
        scheme = "vsock-dgram" if self.datagram else "vsock"
        cid = "any" if self.cid == VMADDR_CID_ANY else self.cid
        return f"{scheme}:{cid}:{'any' if self.port == VMADDR_PORT_ANY else self.port}"


@dataclass(frozen=True, slots=True)
class Inet:
    """A TCP or UDP endpoint.  ``host`` is a name or an address, empty for all local ones."""

    host: str
    port: int
    datagram: bool = False

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'udp' if self.datagram else 'tcp'}:{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Unix:
    """A unix socket.  A path that begins with ``@`` is an abstract name."""

    path: str
    datagram: bool = False

    def __str__(self) -> str:
        return f"{'unix-dgram' if self.datagram else 'unix'}:{self.path}"


@dataclass(frozen=True, slots=True)
class VsockMux:
    """A port of the guest behind the unix socket ``path`` (hybrid vsock)."""

    path: str
    port: int
    datagram = False

    def __str__(self) -> str:
        return f"vsock-mux:{self.path}:{self.port}"


@dataclass(frozen=True, slots=True)
class VsockFolder:
    """An address whose unix socket is in the folder ``path``.

    ``convention`` decides on the socket's name: ``hyperkit`` or ``vsock-emu``.
    """

    convention: str  #: ``hyperkit`` or ``vsock-emu``
    path: str
    cid: int
    port: int
    datagram = False

    @property
    def socket_path(self) -> str:
        """The path of the unix socket that belongs to this CID and port."""
        if self.convention == "hyperkit":
            return f"{self.path}/{self.cid:08x}.{self.port:08x}"
        return f"{self.path}/{self.cid}.{self.port}"

    def __str__(self) -> str:
        return f"{self.convention}:{self.path}:{self.cid}:{self.port}"


@dataclass(frozen=True, slots=True)
class Exec:
    """A command, started once for each connection."""

    command: tuple[str, ...]
    datagram = False

    def __str__(self) -> str:
        return f"exec:{shlex.join(self.command)}"


@dataclass(frozen=True, slots=True)
class Stdio:
    """Standard input and output of this process."""

    datagram = False

    def __str__(self) -> str:
        return "stdio:"


@dataclass(frozen=True, slots=True)
class Inherited:
    """A listening socket that this process has inherited, by number or systemd's name."""

    name: str
    datagram = False

    def __str__(self) -> str:
        return f"fd:{self.name}"


@dataclass(frozen=True, slots=True)
class Proxy:
    """The target that a client requests; ``protocol`` is ``http-proxy`` or ``socks5``."""

    protocol: str
    datagram = False

    def __str__(self) -> str:
        return f"{self.protocol}:"


Locator = Vsock | Inet | Unix | VsockMux | VsockFolder | Exec | Stdio | Inherited | Proxy


def parse_locator(text: str) -> Locator:
    """Return the locator in ``text``.

    Raises ValueError if ``text`` is invalid.
    """
    scheme, colon, rest = text.partition(":")
    if text.startswith(_SYSTEMD):
        rest = text.removeprefix(_SYSTEMD[:-1])
        scheme, rest = "vsock-mux", rest if colon else f"{rest}:{_SSH}"
    elif not colon or scheme not in _SCHEMES:
        raise ValueError(f"{text!r}: expected an address such as {', '.join(_EXAMPLES)}")
    try:
        return _SCHEMES[scheme](rest)
    except ValueError as error:
        raise ValueError(f"{text!r}: {error}") from None


def _vsock(rest: str, datagram: bool = False) -> Vsock:
    cid, colon, port = rest.rpartition(":")
    if not colon:
        raise ValueError(f"expected {'vsock-dgram' if datagram else 'vsock'}:CID:PORT")
    return Vsock(parse_cid(cid or "any"), parse_port(port), datagram)


def _inet(rest: str, datagram: bool = False) -> Inet:
    host, colon, port = rest.rpartition(":")
    if not colon:
        raise ValueError(f"expected {'udp' if datagram else 'tcp'}:HOST:PORT")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError(f"expected an IPv6 address in brackets, [{host}]:{port}")
    if host and (not host.isprintable() or any(c in host for c in " /[]")):
        raise ValueError(f"host {host!r}: expected a name or an address")
    return Inet(host, parse_inet_port(port), datagram)


def parse_inet_port(text: str) -> int:
    """Return the TCP or UDP port in ``text``; 0 requests a free port.

    Raises ValueError if ``text`` is not a number from 0 to 65535.
    """
    number = int(text) if text.isascii() and text.isdecimal() and len(text) <= 5 else -1
    if not 0 <= number <= _LARGEST_INET_PORT:
        raise ValueError(f"port {text!r}: expected a number from 0 to {_LARGEST_INET_PORT}")
    return number


def _unix(rest: str, datagram: bool = False) -> Unix:
    return Unix(_path(rest), datagram)


def _mux(rest: str) -> VsockMux:
    path, colon, port = rest.rpartition(":")
    if not colon:
        raise ValueError("expected vsock-mux:PATH:PORT")
    number = parse_port(port)
    if number == VMADDR_PORT_ANY:
        raise ValueError(f"port {port!r}: expected a number; hybrid vsock has no wildcard")
    return VsockMux(_path(path), number)


def _folder(convention: str) -> Callable[[str], Locator]:
    def parse(rest: str) -> Locator:
        address, _, port = rest.rpartition(":")
        path, colon, cid = address.rpartition(":")
        if not colon:
            raise ValueError(f"expected {convention}:DIR:CID:PORT")
        numbers = parse_cid(cid or "host"), parse_port(port)
        if VMADDR_CID_ANY in numbers:
            raise ValueError("expected a CID and a port; a unix socket's name has no wildcard")
        return VsockFolder(convention, _path(path), *numbers)

    return parse


def _path(text: str) -> str:
    if not text or "\0" in text:
        raise ValueError("expected a path")
    return text


def check_hybrid_path(path: str) -> str:
    """Return the reason why ``path`` cannot be a hybrid vsock's unix socket; "" if it can."""
    name = path.rpartition("/")[2]
    if not path.startswith("/") or not name or "\0" in path:
        return f"expected the absolute path of a unix socket, not {path!r}"
    if len(os.fsencode(name)) > HYBRID_PATH_MAX_BYTES:
        return f"socket name too long: {name!r} (expected at most {HYBRID_PATH_MAX_BYTES} bytes)"
    return ""


def _exec(rest: str) -> Exec:
    command = tuple(shlex.split(rest))
    if not command:
        raise ValueError("expected a command")
    return Exec(command)


def _inherited(rest: str) -> Inherited:
    if not rest:
        raise ValueError("expected a descriptor's number or name")
    return Inherited(rest)


def _alone(locator: Locator) -> Callable[[str], Locator]:
    def parse(rest: str) -> Locator:
        if rest:
            raise ValueError(f"expected nothing after {str(locator)!r}")
        return locator

    return parse


_SCHEMES: dict[str, Callable[[str], Locator]] = {
    "vsock": _vsock,
    "vsock-dgram": lambda rest: _vsock(rest, True),
    "vsock-mux": _mux,
    "hyperkit": _folder("hyperkit"),
    "vsock-emu": _folder("vsock-emu"),
    "tcp": _inet,
    "udp": lambda rest: _inet(rest, True),
    "unix": _unix,
    "unix-dgram": lambda rest: _unix(rest, True),
    "exec": _exec,
    "stdio": _alone(Stdio()),
    "fd": _inherited,
    "http-proxy": _alone(Proxy("http-proxy")),
    "socks5": _alone(Proxy("socks5")),
}
_EXAMPLES = ("vsock:3:22", "tcp:localhost:80", "udp:[::1]:53", "unix:/run/x.sock", "stdio:")
