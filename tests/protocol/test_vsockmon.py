"""Layout of captured records.  tests/devices/test_capture.py tests their content."""

from __future__ import annotations

from vsockets.protocol.vsockmon import Operation, Transport, encode_header


def test_header_has_the_layout_of_linux() -> None:
    """Check ``struct af_vsockmon_hdr``: little-endian, 32 bytes."""
    header = encode_header(Operation.PAYLOAD, (3, 1024), (2, 5000), Transport.VIRTIO, 44)
    assert header.hex(" ", 4) == (
        "03000000 00000000 02000000 00000000 00040000 88130000 04000200 2c000000"
    )


def test_enumerations_have_the_numbers_of_linux() -> None:
    assert [(op.name, op.value) for op in Operation] == [
        ("UNKNOWN", 0),
        ("CONNECT", 1),
        ("DISCONNECT", 2),
        ("CONTROL", 3),
        ("PAYLOAD", 4),
    ]
    assert [(one.name, one.value) for one in Transport] == [("NONE", 1), ("VIRTIO", 2)]
