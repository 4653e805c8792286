"""The programs of ``vsock demo``.

Each is an ordinary socket program in the style of the guide's chapters 3 and 4, and uses only the
standard library's ``socket``, nothing of this package.  A program runs in its own process, as
``python programs.py ROLE ARGUMENT...``, and reports in lines of JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BUFSIZE = 65_536

#: Least bytes to send, and most bytes to read from different files.
PAYLOAD, SOURCES = 64_000_000, 32_000_000

#: Header of a transfer: the number of bytes, and their SHA-256 digest.
HEADER = struct.Struct("!Q32s")
RECEIVED = b"received\n"

Address = tuple[Any, int]


def report(**facts: Any) -> None:
    """Print one line of JSON for the parent process."""
    print(json.dumps(facts), flush=True)


def family_of(host: str) -> tuple[int, Any]:
    """Return the address family of ``host``, and the host in that family's form."""
    if "." in host:
        return socket.AF_INET, host
    return socket.AF_VSOCK, int(host)


# Chapter 3: streams


def receive_files(host: str, port: str) -> None:
    """Serve for ever: receive files, check their digest, and reply with a receipt."""
    family, where = family_of(host)
    server = socket.socket(family, socket.SOCK_STREAM)
    server.bind((where, int(port)))
    server.listen(5)
    report(ready=server.getsockname())
    memory = bytearray()
    while True:
        connection, client = server.accept()
        with connection:
            size, announced = HEADER.unpack(receive(connection, bytearray(HEADER.size)))
            if len(memory) != size:
                memory = bytearray(size)
            receive(connection, memory)
            connection.send(
                RECEIVED
            )  # ends the client's measurement, before the digest is computed
            digest = hashlib.sha256(memory)
            receipt = {
                "bytes": size,
                "sha256": digest.hexdigest(),
                "intact": digest.digest() == announced,
                "client": client,
            }
            connection.sendall(json.dumps(receipt).encode())


def receive(connection: socket.socket, memory: bytearray) -> bytearray:
    """Fill ``memory`` from the connection.

    Raises EOFError if the peer closes the connection earlier.
    """
    view = memoryview(memory)
    while view:
        size = connection.recv_into(view[:BUFSIZE])
        if size == 0:
            raise EOFError(f"{len(view)} bytes are missing")
        view = view[size:]
    return memory


def send_files(host: str, port: str) -> None:
    """Make one transfer for each line of standard input; the line ``quietly`` omits progress."""
    family, where = family_of(host)
    names, files = real_files()
    digest = hashlib.sha256(files)
    report(files=names, bytes=len(files), sha256=digest.hexdigest())
    for line in sys.stdin:
        started = time.perf_counter()
        connection = socket.socket(family, socket.SOCK_STREAM)
        with connection:
            connection.connect((where, int(port)))
            connection.sendall(HEADER.pack(len(files), digest.digest()))
            for sent in send_in_blocks(connection, files):
                if line != "quietly\n" and sent % (32 * BUFSIZE) == 0:
                    report(sent=sent)
            receive_line(connection, RECEIVED)
            seconds = time.perf_counter() - started
            receipt = receive_to_the_end(connection)
            report(seconds=seconds, us=connection.getsockname(), **json.loads(receipt))


def send_in_blocks(connection: socket.socket, data: bytes) -> Iterator[int]:
    """Send ``data``, BUFSIZE bytes at a time; yield the number of bytes sent so far."""
    view = memoryview(data)
    for start in range(0, len(data), BUFSIZE):
        connection.sendall(view[start : start + BUFSIZE])
        yield start + BUFSIZE


def receive_to_the_end(connection: socket.socket) -> bytes:
    """Return all data until the peer closes."""
    return b"".join(iter(lambda: connection.recv(BUFSIZE), b""))


def receive_line(connection: socket.socket, expected: bytes) -> None:
    """Read exactly ``expected``."""
    line = bytes(receive(connection, bytearray(len(expected))))
    if line != expected:
        raise ValueError(f"expected {expected!r}, got {line!r}")


def real_files() -> tuple[int, bytes]:
    """Return the number of different files, and their bytes, repeated to at least PAYLOAD.

    The files are the interpreter and the standard library's sources.
    """
    library = Path(os.__file__).parent
    different, total = [], 0
    sources = [*sorted(library.glob("*.py")), *sorted(library.glob("*/*.py"))]
    for path in [Path(sys.executable), *sources]:
        if total < SOURCES and path.is_file():
            different.append(path.read_bytes())
            total += len(different[-1])
    once = b"".join(different)
    return len(different), once * -(-PAYLOAD // len(once))


def accept_clients(port: str) -> None:
    """Serve for ever: accept every client, and report its address."""
    server = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    server.bind((socket.VMADDR_CID_ANY, int(port)))
    server.listen(5)
    report(ready=server.getsockname())
    while True:
        connection, client = server.accept()
        report(client=client)
        connection.close()


def try_to_connect(cid: str, port: str) -> None:
    """Connect to ``cid:port`` and report the errno, or 0."""
    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as client:
        report(errno=client.connect_ex((int(cid), int(port))))


# Chapter 4: datagrams


def report_sources(port: str) -> None:
    """Serve for ever: reply to each datagram with its source address."""
    server = socket.socket(socket.AF_VSOCK, socket.SOCK_DGRAM)
    server.bind((socket.VMADDR_CID_ANY, int(port)))
    report(ready=server.getsockname())
    while True:
        question, client = server.recvfrom(BUFSIZE)
        answer = {"question": question.decode(), "source": client}
        server.sendto(json.dumps(answer).encode(), client)


def ask_for_source(cid: str, port: str) -> None:
    """Ask :func:`report_sources` once, with a text that claims another source."""
    with socket.socket(socket.AF_VSOCK, socket.SOCK_DGRAM) as client:
        client.sendto(b"this is 99:99 speaking: who am I?", (int(cid), int(port)))
        answer, service = client.recvfrom(BUFSIZE)
        report(us=client.getsockname(), service=service, answer=json.loads(answer))


ROLES = {
    role.__name__: role
    for role in (
        receive_files,
        send_files,
        accept_clients,
        try_to_connect,
        report_sources,
        ask_for_source,
    )
}

if __name__ == "__main__":
    ROLES[sys.argv[1]](*sys.argv[2:])
