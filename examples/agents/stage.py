"""A machine with an agent in it, and the host's half beside it, for the scenarios.

``machine`` is a ``PlayedMachine``, or anything with the same methods.
"""

import itertools
import socket
import threading

import agent as agent_module
import host

import vsockets
from vsockets.testing import wait_until

#: Seconds for what has to happen, however loaded the machine is.
PATIENCE = 20


#: Ports for reports to a host whose ports are the same for all machines.
_PORTS = itertools.count(10_000)


class Failed(AssertionError):
    """An agent or a host that does not come through a scenario."""


class Stage:
    """The parts; each but one is careful in a test of a mistake, and that test is impatient."""

    def __init__(
        self,
        machine,
        *,
        agent=agent_module.Agent,
        client=host.Client,
        inbox=host.Inbox,
        setup=host.Setup,
        patience=PATIENCE,
    ):
        self.machine, self.patience = machine, patience
        self.parts = {"agent": agent, "client": client, "inbox": inbox, "setup": setup}
        self.listeners = []
        self.agents = []
        self.reports = agent_module.REPORTS if machine.socket else next(_PORTS)
        self.client = client(machine.socket or None, open_socket=self.dialler())
        self.setup = setup()

    def dialler(self):
        if self.machine.socket:
            return None
        return lambda: self.machine.connect(5000)

    def beside(self, machine):
        """Return a stage with the same parts for another machine."""
        other = type(self)(machine, **self.parts, patience=self.patience)
        other.reports = self.reports
        return other

    def start(self, source=None):
        """Start the agent, with the memory of `source` if that is one.

        Here it is a thread with the guest's sockets, which starts in a millisecond.
        """
        self.agent = self.parts["agent"](
            self.machine.host_cid,
            lambda: vsockets.socket(context=self.machine.context),
            self.reports,
        )
        self.agents.append(self.agent)
        if source is not None:
            for name in ("life", "name", "number"):
                setattr(self.agent, name, getattr(source, name))
        self.agent.start()

    def boot(self):
        """Start the agent, and wait until it listens."""
        self.start()
        self.wait(lambda: self.agent.listening, "the agent's listener")

    def open_session(self):
        """Return a new connection to the agent."""
        return self.client.retry(self.client.open_session, PATIENCE)

    def listen(self):
        """Open the inbox for the agent's reports."""
        if self.machine.socket:
            listener = host.listen(self.machine.socket, self.reports)
        else:
            address = (socket.VMADDR_CID_ANY, self.reports)
            listener = vsockets.create_server(address, context=self.machine.host)
        self.listeners.append(listener)
        self.inbox = self.parts["inbox"](listener, self.machine.time)

    def report(self, text):
        """Have the agent report something, and wait until it has arrived."""
        self.agent.report(text)
        self.expect(lambda: text in self.inbox.texts(), f"the report {text!r}")

    def wait(self, condition, what):
        """Wait for what every agent does."""
        wait_until(condition, what, PATIENCE)

    def expect(self, condition, what):
        """Wait for what a careful agent does.  Raises Failed if it does not happen."""
        try:
            wait_until(condition, what, self.patience)
        except Exception as error:
            raise Failed(what) from error

    def ask(self, request):
        """Send a request, and wait for the reply in a thread.  Raises Failed without a reply."""
        replies = []

        def work():
            try:
                replies.append(self.client.ask(request, self.patience))
            except OSError as error:
                replies.append(error)

        threading.Thread(target=work, daemon=True).start()
        self.expect(lambda: replies, f"a reply to {request!r}")
        if isinstance(replies[0], OSError):
            raise Failed(f"a reply to {request!r}") from replies[0]
        return replies[0]

    def close(self):
        """End the agents and close the host's sockets."""
        for one in self.agents:
            one.running = False
        self.client.close()
        for listener in self.listeners:
            listener.close()
