"""Detecting the ends of streams at a bounded cost: one group at a time."""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import socket
from collections.abc import Iterator

import pytest

from vsockets.daemon import stream_liveness as module
from vsockets.daemon.handover import Reader, Writer
from vsockets.daemon.limits import DAEMON_STREAMS_PER_GROUP
from vsockets.daemon.stream_liveness import Group, StreamLiveness
from vsockets.fabric import Fabric

NUMBER = 3 * DAEMON_STREAMS_PER_GROUP + 5


class Looks:
    """A count of the checks of groups."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.number = 0
        alive = Group.alive

        def counted(group: Group) -> dict[int, int]:
            self.number += 1
            return alive(group)

        monkeypatch.setattr(Group, "alive", counted)


class Stage:
    """Streams registered as vsockd does, whose ends the test has."""

    def __init__(self) -> None:
        self.ended: list[int] = []
        self.watch = StreamLiveness(self.ended.append)
        self.watch.open()
        self.connecting: dict[int, socket.socket] = {}
        self.accepting: dict[int, socket.socket] = {}
        self.groups: dict[int, Group] = {}

    def add(self, numbers: range) -> None:
        for number in numbers:
            mine, theirs = socket.socketpair()
            copy = theirs.dup()  # as sent to a listener
            self.groups[number] = self.watch.add(theirs.fileno(), number)
            theirs.close()
            self.connecting[number], self.accepting[number] = mine, copy

    def look_at_all(self) -> list[int]:
        for group in self.watch.groups():
            self.watch.check(group)
        return self.now_ended()

    def now_ended(self) -> list[int]:
        """Return the streams that have ended since the last call."""
        ended = sorted(self.ended)
        self.ended.clear()
        return ended

    def close(self) -> None:
        for sock in [*self.connecting.values(), *self.accepting.values()]:
            sock.close()
        for group in self.watch.groups():
            group.close()


@pytest.fixture
def stage() -> Iterator[Stage]:
    with contextlib.closing(Stage()) as stage:
        yield stage


def test_groups_have_a_maximum_of_streams(stage: Stage) -> None:
    stage.add(range(NUMBER))
    assert [len(group.numbers) for group in stage.watch.groups()] == [
        DAEMON_STREAMS_PER_GROUP
    ] * 3 + [5]
    assert stage.ended == []


def test_streams_whose_connecting_side_closes(stage: Stage) -> None:
    stage.add(range(NUMBER))
    closed = range(0, NUMBER, 7)
    for number in closed:
        stage.connecting[number].close()
    stage.watch.end_hung_up()
    assert stage.now_ended() == list(closed)
    stage.watch.end_hung_up()
    assert stage.now_ended() == []


def test_streams_whose_accepting_side_closes(stage: Stage) -> None:
    stage.add(range(NUMBER))
    closed = range(0, NUMBER, 7)
    for number in closed:
        stage.accepting[number].close()
    assert stage.look_at_all() == list(closed)
    assert stage.look_at_all() == []


def test_the_cost_of_checking_one_stream(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """One group, however many streams there are."""
    stage.add(range(NUMBER))
    looks = Looks(monkeypatch)
    stage.accepting[7].close()
    stage.watch.check(stage.groups[7])
    assert (stage.now_ended(), looks.number) == ([7], 1)


def test_a_stream_is_found_by_its_inode(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    stage.add(range(NUMBER))
    looks = Looks(monkeypatch)
    for number, sock in stage.accepting.items():
        assert stage.watch.find(os.fstat(sock.fileno()).st_ino) == number
    assert stage.watch.find(1) is None
    # Those of full groups were known; the others are found by the first unknown one.
    assert looks.number == 1
    stage.add(range(NUMBER, NUMBER + 1))
    assert stage.watch.find(1) is None
    assert looks.number == 2


def test_a_search_detects_ended_streams(stage: Stage) -> None:
    stage.add(range(3))
    stage.accepting[1].close()
    assert stage.watch.find(1) is None
    assert stage.now_ended() == [1]


def open_descriptors() -> int:
    """Return how many there are, without those of other tests' unreachable objects."""
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def test_short_streams_need_one_group(stage: Stage) -> None:
    before = open_descriptors()
    for number in range(1000):
        stage.add(range(number, number + 1))
        stage.connecting.pop(number).close()
        stage.accepting.pop(number).close()
        stage.watch.end_hung_up()
    assert len(stage.watch.groups()) == 1
    assert open_descriptors() == before


