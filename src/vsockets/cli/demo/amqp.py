"""``vsock demo amqp``: two guests use RabbitMQ through the three proxies (figure 1-1)."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...attachment import Attachment
from ...testing.rabbitmq import NoRabbitMQ, PrivateRabbitMQ, programs
from ..amqp import require
from ..errors import CliError
from .command import Step, progress
from .stage import VSOCK, signals_deferred

if TYPE_CHECKING:
    from .stage import Program, Stage

_CLIENT = Path(__file__).with_name("amqp_client.py")

#: Messages that each guest sends to the other, and those after which the host proxy is killed.
MESSAGES, KILLED_AFTER = 5000, 2000

#: The virtual host that only the first guest may use.
PRIVATE = "private"


def play(stage: Stage, show_progress: bool) -> tuple[list[Step], dict[str, Any]]:
    """Run the demo.

    Raises CliError if a program or library that the demo needs is missing.
    """
    require("h2", "pika")
    try:
        programs()
    except NoRabbitMQ as error:
        raise CliError(str(error)) from None
    cluster = PrivateRabbitMQ(2, ("/", PRIVATE))
    with progress("start RabbitMQ: two nodes", 1, show_progress):
        cluster.__enter__()
    try:
        return _Demo(stage, cluster).play(show_progress)
    finally:
        with signals_deferred():
            cluster.__exit__(None, None, None)


class _Demo:
    def __init__(self, stage: Stage, cluster: PrivateRabbitMQ) -> None:
        self._stage = stage
        self._cluster = cluster
        self._guests = stage.fabric.guest(), stage.fabric.guest()
        nodes = [f"--node=tcp:127.0.0.1:{port}" for port in cluster.ports]
        self._proxy = self._vsock(stage.fabric.host, "proxy", "--listen=tcp:127.0.0.1:0", *nodes)
        self._proxy_at = self._proxy.read_address()
        self._host, self._host_at = self._host_proxy("vsock::any")
        self._ports = [self._guest_proxy(guest) for guest in self._guests]

    def play(self, show_progress: bool) -> tuple[list[Step], dict[str, Any]]:
        cids = [guest.cid for guest in self._guests]
        clients = [
            self._client("exchange", self._ports[number], f"to-{cids[1 - number]}",
                         f"to-{cids[number]}", MESSAGES)
            for number in (0, 1)
        ]  # fmt: skip
        results = self._exchange(clients, show_progress)
        steps = [
            self._judge_messages(result, cids[number], cids[1 - number])
            for number, result in enumerate(results)
        ]
        steps.append(self._judge_interruption(results))
        steps.append(self._judge_identity(cids))
        for number, allowed in ((0, True), (1, False)):
            answer = self._client("enter", self._ports[number], PRIVATE).read()
            steps.append(self._judge_virtual_host(answer, cids[number], allowed))
        seconds = max(result["seconds"] for result in results)
        rate = {"messages": 2 * MESSAGES, "seconds": round(seconds, 2)}
        return steps, {**rate, "messages_per_s": round(2 * MESSAGES / seconds)}

    def _exchange(self, clients: Sequence[Program], show_progress: bool) -> list[dict[str, Any]]:
        """Let both guests send and receive; kill and restart the host proxy in between."""
        counts, killed = [0, 0], False
        results: list[dict[str, Any]] = [{}, {}]
        with progress("messages between guests", 2 * MESSAGES, show_progress) as advance:
            while not all(results):
                for number, client in enumerate(clients):
                    if results[number]:
                        continue
                    said = client.read()
                    if "received" in said:
                        counts[number] = said["received"]
                    else:
                        results[number] = said
                    advance(sum(counts))
                if not killed and min(counts) >= KILLED_AFTER:
                    killed = True
                    self._host.end()
                    self._host, _ = self._host_proxy(self._host_at.replace("vsock:2:", "vsock::"))
        return results

    def _judge_messages(self, result: dict[str, Any], cid: int, other: int) -> Step:
        ok = result["confirmed"] == result["intact"] == MESSAGES
        text = f"{result['confirmed']} confirmed, {result['intact']} came back intact"
        return Step("messages", f"guest {cid} and guest {other}", ok, text)

    def _judge_interruption(self, results: Sequence[dict[str, Any]]) -> Step:
        codes = [code for result in results for code in result["closed"]]
        again = sum(result["again"] for result in results)
        ok = set(codes) == {320}
        text = f"clients were closed with {', '.join(map(str, codes))}; {again} were sent again"
        return Step("host proxy killed", "both guests", ok, text)

    def _judge_identity(self, cids: Sequence[int]) -> Step:
        with_guests = [self._client("stay", port) for port in self._ports]
        for client in with_guests:
            client.read()
        listed = self._cluster.control(0, "list_connections", "client_properties")
        ok = all(f'"vsock_cid",{cid}' in listed.replace(" ", "") for cid in cids)
        named = ", ".join(map(str, cids))
        return Step("identity", "RabbitMQ", ok, f"its connections have vsock_cid {named}")

    def _judge_virtual_host(self, answer: dict[str, Any], cid: int, allowed: bool) -> Step:
        code = answer["closed"]
        ok = code == (0 if allowed else 530)
        text = f"{PRIVATE!r}: " + (f"refused with {code}" if code else "accepted")
        return Step("virtual host", f"guest {cid}", ok, text)

    def _host_proxy(self, listen: str) -> tuple[Program, str]:
        rules = [f"--allow-vhost={guest.cid}=/" for guest in self._guests]
        rules.append(f"--allow-vhost={self._guests[0].cid}={PRIVATE}")
        host = self._stage.fabric.host
        options = (f"--listen={listen}", f"--proxy={self._proxy_at}", *rules)
        program = self._vsock(host, "host-proxy", *options)
        return program, program.read_address()

    def _guest_proxy(self, guest: Attachment) -> int:
        options = ("--listen=tcp:127.0.0.1:0", f"--host={self._host_at}")
        address = self._vsock(guest, "guest-proxy", *options).read_address()
        return int(address.rpartition(":")[2])

    def _vsock(self, context: Attachment, *arguments: str) -> Program:
        environment = self._stage.fabric.environment(context)
        return self._stage.run(arguments[0], [*VSOCK, "amqp", *arguments], environment)

    def _client(self, role: str, *arguments: object) -> Program:
        """Start a client that connects to 127.0.0.1 by AMQP and knows nothing of vSockets."""
        command = [sys.executable, "-P", os.fspath(_CLIENT), role, *map(str, arguments)]
        return self._stage.run(f"client: {role}", command, dict(os.environ))
