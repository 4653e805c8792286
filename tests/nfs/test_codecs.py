"""XDR, RPC and the decisions of client and server, without any I/O."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vsockets.nfs import nfs3, rpc, xdr
from vsockets.nfs.duplicate_request_cache import DuplicateRequestCache
from vsockets.nfs.exports import ANONYMOUS_ID, Export, Identity
from vsockets.nfs.handles import Identifier, Signer
from vsockets.nfs.limits import (
    NFS_CALL_TIMEOUT_SECONDS,
    NFS_CALLS_IN_FLIGHT_MAX,
    NFS_QUEUE_FULL_RETRY_SECONDS,
    NFS_RETRY_MAX_SECONDS,
    NFS_RETRY_MIN_SECONDS,
)
from vsockets.nfs.retransmission import RoundTrips, Transmission, Window
from vsockets.nfs.rpc import Auth, AuthSys, Call

uints = st.integers(0, 2**32 - 1)
hypers = st.integers(0, 2**64 - 1)
times = st.builds(nfs3.Time, uints, uints)
attributes = st.builds(
    nfs3.Attributes,
    *[uints] * 5,
    *[hypers] * 2,
    st.builds(nfs3.Device, uints, uints),
    *[hypers] * 2,
    *[times] * 3,
)
handles = st.binary(max_size=64)


@given(st.tuples(st.none() | handles, st.none() | attributes, st.just(nfs3.Change())))
def test_a_result_comes_back(value: Any) -> None:
    procedure = nfs3.PROCEDURES[nfs3.NUMBERS["create"]]
    packed = nfs3.encode_result(procedure, nfs3.Status.OK, value)
    assert nfs3.decode_result(procedure, packed) == (0, value)
    assert len(packed) % 4 == 0


@pytest.mark.parametrize("number", nfs3.PROCEDURES)
def test_every_failure_comes_back(number: int) -> None:
    procedure = nfs3.PROCEDURES[number]
    for status in nfs3.Status:
        if status != nfs3.Status.OK:
            packed = nfs3.encode_result(procedure, status, None)
            assert nfs3.decode_result(procedure, packed) == (status, procedure.nothing)
            assert nfs3.error_of(status).errno


@given(st.binary(max_size=200), st.sampled_from(sorted(nfs3.PROCEDURES)))
def test_whatever_comes_is_decoded_or_refused(data: bytes, number: int) -> None:
    codec = nfs3.PROCEDURES[number].arguments
    try:
        value = codec.unpack(data)
    except xdr.XdrError:
        return
    assert codec.pack(value) == data  # there is one way to write a value


@given(uints, uints, uints, uints, st.binary(max_size=400), st.binary(max_size=40))
def test_a_call_comes_back(
    xid: int, program: int, version: int, procedure: int, body: bytes, arguments: bytes
) -> None:
    call = Call(xid, 2, program, version, procedure, Auth(1, body), rpc.NO_AUTH)
    assert rpc.decode_call(rpc.encode_call(call, arguments)) == (call, arguments)


def test_replies() -> None:
    good = rpc.encode_accepted(7, rpc.Accepted.SUCCESS, b"\0\0\0\1")
    assert rpc.reply_to(good) == 7 and rpc.decode_reply(good) == b"\0\0\0\1"
    mismatch = rpc.encode_accepted(7, rpc.Accepted.PROG_MISMATCH, versions=(3, 3))
    with pytest.raises(rpc.RpcRefused, match=r"PROG_MISMATCH \(3, 3\)"):
        rpc.decode_reply(mismatch)
    for why in rpc.Denied:
        with pytest.raises(rpc.RpcRefused, match=why.name):
            rpc.decode_reply(rpc.encode_denied(7, why))


def test_handles_cannot_be_forged() -> None:
    signer = Signer(bytes(32))
    handle = signer.handle(Identifier(1, 2, -3, 4))
    assert signer.check(handle) == Identifier(1, 2, -3, 4)
    assert len(handle) <= nfs3.HANDLE_SIZE
    for number in range(len(handle)):
        forged = bytearray(handle)
        forged[number] ^= 1
        with pytest.raises(ValueError, match="invalid handle"):
            signer.check(bytes(forged))
    for wrong in (b"", handle[:-1], handle + b"\0"):
        with pytest.raises(ValueError, match="invalid handle"):
            signer.check(wrong)
    with pytest.raises(ValueError, match="invalid handle"):
        Signer(b"\1" * 32).check(handle)


def test_a_guest_cannot_push_out_anothers_answers() -> None:
    duplicates = DuplicateRequestCache(most=2, guests=2)
    duplicates.keep(3, (3, 1), 1, b"call", b"reply")
    for xid in range(9):
        duplicates.keep(4, (4, 1), xid, b"call", b"other")
    assert duplicates.find(3, (3, 1), 1, b"call") == b"reply"
    assert duplicates.find(3, (3, 1), 1, b"another call") is None
    assert duplicates.find(4, (3, 1), 1, b"call") is None
    assert len(duplicates) == 3


def test_a_call_is_sent_again_ever_later_until_nobody_is_there() -> None:
    sent, now = Transmission(0.0, 0.5), 0.0
    waits = []
    while sent.again(sent.due):
        waits.append(sent.due - now)
        now = sent.due
    assert max(waits[1:]) <= NFS_RETRY_MAX_SECONDS * 2 and sent.due >= NFS_CALL_TIMEOUT_SECONDS
    assert sent.round_trip(now) is None  # which try was answered nobody knows


def test_a_call_that_did_not_get_away_waits_for_a_queue_only() -> None:
    sent = Transmission(0.0, 0.5)
    for now in (0.0, 0.1, 0.2):
        sent.unsent(now)
        assert sent.due == now + NFS_QUEUE_FULL_RETRY_SECONDS
        assert sent.again(sent.due)
    assert sent.due - 0.202 == pytest.approx(0.5)  # as the first time
    assert sent.round_trip(0.302) == pytest.approx(0.1)


@given(st.lists(st.floats(0, 10)))
def test_waits_stay_within_their_limits(seconds: list[float]) -> None:
    trips, window = RoundTrips(), Window()
    for measured in seconds:
        trips.measured(measured)
        assert NFS_RETRY_MIN_SECONDS <= trips.wait <= NFS_RETRY_MAX_SECONDS
        window.answered() if measured < 5 else window.lost()
        assert 1 <= window.size <= NFS_CALLS_IN_FLIGHT_MAX


def test_exports_as_people_write_them(tmp_path: Any) -> None:
    export = Export.parse(f"{tmp_path},ro,cid=3:4")
    assert (export.read_only, export.root_squash) == (True, True)
    assert [cid for cid in range(6) if export.admits(cid)] == [3, 4]
    root = AuthSys(0, b"guest", 0, 0, (0, 5))
    assert export.identity(root) == Identity(ANONYMOUS_ID, ANONYMOUS_ID, (ANONYMOUS_ID, 5))
    assert export.identity(None) == Identity(ANONYMOUS_ID, ANONYMOUS_ID)
    trusting = Export.parse(f"{tmp_path},no-root-squash")
    assert trusting.identity(root) == Identity(0, 0, (0, 5))
    for text, why in (
        ("relative", "expected an absolute path"),
        ("/none/such", "directory not found"),
        (f"{tmp_path},fast", "expected ro, rw"),
        (f"{tmp_path},cid=x", "CID"),
    ):
        with pytest.raises(ValueError, match=why):
            Export.parse(text)
