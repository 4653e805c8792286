"""Socket options: the guide's page 14, and options of other families."""

from __future__ import annotations

import errno
import socket as stdlib
import struct

import pytest

import vsockets
from vsockets import (
    AF_VSOCK,
    SO_VM_SOCKETS_CONNECT_TIMEOUT,
    SO_VMCI_BUFFER_MAX_SIZE,
    SO_VMCI_BUFFER_MIN_SIZE,
    SO_VMCI_BUFFER_SIZE,
    SO_VMCI_PEER_HOST_VM_ID,
    SO_VMCI_TRUSTED,
)

from .conftest import ANY, Pair


def sizes(sock: vsockets.socket) -> tuple[int, int, int]:
    options = (SO_VMCI_BUFFER_SIZE, SO_VMCI_BUFFER_MIN_SIZE, SO_VMCI_BUFFER_MAX_SIZE)
    size, minimum, maximum = (sock.getsockopt(AF_VSOCK, option) for option in options)
    return size, minimum, maximum


def test_default_sizes_of_the_guide() -> None:
    with vsockets.socket() as sock:
        assert sizes(sock) == (65536, 128, 262144)


def test_the_guides_example() -> None:
    with vsockets.socket() as sock:
        sock.setsockopt(AF_VSOCK, SO_VMCI_BUFFER_SIZE, struct.pack("=Q", 32768))
        assert sock.getsockopt(AF_VSOCK, SO_VMCI_BUFFER_SIZE, 8) == struct.pack("=Q", 32768)
        assert sock.getsockopt(AF_VSOCK, SO_VMCI_BUFFER_SIZE) == 32768


def test_sizes_are_clamped() -> None:
    with vsockets.socket() as sock:
        sock.setsockopt(AF_VSOCK, SO_VMCI_BUFFER_SIZE, 1 << 40)
        assert sizes(sock) == (262144, 128, 262144)
        sock.setsockopt(AF_VSOCK, SO_VMCI_BUFFER_SIZE, 1)
        assert sizes(sock) == (128, 128, 262144)
        sock.setsockopt(AF_VSOCK, SO_VMCI_BUFFER_MIN_SIZE, 4096)
        assert sizes(sock) == (4096, 4096, 262144)
        sock.setsockopt(AF_VSOCK, SO_VMCI_BUFFER_MAX_SIZE, 1 << 33)
        sock.setsockopt(AF_VSOCK, SO_VMCI_BUFFER_SIZE, 1 << 32)
        assert sizes(sock) == (1 << 32, 4096, 1 << 33)


@pytest.mark.parametrize("value", [-1, 1 << 64, b"1234", b"123456789"])
def test_sizes_are_64_bits(value: int | bytes) -> None:
    with vsockets.socket() as sock, pytest.raises(OSError) as caught:
        sock.setsockopt(AF_VSOCK, SO_VMCI_BUFFER_SIZE, value)
    assert caught.value.errno == errno.EINVAL


def connected(
    host: vsockets.Attachment,
    guest: vsockets.Attachment,
    server_options: dict[int, int],
    client_options: dict[int, int],
) -> tuple[vsockets.socket, vsockets.socket]:
    with vsockets.socket(context=host) as server:
        for option, value in server_options.items():
            server.setsockopt(AF_VSOCK, option, value)
        server.bind(ANY)
        server.listen()
        client = vsockets.socket(context=guest)
        for option, value in client_options.items():
            client.setsockopt(AF_VSOCK, option, value)
        try:
            client.connect(server.getsockname())
        except OSError:
            client.close()
            raise
        return client, server.accept()[0]


@pytest.mark.parametrize(
    ("server_options", "client_options", "agreed"),
    [
        ({}, {}, 65536),
        ({}, {SO_VMCI_BUFFER_SIZE: 8192}, 8192),  # the client proposes
        ({SO_VMCI_BUFFER_SIZE: 8192}, {}, 65536),
        ({SO_VMCI_BUFFER_MAX_SIZE: 16384}, {}, 16384),  # too large for the server: its own
        ({SO_VMCI_BUFFER_MIN_SIZE: 100_000}, {}, 100_000),
    ],
)
def test_negotiation(
    host: vsockets.Attachment,
    guest: vsockets.Attachment,
    server_options: dict[int, int],
    client_options: dict[int, int],
    agreed: int,
) -> None:
    client, accepted = connected(host, guest, server_options, client_options)
    with client, accepted:
        assert sizes(client)[0] == sizes(accepted)[0] == agreed


def test_negotiation_without_a_common_size_fails(
    host: vsockets.Attachment, guest: vsockets.Attachment
) -> None:
    server_options = {SO_VMCI_BUFFER_MAX_SIZE: 1024}
    client_options = {SO_VMCI_BUFFER_MIN_SIZE: 4096}
    with pytest.raises(OSError) as caught:
        connected(host, guest, server_options, client_options)
    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize("size", [1024, 32768])
def test_small_buffer_blocks_the_sender(
    host: vsockets.Attachment, guest: vsockets.Attachment, size: int
) -> None:
    client, accepted = connected(host, guest, {}, {SO_VMCI_BUFFER_SIZE: size})
    with client, accepted:
        for sender in (client, accepted):
            sender.setblocking(False)
            sent = 0
            with pytest.raises(BlockingIOError):
                while True:
                    sent += sender.send(bytes(256))
            assert sent < 65536


