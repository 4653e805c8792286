"""Connects to targets: retries, addresses of a name, and hybrid vsock."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Hashable, Iterator
from pathlib import Path

import pytest

import vsockets
from vsockets.forward.dialer import Dialer, Found, NotAdmitted, interleave
from vsockets.model.locator import Inet, Proxy, Unix, Vsock, VsockMux
from vsockets.testing import PrivateFabric

PATIENCE = 20.0
ANY = vsockets.VMADDR_PORT_ANY


@pytest.fixture(scope="module")
def fabric() -> Iterator[PrivateFabric]:
    with PrivateFabric() as fabric:
        yield fabric


def run(main: Callable[[Dialer], Awaitable[None]]) -> None:
    async def with_dialer() -> None:
        async with asyncio.timeout(PATIENCE):
            await main(Dialer())

    asyncio.run(with_dialer())


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (b"", errno.ECONNRESET),  # no listener: every device just closes
        (b"OK", errno.ECONNRESET),
        (b"OK x\n", errno.EPROTO),
        (b"ERROR 5\n", errno.EPROTO),
        (b"O" * 100, errno.EPROTO),
    ],
)
def test_hybrid_refusal_has_its_errno(tmp_path: Path, answer: bytes, code: int) -> None:
    async def main(dialer: Dialer) -> None:
        async def device(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            assert await reader.readline() == b"CONNECT 52\n"
            writer.write(answer)
            writer.close()

        async with await asyncio.start_unix_server(device, tmp_path / "v"):
            with pytest.raises(OSError) as caught:
                await dialer.connect(VsockMux(str(tmp_path / "v"), 52), timeout=PATIENCE)
            assert caught.value.errno == code

    run(main)


def test_silent_hybrid_device_times_out(tmp_path: Path) -> None:
    async def main(dialer: Dialer) -> None:
        with socket.socket(socket.AF_UNIX) as device:
            device.bind(str(tmp_path / "v"))
            device.listen()
            with pytest.raises(OSError) as caught:
                await dialer.connect(VsockMux(str(tmp_path / "v"), 52), timeout=0.05)
            assert caught.value.errno == errno.ETIMEDOUT

    run(main)


def test_retries_end_after_the_wait(tmp_path: Path) -> None:
    async def main(dialer: Dialer) -> None:
        with pytest.raises(FileNotFoundError):
            await dialer.connect(Unix(str(tmp_path / "none")), timeout=1, wait=0.05)

    run(main)


def test_permanent_error_is_raised_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    async def main(dialer: Dialer) -> None:
        for locator in (Unix(str(tmp_path / "file" / "x")), Proxy("socks5")):
            with pytest.raises(OSError):
                await dialer.connect(locator, timeout=1, wait=PATIENCE * 10)

    run(main)


def test_full_backlog_of_a_unix_socket_is_retried(tmp_path: Path) -> None:
    async def main(dialer: Dialer) -> None:
        path = str(tmp_path / "s")
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path)
            server.listen(0)
            first = await dialer.connect(Unix(path), timeout=PATIENCE)
            second = asyncio.create_task(dialer.connect(Unix(path), timeout=PATIENCE))
            await asyncio.sleep(0)
            assert not second.done()
            server.accept()[0].close()
            with first, await second:
                server.accept()[0].close()

    run(main)


def test_only_admitted_addresses_are_connected() -> None:
    async def main(dialer: Dialer) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            target = Inet("localhost", server.getsockname()[1])
            with pytest.raises(NotAdmitted):
                await dialer.connect(target, timeout=PATIENCE, admits=lambda address: False)
            sock = await dialer.connect(
                target, timeout=PATIENCE, admits=ipaddress.ip_address("127.0.0.1").__eq__
            )
            with sock:
                assert sock.getpeername() == server.getsockname()

    run(main)


class Addresses(Dialer):
    """A dialer that resolves every name to ``hosts``."""

    def __init__(self, *hosts: str) -> None:
        super().__init__()
        self.resolver.resolve = self._find  # type: ignore[method-assign]
        self._hosts = hosts

    async def _find(self, host: str, port: int, kind: int, party: Hashable = None) -> list[Found]:
        families = (socket.AF_INET6 if ":" in host else socket.AF_INET for host in self._hosts)
        return [(family, (host, port)) for family, host in zip(families, self._hosts, strict=True)]


@contextlib.contextmanager
def silent(host: str) -> Iterator[int]:
    """Yield a port of ``host`` with a full backlog, for which the kernel drops SYNs."""
    with contextlib.ExitStack() as stack:
        hole = stack.enter_context(socket.socket())
        hole.bind((host, 0))
        hole.listen(0)
        for _ in range(4):
            sock = stack.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(hole.getsockname())
        yield hole.getsockname()[1]


def test_silent_address_does_not_delay_the_next() -> None:
    """RFC 8305, section 5."""

    async def main(_: Dialer) -> None:
        with silent("127.0.0.2") as port, socket.create_server(("127.0.0.3", port)) as server:
            dialer = Addresses("127.0.0.2", "127.0.0.3")
            with await dialer.connect(Inet("two.test", port), timeout=PATIENCE) as sock:
                assert sock.getpeername() == server.getsockname()
        # The cancelled attempt has closed its socket.
        others = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.wait_for(asyncio.gather(*others, return_exceptions=True), PATIENCE)

    run(main)


def test_timeout_applies_to_each_address() -> None:
    """As in docs/forward.md: --connect-timeout applies to each address."""

    async def main(_: Dialer) -> None:
        with silent("127.0.0.2") as port, socket.create_server(("127.0.0.3", port)) as server:
            dialer = Addresses("127.0.0.2", "127.0.0.3")
            with await dialer.connect(Inet("two.test", port), timeout=0.1) as sock:
                assert sock.getpeername() == server.getsockname()
            with pytest.raises(OSError) as caught:
                await Addresses("127.0.0.2").connect(Inet("one.test", port), timeout=0.1)
            assert caught.value.errno == errno.ETIMEDOUT

    run(main)


def test_most_informative_error_is_raised() -> None:
    """A refusal is preferred to a missing route."""

    async def main(_: Dialer) -> None:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            port = unused.getsockname()[1]
            for hosts in (("::ffff:127.0.0.1", "127.0.0.1"), ("127.0.0.1", "fe80::1")):
                with pytest.raises(ConnectionRefusedError, match="Connection refused"):
                    await Addresses(*hosts).connect(Inet("two.test", port), timeout=PATIENCE)

    run(main)


def test_address_families_alternate() -> None:
    """RFC 8305, section 4."""
    four, six = socket.AF_INET, socket.AF_INET6
    found = [(six, (name,)) for name in "abc"] + [(four, (name,)) for name in "xy"]
    assert "".join(address[0] for _, address in interleave(found)) == "axbyc"
    assert interleave([]) == []


def test_refusal_is_explained(fabric: PrivateFabric) -> None:
    async def main(_: Dialer) -> None:
        dialer = Dialer(fabric.host)
        with pytest.raises(ConnectionResetError, match=r"reset by peer \(no listener at that port"):
            await dialer.connect(Vsock(2, 7001), timeout=PATIENCE)
        with pytest.raises(OSError, match=r"No route to host \(no such context"):
            await dialer.connect(Vsock(999, 7001), timeout=PATIENCE)

    run(main)


def test_port_that_accepted_before_is_retried(fabric: PrivateFabric) -> None:
    """The backlog may be full; in TCP, the client's kernel would retry."""

    async def main(_: Dialer) -> None:
        with (
            vsockets.create_server((2, ANY), backlog=1, context=fabric.host) as server,
            contextlib.ExitStack() as stack,
        ):
            dialer, port = Dialer(fabric.host), Vsock(*server.getsockname())
            stack.enter_context(await dialer.connect(port, timeout=PATIENCE))
            with contextlib.suppress(ConnectionResetError):
                while True:  # until the backlog is full
                    other = Dialer(fabric.host)
                    stack.enter_context(await other.connect(port, timeout=PATIENCE))
            last = asyncio.create_task(dialer.connect(port, timeout=PATIENCE))
            await asyncio.sleep(0)  # the connect has been requested
            with pytest.raises(ConnectionResetError):
                await Dialer(fabric.host).connect(port, timeout=PATIENCE)
            server.accept()[0].close()
            (await last).close()

    run(main)


def test_closed_port_is_not_retried_again(fabric: PrivateFabric) -> None:
    async def main(_: Dialer) -> None:
        dialer = Dialer(fabric.host)
        with vsockets.create_server((2, ANY), context=fabric.host) as server:
            port = Vsock(*server.getsockname())
            (await dialer.connect(port, timeout=PATIENCE)).close()
        with pytest.raises(ConnectionResetError):
            await dialer.connect(port, timeout=0.1)
        # Later connects fail at once, without a retry.
        with pytest.raises(ConnectionResetError):
            await dialer.connect(port, timeout=PATIENCE * 2)

    run(main)
