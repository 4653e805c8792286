"""A reader of VMware's ``.vmx`` files.

A file consists of lines ``key = "value"``.  The line format is that of VMware's low-level
dictionary (open-vm-tools, ``lib/dict``): blanks are spaces and tabs; a key contains no blank, ``=``
or ``#`` (and is ASCII, as all of VMware's are); a value without quotes contains no blank or ``#``
and may be empty; ``|XX`` in a value is the byte with that hexadecimal number; ``#`` begins a
comment.  Keys are case-insensitive.

A file that contains a key twice is refused, even if the values are the same or the spellings differ
in case: VMware refuses it as well (Vagrant issue 2597, bosh-lite issue 61), and which of two
``vmci0.id`` is meant cannot be known.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from .limits import VMX_FILE_MAX_BYTES
from .model.constants import VMADDR_CID_ANY, VMADDR_CID_HOST

#: The first virtual hardware version in which a VMCI device is always present (guide page 23).
FIRST_VMCI_HARDWARE = 7

#: Characters of a key or a value shown in an error: enough to recognise it, on one line.
LONGEST_SHOWN = 60

_BOM = b"\xef\xbb\xbf"
_BLANK_LINE = re.compile(rb"[ \t]*(#.*)?", re.DOTALL)
#: Possessive quantifiers for blanks: a megabyte of them must not be matched in every division.
_LINE = re.compile(
    rb"""[ \t]*+ (?P<key>[!"$-<>-~]+)
         [ \t]*+ =
         [ \t]*+ (?: "(?P<quoted>[^\0"]*)" | (?P<bare>[^\0 \t\#"][^\0 \t\#]*)? )
         [ \t]*+ (?:\#.*)?""",
    re.VERBOSE | re.DOTALL,
)
_ESCAPE = re.compile(rb"\|([0-9A-Fa-f]{2})")
_NUMBER = re.compile(r"-?[0-9]{1,10}")
_BOOLEANS = {"true": True, "false": False}

_ENCODING = ".encoding"

#: The encodings that VMware writes, in lower case.  All encode ASCII as ASCII.  For the East Asian
#: ones, Windows' supersets of the standards are used.
_ENCODINGS = {
    "utf-8": "utf-8",
    "us-ascii": "ascii",
    "shift_jis": "cp932",
    "euc-jp": "euc_jp",
    "gb2312": "gb18030",
    "gbk": "gb18030",
    "gb18030": "gb18030",
    "windows-936": "gb18030",
    "big5": "cp950",
    "euc-kr": "cp949",
    "koi8-r": "koi8_r",
    **{f"iso-8859-{n}": f"iso8859_{n}" for n in (*range(1, 12), *range(13, 17))},
    **{f"windows-{n}": f"cp{n}" for n in (874, 932, 949, 950, *range(1250, 1259))},
}


class VmxError(ValueError):
    """An unusable ``.vmx`` file: ``FILE:LINE: KEY: value found, what was expected``.

    Line and key are left out if the error concerns the whole file.
    """

    def __init__(self, file: str, line: int | None, key: str, problem: str) -> None:
        where = file if line is None else f"{file}:{line}"
        super().__init__(": ".join(filter(None, [where, key[:LONGEST_SHOWN], problem])))


@dataclass(frozen=True)
class Vmx:
    """A virtual machine's configuration.

    ``values`` has every key of the file in lower case, with its value as text; ``lines`` has the
    line number of each key, from 1.  The properties are those that vSockets needs; they raise
    VmxError for an invalid value.  An empty value counts as missing.
    """

    name: str  #: the file's name in errors
    values: Mapping[str, str]
    lines: Mapping[str, int]

    @property
    def display_name(self) -> str:
        """``displayName``, the name that users see; "" if it is missing."""
        return self.text("displayName")

    @property
    def hardware_version(self) -> int:
        """``virtualHW.version``; 0 if it is missing."""
        key = "virtualHW.version"
        version = self.number(key)
        if version is None:
            return 0
        if version < 1:
            raise self.error(key, "expected a number from 1")
        return version

    @property
    def vmci_present(self) -> bool:
        """``vmci0.present``: whether the machine has a VMCI device.

        From hardware version 7 the default is TRUE (guide page 23).
        """
        return self.boolean("vmci0.present", self.hardware_version >= FIRST_VMCI_HARDWARE)

    @property
    def cid(self) -> int | None:
        """``vmci0.id``: the context ID (guide page 11), or None if none is assigned.

        VMware writes it as a signed 32-bit number; the unsigned spelling is the same CID.  -1 is
        None: in other keys (``pciSlotNumber``) VMware writes it for "not assigned".
        """
        key = "vmci0.id"
        number = self.number(key)
        if number is None or number == -1:
            return None
        if not -(1 << 31) <= number < 1 << 32:
            raise self.error(key, "expected a number of 32 bits")
        cid = number & 0xFFFF_FFFF
        if not VMADDR_CID_HOST < cid < VMADDR_CID_ANY:
            raise self.error(key, "not a guest's CID, expected 3 to 4294967294")
        return cid

    @property
    def unrestricted(self) -> bool:
        """``vmci0.unrestricted``, which only ESX 4.0 to ESXi 5.0 use (guide page 24)."""
        return self.boolean("vmci0.unrestricted", False)

    @property
    def domain(self) -> str:
        """``vmci0.domain``, which only ESX 4.0 to ESXi 5.0 use (guide page 24)."""
        return self.text("vmci0.domain")

    def require_vmci(self) -> None:
        """Require that the machine has a VMCI device.

        Raises VmxError if it has none.
        """
        if "encryption.data" in self.values:
            raise self.error("encryption.data", "the file is encrypted, expected a plain one")
        if self.hardware_version < FIRST_VMCI_HARDWARE:
            raise self.error(
                "virtualHW.version",
                "expected 7 or later: upgrade the VM's hardware compatibility to 7 or later",
            )
        if not self.vmci_present:
            raise self.error("vmci0.present", "expected TRUE: without it there is no VMCI device")

    # Any key, case-insensitively

    def text(self, key: str) -> str:
        """Return the value of a key, or "" if it is missing."""
        return self.values.get(key.lower(), "")

    def number(self, key: str) -> int | None:
        """Return the value of a key as a number, or None if it is missing.

        Raises VmxError if it is not a number.
        """
        text = self.text(key)
        if not text:
            return None
        if not _NUMBER.fullmatch(text):
            raise self.error(key, "expected a decimal number of at most 10 digits")
        return int(text)

    def boolean(self, key: str, default: bool) -> bool:
        """Return the value of a key as a boolean.

        Raises VmxError if it is neither TRUE nor FALSE.
        """
        text = self.text(key)
        if not text:
            return default
        if text.lower() not in _BOOLEANS:
            raise self.error(key, "expected TRUE or FALSE")
        return _BOOLEANS[text.lower()]

    def error(self, key: str, problem: str) -> VmxError:
        """Return an error about the value of ``key``; the message contains key, line and value."""
        line = self.lines.get(key.lower())
        found = "missing" if line is None else _quoted(self.text(key))
        return VmxError(self.name, line, key, f"{found}, {problem}")


def read_vmx(path: str | os.PathLike[str]) -> Vmx:
    """Read a ``.vmx`` file.

    Raises VmxError, also if the file is missing.
    """
    name = os.fspath(path)
    try:
        with open(path, "rb", opener=_open_nonblocking) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise VmxError(name, None, "", "not a regular file, expected a .vmx file")
            return parse_vmx(file.read(VMX_FILE_MAX_BYTES + 1), name)
    except OSError as error:
        raise VmxError(name, None, "", f"{error.strerror}, expected a .vmx file") from error


def parse_vmx(data: bytes, name: str) -> Vmx:
    """Parse a ``.vmx`` file; ``name`` is its name in errors.

    Raises VmxError if a line is invalid.
    """
    if len(data) > VMX_FILE_MAX_BYTES:
        raise VmxError(
            name, None, "", f"more than {VMX_FILE_MAX_BYTES} bytes, expected a .vmx file"
        )
    found: dict[str, tuple[int, bytes]] = {}
    for number, line in enumerate(data.removeprefix(_BOM).split(b"\n"), 1):
        entry = _parse_line(line.removesuffix(b"\r"), name, number)
        if entry is None:
            continue
        key, value = entry
        if key.lower() in found:
            first = found[key.lower()][0]
            raise VmxError(name, number, key, f"given on line {first} already, expected once")
        found[key.lower()] = number, value
    encoding = _encoding(found, name)
    return Vmx(
        name,
        MappingProxyType(
            {key: _decode(value, encoding, name, n, key) for key, (n, value) in found.items()}
        ),
        MappingProxyType({key: number for key, (number, _) in found.items()}),
    )


def _parse_line(line: bytes, name: str, number: int) -> tuple[str, bytes] | None:
    """Return the key and the value's bytes without escapes, or None for a blank line.

    Raises VmxError if the line is invalid.
    """
    if _BLANK_LINE.fullmatch(line):
        return None
    match = _LINE.fullmatch(line)
    if match is None:
        found = _quoted(line.decode("ascii", "replace"))
        raise VmxError(name, number, "", f'{found}, expected a line of the form: key = "value"')
    # Escapes are decoded before the encoding: a bar can be half of a Shift_JIS or GBK character,
    # and is written as |7C there too.
    value = _ESCAPE.sub(
        lambda escape: bytes([int(escape[1], 16)]), match["quoted"] or match["bare"] or b""
    )
    key = match["key"].decode("ascii")
    if b"\0" in value:
        raise VmxError(name, number, key, "a NUL character, expected text")
    return key, value


def _encoding(found: Mapping[str, tuple[int, bytes]], name: str) -> str:
    line, value = found.get(_ENCODING, (None, b"UTF-8"))
    wanted = value.decode("ascii", "replace")
    if wanted.lower() not in _ENCODINGS:
        raise VmxError(
            name,
            line,
            _ENCODING,
            f"unknown encoding {_quoted(wanted)}, expected UTF-8 or another that VMware writes",
        )
    return _ENCODINGS[wanted.lower()]


def _decode(value: bytes, encoding: str, name: str, line: int, key: str) -> str:
    try:
        return value.decode(encoding)
    except UnicodeDecodeError as error:
        found = f"byte {error.start + 1} of the value, {value[error.start]:#04x}, is not text"
        raise VmxError(
            name, line, key, f"{found}, expected {encoding}: see the line of {_ENCODING}"
        ) from error


def _quoted(text: str) -> str:
    """Return a value for an error: one line, shortened, with control characters escaped."""
    return ascii(text) if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]!a}..."


def _open_nonblocking(path: str, flags: int) -> int:
    # Without O_NONBLOCK, opening a named pipe would block.
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
