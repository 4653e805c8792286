"""The service without sockets, called by well-behaved and by hostile guests."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import random
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vsockets.nfs import handles, limits, listing, mount_protocol, nfs3, procedures, rpc, xdr
from vsockets.nfs.calls import Pending
from vsockets.nfs.exports import Export
from vsockets.nfs.handles import HandleStore, Identifier
from vsockets.nfs.nfs3 import (
    NUMBERS,
    PROCEDURES,
    Access,
    CreateMode,
    NewAttributes,
    StableHow,
    Status,
    Target,
)
from vsockets.nfs.nfs_client import credentials
from vsockets.nfs.procedures import Procedures
from vsockets.nfs.service import NfsService

GUEST = (3, 700)


class DirectGuest:
    """A guest that calls the service directly."""

    def __init__(self, folder: Path, options: str = ",no-root-squash") -> None:
        self.export = folder / "export"
        self.export.mkdir(exist_ok=True)
        self._options = options
        self._state = folder / "state"
        self.xid = 0
        self.start()

    def start(self) -> None:
        self.handle_store = HandleStore(self._state)
        self.service = NfsService(
            [Export.parse(f"{self.export}{self._options}")], self.handle_store
        )

    def stop(self) -> None:
        self.service.close()
        self.handle_store.close()

    def restart(self) -> None:
        self.stop()
        self.start()

    def datagram(self, program: int, number: int, packed: bytes) -> bytes:
        self.xid += 1
        own = credentials(os.geteuid(), os.getegid())
        return rpc.encode_call(
            rpc.CallHeader(self.xid, 2, program, 3, number, own, rpc.NO_AUTH), packed
        )

    def answer(self, datagram: bytes, source: tuple[int, int] = GUEST) -> bytes | None:
        """Return the final reply to a call."""
        reply = self.service.answer(datagram, source)
        while isinstance(reply, Pending):
            error: OSError | None = None
            try:
                for _ in reply.steps:
                    assert self.service.answer(datagram, source) is None  # a retransmission
            except OSError as why:
                error = why
            reply = reply.finish(error)
        return reply

    def root(self, source: tuple[int, int] = GUEST) -> bytes | None:
        packed = mount_protocol.path.pack(os.fsencode(self.export))
        reply = self.answer(
            self.datagram(mount_protocol.PROGRAM, mount_protocol.MNT, packed), source
        )
        assert reply is not None
        status, granted = mount_protocol.mount_result.unpack(rpc.decode_reply(reply))
        return granted[0] if status == 0 else None

    def ask(self, name: str, *arguments: Any, source: tuple[int, int] = GUEST) -> tuple[int, Any]:
        procedure = PROCEDURES[NUMBERS[name]]
        packed = procedure.arguments.pack(arguments[0] if len(arguments) == 1 else arguments)
        datagram = self.datagram(nfs3.PROGRAM, NUMBERS[name], packed)
        reply = self.answer(datagram, source)
        assert reply is not None
        return nfs3.decode_result(procedure, rpc.decode_reply(reply))

    def ok(self, name: str, *arguments: Any) -> Any:
        status, content = self.ask(name, *arguments)
        assert status == Status.OK, (name, status)
        return content

    def make(self, folder: bytes, name: bytes, data: bytes = b"") -> bytes:
        handle, _, _ = self.ok(
            "create", Target(folder, name), (CreateMode.GUARDED, NewAttributes(mode=0o644))
        )
        if data:
            self.ok("write", handle, 0, len(data), StableHow.FILE_SYNC, data)
        assert isinstance(handle, bytes)
        return handle


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[DirectGuest]:
    guest = DirectGuest(tmp_path)
    yield guest
    guest.stop()


def test_handles_survive_restarts_and_renames(guest: DirectGuest) -> None:
    root = guest.root()
    assert root is not None
    folder, _, _ = guest.ok("mkdir", Target(root, b"a"), NewAttributes(mode=0o755))
    file = guest.make(folder, b"file", b"content")
    guest.ok("rename", Target(root, b"a"), Target(root, b"b"))
    guest.ok("link", file, Target(root, b"other"))
    guest.restart()
    assert guest.ok("read", file, 0, 100)[3] == b"content"
    guest.ok("remove", folder, b"file")
    guest.restart()
    assert guest.ok("read", file, 0, 100)[3] == b"content"  # by its second name
    guest.ok("remove", root, b"other")
    assert guest.ask("read", file, 0, 100)[0] == Status.STALE
    (guest.export / "b" / "file").write_text("another file, perhaps with the inode")
    assert guest.ask("read", file, 0, 100)[0] == Status.STALE


def test_write_verifier_changes_with_a_restart(guest: DirectGuest) -> None:
    root = guest.root()
    assert root is not None
    file = guest.make(root, b"file")
    _, _, _, verifier = guest.ok("write", file, 0, 3, StableHow.UNSTABLE, b"abc")
    assert guest.ok("commit", file, 0, 0)[1] == verifier
    guest.restart()
    assert guest.ok("commit", file, 0, 0)[1] != verifier


def test_retransmitted_call_is_not_repeated(guest: DirectGuest) -> None:
    root = guest.root()
    assert root is not None
    guest.make(root, b"file")
    packed = nfs3.target.pack(Target(root, b"file"))
    datagram = guest.datagram(nfs3.PROGRAM, NUMBERS["remove"], packed)
    first = guest.answer(datagram, GUEST)
    assert first == guest.answer(datagram, GUEST) and first is not None
    assert xdr.uint.decode(xdr.Reader(rpc.decode_reply(first))) == Status.OK
    other = guest.answer(datagram, (4, 700))  # another guest's call
    assert other is not None
    assert xdr.uint.decode(xdr.Reader(rpc.decode_reply(other))) == Status.NOENT


def test_exclusive_create_recognises_its_retransmission(guest: DirectGuest) -> None:
    root = guest.root()
    assert root is not None
    target = Target(root, b"file")
    handle, *_ = guest.ok("create", target, (CreateMode.EXCLUSIVE, b"12345678"))
    guest.restart()  # also in a later server process
    assert guest.ok("create", target, (CreateMode.EXCLUSIVE, b"12345678"))[0] == handle
    assert guest.ask("create", target, (CreateMode.EXCLUSIVE, b"87654321"))[0] == Status.EXIST
    assert guest.ask("create", target, (CreateMode.GUARDED, NewAttributes()))[0] == Status.EXIST


def test_server_killed_in_an_exclusive_create_leaves_no_file(
    guest: DirectGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    class KilledError(BaseException):
        pass

    def die(*arguments: object) -> None:
        raise KilledError

    root = guest.root()
    assert root is not None
    target = Target(root, b"file")
    with monkeypatch.context() as patched, pytest.raises(KilledError):
        for module, name in ((os, "utime"), (procedures, "set_times")):
            patched.setattr(module, name, die)  # wherever the verifier is stored
        guest.ask("create", target, (CreateMode.EXCLUSIVE, b"12345678"))
    guest.restart()
    guest.ok("create", target, (CreateMode.EXCLUSIVE, b"12345678"))


def test_setattr_checks_its_guard(guest: DirectGuest) -> None:
    root = guest.root()
    assert root is not None
    file = guest.make(root, b"file", b"12345")
    ctime = guest.ok("getattr", file).ctime
    new = NewAttributes(size=2)
    assert guest.ask("setattr", file, new, ctime._replace(seconds=1))[0] == Status.NOT_SYNC
    change = guest.ok("setattr", file, new, ctime)
    assert (change.before.size, change.after.size) == (5, 2)


@pytest.mark.parametrize("names_at_once", [limits.NFS_LISTING_PART_NAMES_MAX, 40])
@pytest.mark.parametrize("plus", [False, True])
def test_listing_continues_when_the_directory_changes(
    guest: DirectGuest, plus: bool, names_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "NFS_LISTING_PART_NAMES_MAX", names_at_once)
    root = guest.root()
    assert root is not None
    names = {f"file-{number}".encode() for number in range(300)}
    for name in names:
        (guest.export / os.fsdecode(name)).touch()
    seen: list[bytes] = []
    cookie, verifier, end = 0, bytes(8), False
    while not end:
        sizes = (1024, 4096) if plus else (2048,)
        procedure = "readdirplus" if plus else "readdir"
        _, verifier, entries, end = guest.ok(procedure, root, cookie, verifier, *sizes)
        seen += [entry.name for entry in entries]
        cookie = entries[-1].cookie if entries else cookie
        removed = next(iter(names - set(seen)), None)
        if removed is not None:
            guest.ok("remove", root, removed)
            names.discard(removed)
            guest.restart()
    assert names <= set(seen) and len(names) < 300
    assert len(seen) == len(set(seen))
    assert guest.ask("readdir", root, 5, b"x" * 8, 4096)[0] == Status.BAD_COOKIE
    assert guest.ask("readdir", root, 0, bytes(8), 10)[0] == Status.TOOSMALL


def readdir(guest: DirectGuest, folder: bytes) -> bytes:
    packed = PROCEDURES[NUMBERS["readdir"]].arguments.pack((folder, 0, bytes(8), 4096))
    return guest.datagram(nfs3.PROGRAM, NUMBERS["readdir"], packed)


def status_of(reply: object) -> int:
    assert isinstance(reply, bytes)
    return nfs3.decode_result(PROCEDURES[NUMBERS["readdir"]], rpc.decode_reply(reply))[0]


def test_large_directory_is_read_in_steps(
    guest: DirectGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other guests are served between the steps; concurrent listings are limited for each guest."""
    monkeypatch.setattr(listing, "NFS_NAMES_PER_STEP_MAX", 10)
    folders = []
    root = guest.root()
    assert root is not None
    for name in ("a", "b"):
        (guest.export / name).mkdir()
        for number in range(300):
            (guest.export / name / str(number)).touch()
        folders.append(guest.ok("lookup", root, name.encode())[0])
    pending = guest.service.answer(readdir(guest, folders[0]), GUEST)
    assert isinstance(pending, Pending)
    assert status_of(guest.service.answer(readdir(guest, folders[1]), GUEST)) == Status.JUKEBOX
    steps = 0
    for _ in pending.steps:
        steps += 1
        (guest.export / "a" / f"more-{steps}").touch()  # the directory changes during each step
        assert guest.ask("getattr", root, source=(4, 700))[0] == Status.OK
    assert steps >= 30
    assert status_of(pending.finish(None)) == Status.OK
    others = [guest.service.answer(readdir(guest, folders[1]), (cid, 700)) for cid in range(10)]
    started = [one for one in others if isinstance(one, Pending)]
    assert len(started) == limits.NFS_LARGE_LISTINGS_MAX
    assert {status_of(one) for one in others if one not in started} == {Status.JUKEBOX}
    others.clear()
    started.clear()  # as at the server's end
    gc.collect()
    assert guest.ask("readdir", folders[1], 0, bytes(8), 4096)[0] == Status.OK


