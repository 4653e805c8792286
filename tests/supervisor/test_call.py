"""Copies of a caller's descriptors."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from types import SimpleNamespace
from typing import cast

import pytest

from vsockets._linux.sockets import cookie_of
from vsockets.supervisor.call import Call, OtherSocket, Services
from vsockets.supervisor.interception import CallInterrupted, InterceptedCall
from vsockets.supervisor.sockets import Endpoint


class Intercepted(InterceptedCall):
    """A call of this process, whose first argument is ``fd``."""

    def __init__(self, fd: int, waits: bool = True) -> None:
        super().__init__(0, os.getpid(), 0, 0, 0, (fd, 0, 0, 0, 0, 0))
        self._waits = waits

    def is_waiting(self) -> bool:
        return self._waits


@pytest.fixture
def disposed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The descriptors that are closed by another thread."""
    found: list[int] = []
    monkeypatch.setattr("vsockets.supervisor.call.dispose_of_copy", found.append)
    yield found
    for fd in found:
        os.close(fd)


def call(fd: int, waits: bool = True) -> Call:
    interceptor = SimpleNamespace(duplicate=lambda pid, number: os.dup(number))
    services = cast(Services, SimpleNamespace(interceptor=interceptor))
    return Call(services, Intercepted(fd, waits))


def endpoint_of(sock: socket.socket, cookie: int) -> Endpoint:
    return Endpoint(socket.SOCK_STREAM, os.fstat(sock.fileno()).st_ino, cookie)


@pytest.mark.parametrize("is_new", [True, False])
def test_a_copy_of_the_expected_socket_is_returned(disposed: list[int], is_new: bool) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        endpoint = endpoint_of(sock, 0 if is_new else cookie_of(sock))
        copy = call(sock.fileno()).duplicate(endpoint)
        assert endpoint.cookie == cookie_of(sock) == cookie_of(copy)
        copy.close()
    assert disposed == []


@pytest.mark.parametrize("is_new", [True, False])
@pytest.mark.parametrize("kind", ["socket", "file"])
def test_closing_another_file_cannot_block(disposed: list[int], kind: str, is_new: bool) -> None:
    """Closing a file of FUSE, for example, waits for a process of the user."""
    with socket.socket(socket.AF_UNIX) as expected, socket.socket() as sock, open("/dev/null") as f:
        endpoint = endpoint_of(expected, 0 if is_new else cookie_of(expected))
        other = sock.fileno() if kind == "socket" else f.fileno()
        with pytest.raises(OtherSocket):
            call(other).duplicate(endpoint)
        assert len(disposed) == 1
        assert os.path.sameopenfile(disposed[0], other)


def test_the_descriptor_of_an_interrupted_call_is_unproven(disposed: list[int]) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        with pytest.raises(CallInterrupted):
            call(sock.fileno(), waits=False).duplicate(endpoint_of(sock, cookie_of(sock)))
        assert len(disposed) == 1


@pytest.mark.parametrize("code", [errno.EBADF, errno.EPERM])
def test_a_descriptor_that_cannot_be_copied_is_another_socket(code: int) -> None:
    """Often a TCP socket of a process that cannot be read: the kernel performs the call."""

    def fail(pid: int, number: int) -> int:
        raise OSError(code, os.strerror(code))

    services = cast(Services, SimpleNamespace(interceptor=SimpleNamespace(duplicate=fail)))
    with socket.socket(socket.AF_UNIX) as sock, pytest.raises(OtherSocket) as caught:
        Call(services, Intercepted(sock.fileno())).duplicate(endpoint_of(sock, cookie_of(sock)))
    assert caught.value.errno == code
