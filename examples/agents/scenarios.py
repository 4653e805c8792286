"""A scenario for each complaint: what happens to the machine, and what a careful agent does then.

Each function takes a :class:`stage.Stage`, with any machine that its hypervisors have.
"""

import contextlib
import socket
import threading

from stage import Failed

#: The scenarios by name: the function, and the hypervisors that show the complaint.
SCENARIOS = {}


def scenario(*hypervisors):
    """Register a scenario, under the function's name with hyphens."""

    def register(function):
        SCENARIOS[function.__name__.replace("_", "-")] = function, hypervisors
        return function

    return register


# Before the agent is there


@scenario("firecracker", "qemu")
def host_connects_first(stage):
    """The host connects before the agent listens: end of stream instead of OK."""
    late = threading.Thread(
        target=lambda: (stage.wait(lambda: stage.client.failures, "an attempt"), stage.start())
    )
    late.start()
    try:
        stage.ask("get")
    finally:
        late.join()


@scenario("nitro", "firecracker")
def guest_connects_first(stage):
    """The agent connects before its host listens."""
    stage.start()
    stage.wait(lambda: stage.agent.failures, "a refused connect")
    stage.listen()
    stage.report("started")


@scenario("nitro")
def parent_is_three(stage):
    """Nothing listens at CID 2: the parent of an enclave is CID 3."""
    stage.listen()
    stage.start()
    stage.report("started")


@scenario("kata")
def no_attempt(stage):
    """The limit of an attempt is longer than that of all attempts: none is made."""
    stage.boot()
    stage.ask("get")


@scenario("firecracker")
def ok_without_agent(stage):
    """OK comes for a listener that has just closed."""
    stage.machine.fault("stale-ok", port=5000)
    if stage.client.is_up():
        raise Failed("no agent is up")


@scenario("firecracker")
def no_ok(stage):
    """OK never comes."""
    stage.boot()
    stage.machine.fault("no-ok", port=5000)
    stage.ask("get")


@scenario("firecracker", "cloud-hypervisor")
def first_bytes(stage):
    """The agent's first bytes arrive together with the OK line."""
    stage.boot()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(20)
        sock.connect(stage.machine.socket)
        stage.client.send_connect(sock)
        stage.wait(lambda: b"hello" in sock.recv(100, socket.MSG_PEEK), "the greeting")
        stage.client.read_ok(sock)
        sock.settimeout(0.1)
        try:
            assert sock.recv(5) == b"hello"
        except TimeoutError:
            raise Failed("the first bytes arrive") from None


@scenario("firecracker")
def line_in_pieces(stage):
    """The device does not wait for the rest of a CONNECT line."""
    stage.boot()
    stage.ask("get")


# While it works


@scenario("firecracker", "qemu")
def next_client(stage):
    """A client connects while the agent serves another one."""
    stage.boot()
    stage.ask("get")  # and the connection stays open
    with contextlib.closing(stage.beside(stage.machine)) as other:
        other.ask("get")


@scenario("firecracker", "cloud-hypervisor")
def lost_sends(stage):
    """The agent's send() succeeds, and the bytes are lost with the device."""
    stage.listen()
    stage.machine.fault("lost-writes", port=52)
    stage.start()
    stage.report("lost?")


@scenario("firecracker")
def churn(stage):
    """End of stream after some bytes, while many clients connect."""
    stage.boot()
    for seed in range(3):
        stage.machine.fault("early-eof", seed=seed, port=5000)
    stage.ask("get")


@scenario("firecracker")
def stalled(stage):
    """A connection stalls within a reply, as after a lost credit update."""
    stage.boot()
    stage.machine.fault("stall", seed=1, port=5000)
    stage.ask("get")


@scenario("firecracker", "cloud-hypervisor")
def late_reply(stage):
    """A paused machine answers late; the host repeats its request, and both arrive."""
    stage.boot()
    session = stage.open_session()
    stage.machine.pause()
    session.sock.sendall(b"7 add 1\n")
    session.sock.close()  # it waits no longer
    stage.machine.resume()
    with stage.open_session().sock as sock:
        sock.sendall(b"7 add 1\n")
        stage.wait(lambda: stage.agent.seen == 2, "both requests")
    if stage.agent.total != 1:
        raise Failed("the request is done once")


@scenario("firecracker", "cloud-hypervisor@52")
def half_close_of_the_host(stage):
    """The host shuts down its direction, and the device ends both."""
    stage.boot()
    session = stage.open_session()
    with session.sock:
        with stage.agent.changed:  # the agent is busy
            stage.client.send(session, "7", "get")
            stage.machine.describe()
        try:
            session.expect("7")
        except OSError:
            raise Failed("the reply") from None


@scenario("firecracker", "cloud-hypervisor@52")
def half_close_of_the_guest(stage):
    """The agent shuts down its direction, and the host does not see it."""
    stage.listen()
    stage.start()
    stage.report("all")


# Snapshots and restores