def test_new_listing_is_up_to_date(guest: DirectGuest) -> None:
    """Also if the directory's coarse times have not changed."""
    root = guest.root()
    assert root is not None
    for number in range(100):
        (guest.export / str(number)).touch()
        entries = guest.ok("readdir", root, 0, bytes(8), 65_000)[2]
        assert len(entries) == number + 3


def test_error_while_reading_a_large_directory(
    guest: DirectGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "NFS_NAMES_PER_STEP_MAX", 10)
    root = guest.root()
    assert root is not None
    for number in range(30):
        (guest.export / str(number)).touch()
    pending = guest.service.answer(readdir(guest, root), GUEST)
    assert isinstance(pending, Pending)
    assert status_of(pending.finish(OSError(errno.EIO, "the disk"))) == Status.IO
    del pending
    assert guest.ask("readdir", root, 0, bytes(8), 4096)[0] == Status.OK


def test_removed_names_are_not_listed(guest: DirectGuest) -> None:
    """Names removed during the listing, as by rm -r: the server may have read them before."""
    root = guest.root()
    assert root is not None
    for number in range(1000):
        (guest.export / str(number)).touch()
    time.sleep(0.2)  # beyond the resolution of file times
    _, verifier, first, _ = guest.ok("readdirplus", root, 0, bytes(8), 512, 4096)
    for path in guest.export.iterdir():
        path.unlink()
    seen, cookie, end, calls = 0, first[-1].cookie, False, 0
    while not end:
        _, verifier, entries, end = guest.ok("readdirplus", root, cookie, verifier, 512, 4096)
        assert entries or end
        seen += len(entries)
        cookie = entries[-1].cookie if entries else cookie
        calls += 1
    assert seen < calls <= 1000 / limits.NFS_READDIRPLUS_ENTRIES_MAX + 1


