"""The RPC service: decode a call, perform it, encode the reply; independent of sockets."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

from ..logs import by
from . import mount_protocol, nfs3, rpc
from .calls import Caller, Change, NfsError, NotReady, Pending
from .exports import Export, FileRef, Tree
from .handles import HandleStore, Identifier, Signer
from .listing import ListingCache
from .nfs3 import PROCEDURES, Status
from .procedures import Procedures
from .reply_journal import ReplyJournal
from .retransmission import CachedReply, DuplicateRequestCache
from .rpc import AcceptStat, AuthSys, RejectStat
from .xdr import XdrError

log = logging.getLogger("vsockets.nfs")

#: errno values whose NFS status has another number, or that NFS lacks.
_STATUSES = {
    errno.ENAMETOOLONG: Status.NAMETOOLONG,
    errno.ENOTEMPTY: Status.NOTEMPTY,
    errno.EDQUOT: Status.DQUOT,
    errno.ESTALE: Status.STALE,
    errno.EOPNOTSUPP: Status.NOTSUPP,
    errno.ELOOP: Status.INVAL,
    errno.ETXTBSY: Status.ACCES,
    errno.EMFILE: Status.JUKEBOX,
    errno.ENFILE: Status.JUKEBOX,
    errno.ENOMEM: Status.JUKEBOX,
    errno.EBUSY: Status.ACCES,
}


class NfsService:
    """The exports of a server process, with the RPC programs NFS and MOUNT."""

    def __init__(
        self, exports: Sequence[Export], handle_store: HandleStore, transfer: int = nfs3.DATA_SIZE
    ) -> None:
        """Serve ``exports``; ``transfer`` limits READ, WRITE and listings, in bytes.

        Raises OSError if an exported folder cannot be opened.
        """
        self._trees = [Tree(export, handle_store) for export in exports]
        self._by_number = {tree.number: tree for tree in self._trees}
        self._signer = Signer(handle_store.key)
        # The write verifier is new in each server process: earlier unstable writes may be lost.
        verifier = os.urandom(nfs3.VERIFIER_SIZE)
        listings = ListingCache(self._signer)
        self._procedures = Procedures(self._signer, listings, verifier, transfer)
        self._duplicates = DuplicateRequestCache(handle_store.replies.write)
        self._begin: Callable[[FileRef, bytes, FileRef | None], None]  #: of the call in progress
        self._duplicates.restore(self._load_replies(handle_store.replies))
        self._pending: set[Hashable] = set()  # (source, xid) of calls in progress

    def _load_replies(self, journal: ReplyJournal) -> Iterator[tuple[int, CachedReply]]:
        """Yield the replies of earlier processes, also to the call that was interrupted."""
        for slot, cached in journal.load():
            reply: CachedReply | None = cached
            if cached.change:
                reply = self._reply_to_interrupted(cached)
                if reply is None:
                    journal.erase(slot)
                elif reply is not cached:
                    journal.write(slot, reply)
            if reply is not None:
                yield slot, reply

    def _reply_to_interrupted(self, cached: CachedReply) -> CachedReply | None:
        """Return the reply to a call in which an earlier process was killed.

        Returns None if the call was not performed, and ``cached``, a refusal, if that is unknown.
        Called before clients are served, so that none of them has changed the name since.
        """
        change = Change.unpack(cached.change)
        tree = self._by_number.get(change.folder.export)
        if tree is None:
            return cached
        found: Identifier | None = None
        try:
            folder = tree.find(change.folder)
            with contextlib.suppress(FileNotFoundError):
                found = tree.look_up(folder, change.name, cached.source[0]).identifier
        except OSError:
            return cached
        procedure = PROCEDURES[change.procedure]
        if change.file is None:  # another program of the host may have made the file
            return cached if found is not None else None
        if (found == change.file) != (procedure.name == "link"):
            return None
        results = nfs3.encode_result(procedure, Status.OK, procedure.no_attributes)
        done = rpc.encode_accepted(cached.xid, AcceptStat.SUCCESS, results)
        return cached._replace(reply=done, change=b"")

    def close(self) -> None:
        """Close all files."""
        for tree in self._trees:
            tree.close()

    def answer(self, data: bytes, source: tuple[Any, ...]) -> bytes | Pending | None:
        """Return the reply to ``data``, a datagram from ``source``; a Pending if it takes steps.

        Returns None for a malformed call, and for a retransmission of a pending one.
        """
        try:
            call, arguments = rpc.decode_call(data)
        except XdrError:
            return None
        if call.version != rpc.VERSION:
            return rpc.encode_rejected(call.xid, RejectStat.RPC_MISMATCH)
        guest = source[0]
        known = self._duplicates.find(guest, source, call.xid, data)
        if known is not None:
            return known
        try:
            caller = rpc.decode_credentials(call.credentials)
        except XdrError:
            return rpc.encode_rejected(call.xid, RejectStat.AUTH_ERROR)
        if (source, call.xid) in self._pending:
            return None
        procedure = PROCEDURES.get(call.procedure) if call.program == nfs3.PROGRAM else None

        def begin(folder: FileRef, name: bytes, file: FileRef | None) -> None:
            """Record that the call begins; its reply is a refusal if this process is killed."""
            assert procedure is not None
            results = nfs3.encode_result(procedure, Status.SERVERFAULT, None)
            refusal = rpc.encode_accepted(call.xid, AcceptStat.SUCCESS, results)
            identifier = file.identifier if file is not None else None
            change = Change(call.procedure, folder.identifier, name, identifier).pack()
            self._duplicates.add(guest, source, call.xid, data, refusal, change)

        def answer(error: OSError | None = None) -> bytes | Pending:
            self._pending.discard((source, call.xid))
            self._begin = begin
            try:
                reply = self._perform(call, arguments, guest, caller, error)
            except NotReady as not_ready:
                self._pending.add((source, call.xid))
                return Pending(not_ready.steps, answer)
            if procedure is not None and procedure.modifies:
                self._duplicates.add(guest, source, call.xid, data, reply)
            return reply

        return answer()

    def _perform(
        self,
        call: rpc.CallHeader,
        arguments: bytes | memoryview,
        guest: Any,
        caller: AuthSys | None,
        error: OSError | None,
    ) -> bytes:
        perform = {nfs3.PROGRAM: self._nfs, mount_protocol.PROGRAM: self._mount}.get(call.program)
        if perform is None:
            return rpc.encode_accepted(call.xid, AcceptStat.PROG_UNAVAIL)
        if call.program_version != nfs3.VERSION:  # the version of MOUNT is 3 as well
            versions = nfs3.VERSION, nfs3.VERSION
            return rpc.encode_accepted(call.xid, AcceptStat.PROG_MISMATCH, versions=versions)
        try:
            results = perform(call.procedure, arguments, guest, caller, error)
        except XdrError:
            return rpc.encode_accepted(call.xid, AcceptStat.GARBAGE_ARGS)
        except NotReady:
            raise
        except Exception:
            log.exception("internal error in a call", extra=by(guest))
            return rpc.encode_accepted(call.xid, AcceptStat.SYSTEM_ERR)
        if results is None:
            return rpc.encode_accepted(call.xid, AcceptStat.PROC_UNAVAIL)
        return rpc.encode_accepted(call.xid, AcceptStat.SUCCESS, results)

    def _nfs(
        self,
        number: int,
        arguments: bytes | memoryview,
        guest: Any,
        credentials: AuthSys | None,
        error: OSError | None,
    ) -> bytes | None:
        """Perform an NFS procedure, and return its encoded results.

        ``error`` is the failure of a pending call's steps, if any.
        """
        if number == 0:
            return b""
        procedure = PROCEDURES.get(number)
        if procedure is None:
            return None
        decoded = procedure.arguments.unpack(arguments)
        if not isinstance(decoded, tuple):
            decoded = (decoded,)
        status, content = Status.OK, None
        try:
            if error is not None:
                raise error
            caller = self._caller(decoded, guest, credentials, procedure.modifies)
            content = getattr(self._procedures, procedure.name)(caller, *decoded)
        except NfsError as failed:
            status = failed.status
        except ValueError:
            status = Status.BADHANDLE
        except OSError as failure:
            status = _status_of(failure, guest)
        return nfs3.encode_result(procedure, status, content)

    def _caller(
        self, arguments: tuple[Any, ...], guest: Any, credentials: AuthSys | None, modifies: bool
    ) -> Caller:
        """Return the caller of a call; all handles in ``arguments`` must be of one export.

        Raises OSError if the guest may not use the export, ValueError for an invalid handle.
        """
        handles = [target.directory for target in arguments if isinstance(target, nfs3.Target)]
        if isinstance(arguments[0], bytes):
            handles.append(arguments[0])
        numbers = {self._signer.verify(handle).export for handle in handles}
        if len(numbers) > 1:
            raise OSError(errno.EXDEV, "handles of two exports")
        tree = self._by_number.get(numbers.pop())
        if tree is None:
            raise OSError(errno.ESTALE, "the directory is not exported")
        if not tree.export.admits(guest):
            raise OSError(errno.EACCES, "not exported to this guest")
        if modifies and tree.export.read_only:
            raise OSError(errno.EROFS, "the export is read-only")
        return Caller(tree, tree.export.identity(credentials), guest, self._begin)

    def _mount(
        self,
        number: int,
        arguments: bytes | memoryview,
        guest: Any,
        credentials: AuthSys | None,
        error: OSError | None,
    ) -> bytes | None:
        if number == mount_protocol.MNT:
            return self._mount_export(mount_protocol.path.unpack(arguments), guest)
        if number == mount_protocol.UMNT:
            mount_protocol.path.unpack(arguments)
            return b""
        if arguments:
            raise XdrError("unexpected arguments")
        if number == mount_protocol.DUMP:
            return mount_protocol.mount_list.pack(())
        if number == mount_protocol.EXPORT:
            admitting = (tree for tree in self._trees if tree.export.admits(guest))
            return mount_protocol.export_list.pack(
                tuple(
                    mount_protocol.ExportNode(os.fsencode(tree.export.path), ())
                    for tree in admitting
                )
            )
        return b"" if number in (0, mount_protocol.UMNTALL) else None

    def _mount_export(self, path: bytes, guest: Any) -> bytes:
        for tree in self._trees:
            if os.fsencode(tree.export.path) == path.rstrip(b"/"):
                if not tree.export.admits(guest):
                    log.warning("%s: refused to %s", tree.export.path, guest, extra=by(guest))
                    break
                log.info("%s: mounted by %s", tree.export.path, guest, extra=by(guest))
                return mount_protocol.encode_granted(self._signer.sign(tree.root))
        # The same status for a missing directory: clients cannot probe for existing ones.
        return mount_protocol.mount_result.pack((mount_protocol.MountStatus.ACCES, None))


def _status_of(error: OSError, guest: Hashable) -> Status:
    if error.errno in _STATUSES:
        return _STATUSES[error.errno]
    try:
        return Status(error.errno or 0) if error.errno else Status.IO
    except ValueError:
        log.warning("an error without an NFS status: %s", error, extra=by(guest))
        return Status.IO
