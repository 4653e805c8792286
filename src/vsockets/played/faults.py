"""Faults of a hypervisor's vSockets, each with a name, for a limited number of connections."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

#: The faults by name, and what strikes the next connection.
FAULTS = {
    "no-ok": "CONNECT is never answered",
    "late-ok": "CONNECT is answered after `seconds`",
    "garbage": "CONNECT is answered by bytes that are no OK line",
    "stale-ok": "OK although the listener has just closed; then end of stream",
    "ok-without-data": "OK, and no byte of the guest afterwards",
    "early-eof": "end of stream after some of the guest's bytes",
    "stall": "both directions stop after some of the guest's bytes",
    "slow": "one byte at a time, `seconds` apart",
    "lost-writes": "the guest's bytes are accepted and lost",
    "half-open": "the guest's end is closed, and the host is not notified",
    "reused-port": "the host's end has the port of the connection before",
}

#: Bytes after which ``early-eof`` and ``stall`` strike, at most.
_FEW = 8


@dataclass
class Fault:
    """A fault that strikes the next ``times`` connections of a machine."""

    name: str
    seed: int = 0
    times: int = 1
    seconds: float = 0.2
    port: int | None = None  #: strike only connections to this port, of the guest or of the host
    random: random.Random = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Raise ValueError if the delay is not a number of seconds, or more than an hour."""
        if not 0 <= self.seconds <= 3600:
            raise ValueError(f"invalid seconds: {self.seconds} (expected 0 to 3600)")
        self.random = random.Random(self.seed)


class Strike:
    """The faults of one connection, with their random choices made."""

    def __init__(self, fault: Fault | None = None) -> None:
        self.name = "" if fault is None else fault.name
        self.seconds = 0.0 if fault is None else fault.seconds
        self.after = 0 if fault is None else fault.random.randint(1, _FEW)
        junk = b"" if fault is None else fault.random.randbytes(_FEW)
        self.garbage = b"ERR " + junk.hex().encode()


class Faults:
    """The armed faults of a machine; ``log`` gets a line whenever one strikes."""

    def __init__(self, log: Callable[[str], None]) -> None:
        self.armed: list[Fault] = []
        self._log = log

    def next(self, port: int, connection: str) -> Strike:
        """Return the strike for a new connection to ``port``, the oldest one that is armed for it.

        ``connection`` describes the connection in the log.
        """
        fault = next((one for one in self.armed if one.port in (None, port)), None)
        if fault is None:
            return Strike()
        fault.times -= 1
        if not fault.times:
            self.armed.remove(fault)
        self._log(f"fault {fault.name} (seed {fault.seed}) strikes: {connection}")
        return Strike(fault)
