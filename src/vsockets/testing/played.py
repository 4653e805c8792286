"""Played machines in a private fabric: a client of the process that plays them."""

from __future__ import annotations

import http.client
import json
import os
import socket as stdlib
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..attachment import Attachment

if TYPE_CHECKING:
    from .fabric import PrivateFabric, StrPath

#: Seconds for the process that plays to answer; it takes a hundredth of one.
_PATIENCE = 20.0


class PlayedFailed(Exception):
    """An operation that the played hypervisor does not have, or that the state does not allow."""


class _Connection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("played", timeout=_PATIENCE)
        self._path = path

    def connect(self) -> None:
        self.sock = stdlib.socket(stdlib.AF_UNIX)
        self.sock.settimeout(_PATIENCE)
        self.sock.connect(self._path)


def request(path: str, method: str, target: str, **values: Any) -> Any:
    """Send a request to the API of played machines at the unix socket ``path``.

    Returns the value of the reply.

    Raises PlayedFailed with the message of an error, OSError if the API does not answer.
    """
    connection = _Connection(path)
    try:
        body = json.dumps(values) if values else None
        connection.request(method, target, body)
        response = connection.getresponse()
        text = response.read().decode()
    except http.client.HTTPException as error:
        raise OSError(f"{path}: invalid reply: {error!r}") from None
    finally:
        connection.close()
    if response.status != 200:
        raise PlayedFailed(text.strip())
    return json.loads(text)


