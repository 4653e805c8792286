"""A guest program that asks the host who it is."""

import socket

import vsockets

with vsockets.socket(type=socket.SOCK_DGRAM) as client:
    client.sendto(b"who am I?", (vsockets.VMADDR_CID_HOST, 5001))
    answer, source = client.recvfrom(4096)
    print(answer.decode())
