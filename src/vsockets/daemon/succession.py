"""Replacement of vsockd while it serves: another process takes over its whole state.

The running vsockd starts its successor, with a socket between the two::

    successor                              predecessor
      starts, imports, reads the configuration
      "ready", format  ------------------>
                       <------------------ a part of the state (in a memory file), its descriptors
      restores it
      "next"           ------------------>
                       ...                 serves requests between the parts
      "next"           ------------------>
                                           serves no further request
                       <------------------ the rest and what has changed, descriptors
      restores it, does nothing yet
      "taken"          ------------------>
                       <------------------ "go"; ends without cleaning up
      serves

Requests wait in the kernel from the last "next" on.  The earlier parts have what is numerous and
seldom changes: contexts, established streams, listening sockets of the library.  The rest has those
that have changed since, and the numbers of those that have ended.  Descriptors are copies until the
predecessor ends: if the successor fails at any point before "taken", the predecessor goes on
serving.

All descriptors are sent.  A process that executes another program gets a table of descriptors of
its own, and can join no other process's table later, so a successor cannot share its predecessor's
as a vsockd shares its holder's (:mod:`.holder`).

Streams do not depend on vsockd.  The epolls that detect their end (:mod:`.stream_liveness`) are
handed over as they are, so no stream has to be found again.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import errno
import gc
import logging
import marshal
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .._linux.libc import check, libc
from ..eventloop.loop import EventLoop
from ..fabric import Credentials
from ..state_folder import LOCK
from . import earlier_format
from .broker import Broker
from .channel import Channel, Listener
from .device_link import DeviceChannel, DeviceLink, HandoffChannel, HandoffLink
from .handover import (
    Reader,
    Saved,
    Writer,
    release_endpoint,
    restore_context,
    restore_endpoint,
    restore_fabric,
    save_context,
    save_endpoint,
    save_fabric,
    update_endpoint,
)
from .hybrid_listener import HybridChannel, PlayedHostLink, Relay
from .in_flight import InFlight, Step
from .listeners import AnnouncedListener

log = logging.getLogger(__name__)

#: The format of the state.  A successor takes over this format and the one before
#: (:mod:`.earlier_format`).
FORMAT = 5

#: The version of marshal's format that every Python since 3.4 reads.  (Requests wait meanwhile:
#: pickle takes three times as long to write, JSON five times.)
_MARSHAL = 4
#: Seconds for the successor to start, and to restore the state.
_START_SECONDS = 30.0
_RESTORE_SECONDS = 5.0
#: Listening sockets, and streams, in one part: vsockd serves no request for some milliseconds.
_LISTENERS_PER_PART = 200
_STREAMS_PER_PART = 1000
#: The kernel's limit of descriptors in one message.
_DESCRIPTORS_MAX = 253
_FD_BYTES = array.array("i").itemsize
_PR_SET_CHILD_SUBREAPER = 36
_GO = b"go"
#: Exit status of a successor that has not taken over.
NOT_TAKEN_OVER = os.EX_PROTOCOL
#: The signals that vsockd handles.
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_CHANNELS: dict[str, type[Channel]] = {
    one.__name__: one for one in (Channel, DeviceChannel, HandoffChannel, HybridChannel)
}


# What the state consists of


def save_early(writer: Writer, broker: Broker) -> Iterator[Saved]:
    """Yield parts of the state, each as of its time; vsockd serves in between.

    :func:`save_broker` then returns the rest, and what has changed.
    """
    early, fabric = writer.early, broker.fabric
    early.contexts = {context.cid: save_context(context) for context in fabric.contexts}
    contexts = list(early.contexts.values())
    yield _part(writer, contexts=contexts, groups=broker.streams.save_groups(writer))
    for listeners in _batches(list(broker.listening()), _LISTENERS_PER_PART):
        writer.find_parties(fabric)
        channels: Numbered = {}
        for listener in listeners:
            channel = listener.channel
            if _is_plain(listener, channel):
                number = writer.channel(channel)
                assert number is not None
                channels[number] = channel.save(writer)
                early.channels[number] = channel.version
        yield _part(writer, channels=channels)
    for streams in _batches(list(fabric.connections.values()), _STREAMS_PER_PART):
        writer.find_parties(fabric)
        yield _part(writer, connections=broker.streams.save_early(writer, streams))
    yield _part(writer, is_last=True)


def _is_plain(listener: Listener, channel: Channel) -> bool:
    """Return whether a listening socket is the library's, and refers to nothing but its port."""
    return (
        isinstance(listener, AnnouncedListener)
        and not listener.has_held
        and channel.moved is None
        and channel.last_device is None
        and channel.sock.fileno() >= 0
    )


