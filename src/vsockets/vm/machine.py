"""A running virtual machine: its device process, its QEMU, and the connections between them.

All parts end with this process, however it ends: the device at the end of its standard input, QEMU
because the kernel kills it with its parent.  The sockets between them have no names, except the
device's, which is removed as soon as QEMU has connected.  A virtio device that crashes is replaced
(:mod:`.replug`); without another device QEMU ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import signal
import socket
import sys
import tempfile
import termios
import threading
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

from qemu.qmp import ExecuteError, QMPClient, QMPError

from .._linux.process import notify_ready
from ..attachment import Attachment
from ..control import Control
from ..guestrpc.client import RequestFailed
from ..limits import LOG_LINES_PER_SECOND
from ..logs import Throttle
from ..model.constants import VMADDR_CID_HOST
from .lifecycle_sync import LifecycleSync
from .qemu_args import MachineOptions, machine_arguments
from .readiness import ReadinessReports
from .replug import replug

#: Timeout for the start of QEMU and of the device, in seconds; each takes half a second.
_START_SECONDS = 60.0

#: Timeout in seconds for a process to end after SIGTERM.
_STOP_SECONDS = 10.0

#: A device that crashes more often than so many times in so many seconds is not replaced.
_CRASHES_MAX, _CRASHES_SECONDS = 5, 60.0

#: The exit status of a device without access to the guest's memory, which another one has not, too.
_LOST_MEMORY = 128 + signal.SIGBUS

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


async def forward_stderr(process: Process, name: str, report: Callable[[str], None]) -> None:
    """Call ``report`` with each line that a process writes to standard error.

    A guest may cause such lines, so their rate is limited as that of log lines is.
    """
    assert process.stderr is not None
    throttle = Throttle(LOG_LINES_PER_SECOND)
    while True:
        try:
            line = await process.stderr.readline()
        except ValueError:  # a line longer than the buffer; its rest follows
            continue
        if not line:
            return
        left_out = throttle.admit(name)
        if left_out is not None:
            more = f" ({left_out} more were left out)" if left_out else ""
            report(f"{name}: {line.decode(errors='replace').strip()}{more}")


#: Ends of QEMU that are not a power-off of the guest, by the reason in its monitor's event.
_FAILURES = {
    "guest-reset": "the guest reset its machine, which ends it (-no-reboot; a panic resets, too)",
    "guest-panic": "the guest has panicked",
}


class MachineFailed(Exception):
    """The machine could not be started, or has failed; the message says why."""


class RunningMachine:
    """A virtual machine from its start to its end."""

    def __init__(
        self,
        machine: MachineOptions,
        qemu: str,
        control: Control,
        cid: int,
        *,
        extra: tuple[str, ...] = (),
        grace: float = 10.0,
        halt: Callable[[], object] | None = None,
        wait_ready: bool = False,
        report: Callable[[str], None],
    ) -> None:
        """Prepare to run ``machine`` with the QEMU program ``qemu`` and the arguments ``extra``.

        ``grace`` is the time in seconds that the guest has to power off when asked to.  ``halt``
        is called in a thread to ask it by other means than its power button, and raises OSError or
        RequestFailed when that is impossible.  With ``wait_ready``, the guest's systemd reports to
        this process, which notifies its own service manager when the guest is ready.  ``report``
        receives lines for the user.
        """
        self._machine = machine
        self._program = qemu
        self._control = control
        self._cid = cid
        self._extra = extra
        self._grace = grace
        self._halt = halt
        self._wait_ready = wait_ready
        self._reports: ReadinessReports | None = None
        self._report = report
        self._qmp = QMPClient(str(cid))
        self._status = 0
        self._kill: Callable[[], None] | None = None
        self._powering_down: asyncio.Task[None] | None = None

    async def run(self) -> int:
        """Run the machine until the guest is off.

        Returns the exit status: 0, or 128 plus the number of the signal that ended this process.

        Raises MachineFailed if QEMU fails, or the guest was not ready when it powered off and this
        was waited for; OSError when no port is free for the guest's reports.
        """
        self._main = asyncio.current_task()
        self._loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        try:
            async with contextlib.AsyncExitStack() as stack:
                self._stack = stack
                stack.enter_context(self._signals())
                if self._wait_ready:
                    self._listen_for_reports(stack)
                stack.enter_context(ours)
                # This context ends after QEMU, when the last of QEMU's output has arrived.
                stack.enter_context(console(ours, self._escape))
                with _short_folder() as folder, theirs:
                    device = await stack.enter_async_context(self._device(folder / "device"))
                    qemu = await stack.enter_async_context(self._qemu(folder / "device", theirs))
                    await self._connect(qemu)
                await self._supervise(device, qemu)
        except asyncio.CancelledError:
            if not self._status:
                raise
        if self._reports is not None and not (self._reports.is_ready or self._status):
            raise MachineFailed("the guest has powered off before it was ready")
        return self._status

    def _listen_for_reports(self, stack: contextlib.AsyncExitStack) -> None:
        began = self._loop.time()

        def ready() -> None:
            self._report(f"the guest is ready ({self._loop.time() - began:.1f} s)")
            self._control.announce_ready(self._cid)
            notify_ready()

        host = Attachment(self._control.folder / str(VMADDR_CID_HOST))
        self._reports = ReadinessReports(host, self._cid, self._report, ready)
        stack.enter_context(self._reports)
        address = self._reports.address
        self._machine = dataclasses.replace(self._machine, notify_socket=address)

    # Processes

    @contextlib.asynccontextmanager
    async def _device(self, path: Path) -> AsyncIterator[Process]:
        device = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "vsockets.cli", "--dir", os.fspath(self._control.folder)),
            *("device", self._machine.device, "--cid", str(self._cid)),
            *("--socket", os.fspath(path), "--until-eof"),
            stdin=PIPE,
            stdout=PIPE,
            stderr=PIPE,
            start_new_session=True,  # Ctrl-C is handled by this process
        )
        async with _terminated(device):
            assert device.stdout is not None and device.stderr is not None
            async with _start_timeout("the device"):
                ready = await device.stdout.readline()
                output = (await device.stderr.readline()).decode(errors="replace").strip()
            if not ready:
                raise MachineFailed(output.removeprefix("vsock: ") or "the device did not start")
            yield device

    @contextlib.asynccontextmanager
    async def _qemu(self, path: Path, console_end: socket.socket) -> AsyncIterator[Process]:
        self._monitor, monitor_end = socket.socketpair()
        ends = {"console": console_end, "monitor": monitor_end}
        with monitor_end:
            qemu = await asyncio.create_subprocess_exec(
                # The kernel kills QEMU when this process dies.
                *("setpriv", "--pdeathsig", "KILL", "--", self._program, "-S"),
                *machine_arguments(self._machine, os.fspath(path)),
                *(word for name in ends for word in _channel(name, ends[name].fileno())),
                *("-serial", "chardev:console", "-qmp", "chardev:monitor"),
                *self._extra,
                stdin=DEVNULL,
                stdout=DEVNULL,
                stderr=PIPE,
                pass_fds=[end.fileno() for end in ends.values()],
                start_new_session=True,
            )
        async with _terminated(qemu):
            yield qemu

    async def _connect(self, qemu: Process) -> None:
        try:
            async with _start_timeout("QEMU"):
                await self._qmp.connect(self._monitor)
        except QMPError:
            assert qemu.stderr is not None
            output = (await qemu.stderr.read()).decode(errors="replace").strip()
            raise MachineFailed(f"QEMU: {output or 'ended without a message'}") from None

    async def _supervise(self, device: Process, qemu: Process) -> None:
        """Wait until QEMU has ended, or a device has ended that is not replaced.

        Raises MachineFailed unless the guest has powered off.
        """
        self._kill = qemu.kill
        sync = LifecycleSync(self._qmp, self._control, self._cid, self._report)
        syncing = asyncio.create_task(sync.run())
        keeping = asyncio.create_task(self._keep_device(device))
        qemu_end = asyncio.create_task(qemu.wait())
        qemu_lines = asyncio.create_task(forward_stderr(qemu, "QEMU", self._report))
        ends = keeping, qemu_end
        try:
            await asyncio.wait([*ends, syncing], return_when=asyncio.FIRST_COMPLETED)
            if syncing.done():
                syncing.result()
                # QEMU has closed its monitor and is about to end.
                await asyncio.wait(ends, timeout=_STOP_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            if qemu_end.done():  # the last lines explain its end
                await asyncio.wait([qemu_lines], timeout=_STOP_SECONDS)
        finally:
            tasks = (syncing, qemu_lines, *ends)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            with contextlib.suppress(QMPError, EOFError, OSError):
                await self._qmp.disconnect()
        if not keeping.cancelled():
            ended = _exit_text(keeping.result())
            raise MachineFailed(f"the device has ended ({ended}), and QEMU with it")
        if qemu.returncode and not self._status:
            raise MachineFailed(f"QEMU has ended ({_exit_text(qemu)})")
        if sync.end_reason in _FAILURES:
            raise MachineFailed(_FAILURES[sync.end_reason])

    async def _keep_device(self, device: Process) -> Process:
        """Replace a device that has ended; return the first one that cannot be replaced.

        Raises MachineFailed if another device does not start.
        """
        crashes: deque[float] = deque(maxlen=_CRASHES_MAX)
        while True:
            # The last lines of a process that has ended explain its end.
            await asyncio.gather(device.wait(), forward_stderr(device, "the device", self._report))
            now = self._loop.time()
            too_often = len(crashes) == _CRASHES_MAX and crashes[0] > now - _CRASHES_SECONDS
            if self._machine.device != "virtio" or device.returncode == _LOST_MEMORY or too_often:
                return device
            crashes.append(now)
            self._report(f"the device has ended ({_exit_text(device)}): starting another one")
            with _short_folder() as folder:
                path = folder / "device"
                device = await self._stack.enter_async_context(self._device(path))
                try:
                    await replug(self._qmp, os.fspath(path), self._report)
                except ExecuteError as error:  # the new device has ended as well
                    self._report(f"QEMU: {error}")
                except QMPError:  # QEMU is ending
                    await asyncio.Event().wait()
                else:
                    self._report("the guest has another device: its streams end, listeners stay")

    # Requests to end

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        for number in _SIGNALS:
            self._loop.add_signal_handler(number, self._end, 128 + number)
        try:
            yield
        finally:
            for number in _SIGNALS:
                self._loop.remove_signal_handler(number)

    def _escape(self) -> None:
        self._loop.call_soon_threadsafe(self._end, 0)

    def _end(self, status: int) -> None:
        """Ask the guest to power off; the second time, or after the grace period, kill QEMU."""
        self._status = self._status or status
        if self._kill is None:
            assert self._main is not None
            self._main.cancel()
        elif self._powering_down is None:
            self._powering_down = asyncio.create_task(self._power_down(self._kill))
        else:
            self._kill()

    async def _power_down(self, kill: Callable[[], None]) -> None:
        self._report(f"powering off (repeat to end at once; limit: {self._grace:g} s)")
        with contextlib.suppress(QMPError):
            if not await self._halted():
                await self._qmp.execute("system_powerdown")
            await asyncio.sleep(self._grace)
        kill()

    async def _halted(self) -> bool:
        """Ask the guest's tools to halt it; return whether they have agreed."""
        if self._halt is None:
            return False
        try:
            async with asyncio.timeout(self._grace / 2):
                await asyncio.to_thread(self._halt)
        except (OSError, RequestFailed) as error:  # TimeoutError is an OSError
            self._report(f"VMware Tools: {error}; pressing the power button")
            return False
        return True


