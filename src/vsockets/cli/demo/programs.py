"""The programs of ``vsock demo``.

Each is an ordinary socket program, as the guide's chapters 3 and 4 have them, and knows nothing
of this package: the standard library's ``socket`` is all there is.  It runs in a process of its
own, as ``python programs.py ROLE ARGUMENT...``, and says what happens in lines of JSON.
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

#: Bytes to send at least, and to read from different files at most.
PAYLOAD, SOURCES = 64_000_000, 32_000_000

#: What goes before the files: how many bytes they are, and their SHA-256 digest.
HEADER = struct.Struct("!Q32s")
RECEIVED = b"received\n"

Address = tuple[Any, int]


def say(**facts: Any) -> None:
    """One line of JSON to whoever started us."""
    print(json.dumps(facts), flush=True)


def family_of(host: str) -> tuple[int, Any]:
    """The address family, and the host as that family writes it."""
    if "." in host:
        return socket.AF_INET, host
    return socket.AF_VSOCK, int(host)


# Chapter 3: streams


def receive_files(host: str, port: str) -> None:
    """The service: take files, check their digest, answer with a receipt; for ever."""
    family, where = family_of(host)
    server = socket.socket(family, socket.SOCK_STREAM)
    server.bind((where, int(port)))
    server.listen(5)
    say(ready=server.getsockname())
    memory = bytearray()
    while True:
        connection, client = server.accept()
        with connection:
            size, announced = HEADER.unpack(receive(connection, bytearray(HEADER.size)))
            if len(memory) != size:
                memory = bytearray(size)
            receive(connection, memory)
            connection.send(RECEIVED)  # the client's clock stops here: digests take their time
            digest = hashlib.sha256(memory)
            receipt = {
                "bytes": size,
                "sha256": digest.hexdigest(),
                "intact": digest.digest() == announced,
                "client": client,
            }
            connection.sendall(json.dumps(receipt).encode())


def receive(connection: socket.socket, memory: bytearray) -> bytearray:
    """Fill ``memory``; EOFError when the peer ends before."""
    view = memoryview(memory)
    while view:
        size = connection.recv_into(view[:BUFSIZE])
        if size == 0:
            raise EOFError(f"{len(view)} bytes are missing")
        view = view[size:]
    return memory


def send_files(host: str, port: str) -> None:
    """The client: one transfer for each line of standard input, ``quietly`` or not."""
    family, where = family_of(host)
    names, files = real_files()
    digest = hashlib.sha256(files)
    say(files=names, bytes=len(files), sha256=digest.hexdigest())
    for line in sys.stdin:
        started = time.perf_counter()
        connection = socket.socket(family, socket.SOCK_STREAM)
        with connection:
            connection.connect((where, int(port)))
            connection.sendall(HEADER.pack(len(files), digest.digest()))
            for sent in send_in_blocks(connection, files):
                if line != "quietly\n" and sent % (32 * BUFSIZE) == 0:
                    say(sent=sent)
            receive_line(connection, RECEIVED)
            seconds = time.perf_counter() - started
            receipt = receive_to_the_end(connection)
            say(seconds=seconds, us=connection.getsockname(), **json.loads(receipt))


def send_in_blocks(connection: socket.socket, data: bytes) -> Iterator[int]:
    """Send ``data``, BUFSIZE bytes at a time; after each, how many it were so far."""
    view = memoryview(data)
    for start in range(0, len(data), BUFSIZE):
        connection.sendall(view[start : start + BUFSIZE])
        yield start + BUFSIZE


def receive_to_the_end(connection: socket.socket) -> bytes:
    """Everything until the peer closes."""
    return b"".join(iter(lambda: connection.recv(BUFSIZE), b""))


def receive_line(connection: socket.socket, expected: bytes) -> None:
    """Read exactly ``expected``."""
    line = bytes(receive(connection, bytearray(len(expected))))
    if line != expected:
        raise ValueError(f"expected {expected!r}, got {line!r}")


def real_files() -> tuple[int, bytes]:
    """The standard library's sources and the interpreter, repeated until there is enough.

    Returns the number of different files, and their bytes.
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


def accept_anybody(port: str) -> None:
    """A listener that takes note of who comes; for ever."""
    server = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    server.bind((socket.VMADDR_CID_ANY, int(port)))
    server.listen(5)
    say(ready=server.getsockname())
    while True:
        connection, client = server.accept()
        say(client=client)
        connection.close()


def try_to_connect(cid: str, port: str) -> None:
    """Say with which errno connecting to ``cid:port`` ends, 0 if it works."""
    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as client:
        say(errno=client.connect_ex((int(cid), int(port))))


# Chapter 4: datagrams


def tell_sources(port: str) -> None:
    """The service: tell everybody who asks which source address the question had; for ever."""
    server = socket.socket(socket.AF_VSOCK, socket.SOCK_DGRAM)
    server.bind((socket.VMADDR_CID_ANY, int(port)))
    say(ready=server.getsockname())
    while True:
        question, client = server.recvfrom(BUFSIZE)
        answer = {"question": question.decode(), "source": client}
        server.sendto(json.dumps(answer).encode(), client)


def ask_for_source(cid: str, port: str) -> None:
    """Ask that service once; the question claims to come from somebody else."""
    with socket.socket(socket.AF_VSOCK, socket.SOCK_DGRAM) as client:
        client.sendto(b"this is 99:99 speaking: who am I?", (int(cid), int(port)))
        answer, service = client.recvfrom(BUFSIZE)
        say(us=client.getsockname(), service=service, answer=json.loads(answer))


ROLES = {
    role.__name__: role
    for role in (
        receive_files,
        send_files,
        accept_anybody,
        try_to_connect,
        tell_sources,
        ask_for_source,
    )
}

if __name__ == "__main__":
    ROLES[sys.argv[1]](*sys.argv[2:])
