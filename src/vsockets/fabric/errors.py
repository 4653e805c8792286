"""Exceptions for refused requests, and the rules behind denials."""

from __future__ import annotations

import os
from enum import Enum


class Refused(Exception):
    """A refused request: the program gets ``errno``, the log gets ``reason`` as well.

    The peer never receives the reason: an errno that separates "forbidden" from "absent" would
    disclose to a guest what exists beside it.
    """

    def __init__(self, errno: int, reason: str) -> None:
        super().__init__(f"{os.strerror(errno)}: {reason}")
        self.errno = errno
        self.reason = reason


class Rule(Enum):
    """The rule that a denial is based on.  The value is its name in the audit log."""

    AUTHENTIC_SOURCE = "authentic-source"  #: source addresses cannot be spoofed
    RESERVED_PORT = "reserved-port"  #: ports below 1024 need CAP_NET_BIND_SERVICE
    HYPERVISOR_SERVICE = "hypervisor-service"  #: CID 0 is reserved for the fabric's owner
    GUEST_TO_GUEST = "guest-to-guest"  #: guests communicate with the host only
    RESTRICTED = "restricted"  #: isolated guest: hypervisor services and trusted endpoints only
    DOMAIN = "domain"  #: ESX 4.0 to 5.0: different ``vmci0.domain``
    SUSPENDED = "suspended"  #: the virtual machine is suspended
    FAULT_TOLERANCE = "fault-tolerance"  #: no new connections in FT mode
    CAPTURE = "capture"  #: capturing at a device needs a grant or the fabric's owner
    SOCKETS = "sockets"  #: this and the next three: limits, named as in the configuration
    PENDING_CONNECTS = "pending_connects"
    REQUEST_RATE = "request_rate"
    DATAGRAM_BYTES = "datagram_bytes"


LIMIT_RULES = (Rule.SOCKETS, Rule.PENDING_CONNECTS, Rule.REQUEST_RATE, Rule.DATAGRAM_BYTES)


class Denied(Refused):
    """A request refused by a policy or limit, rather than because its target does not exist."""

    def __init__(self, errno: int, rule: Rule, reason: str) -> None:
        super().__init__(errno, reason)
        self.rule = rule
