"""XDR, RFC 4506: codecs that are built from smaller ones.

Every length is checked against its type's bound and against what is there before anything is
made of it.  Strings are bytes: file names have no encoding.
"""

from __future__ import annotations

import struct as packing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class XdrError(ValueError):
    """Not what the type says: too short, too long, or a value it does not have."""


class Reader:
    """Bytes, and how far they were read."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.position = 0

    def take(self, size: int) -> bytes:
        """The next ``size`` bytes."""
        begin = self.skip(size)
        return self.data[begin : self.position]

    def skip(self, size: int) -> int:
        """Go past ``size`` bytes; returns where they begin."""
        begin, end = self.position, self.position + size
        if end > len(self.data):
            raise XdrError(f"{size} bytes wanted, {len(self.data) - begin} are left")
        self.position = end
        return begin


class Codec(Generic[T]):
    """A type of XDR's.  ``decode`` raises XdrError; ``encode`` what its caller got wrong."""

    def encode(self, value: T, out: bytearray) -> None:
        raise NotImplementedError

    def decode(self, reader: Reader) -> T:
        raise NotImplementedError

    def pack(self, value: T) -> bytes:
        """``value`` alone."""
        out = bytearray()
        self.encode(value, out)
        return bytes(out)

    def unpack(self, data: bytes) -> T:
        """What ``data`` is, all of it.  Raises XdrError."""
        reader = Reader(data)
        value = self.decode(reader)
        if reader.position != len(data):
            raise XdrError(f"{len(data) - reader.position} bytes too many")
        return value


class _Number(Codec[int]):
    def __init__(self, code: str) -> None:
        self._packer = packing.Struct(">" + code)

    def encode(self, value: int, out: bytearray) -> None:
        try:
            out += self._packer.pack(value)
        except packing.error as error:
            raise XdrError(str(error)) from None

    def decode(self, reader: Reader) -> int:
        number: int
        (number,) = self._packer.unpack_from(reader.data, reader.skip(self._packer.size))
        return number


class _Numbers(Codec[T]):
    """A structure of numbers alone, all of them at once."""

    def __init__(
        self, code: str, make: Callable[..., T], split: Callable[[T], Iterable[int]]
    ) -> None:
        self._packer = packing.Struct(">" + code)
        self._make, self._split = make, split

    def encode(self, value: T, out: bytearray) -> None:
        try:
            out += self._packer.pack(*self._split(value))
        except packing.error as error:
            raise XdrError(str(error)) from None

    def decode(self, reader: Reader) -> T:
        begin = reader.skip(self._packer.size)
        return self._make(*self._packer.unpack_from(reader.data, begin))


class _Boolean(Codec[bool]):
    def encode(self, value: bool, out: bytearray) -> None:
        out += b"\0\0\0\1" if value else b"\0\0\0\0"

    def decode(self, reader: Reader) -> bool:
        number = uint.decode(reader)
        if number > 1:
            raise XdrError(f"{number} is neither true nor false")
        return number == 1


class _Void(Codec[None]):
    def encode(self, value: None, out: bytearray) -> None:
        pass

    def decode(self, reader: Reader) -> None:
        pass


class _Fixed(Codec[bytes]):
    def __init__(self, size: int) -> None:
        self._size = size

    def encode(self, value: bytes, out: bytearray) -> None:
        if len(value) != self._size:
            raise XdrError(f"{len(value)} bytes, not {self._size}")
        out += value
        out += bytes(-self._size % 4)

    def decode(self, reader: Reader) -> bytes:
        value = reader.take(self._size)
        if any(reader.take(-self._size % 4)):
            raise XdrError("what fills a word up is not zero")
        return value


class _Opaque(Codec[bytes]):
    def __init__(self, most: int) -> None:
        self._most = most

    def encode(self, value: bytes, out: bytearray) -> None:
        if len(value) > self._most:
            raise XdrError(f"{len(value)} bytes, of {self._most} at most")
        uint.encode(len(value), out)
        out += value
        out += bytes(-len(value) % 4)

    def decode(self, reader: Reader) -> bytes:
        size = uint.decode(reader)
        if size > self._most:
            raise XdrError(f"{size} bytes, of {self._most} at most")
        value = reader.take(size)
        if any(reader.take(-size % 4)):
            raise XdrError("what fills a word up is not zero")
        return value


