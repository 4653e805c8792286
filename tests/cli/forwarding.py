"""What tests of ``vsock forward`` have in common."""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import threading

from .vsock import PATIENCE, Running, Vsock


class Echo:
    """A service on a listening socket: what comes goes back, until the end."""

    def __init__(self, listener: socket.socket) -> None:
        self.listener = listener
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self.listener.accept()
                threading.Thread(target=self._echo, args=(sock,), daemon=True).start()

    @staticmethod
    def _echo(sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError):
            while data := sock.recv(65536):
                sock.sendall(data)


def start(vsock: Vsock, *arguments: object) -> tuple[Running, int]:
    """A forwarder that listens on a free port, and that port."""
    running = vsock.start("forward", *arguments)
    found = re.fullmatch(r"listening on \S+:(\d+)", running.error_line())
    assert found
    return running, int(found[1])


def tcp(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), PATIENCE)


def answer_of(port: int) -> bytes:
    """What somebody who says nothing is told."""
    with tcp(port) as sock:
        return read_all(sock)


def read_all(sock: socket.socket) -> bytes:
    sock.settimeout(PATIENCE)
    data = b""
    while piece := sock.recv(65536):
        data += piece
    return data


def ask(sock: socket.socket, question: bytes = b"question") -> bytes:
    """Half-close after the question; what comes back."""
    with sock:
        sock.sendall(question)
        sock.shutdown(socket.SHUT_WR)
        return read_all(sock)


def end(running: Running, expect: int = 0) -> str:
    running.process.send_signal(signal.SIGTERM)
    return running.finish(expect=expect)[1]
