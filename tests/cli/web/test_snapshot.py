"""Snapshots for the page, made from vsockd's replies."""

from __future__ import annotations

from typing import Any

from vsockets.cli.limits import WEB_CONTEXTS_MAX, WEB_STREAMS_MAX
from vsockets.cli.observation import Owner
from vsockets.cli.web.watcher import make_snapshot

STATUS = {"pid": 1, "folder": "/x", "uptime": 1.0, "streams": 3, "listeners": 1}


def context(cid: int, streams: int = 0, sockets: int = 0) -> dict[str, Any]:
    return {
        "cid": cid,
        "name": f"guest-{cid}",
        "state": "running",
        "sockets": sockets,
        "streams": streams,
        "denials": {"restricted": 2, "guest-to-guest": 1},
        "send_rate": 1.5,
        "receive_rate": 2.0,
    }


def ends(source: int, port: int, target: int) -> list[dict[str, Any]]:
    one = {"context": source, "cid": source, "port": port, "peer": [target, 5000]}
    other = {"context": target, "cid": target, "port": 5000, "peer": [source, port]}
    facts = {"type": "stream", "state": "established", "pid": 7, "uid": 1, "inode": port}
    queues = {"receive_queue": None, "send_queue": 4, "send_rate": None, "receive_rate": None}
    return [
        {**one, **facts, **queues, "accepted": False},
        {**other, **facts, **queues, "accepted": True},
    ]


def find(pid: int, uid: int, inode: int | None) -> Owner:
    """Return a child of ``pid`` as the owner of its sockets."""
    return Owner(pid + 1, uid, f"with {inode}")


def draw(contexts: list[dict[str, Any]], sockets: list[dict[str, Any]]) -> dict[str, Any]:
    names = ("connects", "accepts", "refusals", "denials")
    rates = {row["cid"]: dict.fromkeys(names, 0.5) for row in contexts}
    return make_snapshot(
        STATUS, {"contexts": contexts}, [{"cid": 3, "ft": True}], sockets, rates, find
    )


def test_links_count_streams() -> None:
    sockets = ends(3, 1024, 2) + ends(3, 1025, 2) + ends(2, 1024, 3)
    seen = draw([context(2, 3), context(3, 3)], sockets)
    assert [(one["local"], one["peer"]) for one in seen["streams"]] == [
        ([2, 1024], [3, 5000]),
        ([3, 1024], [2, 5000]),
        ([3, 1025], [2, 5000]),
    ]
    assert seen["streams"][0]["pid"] == 8
    assert seen["streams"][0]["command"] == "with 1024"
    assert seen["links"] == [
        {"from": 2, "to": 3, "streams": 1},
        {"from": 3, "to": 2, "streams": 2},
    ]
    assert seen["rates"]["connects"] == 1.0
    assert (seen["contexts"][0]["bytes"], seen["streams"][0]["bytes"]) == (3.5, None)
    host, guest = seen["contexts"]
    assert (host["guest"], guest["guest"], guest["ft"], guest["denials"]) == (False, True, True, 3)


def test_rates_are_unknown_at_first() -> None:
    seen = make_snapshot(STATUS, {"contexts": [context(2)]}, [], [], {}, find)
    assert seen["rates"] is None and seen["contexts"][0]["rates"] is None


def test_the_hypervisor_is_shown_when_it_has_sockets() -> None:
    rows = draw([context(0), context(2)], [])["contexts"]
    assert [row["cid"] for row in rows] == [2]
    rows = draw([context(0, sockets=1), context(2)], [])["contexts"]
    assert [row["cid"] for row in rows] == [0, 2]


def test_the_busiest_are_shown_and_the_rest_counted() -> None:
    quiet = [context(cid) for cid in range(3, WEB_CONTEXTS_MAX + 50)]
    busy = context(900, streams=1)
    sockets = [row for port in range(WEB_STREAMS_MAX + 5) for row in ends(900, 2000 + port, 2)]
    sockets += ends(WEB_CONTEXTS_MAX + 49, 2000, 2)  # of a context that is not listed
    seen = draw([context(2), *quiet, busy], sockets)
    cids = [row["cid"] for row in seen["contexts"]]
    assert len(cids) == WEB_CONTEXTS_MAX and cids[0] == 2 and cids[-1] == 900
    assert seen["left_out"] == {"contexts": len(quiet) + 2 - WEB_CONTEXTS_MAX, "streams": 6}
    assert seen["links"] == [{"from": 900, "to": 2, "streams": WEB_STREAMS_MAX + 5}]
