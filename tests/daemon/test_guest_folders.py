"""A guest's owner cannot use its folders to affect vsockd's files, time, or start."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import vsockets
from vsockets.daemon.context_manager import Trash
from vsockets.protocol import Record
from vsockets.testing import PrivateFabric, wait_until

from .raw_client import LOCAL_CID, PROMPT, ask_once, assert_serves, compiled
from .users import NOBODY, as_administrator, as_root, user

OWNER = 54_321

#: Attempts of an owner to exchange names while vsockd uses them.  Without the protection under
#: test, 65 were enough.
ATTEMPTS = 150

#: Depth of nested folders: more than Python's recursion limit.
DEPTH = 1500


@pytest.fixture
def fabric(vsock_fabric: PrivateFabric) -> PrivateFabric:
    """Yield a fabric whose folder other users can enter."""
    vsock_fabric.folder.parent.chmod(0o755)
    return vsock_fabric


@pytest.fixture
def place() -> Iterator[Path]:
    """Yield a folder of root's that other users may enter."""
    with tempfile.TemporaryDirectory(prefix="vsock-", dir="/tmp") as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@pytest.fixture
def home(place: Path) -> Path:
    """Yield a folder of the owner's, with an empty one in it."""
    for folder in (place / "home", place / "home" / "vm"):
        folder.mkdir()
        os.chown(folder, OWNER, OWNER)
    return place / "home"


def is_served(fabric: PrivateFabric, cid: int = 7) -> bool:
    return ask_once(vsockets.attach(fabric.folder / str(cid)), LOCAL_CID).local_cid == cid


@contextlib.contextmanager
def in_folder(folder: Path) -> Iterator[None]:
    before = os.open(".", os.O_PATH)
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
        os.close(before)


def make_deep(folder: Path, depth: int) -> None:
    """Nest folders deeper than a path can name, or a recursion can follow."""
    inner = os.open(folder, os.O_PATH)
    for _ in range(depth):
        os.mkdir("d", dir_fd=inner)
        outer, inner = inner, os.open("d", os.O_PATH, dir_fd=inner)
        os.close(outer)
    os.close(inner)


def trash_is_empty(fabric: PrivateFabric) -> bool:
    return not os.listdir(fabric.folder / "private" / "trash")


# The folder of a context


@as_root
def test_only_the_owner_may_connect_and_may_change_nothing(fabric: PrivateFabric) -> None:
    guest = fabric.guest(7, owner=OWNER)
    with user(OWNER):
        assert is_served(fabric)
        for attempt, arguments in (
            (os.mkdir, ("x",)),
            (os.mknod, ("x",)),
            (os.unlink, ("stream",)),
            (os.rename, ("stream", "seqpacket")),
            (os.chmod, (".", 0o777)),
        ):
            with in_folder(guest.folder), pytest.raises(PermissionError):
                attempt(*arguments)
    with user(NOBODY), pytest.raises(PermissionError):
        is_served(fabric)


CONTAINER = """
mount --bind $1 $2 && mount -o remount,bind,ro $2 &&
exec setpriv --reuid=$3 --regid=$3 --clear-groups $4 $2/seqpacket
"""


@as_administrator
@pytest.mark.parametrize("uid", [0, OWNER])
def test_a_container_needs_only_the_guests_folder(
    fabric: PrivateFabric, place: Path, uid: int
) -> None:
    """Even when mounted read-only."""
    guest = fabric.guest(7, owner=OWNER)
    (place / "self").mkdir()
    words = (guest.folder, place / "self", uid, compiled("request_client.c", place))
    done = subprocess.run(
        ["unshare", "--mount", "--net", "sh", "-c", CONTAINER, "sh", *map(str, words)],
        input=LOCAL_CID.encode(),
        capture_output=True,
        timeout=2 * PROMPT,
        check=True,
    )
    assert Record.decode(done.stdout).local_cid == 7


def test_contents_of_the_folder_do_not_delay_the_guests_changes(
    vsock_fabric: PrivateFabric,
) -> None:
    guest = vsock_fabric.guest(7)
    for _ in range(2):
        make_deep(guest.folder, DEPTH)
        for number in range(1000):
            (guest.folder / str(number)).touch()
        vsock_fabric.control.power_off(7)
        assert not guest.folder.exists()
        vsock_fabric.control.power_on(7)
        assert is_served(vsock_fabric)
    assert_serves(vsock_fabric)
    wait_until(lambda: trash_is_empty(vsock_fabric), "all of it to be removed", 6 * PROMPT)


def test_folders_are_discarded_while_others_are_removed(tmp_path: Path) -> None:
    """By two threads, which switch as often as they can."""
    trash = Trash(tmp_path / "trash")
    trash.begin()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for number in range(1500):
            folder = tmp_path / str(number)
            (folder / "inner").mkdir(parents=True)
            trash.discard(folder)
    finally:
        sys.setswitchinterval(interval)
    wait_until(lambda: not os.listdir(tmp_path / "trash"), "all of them to be removed", PROMPT)


