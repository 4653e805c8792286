"""A private fabric: a real vsockd in a temporary directory."""

from __future__ import annotations

import importlib.util
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..attachment import Attachment
from ..control import Control
from ..extras import how_to_install
from ..model.constants import VMADDR_CID_HOST, VMADDR_CID_HYPERVISOR
from . import played
from .played import PlayedMachine

StrPath = str | os.PathLike[str]

_PACKAGE_ROOT = os.fspath(Path(__file__).parents[2])

#: The command ``vsock``, for a Python that may have this package in no other place.
_VSOCK = f"""\
import sys
sys.path.append({_PACKAGE_ROOT!r})
from vsockets.cli import main
sys.exit(main())
"""

#: Timeout in seconds for vsockd to start or to stop; it takes a tenth of one.
_PATIENCE = 20.0

#: Maximum size of a log in bytes: more than vsockd writes in any test, and short enough for a
#: report.
_LONGEST_LOG = 1 << 20


class FabricFailed(Exception):
    """vsockd did not start, did not stop properly, or logged an error."""


class PrivateFabric:
    """A private vsockd, as a context manager::

        with PrivateFabric() as fabric:
            server = vsockets.create_server((2, 5000), context=fabric.host)
            guest = fabric.guest()
            client = vsockets.create_connection((2, 5000), context=guest)
            agent = fabric.popen(guest, ["./agent"])  # any program, unmodified

    Any number of fabrics can run at the same time.  ``folder`` is the state folder; the default is
    a new temporary one with a short path, which is removed at the end.  vsockd is configured by the
    files in ``configuration``, which is empty at first.  With ``restarts``, vsockd is started again
    after it was killed, so many times a minute, and nothing is lost.
    """

    folder: Path  #: the state folder
    configuration: Path  #: the folder of configuration files, read when vsockd starts
    control: Control  #: the administrator's connection
    host: Attachment  #: the host, CID 2
    hypervisor: Attachment  #: the context of the hypervisor's services, CID 0

    def __init__(
        self,
        folder: str | os.PathLike[str] | None = None,
        log_level: str = "info",
        *,
        restarts: int = 0,
    ) -> None:
        self._restarts = restarts
        # TMPDIR may be too long for the path of a unix socket.
        self._scratch = Path(tempfile.mkdtemp(prefix="vsock-", dir=_short_temporary_folder()))
        self.folder = Path(folder) if folder is not None else self._scratch / "fabric"
        self.configuration = self._scratch / "configuration"
        self.configuration.mkdir()
        self._log_file = self._scratch / "log"
        self._log_level = log_level
        self._log = ""
        self._process: subprocess.Popen[bytes] | None = None
        self._lifeline = -1  # a pipe to vsockd, which ends when this process does
        self._programs: list[subprocess.Popen[Any]] = []
        self._player: subprocess.Popen[Any] | None = None  # plays machines
        self._errors_expected = False

    def __enter__(self) -> PrivateFabric:
        try:
            self.start()
        except BaseException:
            self.kill()
            self._remove()
            raise
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            self._end_programs()
            self.stop()
            if kind is None:
                self.check()
        except FabricFailed:
            if kind is None:  # otherwise the block's own exception is more useful
                raise
        finally:
            self._remove()

    # For tests

    @property
    def pid(self) -> int:
        """The process ID of vsockd.

        Raises FabricFailed if vsockd does not run.
        """
        if self._process is None:
            raise FabricFailed("vsockd does not run")
        return self._process.pid

    @property
    def log(self) -> str:
        """The first MiB of vsockd's standard error so far."""
        if self._log_file.exists():
            with open(self._log_file, "rb") as log:
                self._log = log.read(_LONGEST_LOG).decode(errors="replace")
        return self._log

    def guest(
        self, cid: int | None = None, *, name: str = "", owner: int | None = None, **settings: Any
    ) -> Attachment:
        """Add a guest and return its context; without ``cid``, vsockd chooses an unused CID.

        Settings and errors are those of :meth:`vsockets.control.Control.add_context`.  With
        ``reserved_ports=True``, programs in the guest may bind ports below 1024, as in a virtual
        machine whose agent runs as root.
        """
        return Attachment(self.control.add_context(cid, name, owner, **settings)["folder"])

    def played(
        self,
        hypervisor: str,
        cid: int | None = None,
        *,
        socket: str | os.PathLike[str] | None = None,
    ) -> PlayedMachine:
        """Add a machine of a played hypervisor, such as ``firecracker`` or ``kata``.

        ``hypervisor`` may end with ``@`` and a version.  ``socket`` is the path of the machine's
        unix socket, by default in a new folder.  Needs the package's dependencies.

        Raises PlayedFailed if the hypervisor is unknown or the machine cannot be created.
        """
        if self._player is None:
            errors = self._scratch / "player"
            self._player = played.start(self, _vsock(), self.played_api, errors)
        path = None if socket is None else os.path.abspath(socket)
        values = {"hypervisor": hypervisor, "cid": cid, "socket": path}
        row = played.request(self.played_api, "POST", "/machines", **values)
        return PlayedMachine(self, self.played_api, row)

    def end_played(self) -> None:
        """End all played machines and remove their unix sockets; do nothing without any."""
        player, self._player = self._player, None
        if player is not None:
            played.end(player)

    @property
    def played_api(self) -> str:
        """Path of the unix socket of the HTTP API of played machines."""
        return os.fspath(self._scratch / "played")

    def popen(
        self, context: Attachment, arguments: Sequence[StrPath], **options: Any
    ) -> subprocess.Popen[Any]:
        """Start an unmodified program in ``context``, whose AF_VSOCK sockets are the fabric's.

        ``options`` are those of :class:`subprocess.Popen`; ``env`` is the program's environment, to
        which the fabric's variables are added.  The returned process is a supervisor: it passes
        signals on to the program, and ends with the program's exit status.  A program that still
        runs at the end of the fabric is killed.  Needs the package's dependencies, as ``vsock run``
        does.
        """
        options["env"] = self._environment(context, options.get("env"))
        process = subprocess.Popen(_supervised(context, arguments), **options)
        self._programs.append(process)
        return process

    def run(
        self, context: Attachment, arguments: Sequence[StrPath], **options: Any
    ) -> subprocess.CompletedProcess[Any]:
        """Run an unmodified program in ``context`` to its end; see :meth:`popen`.

        ``options`` are those of :func:`subprocess.run`.
        """
        options["env"] = self._environment(context, options.get("env"))
        return subprocess.run(_supervised(context, arguments), **options)

    def environment(self, attachment: Attachment) -> dict[str, str]:
        """Return this process's environment for a child that uses the library in a context.

        Only programs that ``import vsockets`` use the context.  Any other program would get the
        machine's own AF_VSOCK: start it with :meth:`popen`.
        """
        return self._environment(attachment)

    def _environment(
        self, attachment: Attachment, base: Mapping[str, str] | None = None
    ) -> dict[str, str]:
        return {
            **(os.environ if base is None else base),
            "VSOCKETS_TRANSPORT": "fabric",
            "VSOCKETS_CONTEXT": os.fspath(attachment.folder),
            "VSOCKETS_DIR": os.fspath(self.folder),
        }

    def expect_errors(self) -> None:
        """Accept errors in vsockd's log, which otherwise fail the test."""
        self._errors_expected = True

    # Start and stop, for tests of crashes; the context manager does so otherwise

    def start(self) -> None:
        """Start vsockd and return when it serves.

        Raises FabricFailed with vsockd's log.
        """
        ready, announce = os.pipe()
        watched, self._lifeline = os.pipe()
        try:
            with open(self._log_file, "ab") as log:
                self._process = subprocess.Popen(
                    [
                        *(sys.executable, "-m", "vsockets.daemon"),
                        *("--dir", os.fspath(self.folder)),
                        *("--config", os.fspath(self.configuration)),
                        *("--ready-fd", str(announce)),
                        *("--lifeline-fd", str(watched)),
                        *("--log-level", self._log_level),
                        *("--restarts", str(self._restarts)),
                    ],
                    env=_environment_of_vsockd(),
                    stdin=subprocess.DEVNULL,
                    stderr=log,
                    pass_fds=[announce, watched],
                    process_group=0,  # Ctrl-C at the terminal is for the tests only
                )
            os.close(announce)
            announce = -1
            readable, _, _ = select.select([ready], [], [], _PATIENCE)
            # End of file without data: vsockd has ended.
            if not readable or not os.read(ready, 64):
                self._end_process(signal.SIGKILL)
                raise FabricFailed(f"vsockd did not start: {self.log.strip() or 'no message'}")
        finally:
            os.close(ready)
            os.close(watched)
            if announce >= 0:
                os.close(announce)
        self.control = Control(self.folder)
        self.host = Attachment(self.folder / str(VMADDR_CID_HOST))
        self.hypervisor = Attachment(self.folder / str(VMADDR_CID_HYPERVISOR))

    def kill(self) -> None:
        """Kill vsockd, as if it had crashed; :meth:`start` starts it again."""
        if self._process is not None:
            self._end_process(signal.SIGKILL)

    def stop(self) -> None:
        """Stop vsockd as an administrator would; do nothing if it does not run.

        Raises FabricFailed unless vsockd ends in time with status 0 and leaves no file in its
        folder.
        """
        if self._process is None:
            return
        died = self._process.poll() is not None
        status = self._end_process(signal.SIGTERM)
        if died:
            raise FabricFailed(f"vsockd died with status {status}:\n{self.log}")
        if status != 0:
            raise FabricFailed(f"vsockd ended with status {status}:\n{self.log}")
        left = sorted(os.listdir(self.folder)) if self.folder.exists() else []
        if left:
            raise FabricFailed(f"vsockd left {', '.join(left)} in {self.folder}")

    def check(self) -> None:
        """Check that vsockd has logged no unexpected error.

        Raises FabricFailed if it has.
        """
        errors = [line for line in self.log.splitlines() if line.startswith("vsockd: ERROR")]
        if errors and not self._errors_expected:
            raise FabricFailed(f"vsockd logged {len(errors)} errors:\n{self.log}")
        player = self._scratch / "player"
        if player.exists() and (messages := player.read_text(errors="replace")):
            raise FabricFailed(f"the process that plays machines has failed:\n{messages}")

    def _end_programs(self) -> None:
        self.end_played()
        for process in self._programs:
            if process.poll() is None:
                process.kill()
            with process:  # closes the pipes and waits
                pass
        self._programs.clear()

    def _end_process(self, number: signal.Signals) -> int:
        process, self._process = self._process, None
        assert process is not None
        if hasattr(self, "control"):
            self.control.close()
        process.send_signal(number)
        try:
            return process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise FabricFailed(f"vsockd did not end within {_PATIENCE} s:\n{self.log}") from None
        finally:
            os.close(self._lifeline)

    def _remove(self) -> None:
        _ = self.log  # keep the log readable
        shutil.rmtree(self._scratch, ignore_errors=True)


def _short_temporary_folder() -> str | None:
    return "/tmp" if os.access("/tmp", os.W_OK | os.X_OK) else None


def _environment_of_vsockd() -> dict[str, str]:
    # NOTIFY_SOCKET would notify the service manager of the test run.
    without = ("VSOCKETS_CONTEXT", "NOTIFY_SOCKET")
    environment = {name: value for name, value in os.environ.items() if name not in without}
    search_path = filter(None, [_PACKAGE_ROOT, environment.get("PYTHONPATH")])
    return {**environment, "PYTHONPATH": os.pathsep.join(search_path)}


def _vsock() -> list[StrPath]:
    """Return the command ``vsock``.

    Raises FabricFailed if its dependencies are missing.
    """
    if importlib.util.find_spec("click") is None:
        raise FabricFailed(f"vsock run is missing: {how_to_install()}")
    # Neither the working folder nor PYTHONPATH decides what this imports.
    return [sys.executable, "-P", "-c", _VSOCK]


def _supervised(context: Attachment, arguments: Sequence[StrPath]) -> list[StrPath]:
    """Return the command that runs ``arguments`` in ``context``."""
    return [*_vsock(), "run", "--cid", str(context.cid), "--", *arguments]
