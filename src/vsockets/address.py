"""vSockets addresses: a context ID (CID) and a port, both 32-bit unsigned.

In Python an address is the tuple ``(cid, port)``, as in the standard library.
"""

from __future__ import annotations

from .constants import VMADDR_CID_ANY, VMADDR_CID_HOST, VMADDR_CID_HYPERVISOR, VMADDR_CID_LOCAL

LARGEST = 0xFFFF_FFFF

#: The first and last CID a guest can have; those around them mean something else.
FIRST_GUEST_CID = 3
LAST_GUEST_CID = VMADDR_CID_ANY - 1

CID_NAMES = {
    "hypervisor": VMADDR_CID_HYPERVISOR,
    "local": VMADDR_CID_LOCAL,
    "host": VMADDR_CID_HOST,
    "any": VMADDR_CID_ANY,
}


def check(address: object) -> tuple[int, int]:
    """Return ``address`` as ``(cid, port)``.

    Raises TypeError when it is not a pair of integers, OverflowError when one of
    them does not fit 32 bits unsigned (the standard library's choices for ports).
    """
    if not isinstance(address, tuple) or len(address) != 2:
        raise TypeError(f"a vSockets address is a tuple (cid, port), not {address!r}")
    cid, port = address
    if not isinstance(cid, int) or not isinstance(port, int):
        raise TypeError(f"CID and port are integers, not {address!r}")
    if (cid | port) >> 32:  # one of them is negative, or has more than 32 bits
        name, number = ("port", port) if 0 <= cid <= LARGEST else ("CID", cid)
        raise OverflowError(f"{name} {number}: expected 0 to {LARGEST}")
    return cid, port


def parse_cid(text: str) -> int:
    """Read a CID as people write it: a number, or one of the well-known names."""
    if text.lower() in CID_NAMES:
        return CID_NAMES[text.lower()]
    return _number(text, "CID", f"a number from 0 to {LARGEST} or {', '.join(CID_NAMES)}")


def parse_port(text: str) -> int:
    """Read a port number; ``any`` asks for an ephemeral one."""
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
