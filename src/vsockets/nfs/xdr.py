"""XDR (RFC 4506): codecs composed of smaller codecs.

Every length is checked against the bound of its type and against the remaining data before anything
is allocated for it.  Strings are bytes: file names have no encoding.
"""

from __future__ import annotations

import struct as packing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, TypeVar, cast

T = TypeVar("T")


class XdrError(ValueError):
    """Data that does not match its type: too short, too long, or with an invalid value."""


class Reader:
    """A buffer and the position of the next byte to read."""

    def __init__(self, data: bytes | memoryview) -> None:
        self.data = data
        self.position = 0

    def take(self, size: int) -> bytes:
        """Consume and return the next ``size`` bytes.

        Raises XdrError if fewer remain.
        """
        begin = self.skip(size)
        return bytes(self.data[begin : self.position])

    def view(self, size: int) -> memoryview:
        """Consume the next ``size`` bytes and return a view of them, which copies nothing.

        Raises XdrError if fewer remain.
        """
        begin = self.skip(size)
        return memoryview(self.data)[begin : self.position]

    def skip(self, size: int) -> int:
        """Consume ``size`` bytes and return their position.

        Raises XdrError if fewer remain.
        """
        begin, end = self.position, self.position + size
        if end > len(self.data):
            raise XdrError(f"{size} bytes expected, {len(self.data) - begin} remain")
        self.position = end
        return begin


class Codec(Generic[T]):
    """The codec of one XDR type."""

    def encode(self, value: T, out: bytearray) -> None:
        """Append ``value`` to ``out``.

        Raises XdrError for a value that is outside the type's bounds.
        """
        raise NotImplementedError

    def decode(self, reader: Reader) -> T:
        """Consume and return one value.

        Raises XdrError if the bytes are not a value of this type.
        """
        raise NotImplementedError

    def pack(self, value: T) -> bytes:
        """Return ``value`` as bytes.

        Raises XdrError for a value that is outside the type's bounds.
        """
        out = bytearray()
        self.encode(value, out)
        return bytes(out)

    def unpack(self, data: bytes | memoryview) -> T:
        """Decode ``data``, all of which must be one value.

        Raises XdrError if ``data`` is malformed or too long.
        """
        reader = Reader(data)
        value = self.decode(reader)
        if reader.position != len(data):
            raise XdrError(f"{len(data) - reader.position} excess bytes")
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
    """A structure that contains only numbers, packed in one operation."""

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
            raise XdrError(f"invalid boolean {number} (expected 0 or 1)")
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
            raise XdrError(f"{len(value)} bytes (expected {self._size})")
        out += value
        out += bytes(-self._size % 4)

    def decode(self, reader: Reader) -> bytes:
        value = reader.take(self._size)
        _skip_padding(reader, self._size)
        return value


class _Opaque(Codec[bytes]):
    def __init__(self, limit: int) -> None:
        self._limit = limit

    def encode(self, value: bytes, out: bytearray) -> None:
        if len(value) > self._limit:
            raise XdrError(f"{len(value)} bytes (expected at most {self._limit})")
        uint.encode(len(value), out)
        out += value
        out += bytes(-len(value) % 4)

    def decode(self, reader: Reader) -> bytes:
        value = reader.take(self._size(reader))
        _skip_padding(reader, len(value))
        return value

    def _size(self, reader: Reader) -> int:
        size = uint.decode(reader)
        if size > self._limit:
            raise XdrError(f"{size} bytes (expected at most {self._limit})")
        return size


class _Data(_Opaque):
    """Opaque data that is large: decoded as a view of the buffer, as copies cost more than a call.

    The view is annotated as bytes, which it can replace wherever the system reads a buffer.
    """

    def decode(self, reader: Reader) -> bytes:
        value = reader.view(self._size(reader))
        _skip_padding(reader, len(value))
        return cast(bytes, value)


def _skip_padding(reader: Reader, size: int) -> None:
    """Consume the padding of ``size`` bytes of opaque data.

    Raises XdrError unless it is zero.
    """
    if size % 4 and any(reader.take(-size % 4)):
        raise XdrError("padding is not zero")


class _Array(Codec[tuple[T, ...]]):
    def __init__(self, element: Codec[T], limit: int) -> None:
        self._element, self._limit = element, limit

    def encode(self, value: tuple[T, ...], out: bytearray) -> None:
        if len(value) > self._limit:
            raise XdrError(f"{len(value)} elements (expected at most {self._limit})")
        uint.encode(len(value), out)
        for element in value:
            self._element.encode(element, out)

    def decode(self, reader: Reader) -> tuple[T, ...]:
        count = uint.decode(reader)
        if count > self._limit:
            raise XdrError(f"{count} elements (expected at most {self._limit})")
        return tuple(self._element.decode(reader) for _ in range(count))


class _Chain(Codec[tuple[T, ...]]):
    def __init__(self, element: Codec[T], limit: int) -> None:
        self._element, self._limit = element, limit

    def encode(self, value: tuple[T, ...], out: bytearray) -> None:
        for element in value:
            boolean.encode(True, out)
            self._element.encode(element, out)
        boolean.encode(False, out)

    def decode(self, reader: Reader) -> tuple[T, ...]:
        found: list[T] = []
        while boolean.decode(reader):
            if len(found) == self._limit:
                raise XdrError(f"more than {self._limit} elements")
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
        return self._make(*[codec.decode(reader) for codec in self._members])


class _Union(Codec[tuple[int, Any]]):
    def __init__(self, arms: Mapping[int, Codec[Any]], other: Codec[Any] | None) -> None:
        self._arms, self._other = arms, other

    def _arm(self, tag: int) -> Codec[Any]:
        arm = self._arms.get(tag, self._other)
        if arm is None:
            raise XdrError(f"invalid union discriminant {tag}")
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
    """Return the codec of ``size`` bytes of opaque data."""
    return _Fixed(size)


def opaque(limit: int) -> Codec[bytes]:
    """Return the codec of opaque data or a string of at most ``limit`` bytes."""
    return _Opaque(limit)


def data(limit: int) -> Codec[bytes]:
    """Return the codec of at most ``limit`` bytes that are decoded as a view of the buffer."""
    return _Data(limit)


def array(element: Codec[T], limit: int) -> Codec[tuple[T, ...]]:
    """Return the codec of an array with a length prefix."""
    return _Array(element, limit)


def chain(element: Codec[T], limit: int) -> Codec[tuple[T, ...]]:
    """Return the codec of a linked list: a boolean before each element, and one at the end."""
    return _Chain(element, limit)


def optional(content: Codec[T]) -> Codec[T | None]:
    """Return the codec of a value that may be absent (None)."""
    return _Optional(content)


def structure(make: Callable[..., T], *members: Codec[Any]) -> Codec[T]:
    """Return the codec of a NamedTuple, from those of its members."""
    return _Structure(make, members)


def numbers(code: str, make: Callable[..., T], split: Callable[[T], Iterable[int]]) -> Codec[T]:
    """Return the codec of a structure of numbers only; ``code`` has their struct codes (I and Q).

    ``make`` builds the structure from all the numbers; ``split`` returns them.
    """
    return _Numbers(code, make, split)


def union(
    arms: Mapping[int, Codec[Any]], other: Codec[Any] | None = None
) -> Codec[tuple[int, Any]]:
    """Return the codec of a discriminated union, decoded as (discriminant, content).

    ``other`` is the codec for discriminants that are not in ``arms``; without it, they are invalid.
    """
    return _Union(arms, other)
