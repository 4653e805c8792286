"""A stand-in for KMS: it gives a key to each client.  Prints its TCP port."""

import socketserver


class KeyService(socketserver.StreamRequestHandler):
    """One client."""

    def handle(self) -> None:
        if self.rfile.readline() == b"key\n":
            self.wfile.write(b"secret\n")


with socketserver.ThreadingTCPServer(("127.0.0.1", 0), KeyService) as server:
    print(server.server_address[1], flush=True)
    server.serve_forever()
