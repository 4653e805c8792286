"""The library in a guest with ``VSOCKETS_TRANSPORT=kernel``, on its kernel's AF_VSOCK."""

from __future__ import annotations

import textwrap
from typing import Any

import vsockets

from .exchanges import PATIENCE, datagram, dial, exchange, serve
from .image import LOOPBACK
from .machine import Machine

LIBRARY = """
import asyncio, errno, os, select, socket as stdlib
os.environ["VSOCKETS_TRANSPORT"] = "kernel"
import vsockets
from vsockets import AF_VSOCK, VMADDR_CID_ANY, VMADDR_CID_HOST, VMADDR_PORT_ANY
from vsockets.attachment import current
def refusal(function, *arguments):
    try:
        function(*arguments)
    except OSError as error:
        return errno.errorcode[error.errno]
"""


def run(machine: Machine, source: str, **values: Any) -> Any:
    return machine.run(LIBRARY + textwrap.dedent(source), **values)


def start(machine: Machine, source: str, **values: Any) -> Any:
    return machine.start(LIBRARY + textwrap.dedent(source), **values)


def test_current_context_is_the_kernel(machine: Machine) -> None:
    found = run(
        machine,
        "result = repr(current()), vsockets.get_local_cid(), vsockets.VMCISock_GetAFValue()",
    )
    assert found == ("<the kernel's AF_VSOCK>", machine.cid, vsockets.AF_VSOCK)


def test_auto_transport_in_a_guest_is_the_kernel(machine: Machine) -> None:
    """Without a fabric in the guest, the kernel's AF_VSOCK, which reaches the host, is chosen."""
    found = run(
        machine,
        "current.cache_clear(); os.environ['VSOCKETS_TRANSPORT'] = 'auto'; result = repr(current())"
        "\ncurrent.cache_clear()",
    )
    assert found == "<the kernel's AF_VSOCK>"


def test_stream_to_the_host(machine: Machine) -> None:
    server, port = serve(machine)
    with server:
        job = start(
            machine,
            """
            with vsockets.create_connection((VMADDR_CID_HOST, port)) as sock:
                names = isinstance(sock, vsockets.socket), sock.getsockname()[0], sock.getpeername()
                poll = select.poll(); poll.register(sock, select.POLLOUT)
                writable = bool(poll.poll(1000))
                echoed = 0
                while data := sock.recv(65536):
                    sock.sendall(data); echoed += len(data)
                sock.shutdown(stdlib.SHUT_WR)
            result = names, writable, echoed, int(sock.family)
            """,
            port=port,
        )
        accepted, peer = server.accept()
        with accepted:
            assert peer[0] == machine.cid
            accepted.settimeout(PATIENCE)
            assert exchange(accepted, 1 << 20)
        assert job.result(PATIENCE) == (
            (True, machine.cid, (2, port)),
            True,
            1 << 20,
            vsockets.AF_VSOCK,
        )


def test_server_in_the_guest(machine: Machine) -> None:
    job = start(
        machine,
        """
        with vsockets.create_server((VMADDR_CID_ANY, 7100)) as server:
            server.settimeout(10)
            accepted, peer = server.accept()
            with accepted:
                twin = accepted.dup()
                accepted.sendall(b"from the guest")
                kind = type(accepted).__name__, accepted.gettimeout()
                with twin: twin.sendall(b", twice")
        result = peer[0], kind
        """,
    )
    with dial(machine, 7100) as sock:
        assert sock.makefile().read() == "from the guest, twice"
    assert job.result(PATIENCE) == (2, ("KernelSocket", None))


