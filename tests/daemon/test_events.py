"""Events about guests, as programs receive them: one after another, or with asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from vsockets.testing import PrivateFabric

from .guest_changes import MACHINE, Machine, machine, stream
from .raw_client import PROMPT


@pytest.fixture
def guest(shared_fabric: PrivateFabric) -> Iterator[Machine]:
    with machine(shared_fabric) as guest:
        yield guest


def test_events_as_they_happen(shared_fabric: PrivateFabric, guest: Machine) -> None:
    with (
        shared_fabric.control.events("context") as events,
        stream(shared_fabric.host, guest.context),
    ):
        for how in ("suspend", "migrate", "ft on", "power-off"):
            guest.drop(how)
            guest.end_of(how)
        guest.drop("end of the lease")
        seen = [events.wait(PROMPT) for _ in range(9)]
    assert {event["missed"] for event in seen} == {0}
    assert {event["cid"] for event in seen} == {MACHINE}
    assert [
        (event["change"], event["state"], event["ft"], event.get("dropped")) for event in seen
    ] == [
        ("suspend", "suspended", False, 1),
        ("resume", "running", False, 0),
        ("migrate", "running", False, 0),
        ("ft-on", "running", True, 0),
        ("ft-off", "running", False, 0),
        ("power-off", "off", False, 0),
        ("power-on", "running", False, 0),
        ("power-off", "off", False, 0),
        ("removed", "off", False, None),
    ]


def test_events_with_asyncio(shared_fabric: PrivateFabric, guest: Machine) -> None:
    async def follow() -> list[str]:
        with shared_fabric.control.events("context") as events:
            guest.drop("suspend")
            guest.end_of("suspend")
            seen = []
            async for event in events:
                seen.append(event["change"])
                if len(seen) == 1:
                    guest.drop("migrate")
                if len(seen) == 3:
                    break
            return seen

    assert asyncio.run(asyncio.wait_for(follow(), PROMPT)) == ["suspend", "resume", "migrate"]


def test_a_slow_subscriber_gets_the_number_of_missed_events(
    shared_fabric: PrivateFabric, guest: Machine
) -> None:
    control = shared_fabric.control
    many = 2000
    with control.events("context") as idle, control.events("context") as attentive:
        for _ in range(many):  # more than EVENTS_UNREAD_MAX_BYTES holds
            control.migrate(MACHINE)
            assert attentive.wait(PROMPT)["missed"] == 0
        heard = 0
        while True:
            try:
                assert idle.wait(0.01)["missed"] == 0
            except TimeoutError:
                break
            heard += 1
        assert 0 < heard < many
        # The next event that fits tells how many did not.
        control.suspend(MACHINE)
        event = idle.wait(PROMPT)
        assert (event["change"], event["missed"]) == ("suspend", many - heard)
        assert attentive.wait(PROMPT)["missed"] == 0
        control.resume(MACHINE)
        assert idle.wait(PROMPT)["missed"] == 0
