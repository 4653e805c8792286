"""Which guests may use which virtual hosts of the broker.  Decisions only."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..model.address import parse_cid
from ..model.constants import VMADDR_CID_ANY

#: What stands for every virtual host in a rule.
ALL = "*"

_LONGEST = 255  # bytes: a short string of AMQP's


@dataclass(frozen=True, slots=True)
class VirtualHostRule:
    """``CID=VHOST,…``: virtual hosts that the guest may use; ``any`` means every guest."""

    cid: int
    names: frozenset[str]

    @classmethod
    def parse(cls, text: str) -> VirtualHostRule:
        """Raises ValueError."""
        cid, equals, names = text.partition("=")
        found = frozenset(names.split(","))
        if not equals or "" in found:
            raise ValueError(f"{text!r}: expected CID=VHOST or CID=VHOST,VHOST or CID=*")
        if any(len(name.encode()) > _LONGEST for name in found):
            raise ValueError(f"{text!r}: a virtual host's name has {_LONGEST} bytes at most")
        return cls(parse_cid(cid), found)

    def admits(self, cid: int, name: str) -> bool:
        """Whether the rule says that guest ``cid`` may use the virtual host ``name``."""
        return self.cid in (cid, VMADDR_CID_ANY) and bool(self.names & {name, ALL})


def admits(rules: Iterable[VirtualHostRule], cid: int, name: str) -> bool:
    """Whether guest ``cid`` may use the virtual host ``name``; without rules everybody may."""
    rules = tuple(rules)
    return not rules or any(rule.admits(cid, name) for rule in rules)
