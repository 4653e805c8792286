"""Rules for the virtual hosts of the broker that each guest may use.  Performs no I/O."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..model.address import parse_cid
from ..model.constants import VMADDR_CID_ANY

#: The name that stands for every virtual host in a rule.
ALL = "*"

_LONGEST = 255  # bytes of an AMQP short string


@dataclass(frozen=True, slots=True)
class VirtualHostRule:
    """A rule ``CID=VHOST,…``: the virtual hosts that a guest (``any``: every guest) may use."""

    cid: int
    names: frozenset[str]

    @classmethod
    def parse(cls, text: str) -> VirtualHostRule:
        """Parse a rule of the command line.

        Raises ValueError.
        """
        cid, equals, names = text.partition("=")
        found = frozenset(names.split(","))
        if not equals or "" in found:
            raise ValueError(f"{text!r}: expected CID=VHOST or CID=VHOST,VHOST or CID=*")
        if any(len(name.encode()) > _LONGEST for name in found):
            raise ValueError(f"{text!r}: expected virtual hosts of at most {_LONGEST} bytes")
        return cls(parse_cid(cid), found)

    def admits(self, cid: int, name: str) -> bool:
        """Return whether the rule permits guest ``cid`` to use the virtual host ``name``."""
        return self.cid in (cid, VMADDR_CID_ANY) and bool(self.names & {name, ALL})


def admits(rules: Iterable[VirtualHostRule], cid: int, name: str) -> bool:
    """Return whether guest ``cid`` may use the virtual host ``name``; True without rules."""
    rules = tuple(rules)
    return not rules or any(rule.admits(cid, name) for rule in rules)
