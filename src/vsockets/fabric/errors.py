"""How the fabric says no."""

from __future__ import annotations

import os
from enum import Enum


class Refused(Exception):
    """A request cannot be granted: the program gets ``errno``, the log also gets ``reason``.

    The peer never learns the reason: an errno that tells "forbidden" from "absent" would tell
    a guest what exists beside it.
    """

    def __init__(self, errno: int, reason: str) -> None:
        super().__init__(f"{os.strerror(errno)}: {reason}")
        self.errno = errno
        self.reason = reason


class Rule(Enum):
    """What a denial rests on.  The value is its name in the audit log."""

    AUTHENTIC_SOURCE = "authentic-source"  #: the source may not be spoofed
    RESERVED_PORT = "reserved-port"  #: ports below 1024 need CAP_NET_BIND_SERVICE
    HYPERVISOR_SERVICE = "hypervisor-service"  #: CID 0 is for the fabric's owner
    GUEST_TO_GUEST = "guest-to-guest"  #: only host to guest
    RESTRICTED = "restricted"  #: isolated: hypervisor services and trusted endpoints only
    DOMAIN = "domain"  #: ESX 4.0 to 5.0: another ``vmci0.domain``
    SUSPENDED = "suspended"  #: the virtual machine does not run
    FAULT_TOLERANCE = "fault-tolerance"  #: no new connections in FT mode
    CAPTURE = "capture"  #: what passes is its owner's to see
    SOCKETS = "sockets"  #: a guest's limits, by their names in the configuration
    PENDING_CONNECTS = "pending_connects"
    REQUEST_RATE = "request_rate"
    DATAGRAM_BYTES = "datagram_bytes"


LIMIT_RULES = (Rule.SOCKETS, Rule.PENDING_CONNECTS, Rule.REQUEST_RATE, Rule.DATAGRAM_BYTES)


class Denied(Refused):
    """Refused because somebody may not, rather than because something is not there."""

    def __init__(self, errno: int, rule: Rule, reason: str) -> None:
        super().__init__(errno, reason)
        self.rule = rule
