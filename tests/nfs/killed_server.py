"""A server that is killed in the first call that changes a name, before or after the change.

Arguments: EXPORT STATE PORT FUNCTION before|after; FUNCTION is one of os.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Any

from vsockets.model.locator import Inet
from vsockets.nfs import server
from vsockets.nfs.exports import Export
from vsockets.nfs.handles import HandleStore
from vsockets.nfs.service import NfsService

export, state, port, function, stage = sys.argv[1:]
change = getattr(os, function)


def killed(*arguments: Any, **options: Any) -> None:
    if stage == "after":
        change(*arguments, **options)
    os.kill(os.getpid(), signal.SIGKILL)


service = NfsService([Export.parse(export)], HandleStore(Path(state)))
setattr(os, function, killed)
locators = [Inet("127.0.0.1", int(port), datagram=True)]
asyncio.run(server.serve(service, locators, None, lambda _: print("ready", flush=True)))
