"""Start a guest, and wait until it notifies that it is ready: await_ready.py PORT COMMAND…"""

import os
import selectors
import socket
import subprocess
import sys

port = int(sys.argv[1])
kinds = socket.SOCK_DGRAM, socket.SOCK_SEQPACKET  # systemd tries these in turn
with selectors.DefaultSelector() as selector:
    for kind in kinds:
        sock = socket.socket(socket.AF_VSOCK, kind)
        sock.bind((socket.VMADDR_CID_ANY, port))
        if kind == socket.SOCK_SEQPACKET:
            sock.listen()
        selector.register(sock, selectors.EVENT_READ)
    environment = {**os.environ, "NOTIFY_SOCKET": f"vsock:{socket.VMADDR_CID_HOST}:{port}"}
    guest = subprocess.Popen(sys.argv[2:], env=environment)
    ended = os.pidfd_open(guest.pid)
    selector.register(ended, selectors.EVENT_READ)
    ready = False
    while not ready:
        events = selector.select(timeout=60)
        if not events:
            sys.exit("no guest was ready in time")
        for key, _ in events:
            if key.fd == ended:
                if guest.wait() != 0:
                    sys.exit(f"the command ended with status {guest.returncode}, and was not ready")
                selector.unregister(ended)  # it may have notified just before
                continue
            sock = key.fileobj
            if sock.type == socket.SOCK_SEQPACKET:
                sock, (cid, _) = sock.accept()
                data = sock.recv(4096)
            else:
                data, (cid, _) = sock.recvfrom(4096)
            ready = b"READY=1" in data.split(b"\n")
print(f"guest {cid} is ready", flush=True)
