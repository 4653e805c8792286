"""A virtual machine under emulation by QEMU, with a vSockets device."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import socket
import subprocess
import sys
import tarfile
import textwrap
import threading
import time
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any

import vsockets
from vsockets import Attachment
from vsockets.testing import PrivateFabric, wait_until
from vsockets.vm import qemu_args
from vsockets.vm.guest_image import COMMAND_LINE, KernelImage

from . import downloads

#: Timeouts in seconds for booting, and for a guest's reply.
BOOT = 200.0
PATIENCE = 60.0


class GuestError(Exception):
    """A program in the guest failed; ``errno`` is that of an OSError."""

    def __init__(self, kind: str, errno: int | None, text: str) -> None:
        super().__init__(text)
        self.kind = kind
        self.errno = errno


class MonitorError(Exception):
    """QEMU's monitor refused a command."""


class Job:
    """A program that runs in the guest."""

    def __init__(self, agent: Agent, number: int) -> None:
        self._agent = agent
        self._number = number

    def result(self, timeout: float = PATIENCE) -> Any:
        """Return the program's ``result``.

        Raises GuestError and TimeoutError.
        """
        ok, result = self._agent._wait_for(self._number, timeout)
        if not ok:
            raise GuestError(*result)
        return result


class Agent:
    """A process in a guest that runs Python code; :mod:`.agent` is its program."""

    def __init__(self) -> None:
        self._numbers = count(1)
        self._answers: dict[int, tuple[bool, Any]] = {}
        self._arrived = threading.Condition()

    def serve(self, agent: socket.socket) -> None:
        """Use the agent behind ``agent`` from now on."""
        self._agent = agent
        threading.Thread(target=self._listen, args=(agent,), daemon=True).start()

    def _listen(self, agent: socket.socket) -> None:
        received = b""
        with contextlib.suppress(ConnectionResetError):  # the guest ended with unread data
            while data := agent.recv(65_536):
                *lines, received = (received + data).split(b"\n")
                for line in lines:
                    if line.startswith(b"@"):
                        number, ok, result = ast.literal_eval(line[1:].decode())
                        with self._arrived:
                            self._answers[number] = ok, result
                            self._arrived.notify_all()

    def _wait_for(self, number: int, timeout: float) -> tuple[bool, Any]:
        deadline = time.monotonic() + timeout
        with self._arrived:
            while number not in self._answers:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TimeoutError(f"the guest is silent{self._state()}")
                self._check()
                self._arrived.wait(min(left, 1.0))
            return self._answers.pop(number)

    def _state(self) -> str:
        """Return what an error adds about a silent guest."""
        return ""

    def _check(self) -> None:
        """Raise GuestError if the guest has ended."""

    def wait_for_boot(self) -> None:
        """Wait for the agent's first message, also after a reboot."""
        self._wait_for(0, BOOT)

    def nudge(self) -> None:
        """Send an empty line, which the agent ignores: a guest wakes up from s2idle by it."""
        self._agent.sendall(b"\n")

    def start(self, source: str, **values: Any) -> Job:
        """Start Python code in the guest; ``values`` become its variables."""
        names = "".join(f"{name} = {value!r}\n" for name, value in values.items())
        number = next(self._numbers)
        message = repr((number, names + textwrap.dedent(source))) + "\n"
        self._agent.sendall(message.encode())
        return Job(self, number)

    def run(self, source: str, timeout: float = PATIENCE, **values: Any) -> Any:
        """Run Python code in the guest and return its ``result``."""
        return self.start(source, **values).result(timeout)


