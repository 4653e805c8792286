"""What is served to whom."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import NamedTuple

from ..model.address import parse_cid
from .rpc import AuthSys

#: Who nobody is, as everywhere.
NOBODY = 65_534


def _known(number: int) -> int:
    """-1 is no user and no group, and would mean "the same as before"."""
    return NOBODY if number == 0xFFFFFFFF else number


class Identity(NamedTuple):
    """Whose rights a call has."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Export:
    """A folder; ``cids`` are the contexts that may have it, None for all."""

    path: str
    read_only: bool = False
    cids: frozenset[int] | None = None
    root_squash: bool = True

    @classmethod
    def parse(cls, text: str) -> Export:
        """Read ``DIR[,ro][,cid=3:4][,no-root-squash]``.  Raises ValueError."""
        path, *options = text.split(",")
        if not os.path.isabs(path):
            raise ValueError(f"{path!r}: expected an absolute path")
        if not os.path.isdir(path):
            raise ValueError(f"{path!r}: there is no such folder")
        read_only, cids, root_squash = False, None, True
        for option in options:
            if option in ("ro", "rw"):
                read_only = option == "ro"
            elif option == "no-root-squash":
                root_squash = False
            elif option.startswith("cid="):
                cids = frozenset(parse_cid(cid) for cid in option[4:].split(":"))
            else:
                raise ValueError(f"{option!r}: expected ro, rw, cid=CID:… or no-root-squash")
        return cls(os.path.realpath(path), read_only, cids, root_squash)

    def admits(self, cid: int) -> bool:
        """Whether context ``cid`` may have it."""
        return self.cids is None or cid in self.cids

    def identity(self, caller: AuthSys | None) -> Identity:
        """Whose rights ``caller`` has here; without credentials, nobody's."""
        if caller is None:
            return Identity(NOBODY, NOBODY)
        uid, gid, groups = (
            _known(caller.uid),
            _known(caller.gid),
            tuple(map(_known, caller.groups)),
        )
        if self.root_squash:
            uid, gid = uid or NOBODY, gid or NOBODY
            groups = tuple(group or NOBODY for group in groups)
        return Identity(uid, gid, groups)
