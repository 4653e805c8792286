"""Machines of played hypervisors, from Python: both directions, life, and faults."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import shutil
import socket
import struct
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import PIPE

import pytest

import vsockets
from vsockets.testing import PlayedFailed, PlayedMachine, PrivateFabric, wait_until

PATIENCE = 20.0

#: Echoes what each client sends, one client after the other.
ECHO = """
import socket
server = socket.socket(socket.AF_VSOCK)
server.bind((socket.VMADDR_CID_ANY, 55))
server.listen()
while True:
    with server.accept()[0] as client:
        while data := client.recv(65536):
            client.sendall(data)
"""

HYBRID = ("firecracker", "cloud-hypervisor", "kata")


def serve(machine: PlayedMachine, port: int) -> vsockets.socket:
    """Listen in the guest."""
    server = vsockets.create_server((vsockets.VMADDR_CID_ANY, port), context=machine.context)
    server.settimeout(PATIENCE)
    return server


def listen(machine: PlayedMachine, port: int) -> socket.socket:
    """Listen on the host, where the guest's connects to ``port`` arrive."""
    server = socket.socket(socket.AF_UNIX)
    server.bind(machine.port_path(port))
    server.listen()
    server.settimeout(PATIENCE)
    return server


def call(machine: PlayedMachine, port: int) -> vsockets.socket:
    """Connect from the guest to the host."""
    address = machine.host_cid, port
    return vsockets.create_connection(address, timeout=PATIENCE, context=machine.context)


def ask(machine: PlayedMachine, *pieces: bytes) -> socket.socket:
    """Connect to the machine's unix socket, and send ``pieces``, each by itself."""
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(PATIENCE)
    sock.connect(machine.socket)
    for piece in pieces:
        sock.sendall(piece)
    return sock


def joined(machine: PlayedMachine, port: int) -> tuple[socket.socket, vsockets.socket]:
    """Return both ends of a new connection from the host to the guest."""
    with serve(machine, port) as server:
        host = machine.connect(port)
        guest, _ = server.accept()
    guest.settimeout(PATIENCE)
    return host, guest


def take(sock: socket.socket, size: int) -> bytes:
    """Return the next ``size`` bytes, or fewer before the end of the stream."""
    data = b""
    while len(data) < size and (piece := sock.recv(size - len(data))):
        data += piece
    return data


def ended(sock: socket.socket) -> str:
    """Return how the stream of ``sock`` has ended."""
    try:
        return "end" if sock.recv(1) == b"" else "data"
    except ConnectionResetError:
        return "reset"


def is_quiet(sock: socket.socket) -> bool:
    """Return whether ``sock`` has neither data nor its end now."""
    sock.setblocking(False)
    try:
        sock.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return True
    finally:
        sock.settimeout(PATIENCE)
    return False


@pytest.fixture(params=HYBRID, scope="module")
def machine(fabric: PrivateFabric, request: pytest.FixtureRequest) -> PlayedMachine:
    return fabric.played(request.param)


