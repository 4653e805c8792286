"""Name resolution: it does not block the loop, and its threads are limited."""

from __future__ import annotations

import asyncio
import socket
import threading
from typing import Any

import pytest

from vsockets.forward.dialer import Resolver
from vsockets.forward.limits import FORWARD_LOOKUPS_MAX, FORWARD_PARTY_LOOKUPS_MAX

PATIENCE = 20.0


class NameServer:
    """A replacement of getaddrinfo that answers once ``may_answer`` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[str] = []
        self.may_answer = threading.Event()
        self._real = socket.getaddrinfo
        monkeypatch.setattr(socket, "getaddrinfo", self._look_up)

    def _look_up(self, host: str, port: int, *, type: int, flags: int) -> Any:
        if flags & socket.AI_NUMERICHOST:
            return self._real(host, port, type=type, flags=flags)
        self.asked.append(host)
        assert self.may_answer.wait(PATIENCE)
        if host.startswith("no"):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, type, 0, "", ("10.0.0.1", port))]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> NameServer:
    return NameServer(monkeypatch)


def test_literal_addresses_need_no_name_server(server: NameServer) -> None:
    async def main() -> None:
        resolver = Resolver()
        found = await resolver.resolve("127.0.0.1", 80, socket.SOCK_STREAM)
        assert found == [(socket.AF_INET, ("127.0.0.1", 80))]
        [(family, address)] = await resolver.resolve("::1", 80, socket.SOCK_STREAM)
        assert (family, address[:2]) == (socket.AF_INET6, ("::1", 80))

    asyncio.run(main())
    assert server.asked == []


def test_simultaneous_requests_share_one_lookup(
    server: NameServer,
) -> None:
    async def main() -> None:
        resolver = Resolver()
        asking = [
            asyncio.create_task(resolver.resolve("name", 80, socket.SOCK_STREAM)) for _ in range(9)
        ]
        given_up = asyncio.create_task(resolver.resolve("name", 80, socket.SOCK_STREAM))
        await asyncio.sleep(0)
        given_up.cancel()  # does not affect the others
        server.may_answer.set()
        for found in await asyncio.gather(*asking):
            assert found == [(socket.AF_INET, ("10.0.0.1", 80))]
        assert server.asked == ["name"]
        await resolver.resolve("name", 80, socket.SOCK_STREAM)
        assert server.asked == ["name"] * 2

    asyncio.run(asyncio.wait_for(main(), PATIENCE))


def test_failed_lookup_raises_gaierror(server: NameServer) -> None:
    async def main() -> None:
        server.may_answer.set()
        with pytest.raises(socket.gaierror):
            await Resolver().resolve("no.such", 80, socket.SOCK_STREAM)

    asyncio.run(main())


def test_invalid_name_raises_oserror() -> None:
    async def main() -> None:
        with pytest.raises(OSError, match=r"invalid host name|not known|No address"):
            await Resolver().resolve("a" * 70 + ".x", 80, socket.SOCK_STREAM)

    asyncio.run(main())


def test_silent_name_server_blocks_neither_loop_nor_threads(
    server: NameServer,
) -> None:
    async def main() -> None:
        resolver = Resolver()
        before = threading.active_count()
        asking = [
            asyncio.create_task(resolver.resolve(f"name{number}", 80, socket.SOCK_STREAM, number))
            for number in range(FORWARD_LOOKUPS_MAX * 2)
        ]
        for _ in range(100):  # the loop keeps running
            await asyncio.sleep(0)
        assert threading.active_count() <= before + FORWARD_LOOKUPS_MAX
        assert len(server.asked) <= FORWARD_LOOKUPS_MAX
        server.may_answer.set()
        await asyncio.gather(*asking)
        assert len(server.asked) == FORWARD_LOOKUPS_MAX * 2

    asyncio.run(asyncio.wait_for(main(), PATIENCE))


def test_lookups_of_each_party_are_limited(server: NameServer) -> None:
    """One party's silent name servers do not delay another party, even for the same name."""

    async def main() -> None:
        resolver = Resolver()

        def ask(name: str, party: int) -> asyncio.Task[object]:
            return asyncio.create_task(resolver.resolve(name, 80, socket.SOCK_STREAM, party))

        asking = [ask(f"name{number}", 3) for number in range(FORWARD_LOOKUPS_MAX)]
        asking.append(ask("name", 3))
        await asyncio.sleep(0)
        other = ask("name", 4)
        while "name" not in server.asked:
            await asyncio.sleep(0.001)
        assert len(server.asked) == FORWARD_PARTY_LOOKUPS_MAX + 1
        server.may_answer.set()
        await asyncio.gather(other, *asking)

    asyncio.run(asyncio.wait_for(main(), PATIENCE))
