"""``vsock disconnect``: the end of one stream."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..model.address import parse_cid, parse_port
from .connect import administrator
from .context import report_left
from .options import parser_of


@parser_of
def _read_address(text: str) -> tuple[int, int]:
    cid, colon, port = text.rpartition(":")
    if not colon:
        raise ValueError(f"{text!r}: expected CID:PORT, as vsock ls shows it")
    return parse_cid(cid), parse_port(port)


def disconnect(
    local: Annotated[Any, typer.Argument(parser=_read_address, metavar="CID:PORT")],
    peer: Annotated[Any, typer.Argument(parser=_read_address, metavar="CID:PORT")],
) -> None:
    """End the stream between two addresses, in either order, whoever holds it.

    Its two ends see what they see when a guest is suspended; vsockd logs who asked.
    """
    with administrator() as control:
        report_left(control.disconnect(local, peer))