def test_cached_listings_are_bounded(guest: DirectGuest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "NFS_GUEST_LISTED_NAMES_MAX", 1000)
    monkeypatch.setattr(listing, "NFS_LISTED_NAMES_MAX", 2000)
    root = guest.root()
    assert root is not None
    folders = []
    for number in range(30):
        (guest.export / str(number)).mkdir()
        folders.append(guest.ok("lookup", root, b"%d" % number)[0])
    listings = guest.service._procedures._listings
    for cid in range(3, 8):
        for folder in folders:
            assert guest.ask("readdir", folder, 0, bytes(8), 4096, source=(cid, 1))[0] == 0
            assert listings._costs[cid] <= 1000
            assert listings._costs.total() <= 2000
    assert listings._costs == {
        guest: sum(part.cost for part in parts.values()) for guest, parts in listings._parts.items()
    }


def test_files_outside_the_export_are_unreachable(guest: DirectGuest, tmp_path: Path) -> None:
    root = guest.root()
    assert root is not None
    (tmp_path / "secret").write_text("secret")
    (guest.export / "up").symlink_to("..")
    (guest.export / "absolute").symlink_to(tmp_path / "secret")
    assert guest.ok("lookup", root, b"..")[0] == root
    for name in (b"../secret", b"up/secret", b"/etc/passwd", b"", b"a\0b"):
        assert guest.ask("lookup", root, name)[0] == Status.ACCES
    up, _, _ = guest.ok("lookup", root, b"up")
    absolute, _, _ = guest.ok("lookup", root, b"absolute")
    assert guest.ask("lookup", up, b"secret")[0] == Status.NOTDIR
    assert guest.ask("read", absolute, 0, 10)[0] == Status.INVAL
    assert guest.ok("readlink", absolute)[1] == os.fsencode(tmp_path / "secret")
    assert (
        guest.ask("create", Target(root, b".."), (CreateMode.UNCHECKED, NewAttributes()))[0] == 17
    )
    # A directory that was replaced by a link since its handle was issued.
    folder, _, _ = guest.ok("mkdir", Target(root, b"folder"), NewAttributes(mode=0o755))
    (guest.export / "folder").rmdir()
    (guest.export / "folder").symlink_to(tmp_path)
    guest.restart()
    assert guest.ask("lookup", folder, b"secret")[0] == Status.STALE