class PlayedMachine:
    """A machine of a played hypervisor; :meth:`PrivateFabric.played` returns it.

    No virtual machine runs: the guest's programs are processes of this machine, started by
    :meth:`popen`.  What happens to the machine's device happens to their connections only.
    """

    cid: int  #: the guest's CID
    context: Attachment  #: the guest's context, for sockets of the library
    host: Attachment  #: the context in which the guest's host is: for Nitro the parent's
    host_cid: int  #: the CID at which the guest reaches its host
    socket: str  #: path of the machine's unix socket; empty without one
    vmclock: str  #: path of the machine's VMClock, which is a file here; empty without one
    agent: str  #: URL of the hypervisor's own agent (``hvsock://PATH:1024``); empty without one

    def __init__(self, fabric: PrivateFabric, api: str, row: dict[str, Any]) -> None:
        self._fabric = fabric
        self._api = api
        self._programs: list[subprocess.Popen[Any]] = []
        self._take(row)

    def __repr__(self) -> str:
        return f"<played machine {self.cid}>"

    def _take(self, row: dict[str, Any]) -> None:
        self.cid = row["cid"]
        self.host_cid = row["host_cid"]
        self.socket = row["socket"] or ""
        self.agent = row["agent"] or ""
        self.vmclock = row["vmclock"] or ""
        folder = self._fabric.folder
        self.context = Attachment(folder / str(self.cid))
        self.host = Attachment(folder / str(self.host_cid))

    def port_path(self, port: int) -> str:
        """Return the path at which the host listens for the guest's connects to ``port``."""
        return f"{self.socket}_{port}"

    def connect(self, port: int) -> stdlib.socket:
        """Connect from the host to ``port`` of the guest, as the hypervisor's clients do.

        With hybrid vsock the CONNECT line is sent, and the OK line read, byte by byte.

        Raises ConnectionError if the guest's port has no listener or the reply is not OK.
        """
        if not self.socket:
            from ..api import create_connection

            return create_connection((self.cid, port), timeout=_PATIENCE, context=self.host)
        sock = stdlib.socket(stdlib.AF_UNIX)
        try:
            sock.settimeout(_PATIENCE)
            sock.connect(self.socket)
            sock.sendall(b"CONNECT %d\n" % port)
            line = b""
            while not line.endswith(b"\n"):
                byte = sock.recv(1)
                if not byte:
                    raise ConnectionResetError(f"port {port} of the guest: closed after {line!r}")
                line += byte
            if not line.startswith(b"OK "):
                raise ConnectionAbortedError(f"port {port} of the guest: invalid reply {line!r}")
        except BaseException:
            sock.close()
            raise
        return sock

    def popen(self, arguments: Sequence[StrPath], **options: Any) -> subprocess.Popen[Any]:
        """Start a program in the guest; see :meth:`PrivateFabric.popen`.

        :meth:`reboot` and :meth:`change_cid` end the program, as the guest's kernel ends with it.
        """
        process = self._fabric.popen(self.context, arguments, **options)
        self._programs.append(process)
        return process

    # Life

    @property
    def state(self) -> str:
        """The state: ``running``, ``paused`` or ``killed``."""
        return str(self.describe()["state"])

    def describe(self) -> dict[str, Any]:
        """Return the machine's row of the API."""
        return dict(self._request("GET", ""))

    def pause(self) -> None:
        """Stop the machine: data and connects wait in its device."""
        self._request("POST", "/pause")

    def resume(self) -> None:
        """Continue after a pause."""
        self._request("POST", "/resume")

    def snapshot(self) -> int:
        """Save the machine; return the snapshot's number."""
        return int(self._request("POST", "/snapshot")["snapshot"])

    def restore(self, snapshot: int | None = None, *, asleep: float = 0.0) -> None:
        """Replace the hypervisor's process by one that loads a snapshot, by default the last.

        The guest's programs go on where they are; their connections are affected as by that version
        of the hypervisor.  ``asleep`` is the time since the snapshot in seconds: if the hypervisor
        does not advance the guest's clock, :meth:`time` is ahead of it by that much.
        """
        self._request("POST", "/restore", snapshot=snapshot, asleep=asleep)

    def time(self) -> float:
        """Return the host's time, for a host that talks to the guest.

        The guest's clock is that of this computer; after a restore the host's is ahead of it.
        """
        return time.time() + float(self.describe()["asleep"])

    def clone(self, count: int = 1) -> list[PlayedMachine]:
        """Return new machines from the last snapshot; their guests have no program yet."""
        rows = self._request("POST", "/clone", count=count)["machines"]
        return [PlayedMachine(self._fabric, self._api, row) for row in rows]

    def another(self) -> PlayedMachine:
        """Return another machine of the same hypervisor, in the same fabric."""
        row = self.describe()
        return self._fabric.played(f"{row['hypervisor']}@{row['version']}")

    def kill(self) -> None:
        """End the hypervisor's process; the file of its unix socket stays, as a crash leaves it."""
        self._request("POST", "/kill")

    def reboot(self) -> None:
        """Start the guest again, without any program."""
        self._end_programs()
        self._request("POST", "/reboot")

    def replace(self) -> None:
        """End the machine and start another one with the same CID and unix socket.

        The new machine has no program and no snapshot yet.
        """
        self._end_programs()
        self._request("POST", "/replace")

    def change_cid(self, cid: int) -> None:
        """Boot the guest again with another CID, without any program."""
        self._end_programs()
        self._take(self._request("POST", "/change-cid", cid=cid))

    def fault(
        self,
        name: str,
        *,
        seed: int = 0,
        times: int = 1,
        seconds: float = 0.2,
        port: int | None = None,
    ) -> None:
        """Have a fault strike the next ``times`` connections; docs/test-your-agent.md lists them.

        Random choices depend on ``seed`` only.  With ``port``, which is the guest's for CONNECT and
        the host's for a connect of the guest, connections to other ports are spared.
        """
        values = {"name": name, "seed": seed, "times": times, "seconds": seconds, "port": port}
        self._request("POST", "/fault", **values)

    @property
    def log(self) -> list[str]:
        """The operations and the faults that have struck, of all machines, oldest first."""
        return list(request(self._api, "GET", "/log"))

    def _end_programs(self) -> None:
        for process in self._programs:
            if process.poll() is None:
                process.kill()
            process.wait()
        self._programs.clear()

    def _request(self, method: str, operation: str, **values: Any) -> Any:
        return request(self._api, method, f"/machines/{self.cid}{operation}", **values)


def start(
    fabric: PrivateFabric, command: Sequence[StrPath], api: str, errors: Path
) -> subprocess.Popen[Any]:
    """Start the process that plays machines, and return when its API answers.

    Its standard error is the file ``errors``.

    Raises PlayedFailed with the process's message if it ends at once.
    """
    environment = fabric.environment(fabric.host)
    with open(errors, "wb") as log:
        process = subprocess.Popen(
            [*command, "played", "serve", "--socket", os.fspath(api)],
            env=environment,
            stdin=subprocess.PIPE,  # its end is the end of the process that plays
            stdout=subprocess.PIPE,
            stderr=log,
            process_group=0,
        )
    assert process.stdout is not None
    if not process.stdout.readline():
        process.communicate()
        raise PlayedFailed(errors.read_text(errors="replace").strip() or "no message")
    return process


def end(process: subprocess.Popen[Any]) -> None:
    """End the process that plays machines, by the end of its standard input."""
    try:
        process.communicate(timeout=_PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
