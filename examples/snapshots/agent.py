"""An agent for a machine that is paused, snapshotted, restored and cloned while it works.

It answers requests at port 5000, and delivers reports to port 52 of its host: each at least once,
in order, with a number by which the host recognises repetitions.
"""

import collections
import itertools
import socket
import socketserver
import threading
import time

REPORTS, REQUESTS = 52, 5000
#: Seconds without an acknowledgement after which a connection counts as lost.
SILENCE = 0.5


class Reporter(threading.Thread):
    """Delivery of reports: what is not acknowledged is sent again, on a new connection."""

    def __init__(self):
        super().__init__(daemon=True)
        self.numbers = itertools.count(1)
        self.waiting = collections.deque()
        self.changed = threading.Condition()

    def report(self, text):
        """Queue a report."""
        with self.changed:
            self.waiting.append((next(self.numbers), text))
            self.changed.notify()

    def run(self):
        while True:
            try:
                with socket.socket(socket.AF_VSOCK) as sock:
                    sock.settimeout(SILENCE)
                    sock.connect((socket.VMADDR_CID_HOST, REPORTS))
                    self.deliver(sock)
            except OSError:  # no listener yet, reset, silent, closed: all the same
                time.sleep(0.05)

    def deliver(self, sock):
        """Send reports, or an empty one: only a sender notices a silent reset."""
        acknowledgements = sock.makefile()
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.waiting, timeout=SILENCE)
                number, text = self.waiting[0] if self.waiting else (0, "")
            sock.sendall(f"{number} {text}\n".encode())
            # That sendall() has succeeded means nothing: the bytes may be lost with the device.
            if acknowledgements.readline() != f"{number}\n":
                raise ConnectionError("not acknowledged")
            if number:
                with self.changed:
                    self.waiting.popleft()


class Requests(socketserver.ThreadingTCPServer):
    """The listener, which stays open: it outlives every restore."""

    address_family = socket.AF_VSOCK
    daemon_threads = True
    request_queue_size = 128

    def server_bind(self):
        self.socket.bind(self.server_address)


class Request(socketserver.StreamRequestHandler):
    def handle(self):
        try:
            self.wfile.write(b"hello\n")  # OK came from the device, this comes from the agent
            for line in self.rfile:
                word, _, rest = line.decode().strip().partition(" ")
                if word == "report":
                    for number in range(int(rest)):
                        reporter.report(f"report {number}")
                self.wfile.write(b"done\n")
        except OSError:
            pass  # the host connects again


reporter = Reporter()
reporter.start()
with Requests((socket.VMADDR_CID_ANY, REQUESTS), Request) as server:
    server.serve_forever()
