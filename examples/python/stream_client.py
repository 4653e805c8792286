"""A client in a guest: it connects to a service of the host."""

import socket

import vsockets

with vsockets.create_connection((vsockets.VMADDR_CID_HOST, 5000)) as connection:
    connection.sendall(b"hello from context %d\n" % vsockets.VMCISock_GetLocalCID())
    connection.shutdown(socket.SHUT_WR)
    print(connection.makefile().read(), end="")
