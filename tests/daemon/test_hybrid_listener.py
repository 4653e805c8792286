"""``vsock context add --hybrid PATH``: a guest's ports for tools that speak hybrid vsock."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import socket
import stat
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import vsockets
from vsockets import AF_VSOCK, Attachment
from vsockets.limits import HYBRID_LINE_MAX_BYTES, HYBRID_PATH_MAX_BYTES
from vsockets.protocol import RECORD_SIZE, Op, Record, Request, RequestFlag
from vsockets.testing import PrivateFabric, wait_until

from .users import NOBODY, as_root, user

PATIENCE = 10.0


@pytest.fixture(scope="class")
def path() -> Iterator[Path]:
    """Return the socket's path, outside vsockd's folder."""
    with tempfile.TemporaryDirectory(prefix="hybrid-", dir="/tmp") as folder:
        yield Path(folder, "v.sock")


@pytest.fixture(scope="class")
def fabric() -> Iterator[PrivateFabric]:
    """Yield a fabric for all tests of a class, whose folder other users can enter."""
    with PrivateFabric() as fabric:
        fabric.folder.parent.chmod(0o755)
        yield fabric


@pytest.fixture(scope="class")
def guest(fabric: PrivateFabric, path: Path) -> Attachment:
    return fabric.guest(7, hybrid=path, reserved_ports=True)


def dial(path: Path, *pieces: bytes) -> socket.socket:
    """Connect as a tool does, and send the first line."""
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(PATIENCE)
    sock.connect(str(path))
    for piece in pieces:
        sock.sendall(piece)
    return sock


def answer(sock: socket.socket) -> bytes:
    """Return the reply line, read byte by byte; what arrived of it at the end."""
    line = b""
    with contextlib.suppress(ConnectionResetError):
        while not line.endswith(b"\n") and (byte := sock.recv(1)):
            line += byte
    return line


def connect(context: Attachment, port: int) -> vsockets.socket:
    """Connect to the host; patiently, because the relay process may have to start."""
    sock = vsockets.socket(context=context)
    timeout = struct.pack("qq", int(PATIENCE), 0)
    sock.setsockopt(AF_VSOCK, vsockets.SO_VM_SOCKETS_CONNECT_TIMEOUT, timeout)
    try:
        sock.connect((2, port))
    except OSError:
        sock.close()
        raise
    return sock


@contextlib.contextmanager
def unix_service(path: Path, port: int) -> Iterator[socket.socket]:
    """Yield a tool's listener for the guest at ``port`` of the host."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{path}_{port}")
        listener.listen()
        listener.settimeout(PATIENCE)
        try:
            yield listener
        finally:
            os.unlink(f"{path}_{port}")


