"""Trust by configuration: grants to users, groups and executables, and who does not match."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from vsockets.protocol import Op, Record, Request, RequestFlag
from vsockets.testing import PrivateFabric

from .users import NOBODY, as_administrator, as_root, ask_by_program

pytestmark = as_root

#: A group that no user belongs to.
CREW = 54_321


def grant(fabric: PrivateFabric, who: str) -> None:
    (fabric.configuration / "grants.toml").write_text(
        f"[[grant]]\n{who}\nstream_vsocket_trusted = true\n"
    )
    fabric.control.reload()


def is_trusted(answer: Record) -> bool:
    assert answer.status == 0
    assert not answer.flags & RequestFlag.TRUSTED_DATAGRAM
    return bool(answer.flags & RequestFlag.TRUSTED_STREAM)


TRUSTED_BY_9 = Request(Op.LOCAL_CID, peer_cid=9)


def test_a_grant_to_a_group(fabric: PrivateFabric, programs: Path) -> None:
    """Any of a process's groups at the time of connect matches."""
    fabric.guest(9, profile="restricted")
    client = programs / "request_client"
    grant(fabric, f"group = {CREW}")
    assert is_trusted(ask_by_program(client, fabric, TRUSTED_BY_9, groups=(1, CREW)))
    assert not is_trusted(ask_by_program(client, fabric, TRUSTED_BY_9, groups=(1,)))
    grant(fabric, f"group = {NOBODY}")
    assert is_trusted(ask_by_program(client, fabric, TRUSTED_BY_9))


def test_a_grant_to_a_user_and_a_group_needs_both(fabric: PrivateFabric, programs: Path) -> None:
    fabric.guest(9, profile="restricted")
    client = programs / "request_client"
    grant(fabric, f"user = {NOBODY}\ngroup = {CREW}")
    assert is_trusted(ask_by_program(client, fabric, TRUSTED_BY_9, groups=(CREW,)))
    assert not is_trusted(ask_by_program(client, fabric, TRUSTED_BY_9))
    grant(fabric, f"user = {NOBODY - 1}\ngroup = {CREW}")
    assert not is_trusted(ask_by_program(client, fabric, TRUSTED_BY_9, groups=(CREW,)))


def test_a_grant_to_an_executable_alone_is_refused(fabric: PrivateFabric, programs: Path) -> None:
    """Any user could connect, leave the connection to a child, and execute it."""
    fabric.guest(9, profile="restricted")
    client = programs / "request_client"
    with pytest.raises(OSError, match=r"grants.toml:2: grant.executable: any user can execute it"):
        grant(fabric, f'executable = "{client}"')
    assert not is_trusted(ask_by_program(client, fabric, TRUSTED_BY_9))


class TestGrantToAnExecutable:
    """An executable narrows a grant to one file, identified by inode."""

    @pytest.fixture
    def client(self, fabric: PrivateFabric, programs: Path) -> Path:
        fabric.guest(9, profile="restricted")
        client = programs / "request_client"
        grant(fabric, f'user = {NOBODY}\nexecutable = "{client}"')
        return client

    def test_the_program_at_the_path_is_trusted(self, fabric: PrivateFabric, client: Path) -> None:
        assert is_trusted(ask_by_program(client, fabric, TRUSTED_BY_9))

    def test_the_program_of_another_user_is_not_trusted(
        self, fabric: PrivateFabric, client: Path
    ) -> None:
        grant(fabric, f'user = {NOBODY - 1}\nexecutable = "{client}"')
        assert not is_trusted(ask_by_program(client, fabric, TRUSTED_BY_9))

    def test_the_program_by_another_name_is_trusted(
        self, fabric: PrivateFabric, client: Path
    ) -> None:
        link = client.with_name("link")
        link.hardlink_to(client)
        assert is_trusted(ask_by_program(link, fabric, TRUSTED_BY_9))

    def test_a_copy(self, fabric: PrivateFabric, client: Path) -> None:
        copy = Path(shutil.copy(client, client.with_name("copy")))
        assert not is_trusted(ask_by_program(copy, fabric, TRUSTED_BY_9))

    @as_administrator
    def test_another_file_of_that_name_in_another_mount_namespace(
        self, fabric: PrivateFabric, client: Path
    ) -> None:
        copy = Path(shutil.copy(client, client.with_name("impostor")))
        script = (
            f'mount --bind {copy} {client} && exec setpriv --reuid {NOBODY} --clear-groups "$@"'
        )
        elsewhere = ["unshare", "--mount", "sh", "-c", script, "sh"]
        assert not is_trusted(ask_by_program(client, fabric, TRUSTED_BY_9, *elsewhere))

    def test_a_file_that_replaced_it(self, fabric: PrivateFabric, client: Path) -> None:
        """The path identifies the file, and only who may write there can replace it."""
        other = Path(shutil.copy(client, client.with_name("other")))
        running = client.with_name("running")
        running.hardlink_to(client)
        os.replace(other, client)
        assert not is_trusted(ask_by_program(running, fabric, TRUSTED_BY_9))
        assert is_trusted(ask_by_program(client, fabric, TRUSTED_BY_9))