def test_read_only_export_for_one_context(tmp_path: Path) -> None:
    guest = DirectGuest(tmp_path, ",ro,cid=3")
    root = guest.root()
    assert root is not None
    (guest.export / "file").write_text("content")
    file, _, _ = guest.ok("lookup", root, b"file")
    assert guest.ok("read", file, 0, 10)[3] == b"content"
    assert guest.ask("write", file, 0, 1, 0, b"x")[0] == Status.ROFS
    assert guest.ask("remove", root, b"file")[0] == Status.ROFS
    everything = sum(Access)
    assert not guest.ok("access", file, everything)[1] & (Access.MODIFY | Access.EXTEND)
    # Another guest that has obtained a handle.
    assert guest.root(source=(4, 700)) is None
    assert guest.ask("read", file, 0, 10, source=(4, 700))[0] == Status.ACCES
    guest.stop()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as others")
def test_root_squash_maps_root_to_the_anonymous_user(tmp_path: Path) -> None:
    guest = DirectGuest(tmp_path, "")
    root = guest.root()
    assert root is not None
    assert guest.ask("create", Target(root, b"a"), (CreateMode.GUARDED, NewAttributes()))[0] == 13
    guest.export.chmod(0o777)
    handle, *_ = guest.ok("create", Target(root, b"a"), (CreateMode.GUARDED, NewAttributes()))
    attributes = guest.ok("getattr", handle)
    assert (attributes.uid, attributes.gid) == (65_534, 65_534)
    (guest.export / "private").write_text("host's")
    (guest.export / "private").chmod(0o600)
    private, _, _ = guest.ok("lookup", root, b"private")
    assert guest.ask("read", private, 0, 10)[0] == Status.ACCES
    assert guest.ask("setattr", private, NewAttributes(mode=0o666), None)[0] == Status.PERM
    assert os.geteuid() == 0 and (guest.export / "private").read_text() == "host's"
    guest.stop()