def test_sizes_set_on_a_listening_socket(
    host: vsockets.Attachment, guest: vsockets.Attachment
) -> None:
    with vsockets.create_server(ANY, context=host) as server:
        server.setsockopt(AF_VSOCK, SO_VMCI_BUFFER_MAX_SIZE, 2048)
        with vsockets.create_connection(server.getsockname(), context=guest) as client:
            assert sizes(client)[0] == 2048


def test_options_of_other_families_are_ignored(stream: Pair) -> None:
    for sock in (stream.client, stream.server):
        sock.setsockopt(stdlib.IPPROTO_TCP, stdlib.TCP_NODELAY, 1)
        assert sock.getsockopt(stdlib.IPPROTO_TCP, stdlib.TCP_NODELAY) == 1
        assert sock.getsockopt(stdlib.IPPROTO_TCP, stdlib.TCP_NODELAY, 4) == struct.pack("i", 1)
        assert sock.getsockopt(stdlib.IPPROTO_TCP, stdlib.TCP_KEEPIDLE) == 0
        assert sock.getsockopt(stdlib.IPPROTO_TCP, stdlib.TCP_KEEPIDLE, 4) == bytes(4)
        sock.setsockopt(stdlib.IPPROTO_IP, stdlib.IP_TOS, 16)
        sock.setsockopt(stdlib.SOL_SOCKET, stdlib.SO_KEEPALIVE, 1)
        sock.setsockopt(stdlib.SOL_SOCKET, stdlib.SO_REUSEADDR, 1)
        sock.setsockopt(stdlib.SOL_SOCKET, stdlib.SO_LINGER, struct.pack("ii", 1, 0))
    stream.client.send(b"still works")
    assert stream.accepted.recv(100) == b"still works"


def test_socket_options_report_a_vsocket(stream: Pair) -> None:
    for sock, listening in ((stream.server, 1), (stream.client, 0), (stream.accepted, 0)):
        assert sock.getsockopt(stdlib.SOL_SOCKET, stdlib.SO_DOMAIN) == AF_VSOCK
        assert sock.getsockopt(stdlib.SOL_SOCKET, stdlib.SO_TYPE) == stdlib.SOCK_STREAM
        assert sock.getsockopt(stdlib.SOL_SOCKET, stdlib.SO_PROTOCOL) == 0
        assert sock.getsockopt(stdlib.SOL_SOCKET, stdlib.SO_ACCEPTCONN) == listening
        assert sock.getsockopt(stdlib.SOL_SOCKET, stdlib.SO_ERROR) == 0
    raw = stream.accepted.getsockopt(stdlib.SOL_SOCKET, stdlib.SO_PEERCRED, 12)
    assert struct.unpack("iII", raw) == stream.accepted.peer_credentials()


def test_unknown_vsockets_option() -> None:
    with vsockets.socket() as sock:
        for call in (
            lambda: sock.setsockopt(AF_VSOCK, 99, 1),
            lambda: sock.getsockopt(AF_VSOCK, 99),
            lambda: sock.setsockopt(AF_VSOCK, SO_VMCI_TRUSTED, 1),
        ):
            with pytest.raises(OSError) as caught:
                call()
            assert caught.value.errno == errno.ENOPROTOOPT


def test_peer_vm_id_and_trust(stream: Pair, guest: vsockets.Attachment) -> None:
    assert stream.accepted.getsockopt(AF_VSOCK, SO_VMCI_PEER_HOST_VM_ID) == guest.cid
    # The same user as the virtual machine's owner: "considered trusted" (guide page 24).
    assert stream.client.getsockopt(AF_VSOCK, SO_VMCI_TRUSTED) == 1
    with vsockets.socket() as sock, pytest.raises(OSError) as caught:
        sock.getsockopt(AF_VSOCK, SO_VMCI_PEER_HOST_VM_ID)
    assert caught.value.errno == errno.ENOTCONN


def test_connect_timeout_option() -> None:
    with vsockets.socket() as sock:
        assert sock.getsockopt(AF_VSOCK, SO_VM_SOCKETS_CONNECT_TIMEOUT, 16) == struct.pack(
            "=qq", 2, 0
        )
        sock.setsockopt(AF_VSOCK, SO_VM_SOCKETS_CONNECT_TIMEOUT, struct.pack("=qq", 0, 250_000))
        assert sock.getsockopt(AF_VSOCK, SO_VM_SOCKETS_CONNECT_TIMEOUT, 16) == struct.pack(
            "=qq", 0, 250_000
        )
        for wrong, code in ((5, errno.EINVAL), (struct.pack("=qq", 0, 10**6), errno.ERANGE)):
            with pytest.raises(OSError) as caught:
                sock.setsockopt(AF_VSOCK, SO_VM_SOCKETS_CONNECT_TIMEOUT, wrong)
            assert caught.value.errno == code


def test_datagram_sockets_have_no_vsocket_options(host: vsockets.Attachment) -> None:
    with vsockets.socket(type=stdlib.SOCK_DGRAM, context=host) as sock:
        with pytest.raises(OSError) as caught:
            sock.setsockopt(AF_VSOCK, SO_VMCI_BUFFER_SIZE, 4096)
        assert caught.value.errno == errno.EOPNOTSUPP
