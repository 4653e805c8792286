"""The guide's chapter 5 in a few lines, written from its sentences and not from the product."""

from __future__ import annotations

from dataclasses import dataclass

HYPERVISOR, HOST = 0, 2


@dataclass(eq=False)
class Machine:
    """A context as an administrator knows it."""

    cid: int
    owner: int
    profile: str = "default"
    unrestricted: bool = False
    domain: str = ""
    state: str = "running"
    ft: bool = False

    @property
    def is_guest(self) -> bool:
        return self.cid > HOST


def may_communicate(
    source: Machine, destination: Machine, connecting: bool, user: int, net_admin: bool
) -> bool:
    """Return whether a message may pass; ``user`` and ``net_admin`` are the host's endpoint's."""
    if source.state != "running" or destination.state != "running":
        return False  # page 7: "must be running, not powered off"
    if connecting and (source.ft or destination.ft):
        return False  # page 7: "no new vSockets connections can be established"
    guests = [one for one in (source, destination) if one.is_guest]
    if source is destination or not guests:
        return True  # page 8: "interprocess communications on a guest"
    legacy = [one for one in guests if one.profile == "legacy"]
    if len(guests) == 2:  # page 24: vmci0.unrestricted, vmci0.domain
        free = len(legacy) == 2 and all(one.unrestricted for one in guests)
        return free and source.domain == destination.domain
    guest = guests[0]
    if HYPERVISOR in (source.cid, destination.cid) or guest.profile == "default":
        return True  # "allows use of VMware Tools ... even for an isolated virtual machine"
    trusted = net_admin or user == guest.owner  # "Trusted vSockets"
    if legacy:
        return guest.domain == "" and (guest.unrestricted or trusted)
    return trusted
