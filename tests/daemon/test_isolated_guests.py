"""Restricted guests, trusted programs and hypervisor services, with processes of several users."""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Iterator

import pytest

import vsockets
from vsockets import (
    SO_VM_SOCKETS_PEER_HOST_VM_ID,
    SO_VM_SOCKETS_TRUSTED,
    Attachment,
    VMCISock_GetAFValue,
)
from vsockets.testing import PrivateFabric

from .raw_client import ask_once, bind, enter
from .users import NOBODY, as_root, user

OWNER = 54_321

STREAM, SEQPACKET, DATAGRAM = socket.SOCK_STREAM, socket.SOCK_SEQPACKET, socket.SOCK_DGRAM
every_kind = pytest.mark.parametrize("kind", [STREAM, SEQPACKET, DATAGRAM])

pytestmark = as_root


@pytest.fixture
def guest(fabric: PrivateFabric) -> Attachment:
    """Yield a restricted guest."""
    return fabric.guest(3, owner=OWNER, profile="restricted")


@contextlib.contextmanager
def service(context: Attachment, kind: int, address: tuple[int, int]) -> Iterator[vsockets.socket]:
    with vsockets.socket(type=kind, context=context) as sock:
        sock.bind(address)
        sock.settimeout(10)
        if kind != DATAGRAM:
            sock.listen()
        yield sock


def reach(context: Attachment, kind: int, server: vsockets.socket) -> int:
    """Send to ``server`` over a new socket; return the errno, or 0 when it arrived."""
    with vsockets.socket(type=kind, context=context) as client:
        try:
            if kind == DATAGRAM:
                client.sendto(b"x", server.getsockname())
            else:
                client.connect(server.getsockname())
                client.send(b"x")
        except OSError as refusal:
            return refusal.errno or -1
        if kind == DATAGRAM:
            assert server.recvfrom(10) == (b"x", client.getsockname())
        else:
            accepted, source = server.accept()
            with accepted:
                assert (accepted.recv(10), source) == (b"x", client.getsockname())
        return 0


def refusal_of(kind: int) -> int:
    """Return the errno a guest gets for a forbidden endpoint: the same as for a missing one."""
    return errno.ECONNREFUSED if kind == DATAGRAM else errno.ECONNRESET


@every_kind
@pytest.mark.parametrize(("uid", "trusted"), [(0, True), (OWNER, True), (NOBODY, False)])
def test_from_a_restricted_guest(
    fabric: PrivateFabric, guest: Attachment, kind: int, uid: int, trusted: bool
) -> None:
    """Root has CAP_NET_ADMIN, the owner is the owner, and user nobody has neither (guide p. 24)."""
    with user(uid), service(fabric.host, kind, (2, 5000)) as server, user(0):
        assert reach(guest, kind, server) == (0 if trusted else refusal_of(kind))


@every_kind
@pytest.mark.parametrize(("uid", "trusted"), [(0, True), (OWNER, True), (NOBODY, False)])
def test_to_a_restricted_guest(
    fabric: PrivateFabric, guest: Attachment, kind: int, uid: int, trusted: bool
) -> None:
    with service(guest, kind, (3, 5000)) as server, user(uid):
        assert reach(fabric.host, kind, server) == (0 if trusted else errno.EACCES)


@every_kind
def test_a_granted_program(fabric: PrivateFabric, guest: Attachment, kind: int) -> None:
    """For streams, datagrams or both; sequenced packet sockets count as streams."""
    grants = fabric.configuration / "grants.toml"
    for streams, datagrams in ((True, False), (False, True)):
        grants.write_text(
            f"[[grant]]\nuser = {NOBODY}\n"
            f"stream_vsocket_trusted = {str(streams).lower()}\n"
            f"dgram_vsocket_trusted = {str(datagrams).lower()}\n"
        )
        fabric.control.reload()
        trusted = datagrams if kind == DATAGRAM else streams
        with user(NOBODY), service(fabric.host, kind, (2, 5000)) as server, user(0):
            assert reach(guest, kind, server) == (0 if trusted else refusal_of(kind))
        with service(guest, kind, (3, 5000)) as server, user(NOBODY):
            assert reach(fabric.host, kind, server) == (0 if trusted else errno.EACCES)


def test_trust_is_fixed_at_creation(fabric: PrivateFabric, guest: Attachment) -> None:
    """An endpoint keeps the trust it was bound with, also after the grant changes."""
    grants = fabric.configuration / "grants.toml"
    grants.write_text(f"[[grant]]\nuser = {NOBODY}\nstream_vsocket_trusted = true\n")
    fabric.control.reload()
    with user(NOBODY), service(fabric.host, STREAM, (2, 5000)) as granted:
        with user(0):
            grants.unlink()
            fabric.control.reload()
        with service(fabric.host, STREAM, (2, 5001)) as later:
            assert granted.getsockopt(VMCISock_GetAFValue(), SO_VM_SOCKETS_TRUSTED) == 1
            assert later.getsockopt(VMCISock_GetAFValue(), SO_VM_SOCKETS_TRUSTED) == 0
            with user(0):
                assert reach(guest, STREAM, granted) == 0
                assert reach(guest, STREAM, later) == errno.ECONNRESET


