"""A host service over datagrams: the guide's chapter 4."""

import socket

import vsockets

with vsockets.socket(type=socket.SOCK_DGRAM) as server:
    server.bind((vsockets.VMADDR_CID_ANY, 5001))
    print("listening on", server.getsockname(), flush=True)
    question, source = server.recvfrom(4096)
    server.sendto(b"you are context %d, port %d" % source, source)
