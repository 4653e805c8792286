"""Directory listings in an order that changes to the directory do not disturb.

The cookie of a name is a keyed hash of it, and a listing is sorted by cookie.  A listing therefore
continues at the right position after any names are added or removed, and after a restart of the
server.

A directory may contain any number of names and takes time to read, so it is read in steps between
which other calls are served.  A *part* contains a bounded number of names, those with the lowest
cookies from its start; the next part is read when a client reaches it.  The listing of a guest
continues with the part it began, even if the directory has changed since: a name that is added or
removed meanwhile may be listed or not (POSIX, readdir).
"""

from __future__ import annotations

import bisect
import os
import sys
import time
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Hashable, Iterator
from typing import NamedTuple

from .calls import NfsError, NotReady
from .exports import FileRef, UnixIdentity, run_as
from .handles import Identifier, Signer
from .limits import (
    NFS_GUEST_LARGE_LISTINGS_MAX,
    NFS_GUEST_LISTED_NAMES_MAX,
    NFS_LARGE_LISTINGS_MAX,
    NFS_LISTED_NAMES_MAX,
    NFS_LISTING_PART_NAMES_MAX,
    NFS_NAMES_PER_STEP_MAX,
)
from .nfs3 import Status

#: Smaller cookies denote the beginning, the directory itself (``.``) and its parent (``..``).
_FIRST_COOKIE = 3

#: Right shift of a 63-bit cookie that leaves its first ten bits: the bucket for sorting.
_BUCKET = 53

#: Greater than any cookie.
_COOKIES_END = 1 << 64

#: The encoding of names, as in os.fsencode().
_ENCODING = sys.getfilesystemencoding(), sys.getfilesystemencodeerrors()

#: The cost of a part beside its names, in names.
_PART_COST = 100

#: The coarsest resolution of file times, in seconds: more than a kernel tick.
_TIME_RESOLUTION_SECONDS = 0.1


#: A directory entry: cookie, name, and inode (0 for ``.`` and ``..``).  A plain tuple, which the
#: garbage collector soon stops tracking.
Name = tuple[int, bytes, int]


class Part:
    """The names of a directory with cookies from ``start`` to below ``end`` (None: to the last)."""

    def __init__(self, start: int, version: object) -> None:
        self.start = start
        self.end: int | None = None
        self.version = version  #: the directory's times when reading began
        self.names: list[Name] = []
        self.is_awaited = False  #: the call that it was read for has not been repeated yet

    @property
    def cost(self) -> int:
        """The memory that the part takes, as a number of names."""
        return _PART_COST + len(self.names)

    def read(self, fd: int, signer: Signer) -> Iterator[None]:
        """Read the directory ``fd`` in steps.

        Raises OSError if the directory cannot be read.
        """
        buckets: defaultdict[int, list[Name]] = defaultdict(list)
        count = 0
        keyed_number, start, end = (
            signer.keyed_number,
            max(self.start, _FIRST_COOKIE - 1),
            _COOKIES_END,
        )
        with os.scandir(fd) as entries:
            for position, entry in enumerate(entries, 1):
                name = entry.name.encode(*_ENCODING)
                cookie = keyed_number(name, b"names")
                if cookie < _FIRST_COOKIE:
                    cookie = _FIRST_COOKIE
                if start < cookie < end:
                    buckets[cookie >> _BUCKET].append((cookie, name, entry.inode()))
                    count += 1
                    while count > NFS_LISTING_PART_NAMES_MAX and len(buckets) > 1:
                        last = max(buckets)
                        count -= len(buckets.pop(last))
                        self.end = end = last << _BUCKET
                if not position % NFS_NAMES_PER_STEP_MAX:
                    yield
        if not self.start:
            self.names = [(1, b".", 0), (2, b"..", 0)]
        since = 0
        for key in sorted(buckets):
            if since >= NFS_NAMES_PER_STEP_MAX:
                since = 0
                yield
            since += len(buckets[key])
            self.names += sorted(buckets[key])

    def contains(self, cookie: int) -> bool:
        """Return whether the name that follows ``cookie`` is in this part."""
        if cookie < self.start:
            return False
        if self.end is None:
            return True
        return bool(self.names) and cookie < self.names[-1][0]


