"""Counters of what has happened in a context since it was added."""

from __future__ import annotations

from collections import Counter

from .errors import Rule


class Counts:
    """Counters of one context's activity.  They only increase."""

    __slots__ = ("accepts", "connects", "denials", "refusals")

    def __init__(self) -> None:
        self.connects = 0  #: streams established by its programs
        self.accepts = 0  #: streams established to its listeners
        self.refusals = 0  #: requests answered with an errno, including denials
        #: denials of its programs' requests, by rule
        self.denials: Counter[Rule] = Counter()

    def add(self, other: Counts) -> None:
        """Add the counts of ``other`` to these."""
        self.connects += other.connects
        self.accepts += other.accepts
        self.refusals += other.refusals
        self.denials.update(other.denials)
