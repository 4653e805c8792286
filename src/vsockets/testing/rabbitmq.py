"""A private RabbitMQ cluster: real nodes on free ports of this machine, in a temporary directory.

The cluster uses the machine's installation of RabbitMQ, not a running instance, and has its own
name server (epmd), cookie, configuration and data.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
from functools import partial
from pathlib import Path

from .waiting import wait_until

#: Debian's directory of the scripts that run as any user.
_DEBIAN = "/usr/lib/rabbitmq/bin"

#: Timeout in seconds for the nodes to start; one takes five seconds on two busy processors.
_START = 120.0

#: Timeout of a rabbitmqctl command in seconds.
_COMMAND = 60.0

USER = PASSWORD = "guest"


class NoRabbitMQ(Exception):
    """RabbitMQ is not installed; the message says what to install."""


def programs() -> Path:
    """Return the directory of RabbitMQ's scripts.

    Raises NoRabbitMQ if they are not installed.
    """
    # Not that of Debian's /usr/sbin/rabbitmq-server, which runs only as the user rabbitmq.
    path = os.pathsep.join((os.environ.get("PATH", ""), _DEBIAN))
    found = shutil.which("rabbitmq-env", path=path)
    if found is None or shutil.which("erl") is None or shutil.which("epmd") is None:
        raise NoRabbitMQ("RabbitMQ is not installed: apt install rabbitmq-server")
    return Path(found).parent


class PrivateRabbitMQ:
    """A private cluster, as a context manager.

    The user ``guest`` has access to its ``virtual_hosts``.  Classic queues whose names begin with
    ``mirrored`` are mirrored to all nodes if RabbitMQ supports that (before 4.0).
    """

    def __init__(self, nodes: int = 1, virtual_hosts: tuple[str, ...] = ("/",)) -> None:
        self.ports = _free_ports(nodes)  #: the AMQP port of each node, at 127.0.0.1
        self._virtual_hosts = virtual_hosts
        self._distribution = _free_ports(nodes + 1)
        self._names = [f"rabbit{number}@localhost" for number in range(nodes)]
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._epmd: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> PrivateRabbitMQ:
        """Start the cluster.

        Raises NoRabbitMQ if RabbitMQ is not installed.
        """
        self._programs = programs()
        self.folder = Path(tempfile.mkdtemp(prefix="rabbitmq-"))
        try:
            self._prepare()
            for number in range(len(self.ports)):
                self.start(number)
            self.wait()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def start(self, number: int) -> None:
        """Start a node; :meth:`wait` returns when it serves."""
        folder = self.folder / str(number)
        with open(folder / "log", "ab") as log:
            self._processes[number] = subprocess.Popen(
                [self._programs / "rabbitmq-server"],
                env={
                    **self._environment(),
                    "RUNNING_UNDER_SYSTEMD": "true",  # has the script replace itself with the node
                    "RABBITMQ_NODENAME": self._names[number],
                    "RABBITMQ_DIST_PORT": str(self._distribution[number]),
                    "RABBITMQ_MNESIA_BASE": str(folder),
                    "RABBITMQ_LOG_BASE": str(folder),
                    "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq.conf"),
                    "RABBITMQ_ADVANCED_CONFIG_FILE": str(folder / "none"),
                    "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "plugins"),
                    "RABBITMQ_PID_FILE": str(folder / "pid"),
                },
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C at the terminal is for the tests only
            )

    def kill(self, number: int) -> None:
        """Kill a node, as a power cut would."""
        process = self._processes.pop(number, None)
        if process is not None:
            process.kill()
            process.wait()

    def wait(self) -> None:
        """Return when every started node serves."""
        for number in self._processes:
            wait_until(partial(self._serves, number), "RabbitMQ to serve", _START)

    def log(self, number: int) -> str:
        """Return the log of a node."""
        return (self.folder / str(number) / "log").read_text(errors="replace")

    def control(self, number: int, *command: str) -> str:
        """Run ``rabbitmqctl`` on a node and return its output."""
        done = subprocess.run(
            [self._programs / "rabbitmqctl", "--quiet", "--node", self._names[number], *command],
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_COMMAND,
            check=True,
        )
        return done.stdout

    def _serves(self, number: int) -> bool:
        if self._processes[number].poll() is not None:
            raise RuntimeError(f"RabbitMQ has ended:\n{self.log(number)[-2000:]}")
        try:
            with socket.create_connection(("127.0.0.1", self.ports[number]), timeout=5) as sock:
                sock.sendall(b"AMQP\x00\x00\x09\x01")
                return bool(sock.recv(1))
        except OSError:
            return False

    def _environment(self) -> dict[str, str]:
        kept = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR") if name in os.environ}
        return {
            **kept,
            "HOME": str(self.folder),  # the directory of the cookie
            "ERL_EPMD_PORT": str(self._distribution[-1]),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_CONF_ENV_FILE": os.devnull,
        }

    def _prepare(self) -> None:
        cookie = self.folder / ".erlang.cookie"
        cookie.write_text(secrets.token_hex(16))
        cookie.chmod(0o600)
        (self.folder / "definitions.json").write_text(json.dumps(self._definitions()))
        for number, port in enumerate(self.ports):
            folder = self.folder / str(number)
            folder.mkdir()
            (folder / "plugins").write_text("[].\n")
            (folder / "rabbitmq.conf").write_text(
                f"listeners.tcp.1 = 127.0.0.1:{port}\n"
                "log.console = true\n"
                "log.file = false\n"
                "disk_free_limit.absolute = 1MB\n"
                f"load_definitions = {self.folder / 'definitions.json'}\n"
                "cluster_formation.peer_discovery_backend = classic_config\n"
                + "".join(
                    f"cluster_formation.classic_config.nodes.{place + 1} = {name}\n"
                    for place, name in enumerate(self._names)
                )
            )
        epmd = ["epmd", "-address", "127.0.0.1", "-port", str(self._distribution[-1])]
        self._epmd = subprocess.Popen(epmd, stdin=subprocess.DEVNULL, start_new_session=True)

    def _definitions(self) -> dict[str, object]:
        return {
            "vhosts": [{"name": name} for name in self._virtual_hosts],
            "users": [{"name": USER, "password": PASSWORD, "tags": "administrator"}],
            "permissions": [
                {"user": USER, "vhost": name, "configure": ".*", "write": ".*", "read": ".*"}
                for name in self._virtual_hosts
            ],
            "policies": [
                {
                    "vhost": name,
                    "name": "mirrored",
                    "pattern": "^mirrored",
                    "apply-to": "queues",
                    "definition": {"ha-mode": "all", "ha-sync-mode": "automatic"},
                }
                for name in self._virtual_hosts
            ],
        }

    def _close(self) -> None:
        for number in list(self._processes):
            self.kill(number)
        if self._epmd is not None:
            self._epmd.kill()
            self._epmd.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def _free_ports(count: int) -> list[int]:
    """Return ports of 127.0.0.1 that are free now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [sock.getsockname()[1] for sock in sockets]
