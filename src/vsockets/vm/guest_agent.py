"""What a guest without a network offers its host over vSockets: programs, and web pages.

Run in the guest, as ``python3 -m vsockets.vm.guest_agent``; :mod:`.visit` is the host's side.  On
COMMANDS a host's program says in one line of JSON which ``command`` to run, and on a terminal of
how many ``rows`` and ``columns`` if on one; from then on the stream is the command's standard
input and output.  On PAGES there is a web server of the files below ROOT.
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

COMMANDS, PAGES = 22, 80
ROOT = "/srv"

#: Seconds in which a host's program says what it wants, and bytes it takes at most.
_PATIENCE = 10.0
_REQUEST = 65_536

_PAGE = """\
<!doctype html>
<title>A guest without a network</title>
<h1>Context {cid}</h1>
<p>This page comes from inside a virtual machine. Its network interfaces: {interfaces}.
Its kernel: {kernel}.</p>
"""


def main() -> None:
    """Serve for ever."""
    os.makedirs(ROOT, exist_ok=True)
    interfaces = sorted(os.listdir("/sys/class/net"))
    page = _PAGE.format(
        cid=get_local_cid(), interfaces=", ".join(interfaces), kernel=os.uname().release
    )
    Path(ROOT, "index.html").write_text(page)
    threading.Thread(target=_accept, args=(PAGES, _pages), daemon=True).start()
    _accept(COMMANDS, _command)


def _accept(port: int, serve: Callable[[Any, tuple[int, int]], None]) -> None:
    with create_server((VMADDR_CID_ANY, port)) as server:
        while True:
            sock, peer = server.accept()
            if peer[0] != VMADDR_CID_HOST:
                sock.close()
                continue
            threading.Thread(target=_serve, args=(serve, sock, peer), daemon=True).start()


def _serve(serve: Callable[[Any, tuple[int, int]], None], sock: Any, peer: tuple[int, int]) -> None:
    with sock, contextlib.suppress(OSError):  # the host has gone
        serve(sock, peer)


class _Pages(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *values: Any) -> None:
        """The console is for other things."""


def _pages(sock: Any, peer: tuple[int, int]) -> None:
    functools.partial(_Pages, directory=ROOT)(sock, peer, None)  # type: ignore[arg-type]


def _command(sock: Any, peer: tuple[int, int]) -> None:
    sock.settimeout(_PATIENCE)
    request = json.loads(_line(sock))
    sock.settimeout(None)
    if "rows" in request:
        _on_terminal(sock, request["command"], (request["rows"], request["columns"]))
    else:
        subprocess.run(request["command"], stdin=sock, stdout=sock, stderr=sock, check=False)


def _line(sock: Any) -> bytes:
    """Up to its newline and no further: the rest is the command's."""
    line = b""
    while len(line) < _REQUEST:
        there = sock.recv(4096, stdlib.MSG_PEEK)
        end = there.find(b"\n") + 1
        line += sock.recv(end or len(there))
        if end or not there:
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
    os.close(terminal)  # ends what still runs on it
    os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
