"""``.vmx`` files: the format that VMware writes, and the values that vSockets reads."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vsockets.limits import VMX_FILE_MAX_BYTES
from vsockets.vmware import Vmx, VmxError, parse_vmx, read_vmx

SERVER_2 = b"""#!/usr/bin/vmware
config.version = "8"
virtualHW.version = "6"
displayName = "mail"
memsize = "256"
"""

WORKSTATION_7 = b"""\
.encoding = "windows-1252"\r
config.version = "8"\r
virtualHW.version = "7"\r
displayName = "Buchf\xfchrung"\r
vmci0.present = "TRUE"\r
vmci0.pciSlotNumber = "36"\r
vmci0.id = "1066538581"\r
"""

ESXI_5 = b"""\
.encoding = "UTF-8"
virtualHW.version = "8"
displayName = "web \xe2\x84\x96 1"
annotation = "first line|0Asecond, |22quoted|22 and a bar: |7C"
scsi0:0.fileName = "web.vmdk"
vmci0.unrestricted = "TRUE"
vmci0.domain = "lab"
vmci0.id = "-1791447150"
"""

WORKSTATION_17 = b"""\
.encoding = "UTF-8"
config.version = "8"
virtualHW.version = "21"
firmware = "efi"
nvme0:0.fileName = "C:\\VMs\\web.vmdk"
vmci0.present = "TRUE"
vmci0.unrestricted = "false"
vmci0.id = ""
# edited by hand   # twice
displayname=plain # a name without quotes
memsize =
"""


def vmx(text: str) -> Vmx:
    return parse_vmx(text.encode(), "a.vmx")


def test_hardware_before_vmci_is_refused() -> None:
    found = parse_vmx(SERVER_2, "mail.vmx")
    assert found.display_name == "mail"
    assert found.hardware_version == 6
    assert not found.vmci_present
    assert found.cid is None
    with pytest.raises(VmxError) as error:
        found.require_vmci()
    assert str(error.value) == (
        "mail.vmx:3: virtualHW.version: '6', expected 7 or later: "
        "upgrade the VM's hardware compatibility to 7 or later"
    )


def test_file_of_workstation_on_windows() -> None:
    found = parse_vmx(WORKSTATION_7, "a.vmx")
    found.require_vmci()
    assert found.display_name == "Buchführung"
    assert found.cid == 1066538581
    assert found.lines["vmci0.id"] == 7
    assert found.values["vmci0.pcislotnumber"] == "36"


def test_file_of_esxi_with_isolation_options() -> None:
    found = parse_vmx(ESXI_5, "a.vmx")
    found.require_vmci()
    assert found.display_name == "web № 1"
    assert found.values["annotation"] == 'first line\nsecond, "quoted" and a bar: |'
    assert found.values["scsi0:0.filename"] == "web.vmdk"
    assert found.vmci_present, "the default is TRUE from hardware version 7"
    assert found.unrestricted
    assert found.domain == "lab"
    assert found.cid == 2**32 - 1791447150


def test_file_edited_by_hand() -> None:
    found = parse_vmx(WORKSTATION_17, "a.vmx")
    found.require_vmci()
    assert found.display_name == "plain"
    assert found.values["memsize"] == ""
    assert found.values["nvme0:0.filename"] == "C:\\VMs\\web.vmdk"
    assert found.cid is None
    assert not found.unrestricted
    assert found.domain == ""


def test_defaults_of_an_empty_vmx_file() -> None:
    found = parse_vmx(b"", "a.vmx")
    assert not found.values
    assert found.display_name == ""
    assert found.hardware_version == 0
    with pytest.raises(VmxError, match=r"^a.vmx: virtualHW.version: missing, expected 7 or later"):
        found.require_vmci()


def test_disabled_vmci_device_is_refused() -> None:
    found = vmx('virtualHW.version = "10"\nvmci0.present = "FALSE"\n')
    assert not found.vmci_present
    with pytest.raises(VmxError, match=r"^a.vmx:2: vmci0.present: 'FALSE', expected TRUE"):
        found.require_vmci()


def test_encrypted_file_is_reported() -> None:
    with pytest.raises(VmxError, match=r"^a.vmx:1: encryption.data: .* the file is encrypted"):
        vmx('encryption.data = "c2VjcmV0"').require_vmci()


@pytest.mark.parametrize(
    ("text", "cid"),
    [
        ("3", 3),
        ("2147483647", 2**31 - 1),
        ("2147483648", 2**31),
        ("-2147483648", 2**31),
        ("-2", 2**32 - 2),
        ("4294967294", 2**32 - 2),
        ("-1", None),
        ("", None),
    ],
)
def test_signed_and_unsigned_cid(text: str, cid: int | None) -> None:
    assert vmx(f'vmci0.id = "{text}"').cid == cid


@given(st.integers(3, 2**32 - 2))
def test_signed_and_unsigned_spellings_are_the_same_cid(cid: int) -> None:
    signed = cid - 2**32 if cid >= 2**31 else cid
    assert vmx(f'vmci0.id = "{cid}"').cid == cid
    assert vmx(f'vmci0.id = "{signed}"').cid == cid


@pytest.mark.parametrize("text", ["0", "1", "2", "4294967295"])
def test_reserved_cids_are_refused(text: str) -> None:
    with pytest.raises(
        VmxError,
        match=rf"^a.vmx:1: vmci0.id: '{text}', not a guest's CID, expected 3 to \d+$",
    ):
        _ = vmx(f'vmci0.id = "{text}"').cid


@pytest.mark.parametrize("text", ["4294967296", "-2147483649", "9999999999"])
def test_cids_above_32_bits_are_refused(text: str) -> None:
    with pytest.raises(VmxError, match=f"vmci0.id: '{text}', expected a number of 32 bits"):
        _ = vmx(f'vmci0.id = "{text}"').cid


@pytest.mark.parametrize("text", ["0x10", "1_0", "٣", "1.5", "abc", "+3", " 3", "9" * 5000, "--1"])
@pytest.mark.parametrize("key", ["vmci0.id", "virtualHW.version"])
def test_invalid_numbers_are_refused(key: str, text: str) -> None:
    found = vmx(f'{key} = "{text}"')
    with pytest.raises(VmxError, match=f"^a.vmx:1: {key}: .*, expected a decimal number"):
        _ = found.cid if key == "vmci0.id" else found.hardware_version


def test_hardware_version_0_is_refused() -> None:
    with pytest.raises(VmxError, match=r"virtualHW.version: '0', expected a number from 1"):
        _ = vmx('virtualHW.version = "0"').hardware_version


@pytest.mark.parametrize(("text", "value"), [("TRUE", True), ("True", True), ("false", False)])
def test_booleans(text: str, value: bool) -> None:
    found = vmx(f'vmci0.present = "{text}"\nvmci0.unrestricted = "{text}"')
    assert found.vmci_present is value
    assert found.unrestricted is value


@pytest.mark.parametrize("text", ["1", "yes", "TRUE ", "on"])
def test_invalid_booleans_are_refused(text: str) -> None:
    with pytest.raises(VmxError, match=r"^a.vmx:1: vmci0.unrestricted: '.*', expected TRUE or"):
        _ = vmx(f'vmci0.unrestricted = "{text}"').unrestricted


def test_duplicate_key_is_refused() -> None:
    with pytest.raises(
        VmxError, match=r"^a.vmx:3: msg.autoAnswer: given on line 1 already, expected once$"
    ):
        vmx('msg.autoanswer = "true"\n\nmsg.autoAnswer = "true"\n')


@pytest.mark.parametrize(
    ("encoding", "codec", "text"),
    [
        ("UTF-8", "utf-8", "№ 1 日本"),
        ("windows-1252", "cp1252", "Büro €"),
        ("ISO-8859-1", "latin-1", "Büro"),
        ("ISO-8859-16", "iso8859-16", "Iași"),
        ("Shift_JIS", "cp932", "ソース能①"),  # the second byte of ソ is a backslash
        ("shift_jis", "cp932", "弌"),
        ("GBK", "gbk", "瀨倈"),  # the second bytes are bars
        ("Big5", "cp950", "功能"),
        ("windows-949", "cp949", "똠방"),
    ],
)
def test_encodings(encoding: str, codec: str, text: str) -> None:
    for lines in (
        [b'.encoding = "%s"' % encoding.encode(), line("displayName", text, codec)],
        [line("displayName", text, codec), b'.encoding = "%s"' % encoding.encode()],
    ):
        assert parse_vmx(b"\n".join(lines), "a.vmx").display_name == text


@pytest.mark.parametrize("encoding", ["", "EBCDIC", "utf-16", "rot13", "unicode_escape", "|FF|00"])
def test_unknown_encodings_are_refused(encoding: str) -> None:
    with pytest.raises(VmxError, match=r"^a.vmx:2: .encoding: "):
        vmx(f'# \n.encoding = "{encoding}"')


def test_bytes_invalid_in_the_encoding_are_refused() -> None:
    with pytest.raises(
        VmxError,
        match=r"^a.vmx:1: displayname: byte 2 of the value, 0xfc, is not text, expected utf-8: ",
    ):
        parse_vmx(b'displayName = "B\xfcro"', "a.vmx")


def test_byte_order_mark_is_skipped() -> None:
    assert parse_vmx(b'\xef\xbb\xbfdisplayName = "a"', "a.vmx").lines == {"displayname": 1}


@pytest.mark.parametrize(
    "text", ["|", "|2", "|g0", "a|", "|2z"], ids=["end", "one digit", "no digit", "later", "half"]
)
def test_bar_without_escape_is_literal(text: str) -> None:
    assert vmx(f'displayName = "{text}"').display_name == text


@pytest.mark.parametrize(
    "text",
    [
        "displayName",
        "= 1",
        'displayName = "web',
        'displayName = "web" 1',
        'displayName = we"b" 1',
        "displayName = two words",
        'display name = "web"',
        'bürò = "web"',
        'displayName = "a\0b"',
        "d\0i = 1",
        "\x1b[2J",
    ],
)
def test_malformed_lines_are_refused(text: str) -> None:
    with pytest.raises(
        VmxError, match=r'^a.vmx:2: .*, expected a line of the form: key = "value"$'
    ) as error:
        vmx(f"#!/usr/bin/vmware\n{text}\n")
    assert str(error.value).isprintable()


def test_nul_in_a_value_is_refused() -> None:
    with pytest.raises(VmxError, match=r"^a.vmx:1: displayName: a NUL character"):
        vmx('displayName = "web|00.evil"')


def test_too_large_file_is_refused() -> None:
    most = b"#" * VMX_FILE_MAX_BYTES
    assert not parse_vmx(most, "a.vmx").values
    with pytest.raises(VmxError, match=r"^a.vmx: more than 1048576 bytes"):
        parse_vmx(most + b"#", "a.vmx")


def test_long_key_or_value_is_shortened_in_errors() -> None:
    with pytest.raises(VmxError) as error:
        parse_vmx(b"k" * 5000 + b" = \xff", "a.vmx")
    assert len(str(error.value)) < 200
    with pytest.raises(VmxError) as error:
        _ = vmx(f"vmci0.id = {'9' * 5000}").cid
    assert len(str(error.value)) < 200


def test_megabyte_of_blanks_is_refused_quickly() -> None:
    with pytest.raises(VmxError):
        parse_vmx(b"a =" + b" " * (VMX_FILE_MAX_BYTES - 4) + b"\0", "a.vmx")


def test_read_vmx(tmp_path: Path) -> None:
    path = tmp_path / "web.vmx"
    path.write_bytes(ESXI_5)
    assert read_vmx(path) == parse_vmx(ESXI_5, str(path))
    path.write_bytes(b"?")
    with pytest.raises(VmxError, match=f"^{path}:1: "):
        read_vmx(path)


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(VmxError, match=f"^{tmp_path}/no.vmx: No such file or directory"):
        read_vmx(tmp_path / "no.vmx")
    with pytest.raises(VmxError, match=f"^{tmp_path}: .*expected a .vmx file"):
        read_vmx(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(VmxError, match=f"^{tmp_path}/pipe: not a regular file"):
        read_vmx(tmp_path / "pipe")


# A writer with VMware's escapes.


def line(key: str, value: str, codec: str) -> bytes:
    escaped = b"".join(
        b"|%02X" % byte if byte in b'"|\x7f' or (byte < 32 and byte != 9) else bytes([byte])
        for byte in value.encode(codec)
    )
    return b'%s = "%s"' % (key.encode(), escaped)


keys = st.from_regex(r"[A-Za-z][A-Za-z0-9.:_]{0,20}", fullmatch=True)
values = st.text(st.characters(exclude_characters="\0", codec="utf-8"))
entries = st.lists(st.tuples(keys, values), unique_by=lambda entry: entry[0].lower())


@given(entries, st.sampled_from([b"\n", b"\r\n"]), st.sampled_from([b"", b"\xef\xbb\xbf"]))
def test_written_files_round_trip(
    entries: list[tuple[str, str]], newline: bytes, mark: bytes
) -> None:
    lines = [b'.encoding = "UTF-8"', *(line(key, value, "utf-8") for key, value in entries)]
    found = parse_vmx(mark + newline.join([*lines, b""]), "a.vmx")
    wanted = [(".encoding", "UTF-8"), *((key.lower(), value) for key, value in entries)]
    assert list(found.values.items()) == wanted
    assert list(found.lines.items()) == [(key, n) for n, (key, _) in enumerate(wanted, 1)]


texts = st.lists(
    st.sampled_from(
        ['"', "|", "|00", "|ff", "#", " ", "\t", "=", "\n", "\r", "vmci0.id", "-1", ".encoding"]
        + ["virtualHW.version", "7", "GBK", "vmci0.present", "TRUE", "\0", "\x81", "9" * 30]
    )
).map(lambda parts: "".join(parts).encode("latin-1"))


@given(st.binary() | texts)
@example(b".encoding")
def test_hostile_files(data: bytes) -> None:
    message = None
    try:
        found = parse_vmx(data, "a.vmx")
        assert found.values.keys() == found.lines.keys()
        assert {type(found.display_name), type(found.domain)} == {str}
        assert found.cid is None or 2 < found.cid < 2**32 - 1
        assert found.unrestricted in (True, False)
        found.require_vmci()
        assert found.hardware_version >= 7
    except VmxError as error:
        message = str(error)
    assert message is None or (message.startswith("a.vmx:") and message.isprintable())