def identifier(number: int) -> Identifier:
    return Identifier(1, number, 0, 0)


def test_recorded_locations_are_bounded(tmp_path: Path) -> None:
    handle_store = HandleStore(tmp_path / "state", rows_max=10)
    for number in range(50):
        handle_store.add(identifier(2 + number), identifier(1), b"name", 3)
        assert len(handle_store) <= 10
    assert list(handle_store.locations(identifier(51))) == [(identifier(1), b"name")]
    with pytest.raises(OSError, match="--state"):
        HandleStore(tmp_path / "state")
    handle_store.close()


def test_guest_cannot_evict_locations_of_another_guest(tmp_path: Path) -> None:
    """Two guests know a file, and one of them then looks up many names."""
    handle_store = HandleStore(tmp_path / "state", rows_max=100)
    for guest in (3, 4):
        handle_store.add(identifier(2), identifier(1), b"both", guest)
    for number in range(20):
        handle_store.add(identifier(3 + number), identifier(1), b"name", 4)
    for number in range(1000):
        handle_store.add(identifier(100 + number), identifier(1), b"name", 3)
        assert len(handle_store) <= 100
    handle_store.close()
    handle_store = HandleStore(tmp_path / "state", rows_max=100)
    assert list(handle_store.locations(identifier(2))) == [(identifier(1), b"both")]
    for number in range(20):
        assert list(handle_store.locations(identifier(3 + number))) == [(identifier(1), b"name")]
    assert len(handle_store) <= 100
    handle_store.remove(identifier(2), identifier(1), b"both")
    assert not list(handle_store.locations(identifier(2)))
    handle_store.close()


def test_state_file_of_an_earlier_version(tmp_path: Path) -> None:
    """Rows without a guest."""
    with contextlib.closing(sqlite3.connect(tmp_path / "state", isolation_level=None)) as old:
        old.execute(
            "CREATE TABLE places"
            " (file BLOB, folder BLOB, name BLOB, PRIMARY KEY (file, folder, name))"
        )
        row = identifier(2).pack(), identifier(1).pack(), b"name"
        old.execute("INSERT INTO places VALUES (?, ?, ?)", row)
    handle_store = HandleStore(tmp_path / "state")
    assert list(handle_store.locations(identifier(2))) == [(identifier(1), b"name")]
    assert len(handle_store) == 1
    handle_store.close()


class FullDisk:
    """A full disk of the state file, while the context lasts."""

    def __init__(self, guest: DirectGuest) -> None:
        self._run = guest.handle_store._connection.execute

    def __enter__(self) -> None:
        (pages,) = self._run("PRAGMA page_count").fetchone()
        self._run(f"PRAGMA max_page_count = {pages}")

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(sqlite3.ProgrammingError):  # the store is closed
            self._run("PRAGMA max_page_count = 1000000000")


