"""The sans-IO client: the fields of each request, and the values and errors of replies."""

from __future__ import annotations

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vsockets.model.buffers import BufferSizes
from vsockets.model.constants import VMADDR_CID_ANY, VMADDR_PORT_ANY
from vsockets.model.rates import Moved
from vsockets.protocol import PADDING, REQUEST_SIZE, Op, Record, Request, RequestFlag, Role, client

SIZES = BufferSizes(65_536, 128, 262_144)
COOKIE, INODE, SECRET = 0x0123_4567_89AB_CDEF, 0x1032_5476_98BA_DCFE, 0x1111_2222_3333_4444
ANY = VMADDR_PORT_ANY
UNPRIVILEGED = RequestFlag.UNPRIVILEGED

#: Each request, and its fields as the protocol's first version has them.
REQUESTS = {
    "bind": (
        client.bind((3, 5000), sizes=SIZES, cookie=COOKIE),
        Request(Op.BIND, 0, 3, 5000, 0, 0, 0, *SIZES, COOKIE, 0),
    ),
    "bind_datagram": (
        client.bind_datagram((3, 5000)),
        Request(Op.BIND_DATAGRAM, 0, 3, 5000, 0, 0, 0, 0, 0, 0, 0, 0),
    ),
    "bind_datagram, unprivileged": (
        client.bind_datagram((3, 700), unprivileged=True),
        Request(Op.BIND_DATAGRAM, UNPRIVILEGED, 3, 700, 0, 0, 0, 0, 0, 0, 0, 0),
    ),
    "bind_socket": (
        client.bind_socket((3, 5000), sizes=SIZES, secret=SECRET),
        Request(Op.BIND_SOCKET, 0, 3, 5000, 0, 0, 0, *SIZES, SECRET, 0),
    ),
    "bind_socket, unprivileged": (
        client.bind_socket((3, 700), sizes=SIZES, secret=SECRET, unprivileged=True),
        Request(Op.BIND_SOCKET, UNPRIVILEGED, 3, 700, 0, 0, 0, *SIZES, SECRET, 0),
    ),
    "listen": (
        client.listen(128, SIZES),
        Request(Op.LISTEN, 0, 0, 0, 0, 0, 128, *SIZES, 0, 0),
    ),
    "connect": (
        client.connect((2, 5000), sizes=SIZES, cookie=COOKIE),
        Request(Op.CONNECT, 0, 0, 0, 2, 5000, 0, *SIZES, COOKIE, 0),
    ),
    "connect, bound": (
        client.connect((2, 5000), sizes=SIZES, cookie=COOKIE, secret=SECRET),
        Request(Op.CONNECT, 0, 0, 0, 2, 5000, 0, *SIZES, COOKIE, SECRET),
    ),
    "connect_from_guest": (
        client.connect_from_guest(1027, (2, 5000), SIZES),
        Request(Op.CONNECT, 0, VMADDR_CID_ANY, 1027, 2, 5000, 0, *SIZES, 0, 0),
    ),
    "update": (
        client.update(SIZES),
        Request(Op.UPDATE, 0, 0, 0, 0, 0, 0, *SIZES, 0, 0),
    ),
    "count": (
        client.count(Moved(7, 9), cookie=COOKIE, inode=INODE),
        Request(Op.COUNT, 0, 0, 0, 0, 0, 0, 7, 9, 0, COOKIE, INODE),
    ),
    "count, of a device": (
        client.count(Moved(7, 9), local=(3, 1024), peer=(2, 5000)),
        Request(Op.COUNT, 0, 3, 1024, 2, 5000, 0, 7, 9, 0, 0, 0),
    ),
    "resize": (
        client.resize(65_536, cookie=COOKIE, inode=INODE),
        Request(Op.RESIZE, 0, 0, 0, 0, 0, 0, 65_536, 0, 0, COOKIE, INODE),
    ),
    "route": (
        client.route((2, 5000)),
        Request(Op.ROUTE, 0, VMADDR_CID_ANY, ANY, 2, 5000, 0, 0, 0, 0, 0, 0),
    ),
    "catch_all": (
        client.catch_all(),
        Request(Op.CATCH_ALL, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0),
    ),
    "query": (
        client.query(cookie=COOKIE, inode=INODE),
        Request(Op.QUERY, 0, 0, 0, 0, 0, 0, 0, 0, 0, COOKIE, INODE),
    ),
    "local_cid": (
        client.local_cid(),
        Request(Op.LOCAL_CID, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0),
    ),
    "local_cid, trust": (
        client.local_cid(4, cookie=COOKIE),
        Request(Op.LOCAL_CID, 0, 0, 0, 4, 0, 0, 0, 0, 0, COOKIE, 0),
    ),
    "capture": (
        client.capture(3, port=ANY, limit=1000),
        Request(Op.CAPTURE, 0, 0, 0, 3, ANY, 0, 1000, 0, 0, 0, 0),
    ),
    "settle": (
        client.settle((3, 5000), (2, 1027), size=65_536),
        Request(Op.SETTLE, 0, 3, 5000, 2, 1027, 0, 65_536, 0, 0, 0, 0),
    ),
    "settle, refused": (
        client.settle((3, 5000), (2, 1027), error=errno.ECONNRESET),
        Request(Op.SETTLE, 0, 3, 5000, 2, 1027, errno.ECONNRESET, 0, 0, 0, 0, 0),
    ),
}