def test_contents_of_the_folder_do_not_delay_the_next_vsockd(
    vsock_fabric: PrivateFabric,
) -> None:
    for cid in (7, 8, 2):
        if cid > 2:
            vsock_fabric.guest(cid)
        make_deep(vsock_fabric.folder / str(cid), DEPTH)
    vsock_fabric.kill()
    vsock_fabric.start()
    assert_serves(vsock_fabric)
    assert not (vsock_fabric.folder / "7").exists()
    wait_until(lambda: trash_is_empty(vsock_fabric), "all of it to be removed", 6 * PROMPT)


def test_the_next_vsockd_removes_the_rest(
    vsock_fabric: PrivateFabric,
) -> None:
    vsock_fabric.kill()
    left = vsock_fabric.folder / "private" / "trash" / "0"
    left.mkdir()
    make_deep(left, 100)
    vsock_fabric.start()
    wait_until(lambda: trash_is_empty(vsock_fabric), "all of it to be removed", PROMPT)


def test_an_existing_name_keeps_only_that_guest_off(vsock_fabric: PrivateFabric) -> None:
    vsock_fabric.stop()
    vsock_fabric.expect_errors()
    (vsock_fabric.configuration / "a.toml").write_text("[[context]]\ncid = 7\n[[context]]\ncid=8")
    taken = vsock_fabric.folder / "7"
    taken.write_text("in the way")
    vsock_fabric.start()
    states = {row["cid"]: row["state"] for row in vsock_fabric.control.contexts()}
    assert states == {2: "running", 7: "off", 8: "running"}
    assert "context 7 stays powered off: " in vsock_fabric.log
    taken.unlink()
    vsock_fabric.control.power_on(7)
    assert is_served(vsock_fabric)


# The socket of hybrid vsock


@as_root
def test_a_socket_in_the_owners_folder_is_the_owners(fabric: PrivateFabric, home: Path) -> None:
    path = home / "vm" / "web.sock"
    guest = fabric.guest(7, owner=OWNER, hybrid=path)
    found = path.lstat()
    assert (found.st_uid, stat.S_IMODE(found.st_mode)) == (OWNER, 0o600)
    with (
        user(OWNER),
        vsockets.create_server((7, 5052), context=guest),
        socket.socket(socket.AF_UNIX) as tool,
    ):
        tool.settimeout(PROMPT)
        tool.connect(str(path))
        tool.sendall(b"CONNECT 5052\n")
        assert tool.recv(2) == b"OK"
    wait_until(lambda: not fabric.control.status()["streams"], "the end", PROMPT)
    fabric.control.remove_context(7)
    assert not path.exists()


@as_root
def test_vsockd_does_nothing_the_owner_may_not_do(fabric: PrivateFabric, place: Path) -> None:
    """A third user's folder, and one of root's that a group may write."""
    for folder, owner, group, mode in (("theirs", NOBODY, NOBODY, 0o755), ("shared", 0, 0, 0o775)):
        (place / folder).mkdir()
        os.chown(place / folder, owner, group)
        (place / folder).chmod(mode)
        path = place / folder / "web.sock"
        with pytest.raises(OSError, match=rf"hybrid: {path}: .*\(for user {OWNER}, its owner\)"):
            fabric.guest(7, owner=OWNER, hybrid=path)
        assert os.listdir(place / folder) == []
    assert [row["cid"] for row in fabric.control.contexts()] == [2]


@as_root
def test_a_link_that_others_can_change_is_not_followed(
    fabric: PrivateFabric, place: Path, home: Path
) -> None:
    secret = place / "secret"
    secret.mkdir()
    with user(OWNER):
        (home / "link").symlink_to(secret)
    for link in ("link", "roots"):
        with contextlib.suppress(FileExistsError):
            (home / link).symlink_to(secret)  # root's own; but the owner could exchange it
        with pytest.raises(OSError, match=rf"hybrid: .*{home}.*: "):
            fabric.guest(7, hybrid=home / link / "web.sock")
    assert os.listdir(secret) == []


def test_a_link_that_others_cannot_change_is_followed(
    vsock_fabric: PrivateFabric, place: Path
) -> None:
    (place / "folder" / "inner").mkdir(parents=True)
    (place / "absolute").symlink_to(place / "folder")
    (place / "relative").symlink_to("absolute/inner/../inner")
    vsock_fabric.guest(7, hybrid=place / "relative" / "web.sock")
    assert (place / "folder" / "inner" / "web.sock").is_socket()
    (place / "round").symlink_to("round")
    with pytest.raises(OSError, match="hybrid: ") as refused:
        vsock_fabric.guest(8, hybrid=place / "round" / "web.sock")
    assert refused.value.errno == errno.ELOOP


