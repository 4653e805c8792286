"""An enclave that signs for its parent, with a key that it gets through the parent's proxy."""

import hashlib
import hmac
import socket

PARENT = 3  #: the parent's CID, seen from every enclave
PROXY, SERVICE = 8000, 5000


def fetch_key() -> bytes:
    """Return the key that the key service gives to this enclave."""
    with socket.socket(socket.AF_VSOCK) as sock:
        sock.connect((PARENT, PROXY))
        sock.sendall(b"key\n")
        return sock.makefile("rb").readline().strip()


with socket.socket(socket.AF_VSOCK) as server:
    server.bind((socket.VMADDR_CID_ANY, SERVICE))
    server.listen()
    while True:
        connection, (cid, _) = server.accept()
        with connection:
            if cid == PARENT:
                text = connection.makefile("rb").readline()
                signature = hmac.digest(fetch_key(), text.strip(), hashlib.sha256)
                connection.sendall(signature.hex().encode() + b"\n")