class TestHybrid:
    def test_the_host_connects_by_a_line(self, machine: PlayedMachine) -> None:
        with serve(machine, 52) as server, ask(machine, b"connect 52\nhello") as host:
            guest, peer = server.accept()
            with guest:
                assert take(guest, 5) == b"hello"
                assert host.recv(64) == b"OK %d\n" % peer[1]
                assert peer[0] == 2
                assert peer[1] >= 1 << 30
                guest.sendall(b"world")
                assert take(host, 5) == b"world"

    @pytest.mark.parametrize("line", [b"CONNECT 53\n", b"CONNECT x\n", b"HELLO 52\n", b"A" * 40])
    def test_a_port_without_listener_and_an_invalid_line_end_it(
        self, machine: PlayedMachine, line: bytes
    ) -> None:
        with ask(machine, line) as host:
            assert ended(host) in ("end", "reset")

    def test_the_guest_connects_to_a_unix_socket(self, machine: PlayedMachine) -> None:
        with pytest.raises(ConnectionResetError):
            call(machine, 54)
        with listen(machine, 54) as server, call(machine, 54) as guest:
            host, _ = server.accept()
            with host:
                guest.sendall(b"up")
                assert take(host, 2) == b"up"
                host.sendall(b"down")
                assert take(guest, 4) == b"down"
                host.close()
                assert ended(guest) == "end"

    def test_a_program_echoes_a_megabyte(self, machine: PlayedMachine) -> None:
        machine.popen([sys.executable, "-c", ECHO])
        wait_until(lambda: _connects(machine, 55), "the echo server", PATIENCE)
        data = os.urandom(1 << 20)
        with machine.connect(55) as host, ThreadPoolExecutor(1) as pool:
            sending = pool.submit(host.sendall, data)
            assert take(host, len(data)) == data
            sending.result()

    def test_many_connects(self, machine: PlayedMachine) -> None:
        with serve(machine, 56) as server:
            for number in range(200):
                with machine.connect(56) as host:
                    guest, _ = server.accept()
                    with guest:
                        guest.settimeout(PATIENCE)
                        host.sendall(b"%d" % number)
                        assert guest.recv(9) == b"%d" % number


def _connects(machine: PlayedMachine, port: int) -> bool:
    try:
        machine.connect(port).close()
    except ConnectionError:
        return False
    return True


def test_kata_has_an_agent_behind_a_url(fabric: PrivateFabric) -> None:
    machine = fabric.played("kata")
    assert machine.agent == f"hvsock://{machine.socket}:1024"
    host, guest = joined(machine, 1024)
    host.close()
    guest.close()


def test_a_line_in_pieces(fabric: PrivateFabric) -> None:
    """Firecracker reads the line at once or not at all; Cloud Hypervisor waits for the rest."""
    firecracker, cloud = fabric.played("firecracker"), fabric.played("cloud-hypervisor")
    with ask(firecracker, b"CONN") as host:
        assert ended(host) in ("end", "reset")
    with serve(cloud, 57) as server, ask(cloud, b"CONN") as host:
        wait_until(lambda: cloud.state == "running", "the device", PATIENCE)
        host.sendall(b"ECT 57\n")
        server.accept()[0].close()
        assert take(host, 3) == b"OK "


@pytest.mark.parametrize(
    ("hypervisor", "answered"),
    [("firecracker", False), ("cloud-hypervisor@52", False), ("cloud-hypervisor", True)],
)
def test_half_close_of_the_host(fabric: PrivateFabric, hypervisor: str, answered: bool) -> None:
    host, guest = joined(fabric.played(hypervisor), 58)
    with host, guest:
        host.sendall(b"request")
        host.shutdown(socket.SHUT_WR)
        assert take(guest, 7) == b"request"
        assert guest.recv(1) == b""
        if answered:
            guest.sendall(b"answer")
            assert take(host, 6) == b"answer"
        else:
            assert host.recv(6) == b""
            with pytest.raises(BrokenPipeError):
                guest.sendall(b"answer")


def test_a_chosen_cid(fabric: PrivateFabric) -> None:
    for cid, hypervisor in enumerate(("firecracker", "cloud-hypervisor", "qemu", "hyperv"), 4000):
        machine = fabric.played(hypervisor, cid)
        assert machine.context.cid == machine.cid == cid
        with pytest.raises(PlayedFailed, match=f"{cid}"):
            fabric.played(hypervisor, cid)


def test_a_guest_of_hyper_v_does_not_know_its_cid(fabric: PrivateFabric) -> None:
    script = "import socket; s = socket.socket(socket.AF_VSOCK); "
    script += (
        "print(socket.VMADDR_CID_ANY, int.from_bytes(fcntl.ioctl(s, 0x7b9, bytes(4)), 'little'))"
    )
    for hypervisor, known in (("hyperv", False), ("qemu", True)):
        machine = fabric.played(hypervisor)
        command = [sys.executable, "-c", f"import fcntl; {script}"]
        any_cid, cid = fabric.run(machine.context, command, stdout=PIPE).stdout.split()
        assert int(cid) == (machine.cid if known else int(any_cid))


