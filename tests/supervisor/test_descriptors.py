"""Datagram and packet sockets get the lowest free numbers, and work with any number."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import vsockets
from cli.vsock import PROGRAM, Vsock
from vsockets.testing import PrivateFabric

#: The beginning of every program here.
COMMON = """
import array, errno, fcntl, os, resource, socket, subprocess, sys, threading
ANY = (0xFFFFFFFF, 0xFFFFFFFF)
DATAGRAM, PACKET = socket.SOCK_DGRAM, socket.SOCK_SEQPACKET
def datagram():
    sock = socket.socket(40, DATAGRAM)
    sock.bind(ANY)
    return sock
def address(sock): return 1, sock.getsockname()[1]
def pair():
    with socket.socket(40, PACKET) as server:
        server.bind(ANY)
        server.listen()
        client = socket.socket(40, PACKET)
        client.connect(address(server))
        return client, server.accept()[0]
def works(sock, server):
    sock.sendto(b"works", address(server))
    return server.recvfrom(10) == (b"works", (server.getsockname()[0], sock.getsockname()[1]))
def keeps_records(client, accepted):
    client.send(b"no end")
    client.send(b"end", socket.MSG_EOR)
    shown = [accepted.recvmsg(10)[::2] for _ in range(2)]
    return shown == [(b"no end", 0), (b"end", socket.MSG_EOR)]
"""


def run(vsock: Vsock, program: str, *arguments: object, **options: object) -> list[str]:
    command = [sys.executable, "-c", COMMON + program, *arguments]
    done = vsock("run", "--cid", "94", *command)
    assert done.stderr == ""
    return done.stdout.splitlines()


@pytest.mark.parametrize("kind", ["DATAGRAM", "PACKET"])
def test_socket_returns_the_lowest_free_number(vsock: Vsock, kind: str) -> None:
    program = f"""
first = socket.socket(40, {kind}).detach()
others = [socket.socket(40, {kind}).detach() for _ in range(20)]
assert others == list(range(first + 1, first + 21)), (first, others)
for free in (others[3], others[7], 0):
    os.close(free)
    assert socket.socket(40, {kind}).detach() == free
print("lowest")
"""
    assert run(vsock, program) == ["lowest"]


def test_accept_returns_the_lowest_free_number(vsock: Vsock) -> None:
    program = """
server, client = (socket.socket(40, PACKET) for _ in range(2))
server.bind(ANY)
server.listen()
client.connect(address(server))
os.close(0)
accepted = server.accept()[0]
assert accepted.fileno() == 0
assert keeps_records(client, accepted)
print("lowest")
"""
    assert run(vsock, program) == ["lowest"]


def test_a_service_manager_can_rely_on_the_lowest_number(
    vsock: Vsock, fabric: PrivateFabric
) -> None:
    if shutil.which("systemd-socket-activate") is None:
        pytest.skip("no systemd-socket-activate: apt install what .ci/run does")
    program = """
import os, socket
assert os.environ["LISTEN_FDS"] == "1"
sock = socket.socket(fileno=3)
data, source = sock.recvfrom(10)
sock.sendto(data.upper(), source)
"""
    command = ("systemd-socket-activate", "-d", "--listen=vsock:95:7200")
    running = vsock.start("run", "--cid", "95", *command, sys.executable, "-c", program)
    assert running.error_line() == "Listening on vsock:95:7200 as 3."
    with vsockets.socket(type=socket.SOCK_DGRAM, context=fabric.host) as client:
        client.settimeout(20)
        client.sendto(b"hello", (95, 7200))
        assert client.recvfrom(10) == (b"HELLO", (95, 7200))
    running.finish()


def test_a_thousand_datagram_sockets_work(vsock: Vsock) -> None:
    program = """
server = datagram()
sockets = [datagram() for _ in range(1000)]
assert sockets[-1].fileno() >= 1000
for sock in sockets: assert works(sock, server)
for sock in sockets[::-1]:
    server.sendto(b"back", address(sock))
    assert sock.recvmsg(10)[3] == server.getsockname()
print("all")
"""
    assert run(vsock, program) == ["all"]


def test_a_thousand_packet_sockets_work(vsock: Vsock) -> None:
    program = """
pairs = [pair() for _ in range(500)]
for client, accepted in pairs: assert keeps_records(client, accepted)
for client, accepted in pairs: assert keeps_records(accepted, client)
print("all")
"""
    assert run(vsock, program) == ["all"]


@pytest.mark.parametrize("limit", [16, 64, 100_000])
def test_datagram_sockets_work_at_any_descriptor_limit(vsock: Vsock, limit: int) -> None:
    if limit > int(Path("/proc/sys/fs/nr_open").read_text()):
        pytest.skip("the kernel does not allow as many")
    program = """
server = datagram()
assert works(datagram(), server)
assert keeps_records(*pair())
print("works")
"""
    script = 'ulimit -n "$1" || exit 0; exec "$2" -c "$3"'
    done = vsock("run", "sh", "-c", script, "sh", limit, sys.executable, COMMON + program)
    assert done.stdout in ("works\n", "")
    assert done.stderr == "" or "ulimit" in done.stderr


def test_datagram_sockets_work_after_the_limit_is_lowered(vsock: Vsock) -> None:
    program = """