@scenario("cloud-hypervisor@51", "firecracker@1.9")
def silent_after_restore(stage):
    """The agent's connection to its host is dead, and says nothing."""
    stage.listen()
    stage.start()
    stage.wait(lambda: stage.inbox.connections, "the agent's connection")
    before = stage.inbox.connections
    stage.machine.snapshot()
    stage.machine.restore()
    stage.expect(lambda: stage.inbox.connections > before, "another connection")


@scenario("cloud-hypervisor@51")
def first_connect_after_restore(stage):
    """The device counts its ports from the start, and the guest still has a connection there."""
    stage.boot()
    stage.ask("get")
    stage.machine.snapshot()
    stage.machine.restore()
    stage.client.close()
    stage.ask("get")


@scenario("firecracker")
def source_of_a_snapshot(stage):
    """The source's connections die, too, and the host's pool still has one of them."""
    stage.boot()
    stage.ask("get")
    stage.machine.snapshot()
    stage.ask("get")


@scenario("firecracker")
def half_open_at_the_host(stage):
    """The host's end of the source's connection stays open, and the agent connects again."""
    stage.listen()
    stage.start()
    stage.report("before")
    stage.machine.snapshot()
    stage.report("after")


@scenario("firecracker")
def reset_without_restore(stage):
    """The source of a snapshot is reset as a restored machine is, and must keep its name."""
    stage.listen()
    stage.start()
    stage.report("before")
    stage.machine.snapshot()
    stage.report("after")
    if len(stage.inbox.names) != 1:
        raise Failed("the source keeps its name")


@scenario("firecracker", "cloud-hypervisor", "qemu")
def numbers_of_a_restored_agent(stage):
    """Memory is rolled back, and the agent's numbers with it: its host takes them for old ones.

    The test rolls the number back: a played machine keeps its memory.
    """
    stage.listen()
    stage.start()
    stage.report("one")
    stage.machine.snapshot()
    number = stage.agent.number
    stage.report("two")
    stage.machine.restore()
    stage.inbox.new_life()
    stage.agent.number = number
    stage.report("three")


@scenario("firecracker", "cloud-hypervisor", "qemu")
def names_of_clones(stage):
    """Clones have the names, keys and seeds of the snapshot.

    The test copies the name: a played clone has no memory.
    """
    stage.listen()
    stage.start()
    stage.report("source")
    stage.machine.snapshot()
    (machine,) = stage.machine.clone()
    with contextlib.closing(stage.beside(machine)) as clone:
        if machine.socket:
            clone.listen()
        else:
            clone.inbox = stage.inbox  # the host's port is one for all machines
            stage.inbox.new_life()
        clone.start(stage.agent)
        clone.report("clone")
        names = {*stage.inbox.names, *clone.inbox.names}
    if len(names) != 2:
        raise Failed("the clone has a name of its own")


@scenario("firecracker", "cloud-hypervisor@52", "qemu")
def clock_stands(stage):
    """The clock of a restored guest goes on from the snapshot: a new certificate is not yet valid.

    Here the guest's clock is right, and its host's is three days ahead.
    """
    stage.listen()
    stage.boot()
    stage.report("before")
    stage.machine.snapshot()
    stage.machine.restore(asleep=3 * 86_400)
    begins = stage.machine.time() - 1
    stage.expect(lambda: stage.ask(f"valid {begins}") == "yes", "a valid certificate")


@scenario("firecracker@1.16")
def deaf_after_pause(stage):
    """After a pause nothing reaches the guest: the host has to notice, not to wait."""
    stage.boot()
    stage.ask("get")
    stage.machine.pause()
    stage.machine.resume()
    failures = []

    def ask():
        try:
            stage.client.ask("get", 0.1)
        except OSError as error:
            failures.append(error)

    threading.Thread(target=ask, daemon=True).start()
    stage.expect(lambda: failures, "an error")


@scenario("firecracker", "kata")
def file_of_a_dead_machine(stage):
    """The unix socket's file outlives the hypervisor's process."""
    stage.boot()
    stage.ask("get")
    stage.machine.snapshot()
    stage.machine.kill()
    if stage.client.is_up():
        raise Failed("the machine is down")


# Several machines


@scenario("qemu", "firecracker")
def cid_again(stage):
    """Another machine has the CID, and the unix socket, of one that has ended."""
    stage.boot()
    stage.setup.ensure(stage.client, stage.machine.cid, "blue")
    stage.agent.running = False
    stage.machine.replace()
    stage.boot()
    stage.setup.ensure(stage.client, stage.machine.cid, "blue")
    if stage.ask("get") != "blue":
        raise Failed("the second machine is set up")


@scenario("qemu", "nitro")
def one_port_for_all(stage):
    """All machines report to one port of the host."""
    stage.listen()
    machine = stage.machine.another()
    with contextlib.closing(stage.beside(machine)) as other:
        other.inbox = stage.inbox
        other.start()
        other.report("ready")
        assert stage.inbox.is_ready(machine.cid)
    if stage.inbox.is_ready(stage.machine.cid):
        raise Failed("the other machine is not ready")