class Machine(Agent):
    """A running guest, as a context manager that boots it and powers it off."""

    def __init__(
        self,
        fabric: PrivateFabric,
        kernel: KernelImage,
        initrd: Path,
        folder: Path,
        *device_options: str,
        memory: int = 512,
        cid: int | None = None,
        device: str = "vmci",
        arguments: Sequence[str] = (),
        packed: bool = False,
    ) -> None:
        """``arguments`` are additional ones for QEMU."""
        super().__init__()
        self.fabric = fabric
        self.packed = packed  #: for the next boot: virtio rings are packed
        self._kernel = kernel
        self._initrd = initrd
        self._folder = folder
        self._options = device_options
        self._memory = memory
        self._arguments = arguments
        self.cid = cid or 0
        self.kind = device
        self._path = folder / device
        self.device: subprocess.Popen[str] | None = None
        self.qemu: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Machine:
        try:
            self.start_device()
            self.boot()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.kill()

    @property
    def boots(self) -> tuple[Path, Path]:
        """The files of the kernel and of the initrd."""
        return self._kernel.image, self._initrd

    @property
    def kernel(self) -> str:
        """The name of the kernel."""
        return self._kernel.name

    @property
    def console(self) -> str:
        """The console output of the guest."""
        path = self._folder / "console"
        return path.read_text(errors="replace") if path.exists() else ""

    @property
    def device_log(self) -> str:
        """The log of the device."""
        return (self._folder / "device.log").read_text()

    @property
    def host(self) -> Attachment:
        """The context of the host's programs."""
        return self.fabric.host

    def start_device(self) -> None:
        """Start ``vsock device``."""
        command = [sys.executable, "-m", "vsockets.cli", "--dir", str(self.fabric.folder)]
        command += ["device", self.kind, "--socket", str(self._path), "--verbose"]
        command += self._options
        if self.cid:
            command += ["--cid", str(self.cid)]
        with open(self._folder / "device.log", "w") as log:
            self.device = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        assert self.device.stdout is not None
        line = self.device.stdout.readline()
        assert line.strip().isdecimal(), self.device_log
        self.cid = int(line)

    def boot(self) -> None:
        """Start QEMU and wait for the guest."""
        machine = qemu_args.MachineOptions(
            self.kind,
            self._memory,
            kernel=str(self._kernel.image),
            initrd=str(self._initrd),
            append=COMMAND_LINE,
        )
        command = [
            downloads.qemu(),
            *qemu_args.machine_arguments(machine, str(self._path)),
            *("-serial", f"file:{self._folder / 'console'}"),
            *self._control_channels(),
            *self._arguments,
        ]
        with open(self._folder / "qemu.log", "wb") as log:
            self.qemu = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self._connect_agent()
        self._wait_for(0, BOOT)

    def _control_channels(self) -> list[str]:
        """Return QEMU's arguments for the agent and the monitor."""
        return [
            *("-serial", f"unix:{self._folder / 'agent'},server=on,wait=off"),
            *("-qmp", f"unix:{self._folder / 'qmp'},server=on,wait=off"),
            *("-global", "virtio-device.packed=on") * self.packed,
        ]

    def _connect_agent(self) -> None:
        agent = socket.socket(socket.AF_UNIX)

        def connects() -> bool:
            assert self.qemu is not None
            assert self.qemu.poll() is None, (self._folder / "qemu.log").read_text()
            with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
                agent.connect(str(self._folder / "agent"))
                return True
            return False

        wait_until(connects, "QEMU to start", PATIENCE)
        self.serve(agent)

    def _state(self) -> str:
        return f"; its console: {self.console[-2000:]}\nthe device: {self.device_log[-2000:]}"

    def _check(self) -> None:
        if self.qemu is not None and self.qemu.poll() is not None:
            log = (self._folder / "qemu.log").read_text()
            raise GuestError("QEMU", None, f"status {self.qemu.returncode}: {log}")

    # For tests

    def put(self, files: Mapping[str, bytes]) -> None:
        """Send programs and other files to the guest through its device, by path."""
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for path, data in files.items():
                member = tarfile.TarInfo(path)
                member.size, member.mode = len(data), 0o755
                archive.addfile(member, io.BytesIO(data))
        address = (vsockets.VMADDR_CID_HOST, vsockets.VMADDR_PORT_ANY)
        with vsockets.create_server(address, context=self.host) as server:
            server.settimeout(PATIENCE)
            job = self.start(
                """
                import tarfile
                with connect(port).makefile("rb") as file:
                    with tarfile.open(fileobj=file, mode="r|") as archive: archive.extractall("/")
                    file.read()  # what follows the archive's end: its sender waits for it
                """,
                port=server.getsockname()[1],
            )
            with server.accept()[0] as sock:
                sock.sendall(buffer.getvalue())
            job.result()

    def monitor(self, command: str, **arguments: Any) -> Any:
        """Execute a command of QEMU's monitor (QMP) and return its result."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(PATIENCE)
            sock.connect(str(self._folder / "qmp"))
            file = sock.makefile("rw")
            file.readline()
            for request in (
                {"execute": "qmp_capabilities"},
                {"execute": command, "arguments": arguments},
            ):
                file.write(json.dumps(request) + "\n")
                file.flush()
                while "return" not in (answer := json.loads(file.readline())):
                    if "error" in answer:
                        raise MonitorError(answer["error"]["desc"])
            return answer["return"]

    def kill_device(self) -> None:
        """Kill the device, as if it had crashed."""
        assert self.device is not None
        self.device.kill()
        self.device.wait()
        assert self.device.stdout is not None
        self.device.stdout.close()
        wait_until(lambda: not self._path.exists(), "removal of the device's socket", PATIENCE)

    def replug(self) -> None:
        """Unplug the virtio device from the running machine, and plug one in."""
        self.monitor("device_del", id="dev")

        def is_out() -> bool:
            devices = self.monitor("qom-list", path="/machine/peripheral")
            return all(device["name"] != "dev" for device in devices)

        wait_until(is_out, "the guest to release the device", PATIENCE)

        def has_gone() -> bool:
            with contextlib.suppress(MonitorError):  # busy until the device is removed
                self.monitor("chardev-remove", id="vsock")
                return True
            return False

        wait_until(has_gone, "QEMU to release the socket", PATIENCE)
        address = {"type": "unix", "data": {"path": str(self._path)}}
        socket = {"type": "socket", "data": {"addr": address, "server": False}}
        self.monitor("chardev-add", id="vsock", backend=socket)
        self.monitor("device_add", **qemu_args.VIRTIO_DEVICE)

    def kill_qemu(self) -> None:
        """Kill QEMU, as if the power were cut."""
        if self.qemu is not None:
            self.qemu.kill()
            self.qemu.wait()
            self.qemu = None
            self._agent.close()

    def kill(self) -> None:
        """Kill QEMU and the device."""
        self.kill_qemu()
        if self.device is not None:
            self.device.terminate()
            try:
                self.device.wait(10)
            finally:
                self.device.kill()
                assert self.device.stdout is not None
                self.device.stdout.close()
                self.device = None