def _batches(values: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(values), size):
        yield values[start : start + size]


def _part(writer: Writer, **tables: Any) -> Saved:
    """Return a part, with the endpoints that it has mentioned."""
    known = writer.early.endpoints
    endpoints = {
        number: save_endpoint(writer, one) | {"handle": save_handle(writer, one.handle)}
        for one, number in writer.endpoints.items()
        if number not in known
    }
    known.update(endpoints)
    empty: Saved = {"contexts": [], "groups": {}, "channels": {}, "connections": []}
    return empty | {"is_last": False} | tables | {"endpoints": endpoints}


def save_broker(writer: Writer, broker: Broker) -> Saved:
    """Return contexts, sockets, streams, links and datagram sockets."""
    for context in broker.fabric.contexts:
        if context.device is not None:
            writer.link(context.device.streams)
        played = getattr(context.fallback, "__self__", None)
        if isinstance(played, PlayedHostLink):
            writer.link(played)
    dropped = [
        one
        for one, number in writer.channels.items()
        if number in writer.early.channels and one.sock.fileno() < 0
    ]
    dropped_numbers = [writer.channels.pop(one) for one in dropped]
    served = broker.save(writer)
    links, channels, endpoints = _save_references(writer)
    # Routes lead to endpoints that channels and connections do not mention.
    datagrams = broker.datagrams.save(writer)
    for one, number in list(writer.endpoints.items()):
        if number not in endpoints and number not in writer.early.endpoints:
            endpoints[number] = save_endpoint(writer, one) | {"handle": None}
    return {
        **save_fabric(broker.fabric, writer.early),
        "endpoints": endpoints,
        "channels": channels,
        "dropped": dropped_numbers,
        "links": links,
        "datagrams": datagrams,
        "served": served,
    }


#: Saved objects by number.
Numbered = dict[int, Saved]


def _save_references(writer: Writer) -> tuple[Numbered, Numbered, Numbered]:
    """Save the links, channels and endpoints that have a number, and all that these refer to."""
    links: Numbered = {}
    channels: Numbered = {}
    endpoints: Numbered = {}
    early = writer.early
    same = {
        number
        for channel, number in writer.channels.items()
        if number in early.channels and early.channels[number] == channel.version
    }
    # Nothing changes of the endpoints of devices.
    fixed = {
        number
        for number, row in early.endpoints.items()
        if (handle := row["handle"]) is not None and (handle[0] == "link" or handle[1] in same)
    }
    done = 0, 0, 0
    while done != (found := (len(writer.links), len(writer.channels), len(writer.endpoints))):
        for link, number in list(writer.links.items())[done[0] : found[0]]:
            if link.is_open:  # else it was closed since an endpoint that refers to it was saved
                links[number] = link.save(writer)
        for channel, number in list(writer.channels.items())[done[1] : found[1]]:
            if number not in same:
                channels[number] = channel.save(writer)
        for endpoint, number in list(writer.endpoints.items())[done[2] : found[2]]:
            if number not in fixed:
                handle = save_handle(writer, endpoint.handle)
                endpoints[number] = save_endpoint(writer, endpoint) | {"handle": handle}
        done = found
    return links, channels, endpoints


def save_handle(writer: Writer, handle: object) -> tuple[str, int | None] | None:
    """Return the state of the object an endpoint refers to; None for a datagram socket."""
    if isinstance(handle, HandoffLink):
        return "link", writer.link(handle)
    channel = handle.channel if isinstance(handle, Listener) else handle
    if isinstance(channel, Channel) and not (writer.lasting and channel not in writer.channels):
        kind = "channel" if channel is handle else "listener"
        return kind, writer.channel(channel)
    return None  # a datagram socket's is restored with it


def _restore_handle(reader: Reader, saved: tuple[str, int]) -> object:
    kind, number = saved
    if kind == "link":
        return reader.link(number)
    channel = reader.channels.get(number)  # None: it is closed
    return channel if kind == "channel" or channel is None else channel.listener


