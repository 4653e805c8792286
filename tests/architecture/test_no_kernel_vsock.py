"""The safety catch of tests/no_kernel_vsock.py holds, here and in every child."""

from __future__ import annotations

import _socket
import errno
import subprocess
import sys
import threading

import pytest

AF_VSOCK = 40  # the kernel's; raw sockets of it, past everything of ours
KINDS = [_socket.SOCK_STREAM, _socket.SOCK_DGRAM, _socket.SOCK_SEQPACKET]

ATTEMPT = """
import _socket
for make in _socket.socket, _socket.socketpair:
    try:
        make(40, 1)
    except OSError as error:
        print(error.errno)
"""


@pytest.mark.parametrize("kind", KINDS)
def test_this_process_cannot_make_one(kind: int) -> None:
    with pytest.raises(OSError) as refusal:
        _socket.socket(AF_VSOCK, kind)
    assert refusal.value.errno == errno.ENOSYS
    with pytest.raises(OSError) as refusal:
        _socket.socketpair(AF_VSOCK, kind)
    assert refusal.value.errno == errno.ENOSYS


def test_no_thread_can_create_a_socket() -> None:
    errors: list[int | None] = []

    def attempt() -> None:
        try:
            _socket.socket(AF_VSOCK, _socket.SOCK_STREAM)
        except OSError as error:
            errors.append(error.errno)

    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    assert errors == [errno.ENOSYS]


def test_no_child_can_create_a_socket() -> None:
    child = subprocess.run(
        [sys.executable, "-c", ATTEMPT], capture_output=True, text=True, check=True
    )
    assert child.stdout.split() == [str(errno.ENOSYS)] * 2


def test_other_families_are_let_through() -> None:
    one, other = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_STREAM)
    one.close()
    other.close()
    _socket.socket(_socket.AF_INET, _socket.SOCK_STREAM).close()
