"""Who may capture what passes a device: decision by decision."""

from __future__ import annotations

import errno

import pytest

from vsockets.fabric import Context, Credentials, Denied, Fabric, Grant, Rule, Settings, policy

from .somebody import ADMIN, ME, ROOT, YOU, Somebody, granted

OWNER = 4000
FABRIC = Fabric(owner=OWNER)
GUEST = FABRIC.contexts.add(3, "", owner=ME.credentials.uid)
OWNERS = Somebody(Credentials(300, OWNER, OWNER))

CAPTURES = Grant(1000, None, None, False, False, None, capture=True)
TRUSTED = Grant(1000, None, None, True, True, None)
SETTINGS = Settings(grants=(CAPTURES, TRUSTED))


def may(asker: Context, program: Somebody, settings: Settings = SETTINGS) -> bool:
    try:
        policy.require_capture(asker, program, settings)
    except Denied as error:
        denied = error
    else:
        return True
    assert (denied.errno, denied.rule) == (errno.EACCES, Rule.CAPTURE)
    return False


@pytest.mark.parametrize("program", [OWNERS, ROOT, granted(CAPTURES)])
def test_the_fabrics_owner_root_and_who_was_granted_it(program: Somebody) -> None:
    assert may(FABRIC.contexts.host, program)


@pytest.mark.parametrize("program", [ME, YOU, ADMIN, granted(TRUSTED)])
def test_nobody_else_trusted_or_not_the_guests_owner_or_not(program: Somebody) -> None:
    assert not may(FABRIC.contexts.host, program)


def test_a_grant_that_is_not_configured_is_none() -> None:
    assert not may(FABRIC.contexts.host, granted(CAPTURES), Settings(grants=(TRUSTED,)))


@pytest.mark.parametrize("program", [OWNERS, ROOT, granted(CAPTURES)])
def test_no_program_of_a_guest_whoever_it_is(program: Somebody) -> None:
    assert not may(GUEST, program)
    assert not may(FABRIC.contexts.hypervisor, program)