u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)


@pytest.mark.parametrize("name", REQUESTS)
def test_request_has_the_fields_of_its_operation(name: str) -> None:
    data, expected = REQUESTS[name]
    assert Request.decode(data) == expected


def test_every_operation_has_a_request() -> None:
    assert {expected.op for _, expected in REQUESTS.values()} == set(Op)


@given(st.tuples(u32, u32), st.builds(BufferSizes, u64, u64, u64), u64, u64, st.booleans())
def test_connect_equals_an_encoded_request(
    peer: tuple[int, int], sizes: BufferSizes, cookie: int, secret: int, polling: bool
) -> None:
    data = client.connect(peer, sizes=sizes, cookie=cookie, secret=secret, polling=polling)
    flags = RequestFlag.POLLING if polling else 0
    expected = Request(Op.CONNECT, flags, 0, 0, *peer, 0, *sizes, cookie, secret)
    assert data[:REQUEST_SIZE] == expected.encode()
    assert data[REQUEST_SIZE:] == (PADDING if polling else b"")


def test_reply_is_returned_as_a_record() -> None:
    record = Record(0, RequestFlag.NAMED, 2, 5000, 3, 1024, Role.CONNECTED, 1, 2, 3, *SIZES)
    reply = client.decode_reply(record.encode())
    assert reply == record
    assert (reply.local, reply.peer, reply.sizes) == ((2, 5000), (3, 1024), SIZES)
    assert reply.is_named and not Record(0).is_named


@pytest.mark.parametrize("datagram", [False, True])
def test_trust_is_reported_for_one_type_of_socket(datagram: bool) -> None:
    flag = RequestFlag.TRUSTED_DATAGRAM if datagram else RequestFlag.TRUSTED_STREAM
    assert Record(0, flag).is_trusted(datagram=datagram)
    assert not Record(0, flag).is_trusted(datagram=not datagram)


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", errno.ENETDOWN),
        (b"x", errno.EPROTO),
        (bytes(64), errno.EPROTO),
        (Record(errno.ECONNRESET).encode(), errno.ECONNRESET),
    ],
)
def test_reply_without_success_raises_its_errno(data: bytes, code: int) -> None:
    for decode in (client.decode_reply, client.decode_notification, client.decode_handoff):
        with pytest.raises(OSError) as raised:
            decode(data)
        assert raised.value.errno == code


def test_missing_descriptor_is_reported_as_emfile() -> None:
    assert client.missing_descriptor().errno == errno.EMFILE


@pytest.mark.parametrize("polling", [False, True])
@pytest.mark.parametrize("ok_line", [False, True])
def test_pending_connect_has_the_clients_address_and_sizes(polling: bool, ok_line: bool) -> None:
    flags = RequestFlag.POLLING * polling | RequestFlag.OK_LINE * ok_line
    record = Record(0, flags, 3, 5000, 2, 1027, Role.CONNECTED, 1, 2, 3, *SIZES)
    expected = client.PendingConnect(5000, (2, 1027), SIZES, polling, ok_line)
    assert client.decode_handoff(record.encode()) == expected


def test_messages_on_a_devices_link() -> None:
    capture = Record(0, 0, 3, 5000, role=Role.CAPTURE, size=1000)
    assert client.decode_handoff(capture.encode()) == client.CaptureStart(5000, 1000)
    buffer = Record(0, 0, 3, 5000, 2, 1027, Role.BUFFER, size=65_536)
    expected = client.BufferResized(5000, (2, 1027), 65_536)
    assert client.decode_notification(buffer.encode()) == expected
    for role, is_listening in ((Role.LISTENING, True), (Role.NOT_LISTENING, False)):
        port = Record(0, 0, 2, 5000, role=role)
        expected_port = client.PortAvailability(5000, is_listening)
        assert client.decode_notification(port.encode()) == expected_port


def test_notification_of_another_role_raises_eproto() -> None:
    with pytest.raises(OSError, match="role 3") as raised:
        client.decode_notification(Record(0, role=Role.CONNECTED).encode())
    assert raised.value.errno == errno.EPROTO