def has_ended(pid: int) -> bool:
    """Return whether this process has exited, including as a zombie."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


class TestToTheGuest:
    @pytest.mark.parametrize(
        "pieces",
        [
            (b"CONNECT 52\n",),
            (b"CONNECT 52\nhello",),
            (b"CONNECT 52", b"\n", b"hello"),
            (b"C", b"ONNECT", b" 5", b"2\nhel", b"lo"),
            (b"connect 52\r\nhello",),
        ],
    )
    def test_a_stream(
        self, fabric: PrivateFabric, guest: Attachment, path: Path, pieces: tuple[bytes, ...]
    ) -> None:
        """Payload that comes with the line, or right after it, belongs to the stream."""
        payload = b"".join(pieces).partition(b"\n")[2]
        with (
            vsockets.create_server((7, 52), context=guest) as server,
            dial(path, *pieces) as tool,
        ):
            line = answer(tool)
            sock, peer = server.accept()
            with sock:
                assert line == b"OK %d\n" % peer[1]
                assert peer[0] == 2, "a tool is a program of the host"
                assert sock.peer_credentials()[:2] == (os.getpid(), os.geteuid())
                if payload:
                    assert sock.recv(100) == payload
                sock.sendall(b"answer")
                assert tool.recv(100) == b"answer"
                tool.shutdown(socket.SHUT_WR)
                assert sock.recv(1) == b""
                sock.sendall(b"after that")
                assert tool.recv(100) == b"after that"

    def test_a_port_without_a_listener(
        self, fabric: PrivateFabric, guest: Attachment, path: Path
    ) -> None:
        with dial(path, b"CONNECT 52\n") as tool:
            assert answer(tool) == b""

    @pytest.mark.parametrize(
        "said",
        [
            *(b"\n", b"CONNECT\n", b"CONNECT x\n", b"CONNECT 4294967296\n", b"OK 52\n"),
            *(b"GET / HTTP/1.1\r\nHost: x\r\n", b"CONNECT 4294967295\n", b"\0" * 100),
            b"1" * HYBRID_LINE_MAX_BYTES,
        ],
    )
    def test_an_invalid_handshake_closes_the_connection(
        self, fabric: PrivateFabric, guest: Attachment, path: Path, said: bytes
    ) -> None:
        with vsockets.create_server((7, 52), context=guest), dial(path, said) as tool:
            assert answer(tool) == b""

    def test_an_endless_line(self, fabric: PrivateFabric, guest: Attachment, path: Path) -> None:
        with dial(path) as tool, pytest.raises((BrokenPipeError, ConnectionResetError)):
            for _ in range(HYBRID_LINE_MAX_BYTES):
                tool.sendall(b"C")
            assert answer(tool) == b""
            tool.sendall(b"C")

    def test_early_closes(self, fabric: PrivateFabric, guest: Attachment, path: Path) -> None:
        """cloud-hypervisor#6621, #6798; no end is mistaken for another's: flintlock#1205."""
        with vsockets.create_server((7, 52), backlog=500, context=guest) as server:
            for said in (b"", b"CONNECT", b"CONNECT 52\n", b"CONNECT 52\nx") * 25:
                dial(path, said).close()
            with dial(path, b"CONNECT 52\nlast") as tool:
                assert answer(tool).startswith(b"OK ")
                said_there: list[bytes] = []
                while said_there[-1:] != [b"last"]:
                    sock, _ = server.accept()
                    with sock:
                        said_there.append(sock.recv(100))
        assert set(said_there) <= {b"", b"x", b"last"}

    def test_random_handshakes(self, fabric: PrivateFabric, guest: Attachment, path: Path) -> None:
        """Seeded: pieces of handshakes and garbage, closed at any time."""
        source = random.Random(6)
        words = [b"CONNECT", b" ", b"52", b"53", b"\n", b"OK", b"\r", b"\0", b"9" * 20, b"x" * 40]
        with vsockets.create_server((7, 52), backlog=2000, context=guest) as server:
            expected = 0
            for _ in range(400):
                said = b"".join(source.choices(words, k=source.randint(0, 6)))
                if source.random() < 0.3:
                    said = b"CONNECT 52\n" + said
                with contextlib.suppress(BrokenPipeError, ConnectionResetError), dial(path) as tool:
                    for start in range(0, len(said), step := source.randint(3, 40)):
                        tool.sendall(said[start : start + step])
                    tool.shutdown(socket.SHUT_WR)
                    line = answer(tool)
                    assert line == b"" or line.startswith(b"OK ")
                    expected += line != b""
            for _ in range(expected):
                server.accept()[0].close()
            server.settimeout(0)
            with pytest.raises(BlockingIOError):
                server.accept()
        assert expected > 50
        wait_until(lambda: not fabric.control.sockets(), "all to be forgotten", PATIENCE)

    def test_a_device_decides_about_the_connect(
        self, fabric: PrivateFabric, guest: Attachment, path: Path
    ) -> None:
        link = fabric.control.attach_device(7)
        link.settimeout(PATIENCE)
        with dial(path, b"CONNECT 52\nhello") as tool:
            data, fds, _, _ = socket.recv_fds(link, RECORD_SIZE, 1)
            offer = Record.decode(data)
            assert offer.flags == RequestFlag.OK_LINE
            assert offer.local == (7, 52)
            with socket.socket(fileno=fds[0]) as stream:
                stream.sendall(b"OK 1\n")
                settled = Request(Op.SETTLE, 0, *offer.local, *offer.peer, 0, 65_536)
                link.send(settled.encode())
                assert answer(tool) == b"OK 1\n"
                assert stream.recv(100) == b"hello"
        link.close()


