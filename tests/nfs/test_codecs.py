"""XDR, RPC, retransmission and exports, without I/O."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vsockets.nfs import nfs3, rpc, xdr
from vsockets.nfs.exports import ANONYMOUS_ID, Export, UnixIdentity
from vsockets.nfs.handles import Identifier, Signer
from vsockets.nfs.limits import (
    NFS_CALL_TIMEOUT_SECONDS,
    NFS_CALLS_IN_FLIGHT_MAX,
    NFS_QUEUE_FULL_RETRY_SECONDS,
    NFS_RETRY_MAX_SECONDS,
    NFS_RETRY_MIN_SECONDS,
)
from vsockets.nfs.retransmission import (
    CachedReply,
    DuplicateRequestCache,
    RoundTripEstimator,
    Transmission,
    Window,
)
from vsockets.nfs.rpc import Auth, AuthSys, CallHeader

uints = st.integers(0, 2**32 - 1)
hypers = st.integers(0, 2**64 - 1)
times = st.builds(nfs3.Time, uints, uints)
attributes = st.builds(
    nfs3.Attributes,
    *[uints] * 5,
    *[hypers] * 2,
    st.builds(nfs3.DeviceNumber, uints, uints),
    *[hypers] * 2,
    *[times] * 3,
)
handles = st.binary(max_size=64)


@given(st.tuples(st.none() | handles, st.none() | attributes, st.just(nfs3.WccData())))
def test_result_round_trip(value: Any) -> None:
    procedure = nfs3.PROCEDURES[nfs3.NUMBERS["create"]]
    packed = nfs3.encode_result(procedure, nfs3.Status.OK, value)
    assert nfs3.decode_result(procedure, packed) == (0, value)
    assert len(packed) % 4 == 0


@pytest.mark.parametrize("number", nfs3.PROCEDURES)
def test_failed_result_round_trip_of_every_procedure(number: int) -> None:
    procedure = nfs3.PROCEDURES[number]
    for status in nfs3.Status:
        if status != nfs3.Status.OK:
            packed = nfs3.encode_result(procedure, status, None)
            assert nfs3.decode_result(procedure, packed) == (status, procedure.no_attributes)
            assert nfs3.status_error(status).errno


@given(st.binary(max_size=200), st.sampled_from(sorted(nfs3.PROCEDURES)))
def test_random_bytes_are_decoded_or_rejected(data: bytes, number: int) -> None:
    codec = nfs3.PROCEDURES[number].arguments
    try:
        value = codec.unpack(data)
    except xdr.XdrError:
        return
    assert codec.pack(value) == data  # every value has one encoding


@given(uints, uints, uints, uints, st.binary(max_size=400), st.binary(max_size=40))
def test_call_round_trip(
    xid: int, program: int, version: int, procedure: int, body: bytes, arguments: bytes
) -> None:
    call = CallHeader(xid, 2, program, version, procedure, Auth(1, body), rpc.NO_AUTH)
    assert rpc.decode_call(rpc.encode_call(call, arguments)) == (call, arguments)


def test_replies() -> None:
    good = rpc.encode_accepted(7, rpc.AcceptStat.SUCCESS, b"\0\0\0\1")
    assert rpc.reply_xid(good) == 7 and bytes(rpc.decode_reply(good)) == b"\0\0\0\1"
    mismatch = rpc.encode_accepted(7, rpc.AcceptStat.PROG_MISMATCH, versions=(3, 3))
    with pytest.raises(rpc.RpcRejected, match=r"PROG_MISMATCH \(3, 3\)"):
        rpc.decode_reply(mismatch)
    for why in rpc.RejectStat:
        with pytest.raises(rpc.RpcRejected, match=why.name):
            rpc.decode_reply(rpc.encode_rejected(7, why))


def test_data_is_not_copied_from_its_datagram() -> None:
    """READ's data in a reply, and WRITE's in a call, are views of what was received."""
    procedures = nfs3.PROCEDURES
    number = nfs3.NUMBERS["read"]
    results = nfs3.encode_result(procedures[number], nfs3.Status.OK, (None, 5, True, b"hello"))
    reply = rpc.encode_accepted(7, rpc.AcceptStat.SUCCESS, results)
    _, (*_, data) = nfs3.decode_result(procedures[number], rpc.decode_reply(reply))
    assert bytes(data) == b"hello" and memoryview(data).obj is reply
    number = nfs3.NUMBERS["write"]
    arguments = procedures[number].arguments.pack((b"file", 0, 5, 0, b"hello"))
    header = CallHeader(7, 2, nfs3.PROGRAM, nfs3.VERSION, number, Auth(1, b""), rpc.NO_AUTH)
    call = rpc.encode_call(header, arguments)
    handle, *_, data = procedures[number].arguments.unpack(rpc.decode_call(call)[1])
    assert bytes(data) == b"hello" and memoryview(data).obj is call
    assert isinstance(handle, bytes)  # a key of dictionaries


def test_handles_cannot_be_forged() -> None:
    signer = Signer(bytes(32))
    handle = signer.sign(Identifier(1, 2, -3, 4))
    assert signer.verify(handle) == Identifier(1, 2, -3, 4)
    assert len(handle) <= nfs3.HANDLE_SIZE
    for number in range(len(handle)):
        forged = bytearray(handle)
        forged[number] ^= 1
        with pytest.raises(ValueError, match="invalid handle"):
            signer.verify(bytes(forged))
    for wrong in (b"", handle[:-1], handle + b"\0"):
        with pytest.raises(ValueError, match="invalid handle"):
            signer.verify(wrong)
    with pytest.raises(ValueError, match="invalid handle"):
        Signer(b"\1" * 32).verify(handle)


def test_guest_cannot_evict_replies_of_another_guest() -> None:
    recorded: dict[int, CachedReply] = {}
    duplicates = DuplicateRequestCache(recorded.__setitem__, replies_max=6, total_max=4)
    duplicates.add(3, (3, 1), 1, b"call", b"reply")
    for xid in range(9):
        duplicates.add(4, (4, 1), xid, b"call", b"other")
    assert duplicates.find(3, (3, 1), 1, b"call") == b"reply"
    assert duplicates.find(3, (3, 1), 1, b"another call") is None
    assert duplicates.find(4, (3, 1), 1, b"call") is None
    assert len(duplicates) <= 4 and set(recorded) <= set(range(4))
    restored = DuplicateRequestCache(recorded.__setitem__, replies_max=2, total_max=4)
    restored.restore(recorded.items())
    restored.add(3, (3, 1), 1, b"call", b"later reply")  # in the slot of the earlier one
    assert [one.reply for one in recorded.values()].count(b"later reply") == 1
    assert b"reply" not in [one.reply for one in recorded.values()]
    for xid in range(100):
        restored.add(5, (5, 1), xid, b"call", b"other")
    assert restored.find(3, (3, 1), 1, b"call") == b"later reply"
    assert len(restored) <= 4


def test_retransmissions_back_off_until_the_timeout() -> None:
    sent, now = Transmission(0.0, 0.5), 0.0
    waits = []
    while sent.retry(sent.due):
        waits.append(sent.due - now)
        now = sent.due
    assert max(waits[1:]) <= NFS_RETRY_MAX_SECONDS * 2 and sent.due >= NFS_CALL_TIMEOUT_SECONDS
    assert sent.round_trip(now) is None  # ambiguous after a retransmission


def test_unsent_call_is_retried_without_backoff() -> None:
    sent = Transmission(0.0, 0.5)
    for now in (0.0, 0.1, 0.2):
        sent.revert_attempt(now)
        assert sent.due == now + NFS_QUEUE_FULL_RETRY_SECONDS
        assert sent.retry(sent.due)
    assert sent.due - 0.202 == pytest.approx(0.5)  # as the first time
    assert sent.round_trip(0.302) == pytest.approx(0.1)


@given(st.lists(st.floats(0, 10)))
def test_timeout_and_window_stay_within_limits(seconds: list[float]) -> None:
    trips, window = RoundTripEstimator(), Window()
    for measured in seconds:
        trips.add_sample(measured)
        assert NFS_RETRY_MIN_SECONDS <= trips.timeout <= NFS_RETRY_MAX_SECONDS
        window.on_reply() if measured < 5 else window.on_loss()
        assert 1 <= window.size <= NFS_CALLS_IN_FLIGHT_MAX


def test_export_option_syntax(tmp_path: Any) -> None:
    export = Export.parse(f"{tmp_path},ro,cid=3:4")
    assert (export.read_only, export.root_squash) == (True, True)
    assert [cid for cid in range(6) if export.admits(cid)] == [3, 4]
    root = AuthSys(0, b"guest", 0, 0, (0, 5))
    assert export.identity(root) == UnixIdentity(ANONYMOUS_ID, ANONYMOUS_ID, (ANONYMOUS_ID, 5))
    assert export.identity(None) == UnixIdentity(ANONYMOUS_ID, ANONYMOUS_ID)
    trusting = Export.parse(f"{tmp_path},no-root-squash")
    assert trusting.identity(root) == UnixIdentity(0, 0, (0, 5))
    for text, why in (
        ("relative", "expected an absolute path"),
        ("/none/such", "directory not found"),
        (f"{tmp_path},fast", "expected ro, rw"),
        (f"{tmp_path},cid=x", "CID"),
    ):
        with pytest.raises(ValueError, match=why):
            Export.parse(text)