server, sockets, pairs = datagram(), [datagram() for _ in range(50)], [pair() for _ in range(20)]
resource.setrlimit(resource.RLIMIT_NOFILE, (8, 8))
for sock in sockets: assert works(sock, server)
for client, accepted in pairs: assert keeps_records(client, accepted)
try: datagram()
except OSError as error: assert error.errno == errno.EMFILE
for sock in sockets: sock.close()
for client, accepted in pairs: client.close(), accepted.close()
assert works(datagram(), server)
print("works")
"""
    assert run(vsock, program) == ["works"]


def test_copies_of_a_descriptor_work(vsock: Vsock) -> None:
    program = """
server, sock, (client, accepted) = datagram(), datagram(), pair()
def copies(fd):
    yield os.dup(fd)
    yield os.dup2(fd, 300)
    yield os.dup2(fd, 301, inheritable=False)
    yield fcntl.fcntl(fd, fcntl.F_DUPFD, 400)
    yield fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 400)
    yield os.dup(os.dup(fd))
    yield os.dup2(fd, fd)
for fd in copies(sock.fileno()):
    copy = socket.socket(40, DATAGRAM, 0, fd)
    copy.sendto(b"copy", address(server))
    assert server.recvfrom(10) == (b"copy", sock.getsockname())
    copy.detach()
for fd in copies(accepted.fileno()):
    copy = socket.socket(40, PACKET, 0, fd)
    assert keeps_records(client, copy)
    copy.detach()
print("works")
"""
    assert run(vsock, program) == ["works"]


def test_other_files_with_a_covered_number_work(vsock: Vsock) -> None:
    program = """
sock = datagram()
number = sock.fileno()
sock.close()
with socket.socket(socket.AF_INET, DATAGRAM) as udp:
    assert udp.fileno() == number
    udp.bind(("127.0.0.1", 0))
    udp.sendto(b"udp", udp.getsockname())
    assert udp.recvfrom(10) == (b"udp", udp.getsockname())
    udp.connect(udp.getsockname())
    os.write(number, b"again")
    assert udp.recvmsg(10)[0] == b"again"
    copy = os.dup(number)
    os.write(copy, b"copy")
    assert udp.recv(10) == b"copy"
reader, writer = os.pipe()
assert reader == number
copy = os.dup(reader)
os.dup2(writer, number)
os.write(number, b"pipe")
assert os.read(copy, 10) == b"pipe"
print("works")
"""
    assert run(vsock, program) == ["works"]


def test_descriptors_work_after_fork_and_exec(vsock: Vsock) -> None:
    program = """
server, sock = datagram(), datagram()
def child():
    assert works(sock, server)
    assert works(datagram(), server)
    os._exit(0)
for _ in range(3):
    if (pid := os.fork()) == 0: child()
    assert os.waitpid(pid, 0)[1] == 0
inner = '''
import socket, sys
mine = socket.socket(40, socket.SOCK_DGRAM, 0, int(sys.argv[1]))
mine.sendto(b"inherited", (1, int(sys.argv[2])))
made = socket.socket(40, socket.SOCK_DGRAM)
made.sendto(b"made", (1, int(sys.argv[2])))
'''
command = [sys.executable, "-c", inner, str(sock.fileno()), str(address(server)[1])]
for _ in range(2):
    subprocess.run(command, pass_fds=[sock.fileno()], check=True)
    assert server.recvfrom(10) == (b"inherited", sock.getsockname())
    assert server.recvfrom(10)[0] == b"made"
subprocess.run(["sh", "-c", "for i in 1 2 3; do true & done; wait; (exit 7)"])
print("works")
"""
    assert run(vsock, program) == ["works"]


def test_descriptors_work_in_all_threads(vsock: Vsock) -> None:
    program = """
server = datagram()
early = threading.Event()
def wait_then_work():
    early.wait()
    assert works_alone()
def works_alone():
    one, other = datagram(), datagram()
    return all(works(one, other) for _ in range(20))
before = [threading.Thread(target=wait_then_work) for _ in range(10)]
for thread in before: thread.start()
socks = [datagram()]
after = [threading.Thread(target=works_alone) for _ in range(10)]
early.set()
for thread in after: thread.start()
for thread in before + after: thread.join()
received = []
def receive(): received.append(server.recvfrom(10)[0])
readers = [threading.Thread(target=receive) for _ in range(8)]
for thread in readers: thread.start()
for number in range(8): socks[0].sendto(b"%d" % number, address(server))
for thread in readers: thread.join()
print(sorted(received) == [b"%d" % number for number in range(8)])
"""
    assert run(vsock, program) == ["True"]


def test_a_socket_passed_to_another_process_works(vsock: Vsock) -> None:
    program = """
