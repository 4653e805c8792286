"""A fabric for each module, with this process in a guest of it, as users of the examples are."""

from __future__ import annotations

import contextlib
import importlib.util
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

import vsockets
from vsockets import attachment
from vsockets.testing import PrivateFabric

EXAMPLES = Path(__file__).parents[2] / "examples" / "adapters"


def example(name: str) -> ModuleType:
    """Load ``examples/adapters/NAME.py``; skip the test if its library is missing."""
    pytest.importorskip(name.partition("_")[0], reason=f"needs {name.partition('_')[0]}")
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def fabric() -> Iterator[PrivateFabric]:
    """A vsockd shared by the tests of a module."""
    with PrivateFabric() as fabric:
        yield fabric


@pytest.fixture
def guest(fabric: PrivateFabric, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A guest context, which this process is in."""
    guest = fabric.guest()
    for name, value in fabric.environment(guest).items():
        monkeypatch.setenv(name, value)
    attachment.current.cache_clear()
    yield guest.cid
    attachment.current.cache_clear()


Serve = Callable[[Callable[[socket.socket], None]], int]


@pytest.fixture
def serve(fabric: PrivateFabric) -> Iterator[Serve]:
    """A function that has ``talk`` serve each client of a port of the host; it returns the port."""
    with contextlib.ExitStack() as stack:

        def start(talk: Callable[[socket.socket], None]) -> int:
            address = (2, vsockets.VMADDR_PORT_ANY)
            server = stack.enter_context(vsockets.create_server(address, context=fabric.host))
            port = int(server.getsockname()[1])
            ended = threading.Event()
            thread = threading.Thread(target=_accept, args=(server, talk, ended), daemon=True)
            thread.start()

            def end() -> None:
                ended.set()
                vsockets.create_connection((2, port), context=fabric.host).close()
                thread.join(30)

            stack.callback(end)
            return port

        yield start


def _accept(
    server: socket.socket, talk: Callable[[socket.socket], None], ended: threading.Event
) -> None:
    while True:
        sock, _ = server.accept()
        if ended.is_set():
            sock.close()
            return
        threading.Thread(target=_talk, args=(sock, talk), daemon=True).start()


def _talk(sock: socket.socket, talk: Callable[[socket.socket], None]) -> None:
    with sock, contextlib.suppress(OSError):
        sock.settimeout(30)
        talk(sock)


def echo(sock: socket.socket) -> None:
    """Echo data until the end of the stream."""
    while data := sock.recv(65536):
        sock.sendall(data)