@contextlib.asynccontextmanager
async def _terminated(process: Process) -> AsyncIterator[None]:
    """Terminate ``process`` after the with block, if it still runs."""
    try:
        yield
    finally:
        if process.returncode is None:
            process.terminate()
            try:
                async with asyncio.timeout(_STOP_SECONDS):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()


@contextlib.asynccontextmanager
async def _start_timeout(name: str) -> AsyncIterator[None]:
    """Limit the time of the with block, which starts ``name``.

    Raises MachineFailed when the time is over.
    """
    try:
        async with asyncio.timeout(_START_SECONDS):
            yield
    except TimeoutError:
        raise MachineFailed(f"{name} did not start within {_START_SECONDS:g} s") from None


def _channel(name: str, fd: int) -> tuple[str, str]:
    return "-chardev", f"socket,id={name},fd={fd}"


def _exit_text(process: Process) -> str:
    code = process.returncode or 0
    return f"status {code}" if code >= 0 else f"killed by signal {-code}"


@contextlib.contextmanager
def _short_folder() -> Iterator[Path]:
    """Yield a temporary directory whose path leaves room for a unix socket's name."""
    with tempfile.TemporaryDirectory(prefix="vsock-vm-", dir="/tmp") as folder:
        yield Path(folder)


STDIN, STDOUT = 0, 1

