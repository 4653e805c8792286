"""The server's datagrams, with no socket: what it does for honest guests, and for others."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vsockets.bridges.nfs import attributes, mount, nfs3, rpc, xdr
from vsockets.bridges.nfs.calls import credentials
from vsockets.bridges.nfs.exports import Export
from vsockets.bridges.nfs.nfs3 import (
    NUMBERS,
    PROCEDURES,
    Access,
    How,
    NewAttributes,
    Stable,
    Status,
    Target,
)
from vsockets.bridges.nfs.places import Places
from vsockets.bridges.nfs.rpc import Call
from vsockets.bridges.nfs.service import Service

GUEST = (3, 700)


class Played:
    """A guest that calls the service directly."""

    def __init__(self, folder: Path, options: str = ",no-root-squash") -> None:
        self.export = folder / "export"
        self.export.mkdir(exist_ok=True)
        self._options = options
        self._state = folder / "state"
        self.xid = 0
        self.start()

    def start(self) -> None:
        self.places = Places(self._state)
        self.service = Service([Export.parse(f"{self.export}{self._options}")], self.places)

    def stop(self) -> None:
        self.service.close()
        self.places.close()

    def restart(self) -> None:
        self.stop()
        self.start()

    def datagram(self, program: int, number: int, packed: bytes) -> bytes:
        self.xid += 1
        own = credentials(os.geteuid(), os.getegid())
        return rpc.encode_call(Call(self.xid, 2, program, 3, number, own, rpc.NO_AUTH), packed)

    def root(self, source: tuple[int, int] = GUEST) -> bytes | None:
        packed = mount.path.pack(os.fsencode(self.export))
        reply = self.service.answer(self.datagram(mount.PROGRAM, mount.MNT, packed), source)
        assert reply is not None
        status, granted = mount.answer.unpack(rpc.decode_reply(reply))
        return granted[0] if status == 0 else None

    def ask(self, name: str, *arguments: Any, source: tuple[int, int] = GUEST) -> tuple[int, Any]:
        procedure = PROCEDURES[NUMBERS[name]]
        packed = procedure.arguments.pack(arguments[0] if len(arguments) == 1 else arguments)
        datagram = self.datagram(nfs3.PROGRAM, NUMBERS[name], packed)
        reply = self.service.answer(datagram, source)
        assert reply is not None
        return nfs3.decode_result(procedure, rpc.decode_reply(reply))

    def ok(self, name: str, *arguments: Any) -> Any:
        status, content = self.ask(name, *arguments)
        assert status == Status.OK, (name, status)
        return content

    def make(self, folder: bytes, name: bytes, data: bytes = b"") -> bytes:
        handle, _, _ = self.ok(
            "create", Target(folder, name), (How.GUARDED, NewAttributes(mode=0o644))
        )
        if data:
            self.ok("write", handle, 0, len(data), Stable.FILE_SYNC, data)
        assert isinstance(handle, bytes)
        return handle


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[Played]:
    played = Played(tmp_path)
    yield played
    played.stop()


def test_handles_survive_restarts_and_renames(guest: Played) -> None:
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
    assert guest.ok("read", file, 0, 100)[3] == b"content"  # by its other name
    guest.ok("remove", root, b"other")
    assert guest.ask("read", file, 0, 100)[0] == Status.STALE
    (guest.export / "b" / "file").write_text("another file, perhaps with the inode")
    assert guest.ask("read", file, 0, 100)[0] == Status.STALE


def test_what_was_not_committed_may_be_lost_with_a_life(guest: Played) -> None:
    root = guest.root()
    assert root is not None
    file = guest.make(root, b"file")
    _, _, _, verifier = guest.ok("write", file, 0, 3, Stable.UNSTABLE, b"abc")
    assert guest.ok("commit", file, 0, 0)[1] == verifier
    guest.restart()
    assert guest.ok("commit", file, 0, 0)[1] != verifier


def test_what_is_asked_again_is_not_done_again(guest: Played) -> None:
    root = guest.root()
    assert root is not None
    guest.make(root, b"file")
    packed = nfs3.target.pack(Target(root, b"file"))
    datagram = guest.datagram(nfs3.PROGRAM, NUMBERS["remove"], packed)
    first = guest.service.answer(datagram, GUEST)
    assert first == guest.service.answer(datagram, GUEST) and first is not None
    assert xdr.uint.decode(xdr.Reader(rpc.decode_reply(first))) == Status.OK
    other = guest.service.answer(datagram, (4, 700))  # whose call it is not
    assert other is not None
    assert xdr.uint.decode(xdr.Reader(rpc.decode_reply(other))) == Status.NOENT


def test_exclusive_create_knows_its_own_maker(guest: Played) -> None:
    root = guest.root()
    assert root is not None
    target = Target(root, b"file")
    handle, *_ = guest.ok("create", target, (How.EXCLUSIVE, b"12345678"))
    guest.restart()  # which has forgotten all answers
    assert guest.ok("create", target, (How.EXCLUSIVE, b"12345678"))[0] == handle
    assert guest.ask("create", target, (How.EXCLUSIVE, b"87654321"))[0] == Status.EXIST
    assert guest.ask("create", target, (How.GUARDED, NewAttributes()))[0] == Status.EXIST


def test_a_server_killed_within_an_exclusive_create_leaves_nothing(
    guest: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    class KilledError(BaseException):
        pass

    def die(*arguments: object) -> None:
        raise KilledError

    root = guest.root()
    assert root is not None
    target = Target(root, b"file")
    with monkeypatch.context() as patched, pytest.raises(KilledError):
        for module, name in ((os, "utime"), (attributes, "set_times")):
            patched.setattr(module, name, die)  # wherever a file is marked
        guest.ask("create", target, (How.EXCLUSIVE, b"12345678"))
    guest.restart()
    guest.ok("create", target, (How.EXCLUSIVE, b"12345678"))


def test_setattr_minds_its_guard(guest: Played) -> None:
    root = guest.root()
    assert root is not None
    file = guest.make(root, b"file", b"12345")
    ctime = guest.ok("getattr", file).ctime
    new = NewAttributes(size=2)
    assert guest.ask("setattr", file, new, ctime._replace(seconds=1))[0] == Status.NOT_SYNC
    change = guest.ok("setattr", file, new, ctime)
    assert (change.before.size, change.after.size) == (5, 2)


@pytest.mark.parametrize("plus", [False, True])
def test_a_listing_goes_on_whatever_changes(guest: Played, plus: bool) -> None:
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
        gone = next(iter(names - set(seen)), None)
        if gone is not None:
            guest.ok("remove", root, gone)
            names.discard(gone)
            guest.restart()
    assert names <= set(seen) and len(names) < 300
    assert len(seen) == len(set(seen))
    assert guest.ask("readdir", root, 5, b"x" * 8, 4096)[0] == Status.BAD_COOKIE
    assert guest.ask("readdir", root, 0, bytes(8), 10)[0] == Status.TOOSMALL


def test_nothing_outside_the_export_is_reached(guest: Played, tmp_path: Path) -> None:
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
    assert guest.ask("create", Target(root, b".."), (How.UNCHECKED, NewAttributes()))[0] == 17
    # A folder that became a link since its handle was given.
    folder, _, _ = guest.ok("mkdir", Target(root, b"folder"), NewAttributes(mode=0o755))
    (guest.export / "folder").rmdir()
    (guest.export / "folder").symlink_to(tmp_path)
    guest.restart()
    assert guest.ask("lookup", folder, b"secret")[0] == Status.STALE


def test_who_may_do_what(tmp_path: Path) -> None:
    guest = Played(tmp_path, ",ro,cid=3")
    root = guest.root()
    assert root is not None
    (guest.export / "file").write_text("content")
    file, _, _ = guest.ok("lookup", root, b"file")
    assert guest.ok("read", file, 0, 10)[3] == b"content"
    assert guest.ask("write", file, 0, 1, 0, b"x")[0] == Status.ROFS
    assert guest.ask("remove", root, b"file")[0] == Status.ROFS
    everything = sum(Access)
    assert not guest.ok("access", file, everything)[1] & (Access.MODIFY | Access.EXTEND)
    # Another guest that has learnt a handle.
    assert guest.root(source=(4, 700)) is None
    assert guest.ask("read", file, 0, 10, source=(4, 700))[0] == Status.ACCES
    guest.stop()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as others")
def test_root_is_nobody_unless_it_is_trusted(tmp_path: Path) -> None:
    guest = Played(tmp_path, "")
    root = guest.root()
    assert root is not None
    assert guest.ask("create", Target(root, b"a"), (How.GUARDED, NewAttributes()))[0] == 13
    guest.export.chmod(0o777)
    handle, *_ = guest.ok("create", Target(root, b"a"), (How.GUARDED, NewAttributes()))
    attributes = guest.ok("getattr", handle)
    assert (attributes.uid, attributes.gid) == (65_534, 65_534)
    (guest.export / "private").write_text("host's")
    (guest.export / "private").chmod(0o600)
    private, _, _ = guest.ok("lookup", root, b"private")
    assert guest.ask("read", private, 0, 10)[0] == Status.ACCES
    assert guest.ask("setattr", private, NewAttributes(mode=0o666), None)[0] == Status.PERM
    assert os.geteuid() == 0 and (guest.export / "private").read_text() == "host's"
    guest.stop()


def test_places_are_bounded(tmp_path: Path) -> None:
    from vsockets.bridges.nfs.handles import Identifier

    places = Places(tmp_path / "state", most=10)
    folder = Identifier(1, 1, 0, 0)
    for number in range(50):
        places.add(Identifier(1, 2 + number, 0, 0), folder, b"name")
        assert len(places) <= 10
    assert list(places.of(Identifier(1, 51, 0, 0))) == [(folder, b"name")]
    with pytest.raises(OSError, match="--state"):
        Places(tmp_path / "state")
    places.close()


def test_what_was_answered_is_known_to_the_next_server(guest: Played) -> None:
    """A guest whose answer was lost asks again after the restart; the next life forgets."""
    root = guest.root()
    assert root is not None
    procedure = PROCEDURES[NUMBERS["mkdir"]]
    packed = procedure.arguments.pack((Target(root, b"folder"), NewAttributes(mode=0o755)))
    call = guest.datagram(nfs3.PROGRAM, NUMBERS["mkdir"], packed)
    reply = guest.service.answer(call, GUEST)
    guest.restart()
    assert guest.service.answer(call, GUEST) == reply
    assert guest.service.answer(call, (GUEST[0], GUEST[1] + 1)) != reply  # another program's

    # A server that is killed keeps nothing, and what an earlier one kept is too old by then.
    guest.places.close()
    guest.start()
    again = guest.service.answer(call, GUEST)
    assert again is not None
    assert nfs3.decode_result(procedure, rpc.decode_reply(again))[0] == Status.EXIST


def test_hostile_datagrams_are_answered_well_or_not_at_all(guest: Played) -> None:
    """Mutations of good calls: never an exception, always a reply to that call or silence."""
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
        "create": (Target(folder, b"x"), (How.UNCHECKED, NewAttributes(mode=0o644))),
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
        reply = guest.service.answer(bytes(datagram), GUEST)
        if reply is None:
            with pytest.raises(xdr.XdrError):  # what is no call gets no answer
                rpc.decode_call(bytes(datagram))
            continue
        assert rpc.reply_to(reply) == int.from_bytes(datagram[:4])
        try:
            results = rpc.decode_reply(reply)
        except rpc.Refused:
            continue
        called, _ = rpc.decode_call(bytes(datagram))
        if called.program == nfs3.PROGRAM and called.procedure:
            nfs3.decode_result(PROCEDURES[called.procedure], results)
            answered += 1
    assert answered > 500
    assert sorted(os.listdir(guest.export.parent)) == ["export", *_state(guest.export.parent)]


def _state(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("state"))