class TestFromTheGuest:
    def test_a_stream(self, fabric: PrivateFabric, guest: Attachment, path: Path) -> None:
        with (
            unix_service(path, 99) as service,
            connect(guest, 99) as sock,
        ):
            assert sock.getpeername() == (2, 99)
            tool, _ = service.accept()
            with tool:
                sock.sendall(b"question")
                sock.shutdown(socket.SHUT_WR)
                assert tool.recv(100) == b"question"
                assert tool.recv(100) == b""
                tool.sendall(b"answer")
                assert sock.recv(100) == b"answer"
            assert sock.recv(1) == b""

    def test_the_fabrics_listeners_come_first(
        self, fabric: PrivateFabric, guest: Attachment, path: Path
    ) -> None:
        with (
            unix_service(path, 1099),
            vsockets.create_server((2, 1099), context=fabric.host) as server,
            connect(guest, 1099),
        ):
            server.accept()[0].close()

    def test_ports_without_a_usable_socket(
        self, fabric: PrivateFabric, guest: Attachment, path: Path
    ) -> None:
        def refused() -> None:
            with pytest.raises(ConnectionResetError):
                connect(guest, 99)

        refused()
        with unix_service(path, 98):  # another port
            refused()
        Path(f"{path}_99").write_text("no socket")
        refused()
        os.unlink(f"{path}_99")
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(f"{path}_99")  # a socket without a listener
            refused()
        refused()
        os.unlink(f"{path}_99")
        with unix_service(path, 98):
            os.symlink(f"{path}_98", f"{path}_99")  # links lead anywhere
            refused()
        os.unlink(f"{path}_99")

    def test_other_guests_and_the_host_cannot_connect(
        self, fabric: PrivateFabric, guest: Attachment, path: Path
    ) -> None:
        with unix_service(path, 99):
            for other in (fabric.guest(), fabric.host):
                with pytest.raises(ConnectionResetError):
                    connect(other, 99)
            with (
                vsockets.socket(type=socket.SOCK_SEQPACKET, context=guest) as sock,
                pytest.raises(ConnectionResetError),
            ):
                sock.connect((2, 99))

    @as_root
    def test_a_socket_of_another_user(
        self, fabric: PrivateFabric, guest: Attachment, path: Path
    ) -> None:
        path.parent.chmod(0o1777)
        with user(NOBODY):
            service = unix_service(path, 99)
            service.__enter__()
        with pytest.raises(ConnectionResetError):
            connect(guest, 99)
        service.__exit__(None, None, None)

    @as_root
    def test_an_isolated_guest(self, fabric: PrivateFabric, path: Path) -> None:
        """The owner's tools are trusted, as the owner's programs are; root's sockets are hidden."""
        path.parent.chmod(0o1777)
        path = path.with_name("other")
        guest = fabric.guest(8, owner=NOBODY, profile="restricted", hybrid=path)
        with unix_service(path, 99), pytest.raises(ConnectionResetError):
            connect(guest, 99)
        with user(NOBODY):
            service = unix_service(path, 98)
            listener = service.__enter__()
        with connect(guest, 98):
            listener.accept()[0].close()
        service.__exit__(None, None, None)

    def test_the_relay_may_be_killed(
        self, fabric: PrivateFabric, guest: Attachment, path: Path
    ) -> None:
        with unix_service(path, 99) as service:
            relays = []
            for _ in range(2):
                with connect(guest, 99) as sock:
                    tool, _ = service.accept()
                    with tool:
                        relays.append(sock.peer_credentials()[0])
                        os.kill(relays[-1], signal.SIGKILL)
                        assert sock.recv(1) == tool.recv(1) == b""
                        wait_until(
                            lambda: has_ended(relays[-1]), "all of it to be removed", PATIENCE
                        )
                # What was ready when vsockd took the first of these, it has seen by the second.
                for _ in range(2):
                    fabric.control.status()
            assert relays[0] != relays[1]

    @pytest.mark.parametrize(("change", "back"), [("suspend", "resume"), ("power_off", "power_on")])
    def test_its_streams_are_disconnected(
        self, fabric: PrivateFabric, guest: Attachment, path: Path, change: str, back: str
    ) -> None:
        call: Callable[[int], object] = getattr(fabric.control, change)
        undo: Callable[[int], object] = getattr(fabric.control, back)
        with (
            unix_service(path, 99) as service,
            connect(guest, 99) as sock,
        ):
            tool, _ = service.accept()
            with tool:
                call(7)
                assert sock.recv(1) == tool.recv(1) == b""
        undo(7)