#: Ctrl-], as in telnet and virsh; not sent to the guest.
ESCAPE = b"\x1d"

#: Seconds for showing the guest's last output.
_LAST_OUTPUT_SECONDS = 5.0


@contextlib.contextmanager
def console(sock: socket.socket, escape: Callable[[], object]) -> Iterator[Callable[[], None]]:
    """Connect ``sock`` with standard input and output during the with block.

    On a terminal, all keys are sent to the guest except Ctrl-], which calls ``escape`` in a thread.
    After the block, remaining output is shown and the terminal is restored.  The block gets a
    function that waits for the end of the guest's output.
    """
    terminal = os.isatty(STDIN)
    # Threads, so that a stopped terminal blocks only the console.
    output = threading.Thread(target=_copy_output, args=(sock,), daemon=True)
    keyboard = threading.Thread(
        target=_copy_input, args=(sock, escape if terminal else None), daemon=True
    )
    with _raw() if terminal else contextlib.nullcontext():
        output.start()
        keyboard.start()
        try:
            yield output.join
        finally:
            output.join(_LAST_OUTPUT_SECONDS)


@contextlib.contextmanager
def _raw() -> Iterator[None]:
    """Make the terminal pass on each key uninterpreted during the with block.

    Output is processed as usual.
    """
    before = termios.tcgetattr(STDIN)
    mode = termios.tcgetattr(STDIN)
    mode[0] &= ~(termios.BRKINT | termios.ICRNL | termios.INPCK | termios.ISTRIP | termios.IXON)
    mode[3] &= ~(termios.ECHO | termios.ICANON | termios.IEXTEN | termios.ISIG)
    termios.tcsetattr(STDIN, termios.TCSADRAIN, mode)
    try:
        yield
    finally:
        termios.tcsetattr(STDIN, termios.TCSADRAIN, before)


def _copy_output(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):  # standard output is closed
        while data := sock.recv(65_536):
            view = memoryview(data)
            while view:
                view = view[os.write(STDOUT, view) :]


def _copy_input(sock: socket.socket, escape: Callable[[], object] | None) -> None:
    with contextlib.suppress(OSError):  # the guest has ended
        while data := os.read(STDIN, 4096):
            if escape is not None:
                for _ in range(data.count(ESCAPE)):
                    escape()
                data = data.replace(ESCAPE, b"")
            sock.sendall(data)
