"""Client of :mod:`.guest_agent`: run programs in a guest, copy files into it and out of it."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import socket as stdlib
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from ..api import create_connection
from ..attachment import ContextHandle
from .guest_agent import COMMAND_PORT
from .limits import GUEST_OUTPUT_MAX_CHARACTERS

#: Timeout of a guest's reply in seconds.
_REPLY_SECONDS = 60.0

#: Callback for the progress of a copy: bytes so far.
Progress = Callable[[int], None]


class GuestClient:
    """A guest that runs :mod:`vsockets.vm.guest_agent`."""

    def __init__(self, host: ContextHandle, cid: int) -> None:
        """Prepare to connect to guest ``cid`` from ``host``, the host's context."""
        self._host = host
        self.cid = cid

    def start(self, *command: str, size: os.terminal_size | None = None) -> Any:
        """Start a command; return the socket that is its standard input, output and error.

        With ``size``, the command runs on a terminal of that size.

        Raises OSError if the guest does not answer.
        """
        sock = create_connection((self.cid, COMMAND_PORT), _REPLY_SECONDS, context=self._host)
        request: dict[str, object] = {"command": command}
        if size is not None:
            request |= {"rows": size.lines, "columns": size.columns}
        sock.sendall(json.dumps(request).encode() + b"\n")
        return sock

    def run(self, *command: str) -> str:
        """Run a command and return its output.

        Raises OSError if the guest does not answer.
        """
        with self.start(*command) as sock:
            sock.shutdown(stdlib.SHUT_WR)
            return str(sock.makefile(errors="replace").read(GUEST_OUTPUT_MAX_CHARACTERS))

    def copy_in(self, source: Path, destination: str, progress: Progress) -> None:
        """Copy the files below ``source`` to below ``destination`` in the guest.

        Raises OSError if the guest does not answer, or a file cannot be read.
        """
        done = 0
        script = f"mkdir -p {shlex.quote(destination)} && tar -x -C {shlex.quote(destination)}"
        with self.start("sh", "-c", script) as sock:
            with (
                sock.makefile("wb") as stream,
                tarfile.open(fileobj=stream, mode="w|") as archive,
            ):
                for path in files_below(source):
                    archive.add(path, str(path.relative_to(source)), recursive=False)
                    done += path.stat().st_size
                    progress(done)
            sock.shutdown(stdlib.SHUT_WR)
            errors = sock.makefile(errors="replace").read(GUEST_OUTPUT_MAX_CHARACTERS)
        if errors:
            raise OSError(f"the guest's tar: {errors.strip()}")

    def copy_out(self, source: str, destination: Path, progress: Progress, limit: int) -> None:
        """Copy the files below ``source`` in the guest to below ``destination``.

        Nothing outside ``destination`` is written: names that lead out of it are refused.

        Raises OSError, also if the files have more than ``limit`` bytes.
        """
        done = 0
        with self.start("tar", "-c", "-C", source, ".") as sock:
            sock.shutdown(stdlib.SHUT_WR)
            with (
                sock.makefile("rb") as stream,
                tarfile.open(fileobj=stream, mode="r|") as archive,
            ):
                for member in archive:
                    name = PurePosixPath(member.name)
                    content = archive.extractfile(member) if member.isreg() else None
                    if content is None:
                        continue
                    if name.is_absolute() or ".." in name.parts:
                        raise OSError(f"invalid file name from the guest: {member.name!a}")
                    done += member.size
                    if done > limit:
                        raise OSError(f"the guest sent more than {limit} bytes")
                    path = destination / name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with open(path, "xb") as file:
                        shutil.copyfileobj(content, file)
                    progress(done)

    def digest(self, folder: str) -> str:
        """Return the digest of a directory in the guest, computed as by :func:`digest`.

        Raises OSError if the guest does not answer.
        """
        script = "cd {} && find . -type f -print0 | sort -z | xargs -0 -r sha256sum | sha256sum"
        return self.run("sh", "-c", script.format(shlex.quote(folder))).partition(" ")[0]


def files_below(folder: Path) -> Iterator[Path]:
    """Yield the regular files below ``folder``, sorted."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            yield path


def digest(folder: Path) -> str:
    """Return the SHA-256 of the output of sha256sum(1) for all files below ``folder``, sorted."""
    whole = hashlib.sha256()
    names = {f"./{path.relative_to(folder)}".encode(): path for path in files_below(folder)}
    for name in sorted(names):
        whole.update(hashlib.sha256(names[name].read_bytes()).hexdigest().encode())
        whole.update(b"  " + name + b"\n")
    return whole.hexdigest()
