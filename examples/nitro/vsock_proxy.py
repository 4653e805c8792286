"""A proxy of the parent from vSockets to TCP, with an allow list, as AWS's vsock-proxy.

Its list has lines such as ``- {address: kms.eu-west-1.amazonaws.com, port: 443}``.
"""

import argparse
import contextlib
import re
import socket
import threading
from pathlib import Path

ENTRY = re.compile(r"^\s*-\s*\{\s*address:\s*(\S+?)\s*,\s*port:\s*(\d+)\s*\}", re.MULTILINE)


def pump(source: socket.socket, sink: socket.socket) -> None:
    """Copy until the end of the stream, and pass the end on."""
    try:
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
    except OSError:  # one of both is broken: end the other direction, too
        for sock in (source, sink):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


def serve(client: socket.socket, address: str, port: int) -> None:
    """Join one client with the service."""
    with client, socket.create_connection((address, port)) as service:
        there = threading.Thread(target=pump, args=(client, service))
        there.start()
        pump(service, client)
        there.join()


def main() -> None:
    """Read the command line, which is AWS's, and serve."""
    parser = argparse.ArgumentParser()
    parser.add_argument("local_port", type=int)
    parser.add_argument("remote_host")
    parser.add_argument("remote_port", type=int)
    parser.add_argument("--config", type=Path, required=True)
    options = parser.parse_args()
    allowed = [(host, int(port)) for host, port in ENTRY.findall(options.config.read_text())]
    remote = options.remote_host, options.remote_port
    if remote not in allowed:
        parser.exit(1, "the allow list has no {}:{}\n".format(*remote))
    with socket.socket(socket.AF_VSOCK) as server:
        server.bind((socket.VMADDR_CID_ANY, options.local_port))
        server.listen()
        while True:
            client, _ = server.accept()
            threading.Thread(target=serve, args=(client, *remote), daemon=True).start()


if __name__ == "__main__":
    main()