def restore_early(reader: Reader, part: Saved, broker: Broker) -> None:
    """Restore in a new broker a part that :func:`save_early` has yielded."""
    for one in part["contexts"]:
        restore_context(broker.fabric, one)
    broker.streams.restore_groups(reader, part["groups"])
    _restore_endpoints(reader, part["endpoints"])
    _restore_channels(reader, part["channels"])
    for number, one in part["channels"].items():
        broker.restore_channel(reader, reader.channels[number], one)
    broker.streams.restore_connections(reader, part["connections"])
    for number in part["endpoints"].keys() & reader.handles.keys():
        handle = reader.handles[number]
        if handle[0] == "listener" and handle[1] in reader.channels:
            reader.endpoints[number].handle = _restore_handle(reader, handle)


def restore_broker(reader: Reader, saved: Saved, loop: EventLoop, broker: Broker) -> None:
    """Restore in a new broker the state that :func:`save_broker` has returned."""
    channels, endpoints, served = saved["channels"], saved["endpoints"], saved["served"]
    # What has closed since comes first: its ports may have other holders.
    broker.streams.end(served["streams"]["ended"])
    for number in saved["dropped"]:
        broker.drop(reader.channels.pop(number))
    for number in endpoints.keys() & reader.endpoints.keys():
        release_endpoint(reader.endpoints[number])
    restore_fabric(broker.fabric, saved)
    _restore_endpoints(reader, endpoints)
    broker.streams.restore(reader, served["streams"])
    new = {number: one for number, one in channels.items() if number not in reader.channels}
    for number in channels.keys() - new.keys():
        reader.channels[number].requests += 1  # they have changed the channel
    _restore_channels(reader, new)
    broker.datagrams.restore(reader, saved["datagrams"])
    for number, one in saved["links"].items():
        reader.links[number] = _restore_link(reader, one, loop, broker)
    for number, one in new.items():
        reader.channels[number].restore_references(reader, one)
    broker.restore(reader, served, channels)
    for number, handle in reader.handles.items():
        reader.endpoints[number].handle = _restore_handle(reader, handle)


def _restore_endpoints(reader: Reader, saved: Numbered) -> None:
    """Add endpoints, or set what has changed of them."""
    for number, one in saved.items():
        if number in reader.endpoints:
            update_endpoint(reader.endpoints[number], one)
        else:
            reader.endpoints[number] = restore_endpoint(reader, one)
        if one["handle"] is None:
            reader.handles.pop(number, None)
            reader.endpoints[number].handle = None
        else:
            reader.handles[number] = one["handle"]


def _restore_channels(reader: Reader, saved: Numbered) -> None:
    """Add channels, without their listeners and references."""
    for number, one in saved.items():
        reader.channels[number] = _CHANNELS[one["class"]].restore(reader, one)


def _restore_link(reader: Reader, saved: Saved, loop: EventLoop, broker: Broker) -> HandoffLink:
    sock = reader.socket(saved["socket"], socket.SOCK_SEQPACKET)
    link: HandoffLink
    if "pid" in saved:
        link = Relay(loop, broker, sock, saved["pid"])
    elif "played" in saved:
        guest, credentials = reader.context(saved["played"]), Credentials(*saved["credentials"])
        link = PlayedHostLink(loop, broker, guest, sock, credentials)
    else:
        credentials, ports = Credentials(*saved["credentials"]), saved["host_ports"]
        is_reporting = ports is not None
        context = reader.context(saved["context"])
        wanted = saved["seqpacket"], is_reporting, ports
        link = DeviceLink(loop, broker, context, sock, credentials, *wanted)
    link.restore(reader, saved)
    return link


# The exchange


class Part(NamedTuple):
    """A part of the state, as it is sent."""

    content: Saved
    descriptors: list[int]  #: those that no part before has
    is_last: bool


class NotTakenOver(Exception):
    """A failed take-over, after which the predecessor serves again."""


