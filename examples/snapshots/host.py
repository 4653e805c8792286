"""The host's half, for machines whose vsock is a unix socket."""

import contextlib
import os
import socket
import threading
import time

#: Seconds for a machine's answer; then the attempt counts as failed.
PATIENCE = 0.5


def connect(path, port, seconds=20.0):
    """Connect to an agent, and try again for ``seconds``: it may be booting, paused or restored.

    Raises OSError, that of the last attempt.
    """
    end = time.monotonic() + seconds
    while True:
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.settimeout(PATIENCE)
            sock.connect(path)
            sock.sendall(f"CONNECT {port}\n".encode())  # in one write
            expect(sock, b"OK ")
            expect(sock, b"hello")  # OK alone does not mean that the agent has the connection
            return sock
        except OSError:
            sock.close()
            if time.monotonic() > end:
                raise
            time.sleep(0.02)


def expect(sock, start):
    """Read a line that begins with ``start``, and no byte beyond it: what follows is the agent's.

    Raises ConnectionError if another line comes, or none.
    """
    line = b""
    while not line.endswith(b"\n"):
        byte = sock.recv(1)
        if not byte:
            raise ConnectionError(f"closed after {line!r}")
        line += byte
    if not line.startswith(start):
        raise ConnectionError(f"unexpected {line!r}")


class Inbox:
    """Reports of one machine.  Its path tells which: all machines use the same port."""

    def __init__(self, path):
        self.reports = []
        self.last = 0
        self.changed = threading.Condition()
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(f"{path}_52")  # before the agent starts
        self.listener.listen()
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            sock, _ = self.listener.accept()
            # An old connection may be half open: it must not keep a new one waiting.
            threading.Thread(target=self.serve, args=(sock,), daemon=True).start()

    def serve(self, sock):
        with sock, contextlib.suppress(OSError):
            for line in sock.makefile():
                if not line.endswith("\n"):
                    break  # the connection has ended within a line
                number, _, text = line.rstrip("\n").partition(" ")
                with self.changed:
                    if int(number) > self.last:  # otherwise a repetition
                        self.last = int(number)
                        self.reports.append(text)
                        self.changed.notify_all()
                sock.sendall(f"{number}\n".encode())

    def wait(self, count, seconds=20.0):
        """Wait for ``count`` reports; return those that have come."""
        with self.changed:
            self.changed.wait_for(lambda: len(self.reports) >= count, seconds)
            return list(self.reports)


if __name__ == "__main__":
    path = os.environ["VSOCKETS_PLAYED_SOCKET"]
    inbox = Inbox(path)
    with connect(path, 5000) as agent:
        agent.sendall(b"report 3\n")
        expect(agent, b"done")
    for report in inbox.wait(3):
        print(report)