def test_groups_without_streams_are_closed(stage: Stage) -> None:
    before = open_descriptors()
    stage.add(range(NUMBER))
    assert open_descriptors() == before + 2 * NUMBER + 2 * 3
    for ends in (stage.connecting, stage.accepting):
        while ends:
            ends.popitem()[1].close()
    assert len(stage.look_at_all()) == NUMBER
    assert open_descriptors() == before
    # Numbers of descriptors come again.
    stage.add(range(NUMBER))
    stage.accepting[7].close()
    assert stage.look_at_all() == [7]


def test_streams_end_before_their_group_is_closed(stage: Stage) -> None:
    """The journal's rows of streams name the descriptor of the group, which may then be reused."""
    before: list[list[int]] = []
    stage.watch.before_close = lambda: before.append(stage.now_ended())
    numbers = range(DAEMON_STREAMS_PER_GROUP)
    stage.add(numbers)
    stage.add(range(DAEMON_STREAMS_PER_GROUP, DAEMON_STREAMS_PER_GROUP + 1))
    for number in numbers:
        stage.accepting[number].close()
    stage.look_at_all()
    assert before == [list(numbers)]


def test_groups_with_room_are_filled(stage: Stage) -> None:
    """Long-lived streams do not keep a group from having others."""
    stage.add(range(NUMBER))
    for number in range(NUMBER):
        if number % 8:
            stage.connecting.pop(number).close()
            stage.accepting.pop(number).close()
    stage.look_at_all()
    groups = len(stage.watch.groups())
    stage.add(range(NUMBER, 2 * NUMBER - NUMBER // 4))
    assert len(stage.watch.groups()) == groups


def test_with_very_many_streams_groups_are_larger(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "DAEMON_STREAM_GROUPS_MAX", 2)
    stage.add(range(NUMBER))
    assert len(stage.watch.groups()) == 2
    stage.accepting[7].close()
    stage.accepting[NUMBER - 1].close()
    assert stage.look_at_all() == [7, NUMBER - 1]


def test_a_socket_handed_off_again_is_another_stream(stage: Stage) -> None:
    mine, theirs = socket.socketpair()
    with mine, theirs:
        group = stage.watch.add_pending(theirs.fileno(), 1, None)
        with theirs.dup() as back:  # a refused one comes back as another descriptor
            stage.add(
                range(100, 100 + DAEMON_STREAMS_PER_GROUP)
            )  # the next group is another one by now
            assert stage.watch.add_pending(back.fileno(), 2, group) is group
            assert stage.look_at_all() == [1]
            assert set(group.alive()) >= {2}
            mine.close()
            stage.watch.end_hung_up()
            assert stage.now_ended() == [2]


def test_it_checks_without_a_free_descriptor(stage: Stage) -> None:
    stage.add(range(NUMBER))
    stage.accepting[7].close()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        assert stage.look_at_all() == [7]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_the_next_vsockd_finds_streams_without_a_check(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The epolls are handed over with what was found at their last checks."""
    stage.add(range(NUMBER))
    stage.look_at_all()
    writer = Writer(Fabric(0))
    saved = stage.watch.save(writer)
    reader = Reader(Fabric(0), [os.dup(fd) for fd in writer.descriptors])
    looks, ended = Looks(monkeypatch), list[int]()
    successor = StreamLiveness(ended.append)
    successor.restore(reader, saved)
    successor.open()
    inode = os.fstat(stage.accepting[0].fileno()).st_ino
    assert successor.find(inode) == 0 and not looks.number
    stage.connecting[1].close()
    successor.end_hung_up()
    assert ended == [1]
    for group in successor.groups():
        group.close()
