"""A program that executes one socket operation per line of its input.

It is a process of its own, so it can run as another user, and can be killed.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import vsockets
from vsockets import Attachment

TYPES = {
    "stream": socket.SOCK_STREAM,
    "seqpacket": socket.SOCK_SEQPACKET,
    "dgram": socket.SOCK_DGRAM,
}

#: Seconds for one operation; none of them waits for another process.
PATIENCE = 20.0


class Puppet:
    """The process, from the test's side.  Its sockets have numbers."""

    def __init__(self, user: int) -> None:
        self.user = user
        self._made = 0
        source = os.fspath(Path(vsockets.__file__).parents[1])
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(user)],
            env={**os.environ, "PYTHONPATH": source},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def socket(self, context: Attachment, kind: str) -> int:
        self._made += 1
        self.order("socket", self._made, os.fspath(context.folder), kind)
        return self._made

    def accept(self, listener: int) -> tuple[int, tuple[int, int]]:
        """Return the new socket's number, and the address of its peer."""
        self._made += 1
        cid, port = self.order("accept", listener, self._made)
        return self._made, (cid, port)

    def attempt(self, what: str, *arguments: Any) -> int:
        """Return 0, or the errno of an operation."""
        try:
            self.order(what, *arguments)
        except OSError as error:
            return error.errno or -1
        return 0

    def order(self, what: str, *arguments: Any) -> Any:
        """Execute an operation; return its result, or raise OSError."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([what, *arguments]) + "\n")
        answer = json.loads(self._process.stdout.readline())
        if "errno" in answer:
            raise OSError(answer["errno"], answer["error"])
        return answer["value"]

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        with self._process:
            self._process.wait()


def _main() -> None:
    os.setresuid(*[int(sys.argv[1])] * 3)
    sockets: dict[int, vsockets.socket] = {}

    def make(number: int, folder: str, kind: str) -> None:
        sockets[number] = vsockets.socket(type=TYPES[kind], context=vsockets.attach(folder))
        sockets[number].settimeout(PATIENCE)

    def accept(number: int, accepted: int) -> tuple[int, int]:
        sockets[accepted], peer = sockets[number].accept()
        sockets[accepted].settimeout(PATIENCE)
        return peer

    def recvfrom(number: int) -> tuple[str, tuple[int, int]]:
        data, source = sockets[number].recvfrom(1000)
        return data.decode(), source

    orders: dict[str, Callable[..., Any]] = {
        "socket": make,
        "bind": lambda number, cid, port: sockets[number].bind((cid, port)),
        "listen": lambda number: sockets[number].listen(),
        "connect": lambda number, cid, port: sockets[number].connect((cid, port)),
        "accept": accept,
        "name": lambda number: sockets[number].getsockname(),
        "peer": lambda number: sockets[number].getpeername(),
        "send": lambda number, text: sockets[number].send(text.encode()),
        "recv": lambda number: sockets[number].recv(1000).decode(),
        "sendto": lambda number, text, *address: sockets[number].sendto(text.encode(), address),
        "recvfrom": recvfrom,
        "close": lambda number: sockets.pop(number).close(),
    }
    for line in sys.stdin:
        what, *arguments = json.loads(line)
        try:
            answer = {"value": orders[what](*arguments)}
        except OSError as error:
            answer = {"errno": error.errno, "error": str(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _main()