@as_administrator
@pytest.mark.skipif(not os.path.exists("/dev/fuse"), reason="needs FUSE")
def test_a_file_system_that_does_not_answer(fabric: PrivateFabric, home: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    server = os.open("/dev/fuse", os.O_RDWR)
    vm = os.fsencode(home / "vm")
    options = b"fd=%d,rootmode=40000,user_id=%d,group_id=0,allow_other" % (server, OWNER)
    assert libc.mount(b"fuse", vm, b"fuse", 0, options) == 0, os.strerror(ctypes.get_errno())
    try:
        for path in (home / "vm" / "web.sock", home / "vm" / "inner" / "web.sock"):
            with pytest.raises(OSError, match=f"{home / 'vm'}: a file system in user space"):
                fabric.guest(7, owner=OWNER, hybrid=path)
    finally:
        libc.umount2(vm, 2)  # MNT_DETACH
        os.close(server)


@as_root
def test_files_of_the_owner_do_not_keep_vsockd_from_starting(
    fabric: PrivateFabric, home: Path
) -> None:
    path = home / "vm" / "web.sock"
    (fabric.configuration / "a.toml").write_text(
        f'[[context]]\ncid = 7\nowner = {OWNER}\nhybrid = "{path}"\n'
    )
    fabric.stop()
    for kind in ("folder", "file", "link"):
        if kind == "folder":
            path.mkdir()
        elif kind == "file":
            path.touch()
        else:
            path.symlink_to("/etc/passwd")
        fabric.start()
        assert is_served(fabric)
        fabric.control.power_off(7)
        fabric.control.power_on(7)
        assert is_served(fabric)
        assert f"context 7 has no hybrid socket: hybrid: {path}: " in fabric.log
        assert os.path.lexists(path)
        fabric.stop()
        (os.rmdir if kind == "folder" else os.unlink)(path)
    fabric.start()
    assert path.is_socket()
    # What the owner has put in the place of the socket is not vsockd's to remove.
    path.unlink()
    path.touch()
    fabric.control.power_off(7)
    assert path.exists()


@as_root
@pytest.mark.parametrize("exchanged", ["the socket", "its folder"])
def test_an_owner_who_exchanges_names(
    fabric: PrivateFabric, place: Path, home: Path, exchanged: str
) -> None:
    path = home / "vm" / "web.sock"
    secret = place / "secret"
    secret.mkdir(mode=0o700)
    victim = secret / "web.sock"
    victim.write_text("root's")
    victim.chmod(0o600)
    names = [path, home / "vm" / "other", victim]
    if exchanged == "its folder":
        names = [home / "vm", home / "other", secret]
    attacker = subprocess.Popen([compiled("exchanger.c", place), str(OWNER), *names])
    made = 0
    try:
        for _ in range(ATTEMPTS):
            with contextlib.suppress(OSError):
                fabric.guest(7, owner=OWNER, hybrid=path)
                made += 1
                fabric.control.remove_context(7)
            found = victim.stat()
            assert (found.st_uid, stat.S_IMODE(found.st_mode)) == (0, 0o600)
            assert os.listdir(secret) == ["web.sock"]
    finally:
        attacker.kill()
        attacker.wait()
    assert made
    assert victim.read_text() == "root's"


# The state folder


@as_root
def test_a_state_folder_with_a_path_others_can_change_is_refused(home: Path) -> None:
    with pytest.raises(Exception, match=f"{home}: other users can change its content"):
        PrivateFabric(home / "fabric").__enter__()
    assert os.listdir(home) == ["vm"]


@as_administrator
def test_a_full_disk(place: Path) -> None:
    """A full disk is reported as such, takes no port, and is temporary."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mount(b"tmpfs", os.fsencode(place), b"tmpfs", 0, b"nr_inodes=40") == 0
    try:
        with PrivateFabric(place / "fabric") as fabric:
            filled = 0
            with contextlib.suppress(OSError):
                while True:
                    (place / str(filled)).touch()
                    filled += 1
            sock = vsockets.socket(type=socket.SOCK_DGRAM, context=fabric.host)
            with sock:
                with pytest.raises(OSError, match="No space") as refused:
                    sock.bind((2, 5000))
                assert refused.value.errno == errno.ENOSPC
                with pytest.raises(OSError, match="No space"):
                    fabric.guest(7)
                assert [row["cid"] for row in fabric.control.contexts()] == [2]
                assert fabric.control.sockets() == []
                assert_serves(fabric)
                for number in range(filled):
                    (place / str(number)).unlink()
                sock.bind((2, 5000))
                fabric.guest(7)
    finally:
        libc.umount2(os.fsencode(place), 2)  # MNT_DETACH