class _Array(Codec[tuple[T, ...]]):
    def __init__(self, element: Codec[T], most: int) -> None:
        self._element, self._most = element, most

    def encode(self, value: tuple[T, ...], out: bytearray) -> None:
        if len(value) > self._most:
            raise XdrError(f"{len(value)} elements, of {self._most} at most")
        uint.encode(len(value), out)
        for one in value:
            self._element.encode(one, out)

    def decode(self, reader: Reader) -> tuple[T, ...]:
        count = uint.decode(reader)
        if count > self._most:
            raise XdrError(f"{count} elements, of {self._most} at most")
        return tuple(self._element.decode(reader) for _ in range(count))


class _Chain(Codec[tuple[T, ...]]):
    def __init__(self, element: Codec[T], most: int) -> None:
        self._element, self._most = element, most

    def encode(self, value: tuple[T, ...], out: bytearray) -> None:
        for one in value:
            boolean.encode(True, out)
            self._element.encode(one, out)
        boolean.encode(False, out)

    def decode(self, reader: Reader) -> tuple[T, ...]:
        found: list[T] = []
        while boolean.decode(reader):
            if len(found) == self._most:
                raise XdrError(f"more than {self._most} elements")
            found.append(self._element.decode(reader))
        return tuple(found)


class _Optional(Codec[T | None]):
    def __init__(self, content: Codec[T]) -> None:
        self._content = content

    def encode(self, value: T | None, out: bytearray) -> None:
        boolean.encode(value is not None, out)
        if value is not None:
            self._content.encode(value, out)

    def decode(self, reader: Reader) -> T | None:
        return self._content.decode(reader) if boolean.decode(reader) else None


class _Structure(Codec[T]):
    def __init__(self, make: Callable[..., T], members: tuple[Codec[Any], ...]) -> None:
        self._make, self._members = make, members

    def encode(self, value: T, out: bytearray) -> None:
        assert isinstance(value, tuple)
        for codec, member in zip(self._members, value, strict=True):
            codec.encode(member, out)

    def decode(self, reader: Reader) -> T:
        return self._make(*(codec.decode(reader) for codec in self._members))


class _Union(Codec[tuple[int, Any]]):
    def __init__(self, arms: Mapping[int, Codec[Any]], other: Codec[Any] | None) -> None:
        self._arms, self._other = arms, other

    def _arm(self, tag: int) -> Codec[Any]:
        arm = self._arms.get(tag, self._other)
        if arm is None:
            raise XdrError(f"there is no case {tag}")
        return arm

    def encode(self, value: tuple[int, Any], out: bytearray) -> None:
        tag, content = value
        arm = self._arm(tag)
        uint.encode(tag, out)
        arm.encode(content, out)

    def decode(self, reader: Reader) -> tuple[int, Any]:
        tag = uint.decode(reader)
        return tag, self._arm(tag).decode(reader)


uint = _Number("I")
hyper = _Number("Q")
boolean = _Boolean()
void = _Void()


def fixed(size: int) -> Codec[bytes]:
    """``size`` bytes."""
    return _Fixed(size)


def opaque(most: int) -> Codec[bytes]:
    """Bytes, ``most`` at most; strings are the same."""
    return _Opaque(most)


def array(element: Codec[T], most: int) -> Codec[tuple[T, ...]]:
    """A counted sequence."""
    return _Array(element, most)


def chain(element: Codec[T], most: int) -> Codec[tuple[T, ...]]:
    """A linked list: each element is announced, and the end, too."""
    return _Chain(element, most)


def optional(content: Codec[T]) -> Codec[T | None]:
    """One, or none."""
    return _Optional(content)


def structure(make: Callable[..., T], *members: Codec[Any]) -> Codec[T]:
    """A NamedTuple, by its members' types."""
    return _Structure(make, members)


def numbers(code: str, make: Callable[..., T], split: Callable[[T], Iterable[int]]) -> Codec[T]:
    """A structure of numbers alone, I and Q; ``make`` takes them all, and ``split`` gives them."""
    return _Numbers(code, make, split)


def union(
    arms: Mapping[int, Codec[Any]], other: Codec[Any] | None = None
) -> Codec[tuple[int, Any]]:
    """A number, and what it says comes after it; ``other`` after numbers not in ``arms``."""
    return _Union(arms, other)
