"""Locators: parsing, rejection with a reason, and formatting that round-trips."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vsockets.model.locator import (
    Exec,
    Inet,
    Inherited,
    Proxy,
    Stdio,
    Unix,
    Vsock,
    VsockFolder,
    VsockMux,
    parse_locator,
)

ANY = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("text", "locator"),
    [
        ("vsock:3:22", Vsock(3, 22)),
        ("vsock:host:1024", Vsock(2, 1024)),
        ("vsock::any", Vsock(ANY, ANY)),
        ("vsock-dgram:any:5000", Vsock(ANY, 5000, datagram=True)),
        ("vsock-mux:/run/v.sock:52", VsockMux("/run/v.sock", 52)),
        ("vsock-mux:/with:colon:52", VsockMux("/with:colon", 52)),
        ("vsock-mux/run/v.sock:52", VsockMux("/run/v.sock", 52)),
        ("vsock-mux/run/v.sock", VsockMux("/run/v.sock", 22)),
        ("hyperkit:/run/vm:3:52", VsockFolder("hyperkit", "/run/vm", 3, 52)),
        ("hyperkit:/with:colon::52", VsockFolder("hyperkit", "/with:colon", 2, 52)),
        ("vsock-emu:/tmp/v:host:52", VsockFolder("vsock-emu", "/tmp/v", 2, 52)),
        ("tcp:example.org:80", Inet("example.org", 80)),
        ("tcp::80", Inet("", 80)),
        ("tcp:[::1]:80", Inet("::1", 80)),
        ("udp:10.0.0.1:53", Inet("10.0.0.1", 53, datagram=True)),
        ("unix:/run/x.sock", Unix("/run/x.sock")),
        ("unix:@abstract", Unix("@abstract")),
        ("unix-dgram:x", Unix("x", datagram=True)),
        ("exec:ls -l 'a b'", Exec(("ls", "-l", "a b"))),
        ("stdio:", Stdio()),
        ("fd:3", Inherited("3")),
        ("fd:web", Inherited("web")),
        ("http-proxy:", Proxy("http-proxy")),
        ("socks5:", Proxy("socks5")),
    ],
)
def test_valid_locators(text: str, locator: object) -> None:
    assert parse_locator(text) == locator
    assert parse_locator(str(locator)) == locator


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "expected an address such as"),
        ("vsock", "expected an address such as"),
        ("ftp:host:21", "expected an address such as"),
        ("vsock:22", "expected vsock:CID:PORT"),
        ("vsock:-1:22", "CID '-1'"),
        ("vsock:3:4294967296", "port '4294967296'"),
        ("tcp:80", "expected tcp:HOST:PORT"),
        ("tcp:host:65536", "port '65536'"),
        ("tcp:host:http", "port 'http'"),
        ("tcp:::1:80", "in brackets"),
        ("tcp:a b:80", "host 'a b'"),
        ("unix:", "expected a path"),
        ("unix:a\0b", "expected a path"),
        ("vsock-mux:52", "expected vsock-mux:PATH:PORT"),
        ("vsock-mux:/x:any", "no wildcard"),
        ("vsock-mux/x:any", "no wildcard"),
        ("hyperkit:52", "expected hyperkit:DIR:CID:PORT"),
        ("hyperkit::3:52", "expected a path"),
        ("vsock-emu:/x:any:52", "no wildcard"),
        ("vsock-emu:/x:3:any", "no wildcard"),
        ("exec:", "expected a command"),
        ("exec:'", "No closing quotation"),
        ("stdio:x", "expected nothing after"),
        ("fd:", "number or name"),
    ],
)
def test_invalid_locators_are_refused_with_a_reason(text: str, expected: str) -> None:
    with pytest.raises(ValueError, match=r"expected|quotation") as caught:
        parse_locator(text)
    assert expected in str(caught.value)
    assert repr(text) in str(caught.value)


def test_socket_names_in_folders() -> None:
    assert VsockFolder("hyperkit", "/d", 3, 4096).socket_path == "/d/00000003.00001000"
    assert VsockFolder("vsock-emu", "/d", 3, 4096).socket_path == "/d/3.4096"


SCHEMES = r"(vsock|tcp|udp|unix|exec|vsock-mux|hyperkit|vsock-emu|fd):"


@given(st.text() | st.from_regex(rf"({SCHEMES}|vsock-mux/).{{0,20}}"))
def test_any_text_is_a_locator_or_a_value_error(text: str) -> None:
    try:
        locator = parse_locator(text)
    except ValueError:
        return
    assert parse_locator(str(locator)) == locator