class Successor:
    """A process that is to take over, as its predecessor sees it."""

    def __init__(
        self,
        loop: EventLoop,
        command: Sequence[str],
        save: Callable[[], Iterator[Part]],
        ended: Callable[[str], None],
    ) -> None:
        """Start ``command``, with the number of its socket appended.

        ``save`` is called when the successor is ready.  It yields the parts of the state, the next
        one whenever the successor has restored one, and the rest last.  ``ended`` is called at the
        end: with "", if the process has taken over, else with the reason why not.

        Raises OSError when it cannot be started.
        """
        self._loop = loop
        self._save = save
        self._parts: Iterator[Part] = iter(())
        self._ended = ended
        self._sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs:
                number = theirs.fileno()
                self._process = subprocess.Popen([*command, str(number)], pass_fds=[number])
        except OSError:
            self._sock.close()
            raise
        loop.watch(self._sock.fileno(), self._ready)
        self._timer = loop.call_later(_START_SECONDS, self._time_out)

    def _time_out(self) -> None:
        self._end(f"it has not started within {_START_SECONDS:.0f} seconds")

    def _ready(self, events: int) -> None:
        self._sock.settimeout(_RESTORE_SECONDS)
        try:
            words = self._sock.recv(64).split()
            gc.disable()  # it would look at every object that is made, and find no garbage
            if not words:
                self._end("the process has ended; see its messages")
            elif words == [b"ready", b"%d" % FORMAT]:
                self._parts = self._save()
                self._send_next()
            elif words == [b"next"]:
                self._send_next()
            else:
                self._end(f"it expects another format of the state: {words!r}")
        except OSError as error:
            self._end(f"it has failed to take over: {error}")
        finally:
            gc.enable()

    def _send_next(self) -> None:
        part = next(self._parts)
        _send(self._sock, part)
        if part.is_last:
            taken = self._sock.recv(64)
            self._end("" if taken == b"taken" else "it has failed to take over")

    def _end(self, reason: str) -> None:
        self._timer.cancel()
        self._loop.unwatch(self._sock.fileno())
        if reason:
            self.cancel()
        # Else the socket is closed when this process ends, and the successor begins then.
        self._ended(reason)

    def cancel(self) -> None:
        """End the process, which has not taken over."""
        self._process.kill()
        self._process.wait()
        self._sock.close()

    def stop(self) -> None:
        """Ask the process, which has taken over, to end."""
        self._process.terminate()

    def release(self, in_flight: InFlight | None = None) -> None:
        """Let the successor begin; this process must not use what it handed over any longer."""
        if in_flight is None:
            self._sock.send(_GO)
        else:  # known to the holder, even if this process is killed now
            in_flight.send(Step.HAND_OVER, self._sock, _GO)
        self._sock.close()


def _send(sock: socket.socket, part: Part) -> None:
    """Send a part: a message with a memory file, and then the descriptors."""
    content, descriptors, is_last = part
    file = os.memfd_create("vsockd-state", os.MFD_CLOEXEC)
    try:
        with open(file, "wb", closefd=False) as opened:
            opened.write(marshal.dumps(content, _MARSHAL))
        os.lseek(file, 0, os.SEEK_SET)  # the successor gets this very file
        socket.send_fds(sock, [b"%d %d" % (len(descriptors), is_last)], [file])
    finally:
        os.close(file)
    for first in range(0, len(descriptors), _DESCRIPTORS_MAX):
        _send_descriptors(sock, descriptors[first : first + _DESCRIPTORS_MAX])