def test_a_machine_stays_when_vsockd_is_replaced() -> None:
    with PrivateFabric() as fabric:
        machine = fabric.played("firecracker")
        host, guest = joined(machine, 70)
        with host, guest, listen(machine, 71) as server:
            fabric.control.replace()
            host.sendall(b"x")
            assert guest.recv(1) == b"x"
            call(machine, 71).close()
            server.accept()[0].close()


def test_nitro(vsock_fabric: PrivateFabric) -> None:
    first, second = vsock_fabric.played("nitro"), vsock_fabric.played("nitro")
    assert (first.cid, second.cid, first.host.cid) == (16, 17, 3)
    host, enclave = joined(first, 5000)
    with host, enclave:
        assert enclave.getpeername()[0] == 3
    with vsockets.create_server((vsockets.VMADDR_CID_ANY, 8000), context=first.host) as server:
        call(first, 8000).close()
        server.accept()[0].close()
    with serve(second, 5000), pytest.raises(OSError) as caught:
        vsockets.create_connection((17, 5000), context=first.context)
    assert caught.value.errno == errno.EHOSTUNREACH
    with pytest.raises(ConnectionResetError):
        vsockets.create_connection((2, 8000), context=first.context)
    with pytest.raises(PlayedFailed, match="expected 4 or more"):
        vsock_fabric.played("nitro", 3)
    with pytest.raises(PlayedFailed, match="no snapshot"):
        first.snapshot()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("xen", "unknown hypervisor: 'xen'"),
        ("firecracker@x", "invalid version: 'x'"),
        ("firecracker@0.2", "unknown version of firecracker"),
    ],
)
def test_an_unknown_hypervisor(fabric: PrivateFabric, name: str, message: str) -> None:
    with pytest.raises(PlayedFailed, match=message):
        fabric.played(name)


def test_a_path_in_use(fabric: PrivateFabric, tmp_path: Path) -> None:
    (tmp_path / "v").touch()
    with pytest.raises(PlayedFailed, match=r"v: Address already in use"):
        fabric.played("firecracker", 60, socket=tmp_path / "v")
    os.unlink(tmp_path / "v")
    assert fabric.played("firecracker", 60, socket=tmp_path / "v").cid == 60


def player_of(fabric: PrivateFabric) -> int:
    """Return the ID of the process that plays the machines."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(fabric.played_api)
        option = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return int(struct.unpack("3i", option)[0])


def test_connects_are_served_after_a_lack_of_descriptors(fabric: PrivateFabric) -> None:
    machine = fabric.played("cloud-hypervisor")
    player = player_of(fabric)
    assert machine.state == "running"  # and no client of the API waits to be accepted
    folder = f"/proc/{player}/fd"
    limits = resource.prlimit(player, resource.RLIMIT_NOFILE)
    few = 1 + max(int(fd) for fd in os.listdir(folder))
    resource.prlimit(player, resource.RLIMIT_NOFILE, (few, limits[1]))
    try:
        with contextlib.ExitStack() as stack:
            for _ in range(few):
                stack.enter_context(ask(machine))
            wait_until(lambda: len(os.listdir(folder)) == few, "all descriptors", PATIENCE)
    finally:
        resource.prlimit(player, resource.RLIMIT_NOFILE, limits)
    host, guest = joined(machine, 60)
    host.close()
    guest.close()


def strikes(machine: PlayedMachine) -> int:
    """Return how often faults have struck connects of the machine's guest."""
    return sum(f"strikes: connect of machine {machine.cid} " in line for line in machine.log)


