"""Host code for a Firecracker machine: it knows the machine's unix socket, and no AF_VSOCK."""

import os
import socket
import sys


def connect(path: str, port: int) -> socket.socket:
    """Connect to a port of the guest, through the machine's unix socket.

    Raises ConnectionError if no program of the guest listens there.
    """
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(path)
    sock.sendall(f"CONNECT {port}\n".encode())
    line = b""
    while not line.endswith(b"\n"):  # byte by byte: what follows the line is the guest's
        byte = sock.recv(1)
        if not byte:
            sock.close()
            raise ConnectionError(f"port {port} of the guest has no listener")
        line += byte
    if not line.startswith(b"OK "):
        raise ConnectionError(f"malformed reply: {line!r} (expected OK PORT)")
    return sock


def listen(path: str, port: int) -> socket.socket:
    """Listen for the guest's connects to a port of its host."""
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(f"{path}_{port}")
    sock.listen()
    return sock


def main(path: str) -> None:
    """Wait until the guest reports that it is ready, then ask it."""
    with listen(path, 52) as server:
        connection, _ = server.accept()
        os.unlink(server.getsockname())
    with connection:
        print("the guest says:", connection.makefile().readline().strip())
    with connect(path, 5000) as sock:
        sock.sendall(b"ping\n")
        print("the agent replies:", sock.makefile().readline().strip())
    try:
        connect(path, 5001)
    except ConnectionError as error:
        print(error)


if __name__ == "__main__":
    main(sys.argv[1])
