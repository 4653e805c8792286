"""A client in a guest: it asks a service of the host for its own address."""

import socket

import vsockets

with vsockets.socket(type=socket.SOCK_DGRAM) as client:
    client.sendto(b"who am I?", (vsockets.VMADDR_CID_HOST, 5001))
    answer, source = client.recvfrom(4096)
    print(answer.decode())
