"""``vsock events``: print life-cycle events, denials and disconnects as they happen."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import click

from ..control import TOPICS
from ..model.text import printable
from .connect import administrator
from .groups import command
from .options import argument
from .output import notice


@command("events")
@argument(
    "topics",
    nargs=-1,
    type=click.Choice(TOPICS),
    metavar="[context] [denial] [disconnect] [vsockd]",
    help="Topics to print. Default: all.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, one object per line.")
def events(topics: tuple[str, ...], as_json: bool) -> None:
    """Print events of guests, streams and vsockd until Ctrl-C."""
    with administrator() as control, control.events(*topics) as stream:
        if sys.stderr.isatty():
            notice(f"following events: {', '.join(topics or TOPICS)} (Ctrl-C ends)")
        for event in stream:
            print(json.dumps(event) if as_json else printable(_describe(event)), flush=True)


def _describe(event: dict[str, Any]) -> str:
    clock = time.strftime("%H:%M:%S", time.localtime(event["time"]))
    lost = f" ({event['missed']} events were lost before)" if event["missed"] else ""
    if event["topic"] == "context":
        dropped = f", {event['dropped']} connections dropped" if event.get("dropped") else ""
        what = f"context {event['cid']} {event['name']}: {event['change']}{dropped}"
    elif event["topic"] == "disconnect":
        what = event["message"]
    elif event["topic"] == "vsockd":
        what = f"vsockd: {event['change']} (now pid {event['pid']})"
    else:
        what = f"context {event['context']}: {event['message']}"
    return f"{clock} {what}{lost}"
