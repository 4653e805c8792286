"""The agent and its host as they are often written: each class has one mistake.

``docs/test-your-agent.md`` has the complaints that these have led to.
"""

import os
import select
import socket
import time

from agent import REQUESTS, Agent
from host import Client, Inbox, Setup

# In the guest


class WaitsForOrders(Agent):
    """Waits for its host without a limit: a connection that falls silent is never given up."""

    def deliver(self, sock):
        self.begin(sock.makefile())
        sock.sendall(f"{self.name} 0 \n".encode())
        sock.settimeout(None)
        while sock.recv(4096):
            pass


class TrustsSend(Agent):
    """Counts a report as delivered when send() has succeeded."""

    def deliver(self, sock):
        self.begin(sock.makefile())
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.waiting)
                text = self.waiting.popleft()
            self.number += 1
            sock.sendall(f"{self.name} {self.number} {text}\n".encode())


class EndsReportsByShutdown(Agent):
    """Ends a report by a half-close, which does not reach the host."""

    def deliver(self, sock):
        self.begin(sock.makefile())
        with self.changed:
            self.changed.wait_for(lambda: self.waiting)
            text = self.waiting[0]
        sock.sendall(f"{self.name} {self.number + 1} {text}".encode())
        sock.shutdown(socket.SHUT_WR)
        if not sock.recv(100):
            raise ConnectionError("not acknowledged")


class ConnectsOnce(Agent):
    """Gives up when its host does not listen yet."""

    def run(self):
        try:
            with self.open_socket() as sock:
                sock.connect((self.host_cid, self.reports))
                self.deliver(sock)
        except OSError:
            self.failures += 1


class HostIsTwo(Agent):
    """Takes CID 2 for its host everywhere."""

    def start(self):
        self.host_cid = socket.VMADDR_CID_HOST
        return super().start()


class ResetMeansRestored(Agent):
    """Takes a reset for the sign that it is a restored copy."""

    def on_lost(self, error):
        if self.life is not None:
            self.renew()


class KeepsItsName(Agent):
    """Has one name for ever, and so have all copies of it."""

    def renew(self):
        pass


class OwnClock(Agent):
    """Takes its own clock for the time."""

    def now(self):
        return time.time()


class ListensForEach(Agent):
    """Opens its listener again for each client."""

    def serve(self):
        while True:
            try:
                with self.open_socket() as listener:
                    listener.bind((socket.VMADDR_CID_ANY, REQUESTS))
                    listener.listen(1)
                    self.listening = True
                    sock, _ = listener.accept()
                self.answer(sock)
            except OSError:
                return


class RunsRepetitions(Agent):
    """Runs a request each time that it arrives."""

    def reply(self, identifier, request):
        with self.changed:
            self.seen += 1
            return self.do(*request.split())


# On the host


class AsksOnce(Client):
    """Passes the first failure on."""

    def retry(self, attempt, seconds):
        try:
            return attempt()
        except OSError:
            self.failures += 1
            raise


class WaitsForReply(Client):
    """Has no limit for OK and for replies."""

    timeout = None


class SubtractsTimeout(Client):
    """Makes only attempts that can end in time, which may be none."""

    dial_timeout = 30.0

    def retry(self, attempt, seconds):
        end = time.monotonic() + seconds
        while time.monotonic() + self.dial_timeout < end:
            try:
                return attempt()
            except OSError:
                time.sleep(0.02)
        raise TimeoutError("cannot connect to the agent")


class OkIsReady(Client):
    """Takes OK for a sign of the agent."""

    def is_up(self):
        try:
            self.open_socket().close()
        except OSError:
            return False
        return True


class FileIsUp(Client):
    """Takes the file of the unix socket for a sign of the machine."""

    def is_up(self):
        return os.path.exists(self.path)


class BuffersOk(Client):
    """Reads the OK line through a buffer, which takes the agent's first bytes, too."""

    def read_ok(self, sock):
        if not sock.makefile().readline().startswith("OK "):
            raise ConnectionError("not OK")


class WritesPieces(Client):
    """Writes the CONNECT line in pieces, and is slow."""

    def send_connect(self, sock):
        sock.sendall(b"CONNECT ")
        select.select([sock], [], [], 1)
        sock.sendall(f"{self.port}\n".encode())


class EndsRequestsByShutdown(Client):
    """Ends a request by a half-close, which takes the reply with it."""

    def send(self, session, identifier, request):
        super().send(session, identifier, request)
        session.sock.shutdown(socket.SHUT_WR)


class KnowsByCid(Setup):
    """Remembers machines by their CIDs, which are used again."""

    def key(self, client, cid):
        return cid


class ServesInTurn(Inbox):
    """Accepts a connection when the one before has ended."""

    def accept(self):
        while True:
            try:
                self.serve(*self.listener.accept())
            except OSError:
                return


class AnyIsReady(Inbox):
    """Takes a report for the one of the machine that it waits for."""

    def is_ready(self, cid):
        return bool(self.reports)
