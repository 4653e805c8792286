"""``vsock events``: what happens to guests, and what they are denied, as it happens."""

from __future__ import annotations

import json
import time
from enum import StrEnum
from typing import Annotated, Any

import typer

from ..model.text import printable
from .connect import administrator


class Topic(StrEnum):
    """What there are events of."""

    CONTEXT = "context"
    DENIAL = "denial"
    DISCONNECT = "disconnect"


def events(
    topics: Annotated[
        list[Topic] | None,
        typer.Argument(metavar="[context] [denial] [disconnect]", help="By default all."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="For programs: a JSON object a line.")
    ] = False,
) -> None:
    """Follow what happens to guests, and what programs are denied, until Ctrl-C."""
    with administrator() as control, control.events(*(topics or ())) as stream:
        for event in stream:
            print(json.dumps(event) if as_json else printable(_in_words(event)), flush=True)


def _in_words(event: dict[str, Any]) -> str:
    clock = time.strftime("%H:%M:%S", time.localtime(event["time"]))
    lost = f" ({event['missed']} events were lost before)" if event["missed"] else ""
    if event["topic"] == Topic.CONTEXT:
        dropped = f", {event['dropped']} connections dropped" if event.get("dropped") else ""
        what = f"context {event['cid']} {event['name']}: {event['change']}{dropped}"
    elif event["topic"] == Topic.DISCONNECT:
        what = event["message"]
    else:
        what = f"context {event['context']}: {event['message']}"
    return f"{clock} {what}{lost}"
