"""How the fabric says no."""

from __future__ import annotations

import os


class Refused(Exception):
    """A request is denied: the program gets ``errno``, the log also gets ``rule``.

    The peer never learns the rule: an errno that tells "forbidden" from "absent" would tell
    a guest what exists beside it.
    """

    def __init__(self, errno: int, rule: str) -> None:
        super().__init__(f"{os.strerror(errno)}: {rule}")
        self.errno = errno
        self.rule = rule
