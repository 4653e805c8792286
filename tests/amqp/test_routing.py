"""Rules for virtual hosts, the choice of nodes, and requests."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vsockets.amqp.routing import (
    BrokerNode,
    BrokerNodes,
    VirtualHostRule,
    admits,
    connect_request,
    refusal,
    requester,
)
from vsockets.model.locator import Inet


def test_virtual_host_rules_admit_the_named_guests() -> None:
    rules = [VirtualHostRule.parse(text) for text in ("3=/,orders", "4=*", "any=public", "5=x")]
    for cid, name in ((3, "/"), (3, "orders"), (4, "anything"), (9, "public"), (5, "x")):
        assert admits(rules, cid, name)
    for cid, name in ((3, "order"), (3, "*"), (9, "/"), (5, "/"), (3, ""), (5, "X")):
        assert not admits(rules, cid, name)
    assert admits([], 3, "anything")


@pytest.mark.parametrize("text", ["3", "3=", "=x", "3=a,,b", "x=y", "-1=a", "3=" + "é" * 128])
def test_invalid_virtual_host_rule_is_rejected(text: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        VirtualHostRule.parse(text)


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=5))
def test_all_nodes_are_chosen_best_first(states: list[tuple[int, bool]]) -> None:
    nodes = BrokerNodes(Inet("broker", port) for port in range(len(states)))
    for node, (sessions, healthy) in zip(nodes.all, states, strict=True):
        node.sessions, node.healthy = sessions, healthy
    tried: list[BrokerNode] = []
    while (best := nodes.choose(tried)) is not None:
        tried.append(best)
    assert [(not node.healthy, node.sessions) for node in tried] == sorted(
        (not healthy, sessions) for sessions, healthy in states
    )


def test_equal_nodes_are_chosen_in_rotation() -> None:
    nodes = BrokerNodes(Inet("broker", port) for port in range(3))
    assert {nodes.choose() for _ in range(3)} == set(nodes.all)


def test_request_names_authority_and_guest() -> None:
    asked = connect_request("rabbitmq:5672", 7)
    assert refusal(asked, "rabbitmq:5672") is None
    assert requester(asked) == "context 7"
    assert refusal(asked, "other:5672") == 403
    assert refusal({**asked, b":method": b"GET"}, "rabbitmq:5672") == 405
    assert requester({b"vsock-cid": b"\xc2\xb2"}) == "a client without a CID header"
