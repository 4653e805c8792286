"""Asking vsockd as its administrator: what ``vsock`` does, for programs."""

from __future__ import annotations

import errno
import json
import os
import socket
from pathlib import Path
from types import TracebackType
from typing import Any

from .limits import REQUEST_TIMEOUT
from .state_folder import CONTROL, connect_to, default_folder


class Control:
    """A connection to the vsockd of a state folder.

    Raises OSError: ENODEV when none runs there, else with the errno and words of vsockd.
    Contexts added with ``lease=True`` last as long as this connection.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self.folder = Path(folder) if folder is not None else default_folder()
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sock.settimeout(REQUEST_TIMEOUT)
        try:
            connect_to(self._sock.connect, os.fspath(self.folder / CONTROL))
        except (FileNotFoundError, ConnectionRefusedError):
            self._sock.close()
            raise OSError(
                errno.ENODEV, f"no vsockd runs in {self.folder} (start it: vsock up)"
            ) from None
        except OSError:
            self._sock.close()
            raise
        self._answers = self._sock.makefile("rb")

    def __enter__(self) -> Control:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the connection, and the leases made on it."""
        self._answers.close()
        self._sock.close()

    def fileno(self) -> int:
        """The connection's descriptor; whoever has a copy of it keeps the leases."""
        return self._sock.fileno()

    def status(self) -> dict[str, Any]:
        """Facts about the daemon: pid, folder, uptime in seconds, and counts."""
        return self._ask("status")  # type: ignore[no-any-return]

    def sockets(self) -> list[dict[str, Any]]:
        """Every socket of the fabric, one row for each end of a stream."""
        return self._ask("sockets")  # type: ignore[no-any-return]

    def contexts(self) -> list[dict[str, Any]]:
        """The contexts programs can be in: cid, name, owner (user id), folder, ports."""
        return self._ask("context.list")  # type: ignore[no-any-return]

    def add_context(
        self,
        cid: int | None = None,
        name: str = "",
        owner: int | None = None,
        lease: bool = False,
    ) -> dict[str, Any]:
        """Start a guest; without ``cid`` it gets a free one.  Returns its row of
        :meth:`contexts`; OSError EEXIST or EINVAL.
        """
        return self._ask("context.add", cid=cid, name=name, owner=owner, lease=lease)  # type: ignore[no-any-return]

    def remove_context(self, cid: int) -> None:
        """Stop a guest.  OSError ENOENT, EINVAL (the host), EBUSY (it has open streams)."""
        self._ask("context.remove", cid=cid)

    def stop(self) -> None:
        """Shut vsockd down; returns when it has gone."""
        self._ask("stop")
        while self._answers.readline():
            pass

    def _ask(self, op: str, **arguments: Any) -> Any:
        self._sock.sendall(json.dumps({"op": op, **arguments}).encode() + b"\n")
        try:
            line = self._answers.readline()
        except ConnectionError:
            line = b""
        if not line:
            raise OSError(errno.ENODEV, f"the vsockd of {self.folder} has gone")
        answer = json.loads(line)
        if "error" in answer:
            raise OSError(answer["errno"], answer["error"])
        return answer["ok"]
