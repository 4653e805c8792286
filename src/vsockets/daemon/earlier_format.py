"""Conversion of the state that a vsockd of the previous release hands over.

In format 4 only rows of established streams are sent in advance.
"""

from __future__ import annotations

from typing import Any

from .handover import Saved

#: The format of a vsockd that does not name its format to its successor.
FORMAT = 4


def convert(state: Saved, rows: list[Any]) -> None:
    """Convert ``state``, of format 4, to the present format; ``rows`` were sent in advance."""
    state["removed"], state["dropped"] = [], []
    streams = state["served"]["streams"]
    connections = {row[0]: row for row in rows}
    for number in streams["ended"]:
        del connections[number]
    connections.update((row[0], row) for row in streams["connections"])
    streams["connections"], streams["ended"] = list(connections.values()), []
    liveness = streams["liveness"]
    by_inode = dict(liveness.pop("inodes"))
    groups = liveness["groups"] = dict(liveness["groups"])
    liveness["order"] = list(groups)
    for group in groups.values():
        known = (inode for inode in group["inodes"] if inode in by_inode)
        group["inodes"] = [(inode, by_inode[inode]) for inode in known]
