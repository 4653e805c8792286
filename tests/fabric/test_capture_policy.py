"""Decisions on who may capture at a device."""

from __future__ import annotations

import errno

import pytest

from vsockets.fabric import Context, Credentials, Denied, Fabric, Grant, Rule, Settings, policy

from .programs import ADMIN, ME, ROOT, YOU, StubProgram, granted

OWNER = 4000
FABRIC = Fabric(owner=OWNER)
GUEST = FABRIC.contexts.add(3, "", owner=ME.credentials.uid)
OWNERS = StubProgram(Credentials(300, OWNER, OWNER))

CAPTURES = Grant(1000, None, None, False, False, None, capture=True)
TRUSTED = Grant(1000, None, None, True, True, None)
SETTINGS = Settings(grants=(CAPTURES, TRUSTED))


def may(asker: Context, program: StubProgram, settings: Settings = SETTINGS) -> bool:
    try:
        policy.require_capture(asker, program, settings)
    except Denied as error:
        denied = error
    else:
        return True
    assert (denied.errno, denied.rule) == (errno.EACCES, Rule.CAPTURE)
    return False


@pytest.mark.parametrize("program", [OWNERS, ROOT, granted(CAPTURES)])
def test_the_fabrics_owner_root_and_granted_programs_may_capture(program: StubProgram) -> None:
    assert may(FABRIC.contexts.host, program)


@pytest.mark.parametrize("program", [ME, YOU, ADMIN, granted(TRUSTED)])
def test_other_programs_may_not_capture_even_if_trusted_or_the_guests_owners(
    program: StubProgram,
) -> None:
    assert not may(FABRIC.contexts.host, program)


def test_a_grant_counts_only_while_configured() -> None:
    assert not may(FABRIC.contexts.host, granted(CAPTURES), Settings(grants=(TRUSTED,)))


@pytest.mark.parametrize("program", [OWNERS, ROOT, granted(CAPTURES)])
def test_no_program_of_a_guest_may_capture(program: StubProgram) -> None:
    assert not may(GUEST, program)
    assert not may(FABRIC.contexts.hypervisor, program)