def test_full_disk_of_the_state_file(guest: DirectGuest, caplog: pytest.LogCaptureFixture) -> None:
    """New names are found and handles stay valid, also after a restart once there is space."""
    root = guest.root()
    assert root is not None
    names = [b"file-%d" % number for number in range(2000)]
    for name in names:
        (guest.export / os.fsdecode(name)).touch()
    with FullDisk(guest):
        handles = [guest.ok("lookup", root, name)[0] for name in names]
        for handle in handles:  # more files than the server keeps open
            guest.ok("getattr", handle)
        guest.ok("remove", root, names.pop())
        assert guest.ask("getattr", handles.pop())[0] == Status.STALE
        guest.ok("rename", Target(root, names[0]), Target(root, b"renamed"))
        guest.ok("getattr", handles[0])
    guest.restart()
    for handle in handles:
        guest.ok("getattr", handle)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2, lines
    assert "database or disk is full; locations are kept in memory" in lines[0]
    assert "writable again" in lines[1]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "vsockets-test", folder], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting is not permitted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_guest_that_fills_the_disk_of_exports_and_state(small_disk: Path) -> None:
    """Other guests are served, and cached replies are saved: space is reserved for them."""
    guest = DirectGuest(small_disk)
    root = guest.root()
    assert root is not None
    for number in range(600):
        (guest.export / f"{number}").touch()
    made = [(Target(root, b"dir-%d" % number), NewAttributes(mode=0o755)) for number in range(300)]
    arguments = PROCEDURES[NUMBERS["mkdir"]].arguments
    calls = [guest.datagram(nfs3.PROGRAM, NUMBERS["mkdir"], arguments.pack(one)) for one in made]
    replies = [guest.answer(call) for call in calls]
    file, offset, data = guest.make(root, b"file"), 0, bytes(4096)
    status: int = Status.OK
    while status == Status.OK:
        status, _ = guest.ask("write", file, offset, len(data), 0, data, source=(5, 700))
        offset += len(data)
    assert status == Status.NOSPC
    other = (4, 700)
    for number in range(600):
        assert guest.ask("lookup", root, b"%d" % number, source=other)[0] == Status.OK
    assert guest.ask("mkdir", Target(root, b"x"), NewAttributes(), source=other)[0] in (
        Status.NOSPC,
        Status.OK,  # a tmpfs has inodes left
    )
    guest.stop()
    guest.start()
    for call, reply in zip(calls, replies, strict=True):
        assert guest.answer(call) == reply
    guest.stop()


def test_broken_state_file_fails_only_the_calls_that_need_it(guest: DirectGuest) -> None:
    root = guest.root()
    assert root is not None
    (guest.export / "folder").mkdir()
    folder, _, _ = guest.ok("lookup", root, b"folder")
    guest.restart()
    guest.handle_store._connection.execute("DROP TABLE places")
    assert guest.ask("getattr", folder)[0] == Status.IO
    guest.ok("getattr", root)
    guest.ok("lookup", root, b"folder")
    guest.handle_store._connection.execute(handles._TABLE)


def test_damaged_journal_of_replies(guest: DirectGuest, caplog: pytest.LogCaptureFixture) -> None:
    """A record with a wrong checksum is ignored; a file that is not a journal is refused."""
    root = guest.root()
    assert root is not None
    calls = [
        guest.datagram(nfs3.PROGRAM, NUMBERS["remove"], nfs3.target.pack(Target(root, name)))
        for name in (b"one", b"two")
    ]
    replies = [guest.answer(call) for call in calls]
    guest.stop()
    journal = guest.export.parent / "state-replies"
    data = bytearray(journal.read_bytes())
    place = data.index(replies[0] or b"?")
    data[place + 10] ^= 1
    journal.write_bytes(data)
    guest.start()
    (guest.export / "one").touch()
    (guest.export / "two").touch()
    assert guest.answer(calls[1]) == replies[1]
    assert guest.answer(calls[0]) != replies[0]  # performed: its record was lost
    assert [record.getMessage() for record in caplog.records] == [
        f"{journal}: damaged replies ignored: 1"
    ]
    guest.stop()
    journal.write_bytes(b"something else")
    with pytest.raises(OSError, match=r"state-replies: not a journal of replies .*\(remove it"):
        HandleStore(guest.export.parent / "state")
    journal.unlink()
    guest.start()


