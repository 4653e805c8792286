"""Services that a guest without a network offers its host over vSockets: commands and web pages.

Run in the guest as ``python3 -m vsockets.vm.guest_agent``; :mod:`.guest_client` is the client.  On
port COMMAND_PORT, the client sends one line of JSON with a ``command``, and with ``rows`` and
``columns`` for a command on a terminal; after that line the stream is the command's standard input
and output.  On port PAGE_PORT, a web server serves the files below ROOT.
"""

from __future__ import annotations

import contextlib
import functools
import http.server
import json
import os
import pty
import select
import socket as stdlib
import subprocess
import termios
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..api import create_server, get_local_cid
from ..model.constants import VMADDR_CID_ANY, VMADDR_CID_HOST

COMMAND_PORT, PAGE_PORT = 22, 80
ROOT = "/srv"

#: Timeout in seconds for receiving a request, and its maximum size in bytes.
_REQUEST_SECONDS = 10.0
_REQUEST_MAX_BYTES = 65_536

_PAGE = """\
<!doctype html>
<title>A guest without a network</title>
<h1>Context {cid}</h1>
<p>This page comes from inside a virtual machine. Its network interfaces: {interfaces}.
Its kernel: {kernel}.</p>
"""


def main() -> None:
    """Serve until the guest ends."""
    os.makedirs(ROOT, exist_ok=True)
    interfaces = sorted(os.listdir("/sys/class/net"))
    page = _PAGE.format(
        cid=get_local_cid(), interfaces=", ".join(interfaces), kernel=os.uname().release
    )
    Path(ROOT, "index.html").write_text(page)
    threading.Thread(target=_accept, args=(PAGE_PORT, _serve_pages), daemon=True).start()
    _accept(COMMAND_PORT, serve_command)


def _accept(port: int, serve: Callable[[Any, tuple[int, int]], None]) -> None:
    with create_server((VMADDR_CID_ANY, port)) as server:
        while True:
            sock, peer = server.accept()
            if peer[0] != VMADDR_CID_HOST:
                sock.close()
                continue
            threading.Thread(target=_serve, args=(serve, sock, peer), daemon=True).start()


def _serve(serve: Callable[[Any, tuple[int, int]], None], sock: Any, peer: tuple[int, int]) -> None:
    with sock, contextlib.suppress(OSError):  # the host has closed the connection
        serve(sock, peer)


class _Pages(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *values: Any) -> None:
        """Discard log messages: the console belongs to the guest's program."""


def _serve_pages(sock: Any, peer: tuple[int, int]) -> None:
    functools.partial(_Pages, directory=ROOT)(sock, peer, None)  # type: ignore[arg-type]


def serve_command(sock: Any, peer: tuple[int, int]) -> None:
    """Run the command that a client requests on ``sock``, which is its input and output."""
    sock.settimeout(_REQUEST_SECONDS)
    request = json.loads(_read_line(sock))
    sock.settimeout(None)
    if "rows" in request:
        _on_terminal(sock, request["command"], (request["rows"], request["columns"]))
    else:
        subprocess.run(request["command"], stdin=sock, stdout=sock, stderr=sock, check=False)


def _read_line(sock: Any) -> bytes:
    """Return the bytes up to the newline.

    Nothing after the newline is read, because it is the command's input.
    """
    line = b""
    while len(line) < _REQUEST_MAX_BYTES:
        peeked = sock.recv(4096, stdlib.MSG_PEEK)
        end = peeked.find(b"\n") + 1
        line += sock.recv(end or len(peeked))
        if end or not peeked:
            break
    return line


def _on_terminal(sock: Any, command: list[str], size: tuple[int, int]) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        termios.tcsetwinsize(0, size)
        os.execvp(command[0], command)
    pairs = {sock.fileno(): terminal, terminal: sock.fileno()}
    with contextlib.suppress(OSError):  # EIO: the command has ended
        while True:
            readable, _, _ = select.select(list(pairs), [], [])
            for fd in readable:
                data = os.read(fd, 65_536)
                if not data:
                    raise OSError
                view = memoryview(data)
                while view:
                    view = view[os.write(pairs[fd], view) :]
    os.close(terminal)  # hangs up the programs that still run on it
    os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
