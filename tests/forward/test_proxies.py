"""Proxy protocols: valid requests in any pieces, and invalid ones."""

from __future__ import annotations

import ipaddress
import itertools
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vsockets.forward.http_connect import HttpConnect
from vsockets.forward.limits import FORWARD_PROXY_REQUEST_MAX_BYTES
from vsockets.forward.proxies import BadRequest, ProxyProtocol, ProxyRefusal, Socks5

PROTOCOLS = (HttpConnect, Socks5)


def feed(request: ProxyProtocol, data: bytes, cuts: list[int]) -> bytes:
    """Pass ``data`` in pieces until the target is known; return the answers."""
    answer = b""
    places = sorted({min(cut, len(data)) for cut in cuts} | {0, len(data)})
    for begin, end in itertools.pairwise(places):
        if request.target is not None:
            return answer
        answer += request.receive(data[begin:end])
    return answer


cuts = st.lists(st.integers(0, 200), max_size=6)
names = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?(\.[a-z]{2,8}){0,3}", fullmatch=True)
ports = st.integers(0, 65535)


@given(names, ports, cuts)
def test_http_connect_request_is_parsed(name: str, port: int, cuts: list[int]) -> None:
    request = HttpConnect()
    head = f"CONNECT {name}:{port} HTTP/1.1\r\nHost: {name}:{port}\r\nUser-Agent: x\r\n\r\n"
    assert feed(request, head.encode(), cuts) == b""
    assert request.target == (name, port)
    assert request.granted().startswith(b"HTTP/1.1 200 ")
    assert request.rest == b""


def test_bytes_after_http_connect_belong_to_the_stream() -> None:
    request = HttpConnect()
    request.receive(b"CONNECT [::1]:22 HTTP/1.1\r\nHost: x\r\n\r\nSSH-2.0-")
    assert request.target == ("::1", 22)
    assert request.granted().endswith(b"\r\n\r\n")
    assert request.rest == b"SSH-2.0-"


@pytest.mark.parametrize("why", ProxyRefusal)
def test_http_refusal_has_status_and_text(why: ProxyRefusal) -> None:
    request = HttpConnect()
    request.receive(b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n")
    answer = request.refused(why)
    assert answer[9:12] in (b"403", b"502", b"503", b"504")
    assert why.value.encode() in answer


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET http://a/ HTTP/1.1\r\nHost: a\r\n\r\n", b"405"),
        (b"CONNECT a HTTP/1.1\r\nHost: a\r\n\r\n", b"400"),
        (b"CONNECT a:b HTTP/1.1\r\nHost: a\r\n\r\n", b"400"),
        (b"CONNECT a:70000 HTTP/1.1\r\nHost: a\r\n\r\n", b"400"),
        (b"CONNECT a@b:80 HTTP/1.1\r\nHost: a\r\n\r\n", b"400"),
        (b"CONNECT a:80 HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\n", b"400"),
        (b"CONNECT a:80 HTTP/1.1\r\n\r\n", b"400"),
        (b"\x05\x01\x00\r\n\r\n", b"400"),
        (b"C" * (FORWARD_PROXY_REQUEST_MAX_BYTES + 1), b"431"),
    ],
)
def test_invalid_http_request_is_answered(request_: bytes, status: bytes) -> None:
    with pytest.raises(BadRequest) as caught:
        HttpConnect().receive(request_)
    assert caught.value.answer.split()[1] == status


def socks_request(host: str, port: int) -> bytes:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        described = b"\x03" + bytes([len(host)]) + host.encode()
    else:
        described = bytes([{4: 1, 6: 4}[address.version]]) + address.packed
    return b"\x05\x01\x00" + described + port.to_bytes(2, "big")


@given(names | st.ip_addresses().map(str), ports, st.binary(max_size=9), cuts)
def test_socks_request_is_parsed(host: str, port: int, behind: bytes, cuts: list[int]) -> None:
    request = Socks5()
    greeting = b"\x05\x02\x02\x00"
    assert feed(request, greeting, cuts) == b"\x05\x00"
    assert request.receive(socks_request(host, port) + behind) == b""
    assert request.target == (host, port)
    assert request.rest == behind
    assert request.granted() == b"\x05\x00\x00\x01" + bytes(6)


def test_pipelined_socks_request_is_parsed() -> None:
    request = Socks5()
    assert request.receive(b"\x05\x01\x00" + socks_request("a.b", 80) + b"early") == b"\x05\x00"
    assert request.target == ("a.b", 80)
    assert request.rest == b"early"


@pytest.mark.parametrize(
    ("data", "answer"),
    [
        (b"\x04\x01\x00\x50\x7f\x00\x00\x01\x00", b""),
        (b"\x05\x01\x02", b"\x05\xff"),
        (b"\x05\x01\x00\x05\x02\x00\x01" + bytes(6), b"\x05\x07\x00\x01" + bytes(6)),
        (b"\x05\x01\x00\x05\x01\x00\x09" + bytes(6), b"\x05\x08\x00\x01" + bytes(6)),
        (b"\x05\x01\x00\x05\x01\x00\x03\x00\x00\x50", b"\x05\x01\x00\x01" + bytes(6)),
        (b"\x05\x01\x00\x05\x01\x00\x03\x02\xff\xfe\x00\x50", b"\x05\x01\x00\x01" + bytes(6)),
        (b"\x05\x01\x00\x04\x01\x00\x03\x02", b""),
    ],
)
def test_invalid_socks_request_is_answered(data: bytes, answer: bytes) -> None:
    with pytest.raises(BadRequest) as caught:
        Socks5().receive(data)
    assert caught.value.answer == answer


@pytest.mark.parametrize("why", ProxyRefusal)
def test_socks_refusal_has_a_code(why: ProxyRefusal) -> None:
    assert Socks5().refused(why)[1] in (1, 2, 4, 5)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@given(pieces=st.lists(st.binary(max_size=300), max_size=8))
def test_arbitrary_bytes_are_refused_or_incomplete(
    protocol: Callable[[], ProxyProtocol], pieces: list[bytes]
) -> None:
    request = protocol()
    for piece in pieces:
        if request.target is not None:
            break
        try:
            assert len(request.receive(piece)) <= 2
        except BadRequest as error:
            answer = error.answer
            break
    else:
        answer = b""
    assert len(answer) < 1000
    if request.target is not None:
        host, port = request.target
        assert host
        assert 0 <= port <= 65535
        assert request.granted()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_request_size_is_limited(protocol: Callable[[], ProxyProtocol]) -> None:
    request = protocol()
    piece = {HttpConnect: b"CONNECT a:1 HTTP/1.1\r\nX: ", Socks5: b"\x05\xff"}[protocol]  # type: ignore[index]
    with pytest.raises(BadRequest):
        request.receive(piece)
        for _ in range(FORWARD_PROXY_REQUEST_MAX_BYTES // 100 + 2):
            request.receive(b"a" * 100)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_end_of_stream_before_the_request_is_refused(protocol: Callable[[], ProxyProtocol]) -> None:
    with pytest.raises(BadRequest):
        protocol().receive(b"")