class ListingCache:
    """The most recently used parts of each guest."""

    def __init__(self, signer: Signer) -> None:
        self._signer = signer
        #: by guest, the least recently used part first
        self._parts: dict[Hashable, OrderedDict[_Key, Part]] = {}
        self._costs: Counter[Hashable] = Counter()  # cost of the parts, in names
        self._reading: Counter[Hashable] = Counter()  # parts being read in steps
        #: Changes with the key: cookies of another key are invalid.
        self.verifier = signer.keyed_number(b"", b"cookies").to_bytes(8)

    def after(
        self, guest: Hashable, folder: FileRef, cookie: int, identity: UnixIdentity
    ) -> tuple[Part, int]:
        """Return a part, and the index of the first name in it after ``cookie``.

        Raises NotReady while the part is being read, NfsError(JUKEBOX) for too many reads at once,
        OSError if the directory cannot be read.
        """
        with run_as(identity):  # the caller must have read permission, even if the part is cached
            fd = os.open(folder.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            version = _version(folder)
            part = self._find(guest, folder.identifier, cookie, version)
            if part is None:
                start = cookie if cookie >= _FIRST_COOKIE else 0
                steps = self._read(guest, folder.identifier, Part(start, version), fd)
                fd = -1
                part = next(steps)
                if part is None:  # a directory of usual size is read in one step
                    raise NotReady(steps)
        finally:
            if fd >= 0:
                os.close(fd)
        return part, bisect.bisect_right(part.names, (cookie, b"\xff" * 256))

    def _find(
        self, guest: Hashable, folder: Identifier, cookie: int, version: object
    ) -> Part | None:
        begins = cookie < _FIRST_COOKIE
        parts = self._parts.get(guest, OrderedDict[_Key, Part]())
        for key, part in reversed(parts.items()):
            if key.folder != folder:
                continue
            is_new = part.is_awaited or part.version == version
            if part.start == 0 and is_new if begins else part.contains(cookie):
                part.is_awaited = False  # for other calls, the directory may have changed since
                parts.move_to_end(key)
                return part
        return None

    def _read(
        self, guest: Hashable, folder: Identifier, part: Part, fd: int
    ) -> Iterator[Part | None]:
        """Read a part in steps: yield None after each step, and the part at the end."""
        reading = 0
        try:
            for _ in part.read(fd, self._signer):
                if not reading:
                    if (
                        self._reading[guest] >= NFS_GUEST_LARGE_LISTINGS_MAX
                        or self._reading.total() >= NFS_LARGE_LISTINGS_MAX
                    ):
                        raise NfsError(Status.JUKEBOX)
                    reading = 1
                    self._reading[guest] += 1
                    part.is_awaited = True
                yield None
        finally:
            os.close(fd)
            self._reading[guest] -= reading
            if not self._reading[guest]:
                del self._reading[guest]
        self._keep(guest, _Key(folder, part.start), part)
        yield part

    def _keep(self, guest: Hashable, key: _Key, part: Part) -> None:
        """Cache a part, and evict others above the limits."""
        parts = self._parts.setdefault(guest, OrderedDict())
        if key in parts:
            self._evict(guest, key)
        parts[key] = part
        self._costs[guest] += part.cost
        while len(parts) > 1 and self._costs[guest] > NFS_GUEST_LISTED_NAMES_MAX:
            self._evict(guest, next(iter(parts)))
        while len(self._parts) > 1 and self._costs.total() > NFS_LISTED_NAMES_MAX:
            largest = max(
                (name for name in self._parts if name != guest), key=self._costs.__getitem__
            )
            self._evict(largest, next(iter(self._parts[largest])))
            if not self._parts[largest]:
                del self._parts[largest], self._costs[largest]

    def _evict(self, guest: Hashable, key: _Key) -> None:
        self._costs[guest] -= self._parts[guest].pop(key).cost


class _Key(NamedTuple):
    folder: Identifier
    start: int


def _version(folder: FileRef) -> object:
    """Return a value that changes with the directory's names."""
    seconds, nanoseconds = folder.state.ctime
    if time.time() - (seconds + nanoseconds / 1e9) < _TIME_RESOLUTION_SECONDS:
        return object()  # another change could leave the times unchanged
    return folder.state.mtime, folder.state.ctime
