"""Classification of public addresses by IANA's special-purpose registries (RFC 6890).

The tables are written out because those of :mod:`ipaddress` differ between versions of Python and
ignore translators: an IPv6 address that embeds an IPv4 address is public only if that one is.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

Address = IPv4Address | IPv6Address

#: IPv4 networks that are not part of the public Internet.
_SPECIAL_4 = tuple(
    map(
        IPv4Network,
        (
            "0.0.0.0/8",  # this network (RFC 791)
            "10.0.0.0/8",  # private use (RFC 1918)
            "100.64.0.0/10",  # shared between a provider and its customers (RFC 6598)
            "127.0.0.0/8",  # loopback (RFC 1122)
            "169.254.0.0/16",  # link-local (RFC 3927), including clouds' metadata services
            "172.16.0.0/12",  # private use
            "192.0.0.0/24",  # protocol assignments (RFC 6890), including local anycast
            "192.0.2.0/24",  # documentation (RFC 5737)
            "192.88.99.0/24",  # 6to4 relays, deprecated (RFC 7526)
            "192.168.0.0/16",  # private use
            "198.18.0.0/15",  # benchmarks (RFC 2544)
            "198.51.100.0/24",  # documentation
            "203.0.113.0/24",  # documentation
            "224.0.0.0/4",  # multicast (RFC 5771)
            "240.0.0.0/4",  # reserved, and limited broadcast (RFC 1112, RFC 8190)
        ),
    )
)

#: All assigned global unicast addresses (RFC 4291); ``fec0::/10`` and IPv4-compatible addresses,
#: for example, are outside.
_GLOBAL_UNICAST = IPv6Network("2000::/3")

#: IPv6 networks within it that are not part of the public Internet.
_SPECIAL_6 = tuple(
    map(
        IPv6Network,
        (
            "2001::/23",  # protocol assignments (RFC 2928), including Teredo (RFC 4380)
            "2001:db8::/32",  # documentation (RFC 3849)
            "3fff::/20",  # documentation (RFC 9637)
        ),
    )
)

_MAPPED = IPv6Network("::ffff:0:0/96")  # RFC 4291, 2.5.5.2
_NAT64 = IPv6Network("64:ff9b::/96")  # RFC 6052; 64:ff9b:1::/48 (RFC 8215) is never global
_6TO4 = IPv6Network("2002::/16")  # RFC 3056
#: Interface identifiers of ISATAP (RFC 5214), before the IPv4 address.
_ISATAP = (0x0000_5EFE, 0x0200_5EFE)


def is_public(address: Address) -> bool:
    """Return whether ``address``, and any IPv4 address embedded in it, is public."""
    if isinstance(address, IPv4Address):
        return not any(address in network for network in _SPECIAL_4)
    number = int(address)
    last = IPv4Address(number & 0xFFFF_FFFF)
    if address in _MAPPED or address in _NAT64:
        return is_public(last)
    if address not in _GLOBAL_UNICAST or any(address in network for network in _SPECIAL_6):
        return False
    if address in _6TO4 and not is_public(IPv4Address(number >> 80 & 0xFFFF_FFFF)):
        return False
    return number >> 32 & 0xFFFF_FFFF not in _ISATAP or is_public(last)