@every_kind
def test_within_a_restricted_guest_and_to_the_hypervisor(
    fabric: PrivateFabric, guest: Attachment, kind: int
) -> None:
    """ "This allows use of VMware Tools without any problems even for an isolated virtual
    machine."
    """
    with (
        service(guest, kind, (3, 5000)) as own,
        service(fabric.hypervisor, kind, (0, 5000)) as tool,
    ):
        assert reach(guest, kind, own) == 0
        assert reach(guest, kind, tool) == 0
        assert reach(fabric.host, kind, tool) == 0
        with user(NOBODY):
            assert reach(fabric.host, kind, tool) == 0


# What programs learn


@pytest.mark.parametrize(("uid", "answer"), [(0, 1), (OWNER, 1), (NOBODY, 0)])
@pytest.mark.parametrize("kind", [STREAM, SEQPACKET])
def test_so_vm_sockets_trusted(
    fabric: PrivateFabric, guest: Attachment, uid: int, answer: int, kind: int
) -> None:
    """SO_VM_SOCKETS_TRUSTED of a connected socket: for the guest it is connected to."""
    open_to_all = fabric.guest(4, owner=OWNER)
    with (
        service(open_to_all, kind, (4, 5000)) as server,
        user(uid),
        vsockets.socket(type=kind, context=fabric.host) as client,
    ):
        client.connect(server.getsockname())
        assert client.getsockopt(VMCISock_GetAFValue(), SO_VM_SOCKETS_TRUSTED) == answer


def test_so_vm_sockets_peer_host_vm_id(fabric: PrivateFabric) -> None:
    """SO_VM_SOCKETS_PEER_HOST_VM_ID: for the host's programs only, as reported by the kernel."""
    inside = fabric.guest(4)
    family = VMCISock_GetAFValue()
    with (
        service(fabric.host, STREAM, (2, 5000)) as server,
        vsockets.create_connection((2, 5000), context=inside) as client,
    ):
        accepted, _ = server.accept()
        with accepted:
            assert accepted.getsockopt(family, SO_VM_SOCKETS_PEER_HOST_VM_ID) == 4
            with pytest.raises(OSError) as refusal:
                client.getsockopt(family, SO_VM_SOCKETS_PEER_HOST_VM_ID)
            assert refusal.value.errno == errno.ENOPROTOOPT


# Services of the hypervisor


def test_a_service_of_the_hypervisor_is_its_owners(fabric: PrivateFabric) -> None:
    with user(NOBODY), pytest.raises(PermissionError):
        enter(fabric.hypervisor)
    # Nor over the host's control socket, which any user may connect to.
    with user(NOBODY):
        refusal = ask_once(fabric.host, bind(5000)._replace(local_cid=0))
    assert refusal.status == errno.EADDRNOTAVAIL


def test_even_with_open_file_modes(fabric: PrivateFabric) -> None:
    """An administrator's error in the files' modes does not suffice."""
    fabric.hypervisor.folder.chmod(0o755)
    for name in ("stream", "seqpacket"):
        (fabric.hypervisor.folder / name).chmod(0o666)
    with service(fabric.host, STREAM, (2, 5000)) as server, user(NOBODY):
        assert ask_once(fabric.hypervisor, bind(5000)).status == errno.EACCES
        with (
            vsockets.socket(type=DATAGRAM, context=fabric.hypervisor) as sock,
            pytest.raises(PermissionError),
        ):
            sock.bind((0, 5000))
        assert reach(fabric.hypervisor, STREAM, server) == errno.EACCES
    assert "hypervisor-service" in fabric.log


# The legacy profile


def test_domains_of_host_programs(fabric: PrivateFabric) -> None:
    """A host application is in the default domain unless it is configured otherwise."""
    (fabric.configuration / "lab.toml").write_text(
        f'[[grant]]\nuser = {NOBODY}\ndomains = ["lab"]\n'
        '[[context]]\ncid = 3\nprofile = "legacy"\nunrestricted = true\ndomain = "lab"\n'
        '[[context]]\ncid = 4\nprofile = "legacy"\nunrestricted = true\n'
    )
    fabric.control.reload()
    lab, default = (Attachment(fabric.folder / cid) for cid in ("3", "4"))
    with user(NOBODY), service(fabric.host, STREAM, (2, 5000)) as theirs, user(0):
        assert reach(lab, STREAM, theirs) == 0
        assert reach(default, STREAM, theirs) == errno.ECONNRESET
    with user(OWNER), service(fabric.host, STREAM, (2, 5000)) as others, user(0):
        assert reach(lab, STREAM, others) == errno.ECONNRESET
        assert reach(default, STREAM, others) == 0
    with service(lab, STREAM, (3, 5000)) as server:
        assert reach(default, STREAM, server) == errno.EHOSTUNREACH
        with user(OWNER):
            assert reach(fabric.host, STREAM, server) == errno.EACCES
        with user(NOBODY):
            assert reach(fabric.host, STREAM, server) == 0
