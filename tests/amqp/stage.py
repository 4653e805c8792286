"""The three proxies on a private fabric, and message clients."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from cli.vsock import Running
from vsockets import Attachment
from vsockets.testing import PrivateFabric

PROGRAMS = Path(__file__).with_name("programs")

#: Time for a program to send all of its messages, in seconds.
PATIENCE = 150.0


class Proxies:
    """The running proxies, each in a separate process that ends with the context."""

    def __init__(self, fabric: PrivateFabric) -> None:
        self.fabric = fabric
        self._running: list[Running] = []

    def __enter__(self) -> Proxies:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for running in self._running:
            running.close()

    def start(self, where: Attachment, *arguments: object) -> tuple[Running, str]:
        """Start ``vsock amqp …`` in a context; return the process and its listening address."""
        running = Running(("amqp", *arguments), self.fabric.environment(where))
        self._running.append(running)
        line = running.error_line()
        assert line.startswith("listening on "), line
        return running, line.removeprefix("listening on ")

    def amqp_proxy(
        self, ports: list[int], *options: object, listen: str = "tcp:127.0.0.1:0"
    ) -> tuple[Running, str]:
        nodes = [option for port in ports for option in ("--node", f"tcp:127.0.0.1:{port}")]
        return self.start(self.fabric.host, "proxy", "--listen", listen, *nodes, *options)

    def host_proxy(
        self, proxy: str, *options: object, listen: str = "vsock::any"
    ) -> tuple[Running, str]:
        return self.start(
            self.fabric.host, "host-proxy", "--listen", listen, "--proxy", proxy, *options
        )

    def guest_proxy(
        self, guest: Attachment, host: str, listen: str = "tcp:127.0.0.1:0"
    ) -> tuple[Running, int]:
        """Start a guest proxy; return its process and the TCP port for clients."""
        running, where = self.start(guest, "guest-proxy", "--listen", listen, "--host", host)
        return running, int(where.rpartition(":")[2])

    def all_three(self, ports: list[int]) -> int:
        """Start one proxy of each kind; return the TCP port for the guest's clients."""
        _, proxy = self.amqp_proxy(ports)
        _, host = self.host_proxy(proxy)
        return self.guest_proxy(self.fabric.guest(), host)[1]


class Program:
    """A running message client without knowledge of vSockets."""

    def __init__(self, name: str, *arguments: object, environment: Mapping[str, str] = os.environ):
        self._process = subprocess.Popen(
            [sys.executable, str(PROGRAMS / name), *map(str, arguments)],
            env=dict(environment),
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        self._output = self._process.stdout

    def wait_for(self, tenth: int, count: int) -> None:
        """Wait until the program has had this many tenths of its messages confirmed."""
        wanted = str(tenth * (count // 10))
        while (line := self._output.readline()) and line.strip() != wanted:
            pass
        assert line, "the program has ended"

    def result(self) -> Any:
        """Wait for the program's end; return its last line, decoded."""
        *_, last = self._output
        assert self._process.wait(PATIENCE) == 0
        return json.loads(last)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._output.close()
