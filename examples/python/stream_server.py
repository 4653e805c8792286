"""A host service over a stream: the guide's chapter 3."""

import vsockets

with vsockets.socket(vsockets.VMCISock_GetAFValue()) as server:
    server.bind((vsockets.VMADDR_CID_ANY, 5000))
    server.listen()
    print("listening on", server.getsockname(), flush=True)
    connection, (cid, port) = server.accept()
    with connection:
        while data := connection.recv(4096):
            connection.sendall(data.upper())
    print(f"served context {cid}")
