"""The host's half of the agent, for machines whose vsock is a unix socket, and for AF_VSOCK."""

import collections
import itertools
import os
import secrets
import socket
import threading
import time

#: Seconds for a machine's answer; then the attempt counts as failed.
PATIENCE = 0.3


def read_line(sock):
    """Read a line, and no byte beyond it: what follows is the agent's.

    Raises ConnectionError at the end of the stream.
    """
    line = b""
    while not line.endswith(b"\n"):
        byte = sock.recv(1)
        if not byte:
            raise ConnectionError(f"closed after {line!r}")
        line += byte
    return line.decode(errors="replace").rstrip("\n")


class Session:
    """A connection on which the agent has greeted: OK alone does not mean that it is there."""

    def __init__(self, sock):
        self.sock = sock
        self.name = self.expect("hello")

    def expect(self, word):
        """Read a line that begins with `word`; return the rest."""
        found, _, rest = read_line(self.sock).partition(" ")
        if found != word:
            raise ConnectionError(f"unexpected {found!r}")
        return rest


class Client:
    """Requests to the agent of one machine, each repeated until it is answered.

    `open_socket` returns a socket that is connected to the agent; by default that is done through
    the unix socket at `path`.
    """

    timeout = PATIENCE

    def __init__(self, path=None, port=5000, open_socket=None):
        self.path, self.port = path, port
        self.open_socket = open_socket or self.dial
        self.session = None
        self.failures = 0
        self.identifiers = itertools.count(1)
        self.prefix = secrets.token_hex(4)

    def ask(self, request, seconds=20.0):
        """Return the reply; the identifier is the same in each attempt, so it is done once."""
        identifier = f"{self.prefix}-{next(self.identifiers)}"
        return self.retry(lambda: self.attempt(identifier, request), seconds)

    def retry(self, attempt, seconds):
        """Try at least once, and again for `seconds`.  Raises OSError, that of the last attempt."""
        end = time.monotonic() + seconds
        while True:
            try:
                return attempt()
            except OSError:
                self.failures += 1
                if time.monotonic() > end:
                    raise
                time.sleep(0.02)

    def attempt(self, identifier, request):
        """Send a request on the connection that is open, or on a new one."""
        try:
            if self.session is None:
                self.session = self.open_session()
            self.send(self.session, identifier, request)
            return self.session.expect(identifier)
        except OSError:
            self.close()
            raise

    def send(self, session, identifier, request):
        """Send a request, which its newline ends."""
        session.sock.sendall(f"{identifier} {request}\n".encode())

    def open_session(self):
        sock = self.open_socket()
        try:
            sock.settimeout(self.timeout)
            return Session(sock)
        except OSError:
            sock.close()
            raise

    def close(self):
        if self.session is not None:
            self.session.sock.close()
            self.session = None

    def dial(self):
        """Connect through the unix socket."""
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.settimeout(self.timeout)
            sock.connect(self.path)
            self.handshake(sock)
        except OSError:
            sock.close()
            raise
        return sock

    def handshake(self, sock):
        """Send the CONNECT line in one write, and read the OK line byte by byte."""
        self.send_connect(sock)
        self.read_ok(sock)

    def send_connect(self, sock):
        sock.sendall(f"CONNECT {self.port}\n".encode())

    def read_ok(self, sock):
        if not (line := read_line(sock)).startswith("OK "):
            raise ConnectionError(f"unexpected {line!r}")

    def is_up(self):
        """Return whether the agent answers now."""
        try:
            self.open_session().sock.close()
        except OSError:
            return False
        return True


class Setup:
    """Settings of agents, each made once: an agent is known by its name, not by its address."""

    def __init__(self):
        self.done = set()

    def ensure(self, client, cid, value):
        """Set `value` at the agent that `client` reaches, unless that has been done."""
        key = self.key(client, cid)
        if key not in self.done:
            client.ask(f"set {value}")
            self.done.add(key)

    def key(self, client, cid):
        client.close()  # the name that a new connection greets with
        client.session = client.retry(client.open_session, 20)
        return client.session.name


class Inbox:
    """Reports that arrive at one listener, each with the CID that it came from (AF_VSOCK).

    With unix sockets the path tells the machine, and each machine has an inbox.
    """

    def __init__(self, listener, clock=time.time):
        self.clock = clock
        self.life = secrets.token_hex(4)
        self.connections = 0
        self.names = []  #: of the agents, in the order of their first reports
        self.reports = []  #: (CID or None, text)
        self.last = collections.Counter()
        self.changed = threading.Condition()
        self.listener = listener
        threading.Thread(target=self.accept, daemon=True).start()

    def new_life(self):
        """Note that the machine has been restored: its agent has to take a new name."""
        self.life = secrets.token_hex(4)

    def accept(self):
        while True:
            try:
                sock, peer = self.listener.accept()
            except OSError:
                return  # closed
            # An old connection may be half open: it must not keep a new one waiting.
            threading.Thread(target=self.serve, args=(sock, peer), daemon=True).start()

    def serve(self, sock, peer):
        cid = peer[0] if isinstance(peer, tuple) else None
        try:
            with sock:
                sock.sendall(f"life {self.life} {self.clock()}\n".encode())
                for count, line in enumerate(sock.makefile()):
                    if not line.endswith("\n"):
                        break  # the connection has ended within a line
                    self.connections += not count
                    sock.sendall(self.take(cid, *line.rstrip("\n").split(" ", 2)))
        except OSError:
            pass  # the agent connects again

    def take(self, cid, name, number, text):
        """Note a report unless it is a repetition; return the acknowledgement."""
        with self.changed:
            if name not in self.names:
                self.names.append(name)
            if int(number) > self.last[name]:
                self.last[name] = int(number)
                self.reports.append((cid, text))
            self.changed.notify_all()
        return f"{number}\n".encode()

    def texts(self, cid=None):
        """Return the reports that have come from a machine."""
        return [text for source, text in self.reports if cid in (None, source)]

    def is_ready(self, cid):
        """Return whether the machine with this CID has sent a report."""
        return bool(self.texts(cid))

    def wait(self, count, seconds=20.0):
        """Wait for `count` reports; return those that have come."""
        with self.changed:
            self.changed.wait_for(lambda: len(self.reports) >= count, seconds)
            return self.texts()


def listen(path, port):
    """Return a listener for the agent's reports; make it before the machine starts."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{path}_{port}")
    listener.listen(128)
    return listener


if __name__ == "__main__":
    path = os.environ["VSOCKETS_PLAYED_SOCKET"]
    inbox = Inbox(listen(path, 52))
    Client(path).ask("report 3")
    for report in inbox.wait(3):
        print(report)