server, sock = datagram(), datagram()
ours, theirs = socket.socketpair()
inner = '''
import socket
channel = socket.socket(fileno=0)
(fd,) = socket.recv_fds(channel, 1, 1)[1]
sock = socket.socket(fileno=fd)
sock.sendto(b"passed", (1, %d))
print(sock.recvfrom(10)[0].decode(), flush=True)
'''
with subprocess.Popen([sys.executable, "-c", inner % address(server)[1]], stdin=theirs) as child:
    socket.send_fds(ours, [b"x"], [sock.fileno()])
    assert server.recvfrom(10) == (b"passed", sock.getsockname())
    server.sendto(b"back", address(sock))
"""
    assert run(vsock, program) == ["back"]


@pytest.mark.parametrize("how", ["inherited", "passed"])
def test_a_socket_from_a_program_of_the_library_works(
    vsock: Vsock, fabric: PrivateFabric, how: str
) -> None:
    take = "fd = int(sys.argv[1])"
    if how == "passed":
        take = "fd = socket.recv_fds(socket.socket(fileno=int(sys.argv[1])), 1, 1)[1][0]"
    program = f"""
{take}
# With family, type and protocol given, Python makes no call on the socket before the next one.
sock = socket.socket(40, DATAGRAM, 0, fd) if {how == "inherited"} else socket.socket(fileno=fd)
data, source = sock.recvfrom(10)
sock.sendto(data.upper(), source)
"""
    ours, theirs = socket.socketpair()
    with (
        ours,
        theirs,
        vsockets.socket(type=socket.SOCK_DGRAM, context=fabric.host) as sock,
        vsockets.socket(type=socket.SOCK_DGRAM, context=fabric.host) as client,
    ):
        sock.bind((2, 7201))
        given = sock.fileno() if how == "inherited" else theirs.fileno()
        command = (*PROGRAM, "run", "--cid", "host", sys.executable, "-c", COMMON + program)
        with subprocess.Popen([*command, str(given)], env=vsock.environment, pass_fds=[given]):
            if how == "passed":
                socket.send_fds(ours, [b"x"], [sock.fileno()])
            client.settimeout(20)
            client.sendto(b"hello", (2, 7201))
            assert client.recvfrom(10) == (b"HELLO", (2, 7201))


@pytest.mark.notify_only("all processes are traced")
def test_processes_without_such_sockets_are_not_traced(vsock: Vsock) -> None:
    """Neither the process nor its data calls are traced."""
    program = """
stream = socket.socket(40)
tracer = [line for line in open("/proc/self/status") if line.startswith("TracerPid")]
print(tracer[0].split()[1])
datagram()
tracer = [line for line in open("/proc/self/status") if line.startswith("TracerPid")]
print(tracer[0].split()[1] == str(os.getppid()))
"""
    assert run(vsock, program) == ["0", "True"]


def test_a_full_descriptor_table_fails_with_emfile(vsock: Vsock) -> None:
    program = """
resource.setrlimit(resource.RLIMIT_NOFILE, (20, 20))
made = []
while True:
    try: made.append(socket.socket(40, DATAGRAM))
    except OSError as error:
        print(errno.errorcode[error.errno], made[-1].fileno())
        break
"""
    assert run(vsock, program) == ["EMFILE 19"]


def test_close_on_exec_is_honoured(vsock: Vsock) -> None:
    program = """
flags = [fcntl.fcntl(socket.socket(40, kind | flag).detach(), fcntl.F_GETFD)
         for kind in (DATAGRAM, PACKET) for flag in (0, socket.SOCK_CLOEXEC)]
print(flags)
"""
    # Python adds SOCK_CLOEXEC itself.
    assert run(vsock, program) == [str([fcntl_flag() for _ in range(4)])]


def fcntl_flag() -> int:
    import fcntl

    return fcntl.FD_CLOEXEC


def test_inherited_descriptors_are_kept(vsock: Vsock) -> None:
    """The descriptors are neither moved nor closed."""
    reader, writer = os.pipe()
    program = f"datagram(); os.write({writer}, b'kept')"
    command = [*PROGRAM, "run", sys.executable, "-c", COMMON + program]
    subprocess.run(command, env=vsock.environment, pass_fds=[writer], check=True)
    os.close(writer)
    with open(reader, "rb") as file:
        assert file.read() == b"kept"


SENDS_RECORDS = """
import socket, sys
sock = socket.socket(40, socket.SOCK_SEQPACKET)
sock.connect((2, int(sys.argv[1])))
for part in (b"one", b"two", b"three"):
    assert sock.send(part, socket.MSG_EOR) == len(part)
assert sock.recv(100) == b"four"
"""


def test_ends_of_records_for_a_program_of_the_library(vsock: Vsock, fabric: PrivateFabric) -> None:
    """The library's sockets refuse descriptors: the packets arrive without the mark."""
    with vsockets.create_server(
        (2, 0xFFFF_FFFF), type=socket.SOCK_SEQPACKET, context=fabric.host
    ) as server:
        port = server.getsockname()[1]
        running = vsock.start("run", sys.executable, "-c", SENDS_RECORDS, port)
        with server.accept()[0] as accepted:
            assert [accepted.recv(100) for _ in range(3)] == [b"one", b"two", b"three"]
            accepted.send(b"four")
            running.finish(expect=0)