def _send_descriptors(sock: socket.socket, descriptors: list[int]) -> None:
    rights = array.array("i", descriptors)
    for _ in range(int(_RESTORE_SECONDS * 1000)):
        with contextlib.suppress(BlockingIOError):
            try:
                sock.sendmsg([b"d"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
                return
            except OSError as error:
                if error.errno != errno.ETOOMANYREFS:
                    raise
        time.sleep(0.001)  # until the successor has received some
    raise TimeoutError("the successor does not receive descriptors")


def _receive_file(sock: socket.socket) -> tuple[bytes, Any]:
    """Return a message and the content of the file that came with it.

    Raises OSError when the content is damaged.
    """
    message, (file,), _, _ = socket.recv_fds(sock, 64, 1)
    with open(file, "rb") as content:
        try:
            return message, marshal.loads(content.read())
        except (EOFError, ValueError, TypeError) as error:
            raise OSError(errno.EBADMSG, f"the predecessor's state: {error}") from None


class Predecessor:
    """The vsockd that hands over, as its successor sees it."""

    def __init__(self, fd: int, format_: int) -> None:
        """Take ownership of ``fd``, this process's end of the socket to the predecessor.

        ``format_`` is the format of the predecessor's state.
        """
        self._format = min(format_, FORMAT)
        self.state: Saved = {}
        self.descriptors: list[int] = []
        self.reader: Reader | None = None  #: set when the state is restored
        self._sock = socket.socket(fileno=fd)
        self._sock.set_inheritable(False)
        signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)  # until vsockd handles them
        self._sock.settimeout(_RESTORE_SECONDS)

    def receive(self, restore: Callable[[Saved], None]) -> None:
        """Report that this process is ready; receive the predecessor's state and descriptors.

        ``restore`` is called with each part that comes while the predecessor serves.

        Raises OSError when the predecessor does not hand over.
        """
        gc.disable()  # all that is made now stays; the caller enables it again
        self._sock.send(b"ready %d" % self._format)
        if self._format == earlier_format.FORMAT:
            _, rows = _receive_file(self._sock)
            self._sock.send(b"read")
            self._receive_part()
            earlier_format.convert(self.state, rows)
            return
        while not self._receive_part():
            restore(self.state)
            self._sock.send(b"next")

    def _receive_part(self) -> bool:
        """Receive a part of the state with its descriptors; return whether it is the last."""
        message, self.state = _receive_file(self._sock)
        number, *is_last = map(int, message.split())
        number += len(self.descriptors)
        while len(self.descriptors) < number:
            data, ancillary, _, _ = self._sock.recvmsg(
                1, socket.CMSG_LEN(_DESCRIPTORS_MAX * _FD_BYTES), socket.MSG_CMSG_CLOEXEC
            )
            if not data:
                raise ConnectionResetError("the predecessor has ended")
            for _, _, rights in ancillary:
                self.descriptors += array.array("i", rights)
        return is_last == [True]

    def confirm(self) -> None:
        """Report that all was restored; return when the predecessor has stopped serving.

        Raises OSError if the predecessor has not waited for the report.
        """
        self._sock.send(b"taken")
        # Without a timeout: a predecessor that was stopped meanwhile (SIGSTOP, a suspended machine)
        # ends as soon as it runs again, and this process has to serve then.
        self._sock.settimeout(None)
        if self._sock.recv(len(_GO)) != _GO and self.state.get("is_held"):
            raise NotTakenOver("the predecessor was killed, and is started again")
        self._sock.close()


# A predecessor whose parent waits for it


def wait_for_successors(folder: Path, is_stopping: bool) -> int:
    """Remain the process that service managers and shells wait for; return the exit status.

    The lock file in ``folder``, the state folder, names the vsockd that serves.  That vsockd gets
    the signals of this process; with ``is_stopping``, it gets SIGTERM at once.
    """
    expected = {*FORWARDED, signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, expected)
    ending = int(signal.SIGTERM) if is_stopping else 0  # the signal to send to each serving vsockd
    is_reloading = False
    asked = result = 0
    while True:
        for status in _ended_children():
            code = os.waitstatus_to_exitcode(status)
            if code != NOT_TAKEN_OVER:
                result = code
        if not _has_children():
            return result if result >= 0 else 128 - result
        pid = _serving(folder)
        if is_reloading and pid:
            os.kill(pid, signal.SIGHUP)
            is_reloading = False
        if ending and pid and pid != asked:
            os.kill(pid, ending)
            asked = pid
        # While a successor takes over, its process id in the lock file has to be awaited.
        came = signal.sigtimedwait(expected, 0.1 if ending or is_reloading else 3600)
        if came is None or came.si_signo == signal.SIGCHLD:
            continue
        if came.si_signo == signal.SIGHUP:
            is_reloading = True
        else:
            ending, asked = came.si_signo, 0


def _serving(folder: Path) -> int:
    """Return the process id of the vsockd that serves, or of its holder; 0 without one.

    It is a child of this process.
    """
    try:
        pid = int((folder / LOCK).read_text())
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        parent = int(fields[1])
        if parent != os.getpid():  # a holder, which passes signals on
            pid = parent
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except (OSError, ValueError, IndexError):
        return 0
    return pid


def _ended_children() -> Iterator[int]:
    """Reap the children that have ended, and return the wait statuses of those that are vsockd.

    The others are relays, which have process groups of their own.
    """
    with contextlib.suppress(ChildProcessError):
        while ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            is_vsockd = os.getpgid(ended.si_pid) == os.getpgrp()
            _, status = os.waitpid(ended.si_pid, 0)
            if is_vsockd:
                yield status


def _has_children() -> bool:
    """Return whether this process has a child that is vsockd.

    A relay is no reason to wait: it serves its streams after vsockd has crashed, and a service
    manager has to start another vsockd meanwhile.
    """
    try:
        os.waitid(os.P_PGID, os.getpgrp(), os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def adopt_orphans() -> None:
    """Become the parent of descendants whose parents end (child subreaper)."""
    check(libc.prctl(_PR_SET_CHILD_SUBREAPER, ctypes.c_ulong(1), 0, 0, 0))
