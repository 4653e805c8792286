"""An agent in a guest: it answers each line with a line, and serves the host alone."""

import socket
import socketserver
import sys


class Agent(socketserver.StreamRequestHandler):
    """One connection."""

    def handle(self) -> None:
        if self.client_address[0] != socket.VMADDR_CID_HOST:
            return
        for line in self.rfile:
            self.wfile.write(f"{self.answer(line.decode().split())}\n".encode())

    def answer(self, words: list[str]) -> str:
        """Return the reply to a request."""
        match words:
            case ["ping"]:
                return f"pong from context {self.request.getsockname()[0]}"
            case ["add", *numbers]:
                return str(sum(map(int, numbers)))
            case _:
                return "unknown request"


class Server(socketserver.ThreadingTCPServer):
    """The standard library's server, on vSockets."""

    address_family = socket.AF_VSOCK
    daemon_threads = True


if __name__ == "__main__":
    port = int(sys.argv[1]) if sys.argv[1:] else 5000
    with Server((socket.VMADDR_CID_ANY, port), Agent) as server:
        print("ready", flush=True)
        server.serve_forever()