class TestLifeCycle:
    @pytest.fixture
    def fabric(self, vsock_fabric: PrivateFabric) -> PrivateFabric:
        """Yield a fabric for each test."""
        vsock_fabric.folder.parent.chmod(0o755)
        return vsock_fabric

    @pytest.fixture
    def path(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="hybrid-", dir="/tmp") as folder:
            yield Path(folder, "v.sock")

    def test_its_mode_and_owner(self, fabric: PrivateFabric, path: Path) -> None:
        owner = 54_321 if os.geteuid() == 0 else os.geteuid()
        fabric.guest(7, hybrid=path, owner=owner)
        found = path.stat()
        assert stat.S_IMODE(found.st_mode) == 0o600
        assert found.st_uid == owner

    @as_root
    def test_a_restricted_guest_is_for_trusted_tools(
        self, fabric: PrivateFabric, path: Path
    ) -> None:
        guest = fabric.guest(7, hybrid=path, owner=54_321, profile="restricted")
        path.parent.chmod(0o755)
        path.chmod(0o666)
        with vsockets.create_server((7, 52), context=guest):
            for who, expected in ((NOBODY, b""), (54_321, b"OK")):
                with user(who):
                    tool = dial(path)
                with tool:
                    tool.sendall(b"CONNECT 52\n")
                    assert answer(tool).startswith(expected)
                    assert expected or answer(tool) == b""
        row = next(row for row in fabric.control.contexts() if row["cid"] == 2)
        assert row["denials"] == {"restricted": 1}

    def test_it_is_removed_with_the_context(self, fabric: PrivateFabric, path: Path) -> None:
        guest = fabric.guest(7, hybrid=path, reserved_ports=True)
        fabric.control.power_off(7)
        assert not path.exists()
        fabric.control.power_on(7)
        with vsockets.create_server((7, 52), context=guest), dial(path, b"CONNECT 52\n") as tool:
            assert answer(tool).startswith(b"OK")
        wait_until(lambda: not fabric.control.status()["streams"], "the end", PATIENCE)
        assert fabric.control.contexts()[-1]["hybrid"] == str(path)
        fabric.control.remove_context(7)
        assert not path.exists()

    def test_vsockd_ends_or_is_killed(self, fabric: PrivateFabric, path: Path) -> None:
        fabric.guest(7, hybrid=path)
        fabric.kill()
        assert path.exists()  # a file without a socket, which is replaced
        fabric.start()
        fabric.guest(7, hybrid=path)
        with dial(path, b"CONNECT 52\n") as tool:
            assert answer(tool) == b""
        fabric.stop()
        assert not path.exists()
        fabric.start()

    def test_a_socket_in_use_is_not_replaced(self, fabric: PrivateFabric, path: Path) -> None:
        with socket.socket(socket.AF_UNIX) as theirs:
            theirs.bind(str(path))
            theirs.listen()
            with pytest.raises(OSError, match=rf"hybrid: {path}: ") as refused:
                fabric.guest(7, hybrid=path)
            assert refused.value.errno == errno.EADDRINUSE
        assert len(fabric.control.contexts()) == 1
        fabric.guest(7, hybrid=path)

    @pytest.mark.parametrize(
        "wrong",
        ["v.sock", "/", "/run/", "/tmp/" + "x" * (HYBRID_PATH_MAX_BYTES + 1), "/a\0b", "/none/v"],
    )
    def test_invalid_paths(self, fabric: PrivateFabric, wrong: str) -> None:
        with pytest.raises(OSError, match="hybrid: "):
            fabric.guest(7, hybrid=wrong)
        assert len(fabric.control.contexts()) == 1

    def test_long_paths(self, fabric: PrivateFabric, path: Path) -> None:
        """flintlock#1226, vfkit#194: a unix socket's path has 107 bytes."""
        deep = path.parent / ("d" * 100) / ("e" * 100)
        deep.mkdir(parents=True)
        guest = fabric.guest(7, hybrid=deep / ("v" * HYBRID_PATH_MAX_BYTES), reserved_ports=True)
        before = os.getcwd()
        os.chdir(deep)
        try:
            name = Path("v" * HYBRID_PATH_MAX_BYTES)
            with (
                unix_service(name, 99) as service,
                connect(guest, 99),
            ):
                service.accept()[0].close()
            with vsockets.create_server((7, 5), context=guest), dial(name, b"CONNECT 5\n") as tool:
                assert answer(tool).startswith(b"OK")
        finally:
            os.chdir(before)

    def test_in_the_configuration(self, fabric: PrivateFabric, path: Path) -> None:
        (fabric.configuration / "a.toml").write_text(f'[[context]]\ncid = 9\nhybrid = "{path}"\n')
        fabric.control.reload()
        with dial(path, b"CONNECT 5\n") as tool:
            assert answer(tool) == b""
        (fabric.configuration / "a.toml").write_text('[[context]]\ncid = 9\nhybrid = "v"\n')
        with pytest.raises(OSError, match=r"a.toml:3.*hybrid.*absolute path"):
            fabric.control.reload()
