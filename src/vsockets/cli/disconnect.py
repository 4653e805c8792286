"""``vsock disconnect``: close one stream."""

from __future__ import annotations

from ..model.address import parse_cid, parse_port
from .connect import administrator
from .context import report_left
from .groups import command
from .options import argument, parser_of


@parser_of
def _read_address(text: str) -> tuple[int, int]:
    cid, colon, port = text.rpartition(":")
    if not colon:
        raise ValueError(f"{text!r}: expected CID:PORT, as vsock ls shows it")
    return parse_cid(cid), parse_port(port)


@command("disconnect")
@argument("local", type=_read_address, metavar="CID:PORT")
@argument("peer", type=_read_address, metavar="CID:PORT")
def disconnect(local: tuple[int, int], peer: tuple[int, int]) -> None:
    """Close the stream between two addresses.  Their order does not matter.

    Both ends see what they see when a guest is suspended; vsockd logs the user who asked.
    """
    with administrator() as control:
        report_left(control.disconnect(local, peer))