def test_buffer_sizes_and_other_options(machine: Machine) -> None:
    found = run(
        machine,
        """
        with vsockets.socket() as sock:
            sock.setsockopt(AF_VSOCK, vsockets.SO_VMCI_BUFFER_MAX_SIZE, 1 << 20)
            sock.setsockopt(AF_VSOCK, vsockets.SO_VMCI_BUFFER_SIZE, 300_000)
            sizes = [sock.getsockopt(AF_VSOCK, option) for option in (0, 1, 2)]
            option = vsockets.SO_VM_SOCKETS_CONNECT_TIMEOUT_OLD
            sock.setsockopt(AF_VSOCK, option, bytes([3] + [0] * 15))
            timeout = sock.getsockopt(AF_VSOCK, option, 16)
            sock.setsockopt(stdlib.IPPROTO_TCP, stdlib.TCP_NODELAY, 1)
            ignored = sock.getsockopt(stdlib.IPPROTO_TCP, stdlib.TCP_NODELAY)
            domain = sock.getsockopt(stdlib.SOL_SOCKET, stdlib.SO_DOMAIN)
        result = sizes, timeout[0], ignored, domain
        """,
    )
    assert found == ([300_000, 128, 1 << 20], 3, 1, vsockets.AF_VSOCK)


def test_errors_of_the_kernel(machine: Machine) -> None:
    found = run(
        machine,
        """
        one, two = vsockets.socket(), vsockets.socket()
        with one, two:
            one.bind((VMADDR_CID_ANY, 7200))
            result = [
                refusal(two.bind, (VMADDR_CID_ANY, 7200)),
                refusal(two.connect, (VMADDR_CID_HOST, 7201)),
                refusal(two.getpeername),
                refusal(two.peer_credentials),
                refusal(vsockets.socket, 40, 77),
                refusal(lambda: vsockets.socket(type=-1, fileno=os.open("/dev/null", 0))),
            ]
        """,
    )
    assert found == [
        "EADDRINUSE",
        "ECONNRESET",
        "ENOTCONN",
        "ENOTSUP",
        "ESOCKTNOSUPPORT",
        "ENOTSOCK",
    ]


def test_datagrams_in_both_directions(machine: Machine) -> None:
    """Over VMCI, the only device with datagrams in a guest's kernel."""
    with datagram(machine) as service:
        job = start(
            machine,
            """
            with vsockets.socket(type=stdlib.SOCK_DGRAM) as sock:
                sock.bind((VMADDR_CID_ANY, 7300))
                sock.settimeout(10)
                sock.sendto(b"question", (VMADDR_CID_HOST, port))
                result = sock.recvfrom(100)
            """,
            port=service.getsockname()[1],
        )
        question, source = service.recvfrom(100)
        assert (question, source) == (b"question", (machine.cid, 7300))
        service.sendto(b"answer", source)
        assert job.result(PATIENCE) == (b"answer", service.getsockname())


def test_asyncio(machine: Machine) -> None:
    server, port = serve(machine)
    with server:
        job = start(
            machine,
            """
            async def talk():
                reader, writer = await vsockets.open_connection(VMADDR_CID_HOST, port)
                writer.write(b"hello\\n")
                line = await asyncio.wait_for(reader.readline(), 10)
                writer.close()
                return line
            result = asyncio.run(talk())
            """,
            port=port,
        )
        accepted, _ = server.accept()
        with accepted:
            assert accepted.recv(100) == b"hello\n"
            accepted.sendall(b"good day\n")
            assert job.result(PATIENCE) == b"good day\n"


def test_socketpair_in_the_guest(machine: Machine) -> None:
    found = run(
        machine,
        """
        for module in modules:
            assert os.system(f"insmod /modules/{module}.ko") == 0
        one, other = vsockets.socketpair()
        with one, other:
            one.sendall(b"loopback")
            result = other.recv(100), other.getpeername()[1] == one.getsockname()[1]
        for module in reversed(modules):
            assert os.system(f"rmmod {module}") == 0
        """,
        modules=LOOPBACK,
    )
    assert found == (b"loopback", True)


def test_recv_ends_when_the_host_closes(machine: Machine) -> None:
    server, port = serve(machine)
    with server:
        job = start(
            machine,
            "sock = vsockets.create_connection((VMADDR_CID_HOST, port), timeout=10)\n"
            "result = sock.recv(10)",
            port=port,
        )
        accepted, _ = server.accept()
        accepted.close()
        assert job.result(PATIENCE) == b""