def test_a_guests_connect_waits_for_room_in_the_hosts_backlog(fabric: PrivateFabric) -> None:
    machine = fabric.played("firecracker")
    with socket.socket(socket.AF_UNIX) as server, ThreadPoolExecutor(3) as pool:
        server.bind(machine.port_path(70))
        server.listen(0)  # room for one
        server.settimeout(PATIENCE)
        machine.fault("slow", times=3, seconds=0.0)  # for its line in the log, before the connect
        guests = [pool.submit(call, machine, 70) for _ in range(3)]
        wait_until(lambda: strikes(machine) == 3, "three connects", PATIENCE)
        hosts = [server.accept()[0] for _ in guests]
        for guest, host in zip(guests, hosts, strict=True):
            guest.result(PATIENCE).close()
            host.close()


def test_a_machine_without_a_place_for_its_socket_has_ended(fabric: PrivateFabric) -> None:
    for operation in ("restore", "reboot", "replace"):
        machine = fabric.played("cloud-hypervisor")
        machine.snapshot()
        folder = Path(machine.socket).parent
        shutil.rmtree(folder)
        with pytest.raises(PlayedFailed, match="No such file or directory"):
            getattr(machine, operation)()
        assert machine.state == "killed"
        with pytest.raises(PlayedFailed, match="it is killed"):
            machine.pause()
        folder.mkdir()
        machine.reboot()
        assert machine.state == "running"
        host, guest = joined(machine, 60)
        host.close()
        guest.close()


def test_a_path_of_a_machine_with_another_cid_now(fabric: PrivateFabric) -> None:
    machine = fabric.played("kata", 300)
    machine.change_cid(301)
    assert machine.log[-1] == "machine 301 (kata): was machine 300"
    again = fabric.played("kata", 300)
    assert again.socket != machine.socket
    for one in (machine, again):
        host, guest = joined(one, 60)
        host.close()
        guest.close()


def test_clones_are_all_made_or_none(fabric: PrivateFabric, tmp_path: Path) -> None:
    machine = fabric.played("firecracker")
    machine.snapshot()
    used = {context["cid"] for context in fabric.control.contexts()}
    free = [cid for cid in range(3, 1000) if cid not in used][:3]
    folder = fabric.folder.parent / f"machine-{free[2]}"
    folder.mkdir()
    (folder / "v.sock").touch()  # of another program
    with pytest.raises(PlayedFailed, match="Address already in use"):
        machine.clone(3)
    assert {context["cid"] for context in fabric.control.contexts()} == used
    shutil.rmtree(folder)
    assert [clone.cid for clone in machine.clone(3)] == free
    assert machine.log[-1].endswith(f"cloned: machines {', '.join(map(str, free))}")


def test_guests_of_two_fabrics_may_have_the_same_cid(fabric: PrivateFabric) -> None:
    with PrivateFabric() as other:
        machines = [one.played("firecracker", 400) for one in (fabric, other)]
        for machine in machines:
            with serve(machine, 60) as server:
                host = machine.connect(60)
                guest, _ = server.accept()
                assert guest.getsockname()[0] == 400
                guest.sendall(machine.socket.encode())
                assert take(host, len(machine.socket)) == machine.socket.encode()
                host.close()
                guest.close()


def test_one_process_decides_a_guests_connects(fabric: PrivateFabric, tmp_path: Path) -> None:
    played = fabric.played("firecracker").cid
    hybrid = fabric.guest(hybrid=tmp_path / "v").cid
    for cid, code in ((played, errno.EBUSY), (hybrid, errno.EBUSY), (2, errno.EINVAL)):
        with pytest.raises(OSError) as caught:
            fabric.control.attach_played_host(cid)
        assert caught.value.errno == code


def test_connects_end_with_the_process_that_decides_them(fabric: PrivateFabric) -> None:
    guest = fabric.guest()
    for _ in range(2):
        with fabric.control.attach_played_host(guest.cid):
            pass
        wait_until(lambda: _is_refused(guest), "the end of the link", PATIENCE)


def _is_refused(guest: vsockets.Attachment) -> bool:
    try:
        vsockets.create_connection((2, 5999), timeout=0.1, context=guest)
    except OSError as error:
        return error.errno == errno.ECONNRESET
    return False
