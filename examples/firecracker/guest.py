"""The guest's half: an agent that reports to the host when it is ready."""

import socket
import time


def report(text: bytes) -> None:
    """Send a line to port 52 of the host; wait until the host listens."""
    while True:
        with socket.socket(socket.AF_VSOCK) as sock:
            try:
                sock.connect((socket.VMADDR_CID_HOST, 52))
            except ConnectionResetError:  # no listener yet
                time.sleep(0.1)
                continue
            sock.sendall(text)
            return


with socket.socket(socket.AF_VSOCK) as server:
    server.bind((socket.VMADDR_CID_ANY, 5000))
    server.listen()
    report(b"ready\n")
    connection, _ = server.accept()
    with connection:
        if connection.makefile().readline() == "ping\n":
            connection.sendall(b"pong\n")
