"""``vsock device``: the devices of virtual machines, a process for each."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..state_folder import short_path
from .context import read_cid
from .output import notice
from .reach import administrator

app = typer.Typer(help="Devices of virtual machines.", rich_markup_mode=None)


@app.command("vmci")
def vmci(
    path: Annotated[
        Path, typer.Option("--socket", metavar="PATH", help="Where the virtual machine connects.")
    ],
    cid: Annotated[
        int | None,
        typer.Option(
            "--cid",
            parser=read_cid,
            metavar="CID",
            help="Its context; by default one that is free.",
        ),
    ] = None,
    legacy: Annotated[
        bool,
        typer.Option("--legacy", help="As guests before Linux 5.18 know it; slow."),
    ] = False,
    older: Annotated[
        bool,
        typer.Option("--protocol-1", help="Speak the first version of the stream protocol."),
    ] = False,
    sandbox: Annotated[
        bool, typer.Option(help="Give up every privilege and system call not needed.")
    ] = True,
    verbose: Annotated[bool, typer.Option("--verbose", help="Say what happens.")] = False,
) -> None:
    """Serve a virtual machine's VMCI device over vfio-user (docs/vmci.md).

    For QEMU from 10.1 on: -device '{"driver":"vfio-user-pci","socket":{"type":"unix",
    "path":PATH},"x-no-posted-writes":true}', with memory that is shared.
    """
    # Here, because no other command needs them.
    from ..devices.attachment import Attachment
    from ..devices.loop import DeviceLoop
    from ..devices.sandbox import enter_sandbox
    from ..devices.vfio_user import Server
    from ..devices.vmci.machine import VmciMachine

    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format="vsock device: %(message)s"
    )
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    with administrator(start=True) as control:
        if cid is None or all(row["cid"] != cid for row in control.contexts()):
            cid = control.add_context(cid, lease=True)["cid"]
        link = control.attach_device(cid)
        owner = next(row["owner"] for row in control.contexts() if row["cid"] == cid)
        events = control.events("context")
        path.unlink(missing_ok=True)
        with short_path(path) as spelled:
            listener.bind(spelled)
        listener.listen(1)
        os.chmod(path, 0o600)
        loop = DeviceLoop()
        attachment = Attachment(loop, link, cid)
        machine = VmciMachine(loop, attachment, cid, events, legacy=legacy, older=older)
        Server(loop, listener, machine.device, machine.settle)
        if sandbox:
            enter_sandbox(owner)
        notice(f"context {cid}: the VMCI device waits at {path}")
        with loop.signalled({signal.SIGTERM: loop.stop, signal.SIGINT: loop.stop}):
            print(cid, flush=True)
            loop.run()
    sys.stdout.flush()
