"""Allow lists of contexts and of hosts."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vsockets.forward.settings import HostRule, HostRules, PeerRule, admits_peer, check_host


def admits(rules: tuple[str, ...], peer: tuple[int, int]) -> bool:
    return admits_peer([PeerRule.parse(rule) for rule in rules], peer)


def test_without_rules_every_context_may_connect() -> None:
    assert admits((), (3, 1024))


@pytest.mark.parametrize(
    ("rule", "peer", "answer"),
    [
        ("3", (3, 5), True),
        ("3", (4, 5), False),
        ("3:1023", (3, 1023), True),
        ("3:1023", (3, 1024), False),
        ("3:1-1023", (3, 1), True),
        ("3:1-1023", (3, 1024), False),
        ("any:1-1023", (77, 1000), True),
        ("any:1-1023", (77, 2000), False),
    ],
)
def test_peer_rule_admits_its_addresses(rule: str, peer: tuple[int, int], answer: bool) -> None:
    assert admits((rule,), peer) is answer
    assert admits(("9", rule), peer) is answer


@pytest.mark.parametrize("text", ["", "x", "3:", "3:5-4", "3:1-2-3", "-1"])
def test_invalid_peer_rule_is_rejected(text: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        PeerRule.parse(text)


def leads(rules: tuple[str, ...], name: str, address: str, port: int = 443) -> bool:
    hosts = HostRules(HostRule.parse(rule) for rule in rules)
    if name and not hosts.admits_name(name, port):
        return False
    return hosts.admits_address(name, ipaddress.ip_address(address), port)


PUBLIC, PRIVATE, LOOPBACK, MAPPED = "93.184.216.34", "10.1.2.3", "127.0.0.1", "::ffff:127.0.0.1"


@pytest.mark.parametrize(
    ("rule", "name", "address", "answer"),
    [
        ("example.org", "example.org", PUBLIC, True),
        ("example.org", "EXAMPLE.org.", PUBLIC, True),
        ("example.org", "sub.example.org", PUBLIC, False),
        ("example.org:443", "example.org", PUBLIC, True),
        ("example.org:80", "example.org", PUBLIC, False),
        ("example.org", "example.org", PRIVATE, True),  # named exactly
        ("*.example.org", "a.example.org", PUBLIC, True),
        ("*.example.org", "example.org", PUBLIC, False),
        ("*.example.org", "a.example.org", PRIVATE, False),  # its name server could answer anything
        ("*.example.org", "a.example.org", LOOPBACK, False),
        ("*.example.org", "a.example.org", MAPPED, False),
        ("*", "whatever.net", PUBLIC, True),
        ("*", "whatever.net", "169.254.169.254", False),
        ("*", "", PUBLIC, True),
        ("*", "", LOOPBACK, False),
        ("example.org", "", PUBLIC, False),
        ("127.0.0.1", "", LOOPBACK, True),
        ("127.0.0.1", "", MAPPED, True),
        ("127.0.0.1:80", "", LOOPBACK, False),
        ("10.0.0.0/8:443", "", PRIVATE, True),
        ("10.0.0.0/8", "whatever.net", PRIVATE, False),
        ("[::1]:443", "", "::1", True),
        ("[fd00::]/8", "", "fd12::1", True),
        ("*", "", "224.0.0.1", False),
        ("*", "", "64:ff9b::a9fe:a9fe", False),  # 169.254.169.254, by NAT64
        ("*.example.org", "a.example.org", "2002:a9fe:a9fe::", False),  # by 6to4
        ("*.example.org", "a.example.org", "::7f00:1", False),
        ("[64:ff9b::]/96", "", "64:ff9b::a9fe:a9fe", True),  # listed as a network
    ],
)
def test_host_rule_admits_its_destinations(
    rule: str, name: str, address: str, answer: bool
) -> None:
    assert leads((rule,), name, address) is answer


@pytest.mark.parametrize(
    "text", ["", "a b", "host:x", "host:70000", "::1", "[::1", "http://x", "10.0.0.1/8"]
)
def test_invalid_host_rule_is_rejected(text: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        HostRule.parse(text)


@given(st.text(max_size=300))
def test_invalid_host_name_is_rejected(text: str) -> None:
    try:
        host = check_host(text)
    except ValueError:
        return
    assert len(host) <= 253
    assert host.isascii()
    assert host.isprintable()
