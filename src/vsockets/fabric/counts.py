"""How much of what has happened in a context, since it was added."""

from __future__ import annotations

from collections import Counter

from .errors import Rule


class Counts:
    """What a context's programs did.  Everything only rises."""

    __slots__ = ("accepts", "connects", "denials", "refusals")

    def __init__(self) -> None:
        self.connects = 0  #: streams its programs began, and have got
        self.accepts = 0  #: streams that were begun to it
        self.refusals = 0  #: requests answered with an errno, denials among them
        #: how often which rule was applied to its programs
        self.denials: Counter[Rule] = Counter()

    def add(self, other: Counts) -> None:
        """Take over what somebody else did."""
        self.connects += other.connects
        self.accepts += other.accepts
        self.refusals += other.refusals
        self.denials.update(other.denials)
