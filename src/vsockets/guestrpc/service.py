"""The service at the hypervisor's ports: one for all guests of a fabric.

A guest's tools exit when a reconnect fails once, so the ports must never be without a listener.
:func:`run` therefore holds both listeners in a process that does nothing else, and starts another
process that serves, again if that one is killed; connections wait in the backlog meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import json
import logging
import os
import socket as stdlib
import sqlite3
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from .. import logs
from .._linux.folders import SocketFile, open_folder, remove_stale
from ..attachment import ContextHandle
from ..control import Control, Events
from ..eventloop.asyncio_server import AsyncioAcceptor, Listener, open_listener
from ..eventloop.rebind import REBIND_FIRST_PAUSE_SECONDS
from ..eventloop.replacement import is_worker, take_over
from ..eventloop.retry import Backoff
from ..eventloop.service import keep_service, run_service
from ..model.constants import VMADDR_CID_HYPERVISOR
from ..model.locator import Vsock
from .client import to_bytes, to_text
from .commands import STATE_CHANGES, CommandChannel, CommandFailed
from .guest import Guest, Permissions, Requests
from .limits import (
    GUESTRPC_COMMAND_TIMEOUT_SECONDS,
    GUESTRPC_CONTROL_MAX_BYTES,
    GUESTRPC_GUEST_CONNECTIONS_MAX,
    GUESTRPC_HEARTBEAT_SECONDS,
    GUESTRPC_PACKET_TIMEOUT_SECONDS,
    GUESTRPC_RESTART_SECONDS,
)
from .packets import RPCI_PORT, TCLO_PORT, Decoder, Packet, PacketError, encode
from .variables import VariableRefused, Variables, Writer, full_name

log = logging.getLogger("vsockets.guestinfo")

LOCATORS = Vsock(VMADDR_CID_HYPERVISOR, RPCI_PORT), Vsock(VMADDR_CID_HYPERVISOR, TCLO_PORT)

_CHUNK = 65_536


class ControlError(Exception):
    """A request at the control socket that cannot be carried out; the message says why."""


class GuestService:
    """The guests, their connections, and the administrator's requests, in the running loop."""

    def __init__(
        self,
        variables: Variables,
        listeners: Sequence[Listener],
        context: ContextHandle,
        control: Path,
    ) -> None:
        """Serve at ``listeners``, those of :data:`LOCATORS`, and at the unix socket ``control``.

        ``context`` is the hypervisor's, and the folder of ``control`` is the fabric's.

        Raises OSError or sqlite3.Error.
        """
        self._variables = variables
        self._folder = control.parent
        self._events: Events | None = None  #: None while vsockd does not run
        self._backoff = Backoff(REBIND_FIRST_PAUSE_SECONDS)
        self._guests = {
            cid: Guest(cid, Permissions(**json.loads(text)))
            for cid, text in variables.guests().items()
        }
        self._channels: dict[int, CommandChannel] = {}  # those of daemons that obey commands
        self._counts: Counter[int] = Counter()
        self._turns: defaultdict[int, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._tasks: dict[asyncio.Task[None], Guest] = {}
        self._follow_contexts()
        self._requests = Requests(variables, self._set_option)
        self._control_file = SocketFile(control)
        self._control = stdlib.socket(stdlib.AF_UNIX)
        try:
            self._control_file.bind(self._control, 0o600)
        except OSError:
            self._control.close()
            self._control_file.close()
            raise
        self._acceptors = [
            AsyncioAcceptor(
                locator,
                listener,
                functools.partial(self._admit, serve),
                has_room=lambda: True,
                reopen=functools.partial(open_listener, locator, context),
                log=log,
            )
            for locator, listener, serve in zip(
                LOCATORS, listeners, (self._serve_requests, self._serve_commands), strict=True
            )
        ]

    async def run(self, ready: Callable[[], object]) -> None:
        """Serve until SIGTERM or SIGINT, or another process takes over.

        ``ready`` is called at the beginning.
        """
        limit = GUESTRPC_CONTROL_MAX_BYTES
        self._server = await asyncio.start_unix_server(
            self._serve_control, sock=self._control, limit=limit
        )
        try:
            await run_service(ready, retire=self._retire)
        finally:
            await self._retire()

    def _retire(self) -> Awaitable[object]:
        """Release at once what only one process can have open; return an awaitable of the rest.

        The tools connect again, and wait in the listeners' backlog.
        """
        if not self._acceptors:  # retired before
            return asyncio.gather(*self._tasks, return_exceptions=True)
        self._server.close()
        self._unfollow_contexts()
        self._control_file.remove()
        self._control_file.close()
        for acceptor in self._acceptors:
            acceptor.close()
        self._acceptors.clear()
        for task in self._tasks:
            task.cancel()
        self._variables.close()
        return asyncio.gather(*self._tasks, return_exceptions=True)

    # Contexts

    def _follow_contexts(self) -> None:
        """Notice the removal of contexts from now on; retry while vsockd does not run.

        A guest whose context was removed meanwhile is disabled: its CID may be another guest's by
        now.
        """
        loop = asyncio.get_running_loop()
        try:
            self._events = Events(self._folder, ("context",))
            loop.add_reader(self._events.fileno(), self._notice_changes)
            self._forget_all_without_context()
        except OSError:
            self._unfollow_contexts()
            loop.call_later(self._backoff.next_pause(), self._follow_contexts)
        else:
            self._backoff.reset()

    def _unfollow_contexts(self) -> None:
        if self._events is not None:
            asyncio.get_running_loop().remove_reader(self._events.fileno())
            self._events.close()
            self._events = None

    def _forget_all_without_context(self) -> None:
        with Control(self._folder) as control:
            present = {row["cid"] for row in control.contexts()}
        for cid in self._guests.keys() - present:
            self._forget_removed(cid)

    def _notice_changes(self) -> None:
        """Forget the guests whose contexts have been removed, and note which were suspended.

        Called also before a connection or a request is handled, which may be of the CID's next
        guest.
        """
        if self._events is None:
            return
        try:
            events = self._events.take()
        except OSError:
            events = None
        if events is None:
            self._unfollow_contexts()
            self._follow_contexts()
            return
        for event in events:
            guest = self._guests.get(event["cid"])
            match event["change"]:
                case "removed":
                    self._forget_removed(event["cid"])
                case "suspend" if guest is not None:
                    guest.is_suspended = True
                case "reset" | "power-off" if guest is not None:
                    guest.is_suspended = False
        if any(event["missed"] for event in events):
            with contextlib.suppress(OSError):  # vsockd has ended: the next event
                self._forget_all_without_context()

    def _forget_removed(self, cid: int) -> None:
        if self._forget(cid):
            log.log(logs.NOTICE, "guest %d: its context was removed: disabled", cid)
            try:
                self._variables.retire(cid)
            except sqlite3.Error as error:
                log.error("guest %d: %s", cid, error)

    def _forget(self, cid: int) -> bool:
        """Disable a guest and close its connections; return False if it is not enabled."""
        guest = self._guests.pop(cid, None)
        if guest is None:
            return False
        self._turns.pop(cid, None)
        for task, of in self._tasks.items():
            if of is guest:
                task.cancel()
        return True

    # Guests

    def _admit(self, serve: Callable[..., Any], sock: stdlib.socket) -> None:
        try:
            cid, port = sock.getpeername()
        except OSError:
            sock.close()
            return
        self._notice_changes()
        guest = self._guests.get(cid)
        if guest is None:
            log.info("guest %d: refused: it is not enabled", cid, extra=logs.rare(cid))
        elif self._counts[cid] >= GUESTRPC_GUEST_CONNECTIONS_MAX:
            log.warning("guest %d: too many connections", cid, extra=logs.rare(cid))
        else:
            self._counts[cid] += 1
            task = asyncio.ensure_future(self._serve(serve, guest, port, sock))
            self._tasks[task] = guest
            task.add_done_callback(self._served)
            return
        sock.close()

    async def _serve(
        self, serve: Callable[..., Any], guest: Guest, port: int, sock: stdlib.socket
    ) -> None:
        try:
            reader, writer = await asyncio.open_connection(sock=sock)
            try:
                await serve(guest, port, reader, writer)
            finally:
                writer.close()
        except (PacketError, TimeoutError) as error:
            why = str(error) or "it does not go on"
            log.warning("guest %d: disconnected: %s", guest.cid, why, extra=logs.rare(guest.cid))
        except OSError:
            pass  # the guest has closed the connection
        except sqlite3.Error as error:
            log.error("guest %d: %s", guest.cid, error, extra=logs.rare(guest.cid))

    def _served(self, task: asyncio.Task[None]) -> None:
        self._counts[self._tasks.pop(task).cid] -= 1  # also of one cancelled before it began

    async def _serve_requests(
        self, guest: Guest, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        decoder = Decoder()
        while data := await _read(reader, decoder.is_within):
            for packet in decoder.feed(data):
                async with self._turn(guest):
                    if not packet.is_ping:
                        writer.write(encode(self._answer(guest, port, packet)))
                await _drain(writer)

    @contextlib.asynccontextmanager
    async def _turn(self, guest: Guest) -> AsyncIterator[None]:
        """Handle one packet in the with block, then let the other guests have one handled each.

        However many packets and connections a guest has, another guest waits for only one packet of
        it, which may have to write a variable to the disk.
        """
        async with self._turns[guest.cid]:
            yield
            await asyncio.sleep(0)

    def _answer(self, guest: Guest, port: int, packet: Packet) -> bytes:
        if packet.is_too_long:
            return b"0 Value too long"
        return self._requests.answer(guest, port, packet.payload)

    async def _serve_commands(
        self, guest: Guest, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        decoder = Decoder()
        channel = CommandChannel(writer.write, lambda: self._is_ready(guest, channel))
        try:
            while data := await _read(reader, decoder.is_within):
                for packet in decoder.feed(data):
                    async with self._turn(guest):
                        guest.heard = time.monotonic()
                        channel.receive(packet)
                    await _drain(writer)  # the guest reads a command before it gets another one
        finally:
            if self._channels.get(guest.cid) is channel:
                del self._channels[guest.cid]
                log.log(logs.NOTICE, "guest %d: VMware Tools have disconnected", guest.cid)
            channel.close()

    def _is_ready(self, guest: Guest, channel: CommandChannel) -> None:
        self._channels[guest.cid] = channel
        log.log(logs.NOTICE, "guest %d: VMware Tools are running", guest.cid)
        if guest.is_suspended:  # they have connected again
            guest.is_suspended = False
            self._announce_resume(guest, channel)

    def _announce_resume(self, guest: Guest, channel: CommandChannel) -> None:
        """Notify the tools of the resume, as soon as their scripts for the suspend have ended."""

        def answered(answer: bytes | CommandFailed) -> None:
            if isinstance(answer, CommandFailed) and self._channels.get(guest.cid) is channel:
                guest.changed = functools.partial(self._announce_resume, guest, channel)

        guest.changed = _do_nothing
        with contextlib.suppress(CommandFailed):
            channel.command(STATE_CHANGES["resume"], answered)

    def _set_option(self, guest: Guest, option: bytes) -> None:
        if channel := self._channels.get(guest.cid):
            with contextlib.suppress(CommandFailed):
                channel.command(b"Set_Option " + option, lambda answer: None)

    # The administrator

    async def _serve_control(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        try:
            async with asyncio.timeout(GUESTRPC_PACKET_TIMEOUT_SECONDS):
                request = json.loads(await reader.readline())
            reply = {"result": await self._carry_out(**request)}
        except (ControlError, VariableRefused, CommandFailed, sqlite3.Error) as error:
            reply = {"error": str(error)}
        except (ValueError, TypeError, KeyError) as error:
            reply = {"error": f"invalid request: {error}"}
        except (TimeoutError, OSError):
            writer.close()
            return
        writer.write(json.dumps(reply).encode() + b"\n")
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(GUESTRPC_PACKET_TIMEOUT_SECONDS):
                await writer.drain()
        writer.close()

    async def _carry_out(self, do: str, cid: int = 0, **given: Any) -> Any:
        self._notice_changes()
        if do == "list":
            return [self._described(guest) for _, guest in sorted(self._guests.items())]
        if do == "admit":
            return self._admit_guest(cid, **given)
        guest = self._guests.get(cid)
        if guest is None:
            raise ControlError(f"guest {cid} is not enabled (first: vsock guestinfo enable {cid})")
        match do:
            case "remove":
                self._variables.remove(cid)
                self._forget(cid)
                return None
            case "variables":
                return [
                    (name, writer.value, to_text(value))
                    for name, writer, value in self._variables.all(cid)
                ]
            case "set":
                for name, value in given["values"].items():
                    self._variables.set(cid, Writer.HOST, full_name(name), to_bytes(value))
                return None
            case "unset":
                return self._variables.unset(cid, full_name(given["name"]))
            case "send":
                return await self._send(cid, given["change"])
        raise ValueError(f"unknown operation {do!r}")

    def _admit_guest(
        self,
        cid: int,
        identity: str,
        permissions: dict[str, Any] | None = None,
        values: dict[str, str] | None = None,
    ) -> None:
        allowed = Permissions(**permissions or {})
        encoded = None
        if values is not None:
            encoded = {full_name(name): to_bytes(value) for name, value in values.items()}
        text = json.dumps(dataclasses.asdict(allowed))
        if not self._variables.admit(cid, identity, text, encoded):
            self._forget(cid)  # another machine had the CID
        guest = self._guests.setdefault(cid, Guest(cid))
        guest.permissions = allowed

    def _described(self, guest: Guest) -> dict[str, Any]:
        silent = time.monotonic() - guest.heard
        return {
            "cid": guest.cid,
            "running": guest.cid in self._channels and silent < GUESTRPC_HEARTBEAT_SECONDS,
            "claims": guest.claims,
            "capabilities": guest.capabilities,
        }

    async def _send(self, cid: int, change: str) -> str:
        channel = self._channels.get(cid)
        if channel is None:
            raise ControlError(f"guest {cid}: no VMware Tools are connected")
        answered = asyncio.get_running_loop().create_future()
        finished = asyncio.Event()

        def answer(given: bytes | CommandFailed) -> None:
            if not answered.done():
                answered.set_result(given)

        guest = self._guests[cid]
        guest.changed = finished.set
        channel.command(STATE_CHANGES[change], answer)
        try:
            async with asyncio.timeout(GUESTRPC_COMMAND_TIMEOUT_SECONDS):
                text = await answered
                if change == "suspend" and not isinstance(text, CommandFailed):
                    await finished.wait()  # the scripts run after the answer
        except TimeoutError:
            limit = f"{GUESTRPC_COMMAND_TIMEOUT_SECONDS:g} s"
            raise ControlError(
                f"guest {cid}: VMware Tools have not answered within {limit}"
            ) from None
        if isinstance(text, CommandFailed):
            raise text
        return str(text.decode(errors="replace"))


def _do_nothing() -> None:
    pass


async def _read(reader: asyncio.StreamReader, is_within: bool) -> bytes:
    """Return the bytes that arrive next, b"" at the end.

    Between packets a guest may be silent for any time, also with a command to answer: the daemon of
    a guest that is slow or paused may crash when it is disconnected.

    Raises TimeoutError when none arrive in time within a packet.
    """
    async with asyncio.timeout(GUESTRPC_PACKET_TIMEOUT_SECONDS if is_within else None):
        return await reader.read(_CHUNK)


async def _drain(writer: asyncio.StreamWriter) -> None:
    """Wait until the guest has read enough of what was sent.  Raises TimeoutError."""
    async with asyncio.timeout(GUESTRPC_PACKET_TIMEOUT_SECONDS):
        await writer.drain()


# Processes


def run(
    context: ContextHandle, state: Path | None, control: Path, ready: Callable[[], object]
) -> int:
    """Serve until SIGTERM or SIGINT; return the exit status.

    The process that is started first holds the listeners, and starts its command again to serve.
    ``context`` is the hypervisor's; ``state`` is the file of the variables, which are kept in
    memory without one; ``control`` is the path of the administrator's socket.  ``ready`` is called
    in each process that begins to serve.

    Raises OSError when a port is taken, or the process may not be the hypervisor.
    """
    listeners = [open_listener(locator, context) for locator in LOCATORS]
    if not is_worker():
        try:
            return asyncio.run(keep_service(GUESTRPC_RESTART_SECONDS))
        finally:
            _remove_stale(control)

    async def serve() -> None:
        take_over()  # a predecessor has the file of the variables and the control socket open
        with Variables(state) as variables:
            await GuestService(variables, listeners, context, control).run(ready)

    try:
        asyncio.run(serve())
    except OSError as error:
        log.error("%s", error)
        return 1
    except sqlite3.Error as error:
        log.error("--state %s: %s", state, error)
        return 1
    except BaseException:
        log.exception("unexpected error")
        return 1
    return 0


def _remove_stale(control: Path) -> None:
    """Remove the control socket that a process has left which was killed."""
    with contextlib.suppress(OSError):
        folder = open_folder(control.parent)
        try:
            remove_stale(control.name, folder)
        finally:
            os.close(folder)