def test_internal_error_gets_a_reply(
    guest: DirectGuest, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    root = guest.root()
    assert root is not None

    def fail(*arguments: object) -> None:
        raise RuntimeError

    monkeypatch.setattr(Procedures, "getattr", fail)
    datagram = guest.datagram(nfs3.PROGRAM, NUMBERS["getattr"], nfs3.handle.pack(root))
    assert guest.answer(datagram) == rpc.encode_accepted(guest.xid, rpc.AcceptStat.SYSTEM_ERR)
    assert [record.levelname for record in caplog.records] == ["ERROR"]


def test_malformed_datagrams_get_a_valid_reply_or_none(
    guest: DirectGuest, caplog: pytest.LogCaptureFixture
) -> None:
    """Mutated calls never raise an exception; each gets a reply with its xid, or none."""
    chance = random.Random(9)
    root = guest.root()
    assert root is not None
    file = guest.make(root, b"file", b"content")
    folder, _, _ = guest.ok("mkdir", Target(root, b"folder"), NewAttributes(mode=0o755))
    arguments: dict[str, tuple[Any, ...]] = {
        "getattr": (file,),
        "setattr": (file, NewAttributes(mode=0o600, size=9), None),
        "lookup": (root, b"file"),
        "access": (file, 63),
        "readlink": (file,),
        "read": (file, 0, 100),
        "write": (file, 4, 4, 0, b"data"),
        "create": (Target(folder, b"x"), (CreateMode.UNCHECKED, NewAttributes(mode=0o644))),
        "mkdir": (Target(folder, b"y"), NewAttributes(mode=0o755)),
        "symlink": (Target(folder, b"z"), NewAttributes(), b"target"),
        "mknod": (Target(folder, b"p"), (7, NewAttributes())),
        "remove": (folder, b"x"),
        "rmdir": (folder, b"y"),
        "rename": (Target(folder, b"z"), Target(folder, b"w")),
        "link": (file, Target(folder, b"l")),
        "readdir": (root, 0, bytes(8), 4096),
        "readdirplus": (root, 0, bytes(8), 512, 4096),
        "fsstat": (root,),
        "fsinfo": (root,),
        "pathconf": (root,),
        "commit": (file, 0, 0),
    }
    assert set(arguments) == set(NUMBERS)
    answered = 0
    for _ in range(3000):
        name = chance.choice(sorted(arguments))
        number = NUMBERS[name]
        values = arguments[name]
        packed = PROCEDURES[number].arguments.pack(values[0] if len(values) == 1 else values)
        datagram = bytearray(guest.datagram(nfs3.PROGRAM, number, packed))
        for _ in range(chance.randrange(4)):
            datagram[chance.randrange(len(datagram))] = chance.choice((0, 1, 127, 128, 255))
        if chance.random() < 0.1:
            del datagram[chance.randrange(len(datagram)) :]
        reply = guest.answer(bytes(datagram), GUEST)
        if reply is None:
            with pytest.raises(xdr.XdrError):  # a malformed call gets no reply
                rpc.decode_call(bytes(datagram))
            continue
        assert rpc.reply_xid(reply) == int.from_bytes(datagram[:4])
        try:
            results = rpc.decode_reply(reply)
        except rpc.RpcRejected:
            continue
        called, _ = rpc.decode_call(bytes(datagram))
        if called.program == nfs3.PROGRAM and called.procedure:
            nfs3.decode_result(PROCEDURES[called.procedure], results)
            answered += 1
    assert answered > 500
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
    assert sorted(os.listdir(guest.export.parent)) == ["export", *_state(guest.export.parent)]


def _state(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("state"))
