"""The variables of guests: two writers, limits, and what survives a restart."""

from __future__ import annotations

import resource
import sqlite3
from pathlib import Path

import pytest

from vsockets.guestrpc import limits
from vsockets.guestrpc.variables import VariableRefused, Variables, Writer, full_name

NAME = "guestinfo.userdata"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "variables"


def test_a_guest_reads_its_own_value_before_the_hosts(path: Path) -> None:
    with Variables(path) as variables:
        variables.admit(7, "a.vmx", "{}")
        variables.set(7, Writer.HOST, NAME, b"secret")
        assert variables.get(7, NAME) == b"secret"
        variables.set(7, Writer.GUEST, NAME, b"---")
        assert variables.get(7, NAME) == b"---"
        assert variables.all(7) == [(NAME, Writer.GUEST, b"---"), (NAME, Writer.HOST, b"secret")]


def test_a_redaction_outlives_the_service_and_new_values_of_the_host(path: Path) -> None:
    with Variables(path) as variables:
        variables.admit(7, "a.vmx", "{}")
        variables.admit(7, "a.vmx", "{}", {NAME: b"secret"})
        variables.set(7, Writer.GUEST, NAME, b"---")
    with Variables(path) as variables:
        variables.admit(7, "a.vmx", '{"may_set": false}', {NAME: b"secret"})
        assert variables.get(7, NAME) == b"---"
        assert variables.guests() == {7: '{"may_set": false}'}


def test_another_machine_with_the_cid_has_no_variables_of_the_first(path: Path) -> None:
    with Variables(path) as variables:
        variables.admit(7, "a.vmx", "{}")
        variables.set(7, Writer.GUEST, NAME, b"of the first")
        variables.admit(7, "b.vmx", "{}")
        assert variables.all(7) == []
        assert variables.remove(7)
        assert not variables.remove(7)


def test_limits_refuse_and_change_nothing(path: Path) -> None:
    most = limits.GUESTRPC_VARIABLES_MAX_BYTES
    with Variables(path) as variables:
        variables.admit(7, "", "{}")
        variables.set(7, Writer.GUEST, NAME, bytes(most - len(NAME)))
        with pytest.raises(VariableRefused, match=f"expected at most {most}"):
            variables.set(7, Writer.GUEST, "guestinfo.b", b"")
        with pytest.raises(VariableRefused, match="expected at most 9"):
            variables.set(7, Writer.GUEST, NAME, bytes(10), 9)
        assert [name for name, _, _ in variables.all(7)] == [NAME]
        assert len(variables.get(7, NAME) or b"") == most - len(NAME)
        # The host's limit is another one; the guest cannot use it up.
        variables.set(7, Writer.HOST, NAME, b"x")


def test_the_number_of_variables_is_limited(path: Path) -> None:
    with Variables() as variables:
        variables.admit(7, "", "{}")
        for number in range(limits.GUESTRPC_VARIABLES_MAX):
            variables.set(7, Writer.GUEST, f"guestinfo.{number}", b"")
        with pytest.raises(VariableRefused, match="1025 variables, expected at most 1024"):
            variables.set(7, Writer.GUEST, "guestinfo.more", b"")
        variables.set(7, Writer.GUEST, "guestinfo.0", b"changed")


def test_names() -> None:
    assert full_name("UserData") == full_name("guestinfo.USERDATA") == NAME
    for name in ("", "guestinfo.", "a b", "a=b", "a#b", "\xe9", "a\0", "x" * 300, "a\nb"):
        with pytest.raises(VariableRefused, match="printable ASCII"):
            full_name(name)


def test_a_file_that_is_no_database(path: Path) -> None:
    path.write_bytes(b"something else, and longer than a header of SQLite: " * 50)
    with pytest.raises(sqlite3.DatabaseError, match="not a database"):
        Variables(path)
    other = path.with_name("other")
    with sqlite3.connect(other) as database:
        database.execute("PRAGMA user_version = 9")
    with pytest.raises(sqlite3.DatabaseError, match="layout 9, expected 1"):
        Variables(other)


def test_a_disk_that_was_full(path: Path) -> None:
    """A write fails as a whole, and the next one succeeds once there is room."""
    with Variables(path) as variables:
        variables.admit(7, "", "{}")
        variables.set(7, Writer.GUEST, NAME, b"before")
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        for room in (0, 8192, 100_000):
            wal = path.with_name(path.name + "-wal").stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (wal + room, hard))
            try:
                with pytest.raises(sqlite3.Error):
                    variables.set(7, Writer.GUEST, NAME, bytes(500_000))
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            assert variables.get(7, NAME) == b"before"
        variables.set(7, Writer.GUEST, NAME, b"after")
    with Variables(path) as variables:
        assert variables.get(7, NAME) == b"after"


def test_a_file_that_another_service_uses(path: Path) -> None:
    with Variables(path), pytest.raises(sqlite3.OperationalError, match="locked"):
        Variables(path)


def test_permissions_are_kept_if_values_are_refused(path: Path) -> None:
    with Variables(path) as variables:
        variables.admit(7, "a.vmx", "{}", {NAME: b"a"})
        with pytest.raises(VariableRefused):
            variables.admit(7, "b.vmx", "other", {NAME: bytes(2_000_000)})
        assert variables.guests() == {7: "{}"}
        assert variables.get(7, NAME) == b"a"
