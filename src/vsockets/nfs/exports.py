"""Exported directories and the contexts that may mount them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import NamedTuple

from ..model.address import parse_cid
from .rpc import AuthSys

#: The uid and gid without rights that replace root's (Linux's default anonuid).
ANONYMOUS_ID = 65_534


def _valid_id(number: int) -> int:
    """Return ``number``, or ANONYMOUS_ID for -1, which means "unchanged" to chown(2)."""
    return ANONYMOUS_ID if number == 0xFFFFFFFF else number


class UnixIdentity(NamedTuple):
    """The user and groups with whose rights a call is performed."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Export:
    """An exported directory; ``cids`` are the contexts that may mount it (None: all)."""

    path: str
    read_only: bool = False
    cids: frozenset[int] | None = None
    root_squash: bool = True

    @classmethod
    def parse(cls, text: str) -> Export:
        """Parse ``DIR[,ro][,cid=3:4][,no-root-squash]``.

        Raises ValueError.
        """
        path, *options = text.split(",")
        if not os.path.isabs(path):
            raise ValueError(f"{path!r}: expected an absolute path")
        if not os.path.isdir(path):
            raise ValueError(f"{path!r}: directory not found")
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
        """Return whether context ``cid`` may mount the export."""
        return self.cids is None or cid in self.cids

    def identity(self, caller: AuthSys | None) -> UnixIdentity:
        """Return the identity of ``caller`` in this export; None stands for missing credentials."""
        if caller is None:
            return UnixIdentity(ANONYMOUS_ID, ANONYMOUS_ID)
        uid, gid, groups = (
            _valid_id(caller.uid),
            _valid_id(caller.gid),
            tuple(map(_valid_id, caller.groups)),
        )
        if self.root_squash:
            uid, gid = uid or ANONYMOUS_ID, gid or ANONYMOUS_ID
            groups = tuple(group or ANONYMOUS_ID for group in groups)
        return UnixIdentity(uid, gid, groups)
