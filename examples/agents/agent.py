"""An agent for a machine that is paused, snapshotted, restored and cloned while it works.

It answers requests at port 5000: a line with an identifier, a word and more, and a line of reply.
It delivers reports to port 52 of its host: each at least once, in order, under the agent's name and
a number, by which the host recognises repetitions.
"""

import collections
import os
import secrets
import socket
import threading
import time

REPORTS, REQUESTS = 52, 5000
#: Seconds without an acknowledgement after which a connection counts as lost.
SILENCE = 0.3
#: Replies that are remembered, for requests that are repeated.
REMEMBERED = 1000


def open_vsock():
    return socket.socket(socket.AF_VSOCK)


class Agent:
    """The agent; `open_socket` lets a test run it in a thread instead of a guest."""

    def __init__(self, host_cid=socket.VMADDR_CID_HOST, open_socket=open_vsock, reports=REPORTS):
        self.host_cid = host_cid  # 3 in an enclave of Nitro
        self.open_socket = open_socket
        self.reports = reports  # port of the host
        self.running = True
        self.listening = False
        self.changed = threading.Condition()
        self.life = None  # the host's name for this life of the machine
        self.name = secrets.token_hex(8)
        self.number = 0
        self.clock_offset = 0.0
        self.waiting = collections.deque()
        self.failures = 0
        self.replies = collections.OrderedDict()
        self.total = 0
        self.setting = "-"
        self.seen = 0

    def start(self):
        """Deliver reports and answer requests, in threads."""
        for work in (self.run, self.serve):
            threading.Thread(target=work, daemon=True).start()
        return self

    def now(self):
        """Return the host's time: a restored machine's clock goes on from the snapshot."""
        return time.time() + self.clock_offset

    # Reports

    def report(self, text):
        """Queue a report."""
        with self.changed:
            self.waiting.append(text)
            self.changed.notify()

    def run(self):
        while self.running:
            try:
                with self.open_socket() as sock:
                    sock.settimeout(SILENCE)
                    sock.connect((self.host_cid, self.reports))
                    self.deliver(sock)
            except OSError as error:  # no listener yet, reset, silent, closed: all the same
                self.failures += 1
                self.on_lost(error)
                time.sleep(0.02)

    def on_lost(self, error):
        """Do nothing: the source of a snapshot sees the same reset as the restored machine."""

    def deliver(self, sock):
        """Send reports, or an empty one: only a sender notices a silent reset."""
        lines = sock.makefile()
        self.begin(lines)
        wait = 0
        while self.running:
            with self.changed:
                self.changed.wait_for(lambda: self.waiting, timeout=wait)
                number, text = (self.number + 1, self.waiting[0]) if self.waiting else (0, "")
            sock.sendall(f"{self.name} {number} {text}\n".encode())
            # That sendall() has succeeded means nothing: the bytes may be lost with the device.
            if lines.readline() != f"{number}\n":
                raise ConnectionError("not acknowledged")
            if number:
                with self.changed:
                    self.number = number
                    self.waiting.popleft()
            wait = SILENCE

    def begin(self, lines):
        """Read the host's first line: the machine's life, and the time."""
        word, life, now = lines.readline().split() or ("", "", "")
        if word != "life":
            raise ConnectionError("no greeting")
        self.clock_offset = float(now) - time.time()
        if self.life not in (None, life):
            self.renew()
        self.life = life

    def renew(self):
        """Take a new name, and count from the start: this machine is a copy of another one."""
        self.name = secrets.token_hex(8)
        self.number = 0

    # Requests

    def serve(self):
        """Listen for life, on every CID: the listener outlives restores and changes of the CID."""
        with self.open_socket() as listener:
            listener.bind((socket.VMADDR_CID_ANY, REQUESTS))
            listener.listen(128)
            self.listening = True
            while True:
                try:
                    sock, _ = listener.accept()
                except OSError:
                    return  # the machine has been rebooted
                threading.Thread(target=self.answer, args=(sock,), daemon=True).start()

    def answer(self, sock):
        with sock:
            try:
                # OK came from the device, this comes from the agent.
                sock.sendall(f"hello {self.name}\n".encode())
                for line in sock.makefile():  # a line is a request; its end is not end of stream
                    if line.endswith("\n"):
                        identifier, _, request = line.strip().partition(" ")
                        sock.sendall(f"{identifier} {self.reply(identifier, request)}\n".encode())
            except OSError:
                pass  # the host connects again

    def reply(self, identifier, request):
        """Do what `request` says once, however often the host repeats it."""
        with self.changed:
            self.seen += 1
            if identifier not in self.replies:
                self.replies[identifier] = self.do(*request.split())
                if len(self.replies) > REMEMBERED:
                    self.replies.popitem(last=False)
            return self.replies[identifier]

    def do(self, word, argument=""):
        if word == "report":
            self.waiting.extend(f"report {number}" for number in range(int(argument)))
            self.changed.notify()
        elif word == "add":
            self.total += int(argument)
            return self.total
        elif word == "set":
            self.setting = argument
        elif word == "get":
            return self.setting
        elif word == "valid":  # is a certificate valid that begins at this time?
            return "yes" if self.now() >= float(argument) else "not yet"
        return "done"


if __name__ == "__main__":
    agent = Agent(int(os.environ.get("AGENT_HOST_CID", socket.VMADDR_CID_HOST)))
    threading.Thread(target=agent.run, daemon=True).start()
    agent.serve()
