"""vSockets addresses: a context ID (CID) and a port, both unsigned numbers of 32 bits.

In Python an address is the tuple ``(cid, port)``, as in the standard library.
"""

from __future__ import annotations

from operator import index

from .constants import VMADDR_CID_ANY, VMADDR_CID_HOST, VMADDR_CID_HYPERVISOR, VMADDR_CID_LOCAL

LARGEST = 0xFFFF_FFFF

#: The first and last CID of guests.  The CIDs around them have other meanings.
FIRST_GUEST_CID = 3
LAST_GUEST_CID = VMADDR_CID_ANY - 1

CID_NAMES = {
    "hypervisor": VMADDR_CID_HYPERVISOR,
    "local": VMADDR_CID_LOCAL,
    "host": VMADDR_CID_HOST,
    "any": VMADDR_CID_ANY,
}


def check(address: object) -> tuple[int, int]:
    """Return ``address`` as a ``(cid, port)`` of ints, converted as the socket module does.

    CPython parses an AF_VSOCK address with the format "II" (``getsockaddrarg()`` in
    Modules/socketmodule.c): the lower 32 bits of any object with ``__index__``.  So -1 is
    VMADDR_CID_ANY, and VMADDR_PORT_ANY.

    Raises TypeError if ``address`` is not a tuple of two such objects.
    """
    if not isinstance(address, tuple) or len(address) != 2:
        raise TypeError(f"vSockets address: expected a tuple (cid, port), not {address!r}")
    cid, port = address
    if type(cid) is int and type(port) is int and not (cid | port) >> 32:
        return cid, port
    try:
        return index(cid) & LARGEST, index(port) & LARGEST
    except TypeError:
        raise TypeError(f"CID and port: expected integers, not {address!r}") from None


def parse_cid(text: str) -> int:
    """Return the CID in ``text``, a number or a well-known name.

    Raises ValueError if ``text`` is neither.
    """
    if text.lower() in CID_NAMES:
        return CID_NAMES[text.lower()]
    return _number(text, "CID", f"a number from 0 to {LARGEST} or {', '.join(CID_NAMES)}")


def parse_port(text: str) -> int:
    """Return the port in ``text``, a number or ``any``.

    Raises ValueError if ``text`` is neither.
    """
    if text.lower() == "any":
        return LARGEST
    return _number(text, "port", f"a number from 0 to {LARGEST} or any")


def _number(text: str, what: str, expected: str) -> int:
    try:
        value = int(text, 0)
    except ValueError:
        value = -1
    if not 0 <= value <= LARGEST:
        raise ValueError(f"{what} {text!r}: expected {expected}")
    return value
