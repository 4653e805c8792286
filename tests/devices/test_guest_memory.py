"""Valid and invalid guest addresses."""

from __future__ import annotations

import errno
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vsockets.devices.guest_memory import BadAddress, GuestMemory, PageList, ScatterList

PAGE = 4096


@pytest.fixture
def file() -> int:
    fd = os.memfd_create("guest")
    os.ftruncate(fd, 16 * PAGE)
    return fd


def test_view_requires_one_writable_region(file: int) -> None:
    memory = GuestMemory()
    memory.map(PAGE, 4 * PAGE, True, file, 0)
    memory.map(5 * PAGE, PAGE, True, file, 8 * PAGE)
    memory.map(7 * PAGE, PAGE, False, file, 0)
    memory.map(8 * PAGE, PAGE, True, None, 0)
    os.close(file)
    memory.view(PAGE, 4 * PAGE)[:3] = b"abc"
    assert bytes(memory.view(PAGE + 1, 2)) == b"bc"
    for address, size in [
        (0, 1),
        (PAGE - 1, 2),
        (4 * PAGE, PAGE + 1),  # into the next region
        (6 * PAGE, 1),
        (7 * PAGE, 1),  # read-only
        (8 * PAGE, 1),  # reserved without memory
        (PAGE, -1),
        ((1 << 64) - 1, 2),
        (PAGE, 1 << 64),
    ]:
        with pytest.raises(BadAddress):
            memory.view(address, size)


def test_invalid_regions_are_refused(file: int) -> None:
    memory = GuestMemory()
    memory.map(PAGE, PAGE, True, file, 0)
    for address, size, offset, code in [
        (PAGE, PAGE, 0, errno.EEXIST),
        (0, PAGE + 1, 0, errno.EEXIST),
        (2 * PAGE - 1, PAGE, 0, errno.EEXIST),
        (8 * PAGE, 0, 0, errno.EINVAL),
        ((1 << 64) - PAGE, 2 * PAGE, 0, errno.EINVAL),
        (8 * PAGE, PAGE, 16 * PAGE, errno.EINVAL),  # beyond the end of the file: SIGBUS
    ]:
        with pytest.raises(OSError) as failed:
            memory.map(address, size, True, file, offset)
        assert failed.value.errno == code
    for address, size in [(0, PAGE), (PAGE, 2 * PAGE), (PAGE + 1, PAGE - 1), (9 * PAGE, 1)]:
        with pytest.raises(OSError, match="no region"):
            memory.unmap(address, size)
    memory.unmap(PAGE, PAGE)
    with pytest.raises(BadAddress):
        memory.view(PAGE, 1)
    os.close(file)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=2000), st.data())
def test_scatter_list_window_equals_the_joined_bytes(sizes: list[int], data: st.DataObject) -> None:
    whole = bytes(i % 251 for i in range(sum(sizes)))
    views, at = [], 0
    for size in sizes:
        views.append(memoryview(whole[at : at + size]))
        at += size
    scattered = ScatterList(views)
    start = data.draw(st.integers(0, len(whole) - 1))
    length = data.draw(st.integers(1, len(whole) - start))
    window = b"".join(scattered.window(start, length))
    assert len(scattered.window(start, length)) <= 1024
    assert whole[start : start + length].startswith(window)
    assert len(window) == length or len(scattered.window(start, length)) == 1024


@pytest.mark.parametrize("regions", [1, 3])
def test_scattered_pages_equal_the_pages_one_by_one(regions: int) -> None:
    """Pages may be adjacent or not, and in any order; the second case has several regions."""
    file, memory, count = os.memfd_create("guest"), GuestMemory(), 12
    os.ftruncate(file, count * PAGE)
    for number in range(count):
        os.pwrite(file, bytes([number]) * PAGE, number * PAGE)
    step = count // regions * PAGE
    for start in range(0, count * PAGE, step):
        memory.map(start, step, True, file, start)
    os.close(file)
    for order in [range(count), reversed(range(count)), (3, 4, 5, 0, 11, 7, 8), (9,)]:
        numbers = list(order)
        pages = PageList(memory, [number * PAGE for number in numbers], PAGE)
        assert len(pages) == len(numbers)
        assert [pages.view(place, 1)[0] for place in range(len(numbers))] == numbers
        for first in range(len(numbers)):
            scattered = pages.scatter(first, len(numbers))
            window = b"".join(scattered.window(0, scattered.size))
            assert window == b"".join(bytes([number]) * PAGE for number in numbers[first:])
        for number in range(-1, count + 1):
            assert pages.overlaps(number * PAGE, PAGE) is (number in numbers)


def test_pages_outside_of_the_memory_are_refused() -> None:
    file, memory = os.memfd_create("guest"), GuestMemory()
    os.ftruncate(file, 8 * PAGE)
    memory.map(0, 2 * PAGE, True, file, 0)
    memory.map(3 * PAGE, PAGE, False, file, 0)  # read-only, after a hole
    memory.map(4 * PAGE, 2 * PAGE, True, file, 0)
    os.close(file)
    assert len(PageList(memory, [PAGE, 5 * PAGE, 0], PAGE)) == 3
    for numbers in [(0, 2, 1), (0, 3, 1), (5, 6), (2**52, 0), (5, 2**52 - 1)]:
        with pytest.raises(BadAddress):
            PageList(memory, [number * PAGE for number in numbers], PAGE)
