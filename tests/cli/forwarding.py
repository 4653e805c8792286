"""Helpers of the tests of ``vsock forward``."""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import threading

from .vsock import PATIENCE, Running, Vsock


class Echo:
    """An echo service on a listening socket."""

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
    """Start a forwarder on a free port; return it and the port."""
    running = vsock.start("forward", *arguments)
    found = re.fullmatch(r"listening on \S+:(\d+)", running.error_line())
    assert found
    return running, int(found[1])


def tcp(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), PATIENCE)


def answer_of(port: int) -> bytes:
    """Return what a client receives that sends nothing."""
    with tcp(port) as sock:
        return read_all(sock)


def read_all(sock: socket.socket) -> bytes:
    sock.settimeout(PATIENCE)
    data = b""
    while piece := sock.recv(65536):
        data += piece
    return data


def ask(sock: socket.socket, question: bytes = b"question") -> bytes:
    """Send a question, half-close, and return the reply."""
    with sock:
        sock.sendall(question)
        sock.shutdown(socket.SHUT_WR)
        return read_all(sock)


def end(running: Running, expect: int = 0) -> str:
    running.process.send_signal(signal.SIGTERM)
    return running.finish(expect=expect)[1]
