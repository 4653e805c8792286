"""Reports of hostile guests, which are processes here; test_run sends them from a machine."""

from __future__ import annotations

import asyncio
import socket as stdlib

import pytest

import vsockets
from vsockets.testing import PrivateFabric
from vsockets.vm.limits import VM_NOTIFY_SHOWN_MAX_CHARACTERS
from vsockets.vm.readiness import ReadinessReports


@pytest.mark.parametrize("kind", [stdlib.SOCK_SEQPACKET, stdlib.SOCK_DGRAM])
def test_hostile_reports(vsock_fabric: PrivateFabric, kind: int) -> None:
    """Reports of another guest are ignored, and long ones are shortened."""
    guest, other = vsock_fabric.guest(), vsock_fabric.guest()

    async def receive() -> list[str]:
        lines: list[str] = []
        ready = asyncio.Event()
        reports = ReadinessReports(vsock_fabric.host, guest.cid, lines.append, ready.set)
        with reports:
            for context, text in (
                (other, b"STATUS=other\nREADY=1"),
                (guest, b"STATUS=" + b"\x1b" * 5000 + b"\nREADY=1"),
            ):
                with vsockets.socket(type=kind, context=context) as sock:
                    sock.bind((vsockets.VMADDR_CID_ANY, vsockets.VMADDR_PORT_ANY))
                    sock.connect((vsockets.VMADDR_CID_HOST, reports.port))
                    sock.sendall(text)
            await asyncio.wait_for(ready.wait(), 20)
        return lines

    shown = "\\x1b" * VM_NOTIFY_SHOWN_MAX_CHARACTERS
    assert asyncio.run(receive()) == [f"guest: {shown}"]


def test_a_waiting_job_is_shown_once(vsock_fabric: PrivateFabric) -> None:
    """systemd reports the time that it has waited, twice a second."""
    guest = vsock_fabric.guest()

    async def receive() -> list[str]:
        lines: list[str] = []
        ready = asyncio.Event()
        with ReadinessReports(vsock_fabric.host, guest.cid, lines.append, ready.set) as reports:
            texts = [f"STATUS=({n} of 2) Job {n % 2} waits ({n}s / no limit)" for n in range(6)]
            for text in (*texts, "READY=1"):
                with vsockets.socket(type=stdlib.SOCK_SEQPACKET, context=guest) as sock:
                    sock.connect((vsockets.VMADDR_CID_HOST, reports.port))
                    sock.sendall(text.encode())
                await asyncio.sleep(0)
            await asyncio.wait_for(ready.wait(), 20)
        return lines

    shown = {line.partition("Job ")[2].partition(" (")[0] for line in asyncio.run(receive())}
    assert shown == {"0 waits", "1 waits"}
    assert len(asyncio.run(receive())) == 2
