"""The service at the hypervisor's ports: one for all guests of a fabric.

A guest's tools exit when a reconnect fails once, so the ports must never be without a listener.
:func:`run` therefore holds both listeners in a process that does nothing else, and starts the one
that serves, again if it dies; connections wait in the backlog meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import json
import logging
import os
import signal
import socket as stdlib
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from .. import logs
from .._linux.folders import SocketFile
from .._linux.libc import check, libc
from ..attachment import ContextHandle
from ..eventloop.asyncio_server import AsyncioAcceptor, Listener, open_listener
from ..eventloop.service import run_service
from ..model.constants import VMADDR_CID_HYPERVISOR
from ..model.locator import Vsock
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
_PR_SET_PDEATHSIG = 1


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

        ``context`` is the hypervisor's.  Raises OSError or sqlite3.Error.
        """
        self._variables = variables
        self._guests = {
            cid: Guest(cid, Permissions(**json.loads(text)))
            for cid, text in variables.guests().items()
        }
        self._channels: dict[int, CommandChannel] = {}  # those of daemons that obey commands
        self._counts: Counter[int] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()
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
        """Serve until SIGTERM or SIGINT; ``ready`` is called at the beginning."""
        limit = GUESTRPC_CONTROL_MAX_BYTES
        server = await asyncio.start_unix_server(
            self._serve_control, sock=self._control, limit=limit
        )
        try:
            await run_service(ready)
        finally:
            server.close()
            self._control_file.remove()
            self._control_file.close()
            for acceptor in self._acceptors:
                acceptor.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    # Guests

    def _admit(self, serve: Callable[..., Any], sock: stdlib.socket) -> None:
        try:
            cid, port = sock.getpeername()
        except OSError:
            sock.close()
            return
        guest = self._guests.get(cid)
        if guest is None:
            log.info("guest %d: refused: it does not take part", cid, extra=logs.rare(cid))
        elif self._counts[cid] >= GUESTRPC_GUEST_CONNECTIONS_MAX:
            log.warning("guest %d: too many connections", cid, extra=logs.rare(cid))
        else:
            self._counts[cid] += 1
            task = asyncio.ensure_future(self._serve(serve, guest, port, sock))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
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
        finally:
            self._counts[guest.cid] -= 1

    async def _serve_requests(
        self, guest: Guest, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        decoder = Decoder()
        while data := await _read(reader, decoder.is_within):
            for packet in decoder.feed(data):
                if packet.is_ping:
                    continue
                writer.write(encode(self._answer(guest, port, packet)))
                async with asyncio.timeout(GUESTRPC_PACKET_TIMEOUT_SECONDS):
                    await writer.drain()

    def _answer(self, guest: Guest, port: int, packet: Packet) -> bytes:
        if packet.is_too_long:
            return b"0 Value too long"
        if guest is not self._guests.get(guest.cid):
            raise PacketError("it does not take part any longer")
        return self._requests.answer(guest, port, packet.payload)

    async def _serve_commands(
        self, guest: Guest, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        decoder = Decoder()
        channel = CommandChannel(writer.write, lambda: self._is_ready(guest, channel))
        try:
            while data := await _read(
                reader,
                decoder.is_within,
                GUESTRPC_COMMAND_TIMEOUT_SECONDS if channel.is_waiting else None,
            ):
                for packet in decoder.feed(data):
                    guest.heard = time.monotonic()
                    channel.receive(packet)
        finally:
            if self._channels.get(guest.cid) is channel:
                del self._channels[guest.cid]
                log.log(logs.NOTICE, "guest %d: VMware Tools have disconnected", guest.cid)
            channel.close()

    def _is_ready(self, guest: Guest, channel: CommandChannel) -> None:
        self._channels[guest.cid] = channel
        log.log(logs.NOTICE, "guest %d: VMware Tools are running", guest.cid)

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
        if do == "list":
            return [self._described(guest) for _, guest in sorted(self._guests.items())]
        if do == "admit":
            return self._admit_guest(cid, **given)
        guest = self._guests.get(cid)
        if guest is None:
            raise ControlError(
                f"guest {cid} does not take part (first: vsock guestinfo enable {cid})"
            )
        match do:
            case "remove":
                self._variables.remove(cid)
                del self._guests[cid]
                return None
            case "variables":
                return [
                    (name, writer.value, value.decode(errors="surrogateescape"))
                    for name, writer, value in self._variables.all(cid)
                ]
            case "set":
                for name, value in given["values"].items():
                    self._variables.set(cid, Writer.HOST, full_name(name), _encoded(value))
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
        self._variables.admit(cid, identity, json.dumps(dataclasses.asdict(allowed)))
        if values is not None:
            encoded = {full_name(name): _encoded(value) for name, value in values.items()}
            self._variables.replace(cid, encoded)
        self._guests[cid] = Guest(cid, allowed)

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

        def answer(given: bytes | CommandFailed) -> None:
            if not answered.done():
                answered.set_result(given)

        channel.command(STATE_CHANGES[change], answer)
        async with asyncio.timeout(GUESTRPC_COMMAND_TIMEOUT_SECONDS):
            text = await answered
        if isinstance(text, CommandFailed):
            raise text
        return str(text.decode(errors="replace"))


def _encoded(value: str) -> bytes:
    return value.encode(errors="surrogateescape")


async def _read(
    reader: asyncio.StreamReader, is_within: bool, seconds: float | None = None
) -> bytes:
    """Return the bytes that arrive next, b"" at the end.

    Raises TimeoutError when none arrive in time within a packet, or in ``seconds``.
    """
    async with asyncio.timeout(GUESTRPC_PACKET_TIMEOUT_SECONDS if is_within else seconds):
        return await reader.read(_CHUNK)


# Processes


def run(
    context: ContextHandle, state: Path | None, control: Path, ready: Callable[[], object]
) -> int:
    """Serve until SIGTERM or SIGINT; return the exit status.

    ``context`` is the hypervisor's; ``state`` is the file of the variables, which are kept in
    memory without one; ``control`` is the path of the administrator's socket.  ``ready`` is called
    in each process that begins to serve.

    Raises OSError when a port is taken, or the process may not be the hypervisor.
    """
    listeners = [open_listener(locator, context) for locator in LOCATORS]
    keeper = _Keeper(lambda: _serve_in_child(listeners, context, state, control, ready))
    return keeper.run()


class _Keeper:
    """The process that holds the listeners while its child serves."""

    def __init__(self, serve: Callable[[], int]) -> None:
        self._serve = serve
        self._child = 0
        self._is_ending = False

    def run(self) -> int:
        """Return the exit status of the last child."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._forward)
        while True:
            began = time.monotonic()
            self._child = os.fork()
            if self._child == 0:
                os._exit(self._serve())
            if self._is_ending:  # the signal came before the process id was known
                os.kill(self._child, signal.SIGTERM)
            _, status = os.waitpid(self._child, 0)
            self._child = 0
            code = os.waitstatus_to_exitcode(status)
            if self._is_ending or code >= 0:
                return code if code >= 0 else 128 - code
            log.error("the serving process was ended by signal %d; starting another one", -code)
            time.sleep(max(0.0, GUESTRPC_RESTART_SECONDS - (time.monotonic() - began)))

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self._is_ending = True
        if self._child:
            os.kill(self._child, number)


def _serve_in_child(
    listeners: Sequence[Listener],
    context: ContextHandle,
    state: Path | None,
    control: Path,
    ready: Callable[[], object],
) -> int:
    check(libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0))

    async def serve() -> None:
        with Variables(state) as variables:
            await GuestService(variables, listeners, context, control).run(ready)

    try:
        asyncio.run(serve())
    except (OSError, sqlite3.Error) as error:
        log.error("%s", error)
        return 1
    except BaseException:
        log.exception("unexpected error")
        return 1
    return 0
