"""Public addresses, against IANA's special-purpose address registries (RFC 6890, 2025-10-22)."""

from __future__ import annotations

import ipaddress

import pytest

from vsockets.forward.settings import is_public

# iana-ipv4-special-registry and iana-ipv6-special-registry: blocks that are not "globally
# reachable", and 224.0.0.0/4 and ff00::/8, which are in separate registries.
NOT_GLOBAL = (
    *("0.0.0.0/8", "0.0.0.0/32", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16"),
    *("172.16.0.0/12", "192.0.0.0/24", "192.0.0.0/29", "192.0.0.8/32", "192.0.0.170/31"),
    *("192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24"),
    *("203.0.113.0/24", "240.0.0.0/4", "255.255.255.255/32", "224.0.0.0/4"),
    *("::1/128", "::/128", "64:ff9b:1::/48", "100::/64", "100:0:0:1::/64", "2001::/23"),
    *("2001:2::/48", "2001:db8::/32", "3fff::/20", "5f00::/16", "fc00::/7", "fe80::/10"),
    "ff00::/8",
    # Without a separate entry today: site-local (RFC 3879), IPv4-compatible (RFC 4291,
    # 2.5.5.1), IPv4-translated (RFC 2765), Teredo (RFC 4380; its entry is N/A).
    *("fec0::/10", "::/96", "::ffff:0:0:0/96", "2001::/32"),
)

# Blocks of the registries that are "globally reachable", and the public resolvers of two networks.
GLOBAL = (
    *("192.31.196.0/24", "192.52.193.0/24", "192.175.48.0/24", "8.8.8.8/32", "9.9.9.9/32"),
    *("2620:4f:8000::/48", "2001:4860:4860::8888/128", "2620:fe::fe/128", "2a00:1450::/32"),
)

# Just outside of blocks.
NEIGHBOURS = (
    *("1.0.0.0", "9.255.255.255", "11.0.0.0", "100.63.255.255", "100.128.0.0", "126.255.255.255"),
    *("128.0.0.0", "169.253.255.255", "169.255.0.0", "172.15.255.255", "172.32.0.0"),
    *("191.255.255.255", "192.0.1.0", "192.0.3.0", "192.167.255.255", "192.169.0.0"),
    *("198.17.255.255", "198.20.0.0", "223.255.255.255", "2000::", "2001:200::", "2001:db9::"),
    *("2003::", "3ffe:ffff::", "3fff:1000::"),
)


def ends(block: str) -> list[str]:
    network = ipaddress.ip_network(block)
    return [str(network[0]), str(network[-1])]


@pytest.mark.parametrize("address", [end for block in NOT_GLOBAL for end in ends(block)])
def test_special_purpose_addresses_are_not_public(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "address", [*(end for block in GLOBAL for end in ends(block)), *NEIGHBOURS]
)
def test_other_addresses_are_public(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


def embed(address: str) -> dict[str, ipaddress.IPv6Address]:
    """Return the IPv6 addresses that embed the IPv4 ``address``, by mechanism."""
    number = int(ipaddress.IPv4Address(address))
    nowhere = int(ipaddress.IPv4Address("8.8.8.8"))

    def within(prefix: str, low: int) -> ipaddress.IPv6Address:
        return ipaddress.IPv6Address(int(ipaddress.IPv6Address(prefix)) | low)

    return {
        "mapped": within("::ffff:0:0", number),
        "compatible": within("::", number),
        "translated": within("::ffff:0:0:0", number),
        "NAT64": within("64:ff9b::", number),
        "NAT64, local use": within("64:ff9b:1::", number),
        "6to4": within("2002::", number << 80 | 1),
        "Teredo server": within("2001::", number << 64 | (nowhere ^ 0xFFFF_FFFF)),
        "Teredo client": within("2001::", nowhere << 64 | (number ^ 0xFFFF_FFFF)),
        "ISATAP": within("2a00:1450::", 0x5EFE << 32 | number),
        "ISATAP, global": within("2a00:1450::", 0x0200_5EFE << 32 | number),
    }


@pytest.mark.parametrize("way", embed("0.0.0.0"))
@pytest.mark.parametrize("address", ["169.254.169.254", "127.0.0.1", "10.0.0.1", "192.0.0.8"])
def test_embedded_special_address_is_not_public(address: str, way: str) -> None:
    assert not is_public(embed(address)[way])


@pytest.mark.parametrize("way", ["mapped", "NAT64", "6to4", "ISATAP", "ISATAP, global"])
def test_embedded_public_address_is_public(way: str) -> None:
    assert is_public(embed("8.8.8.8")[way])
