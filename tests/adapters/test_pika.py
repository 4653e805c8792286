"""pika, which supports TCP only, through ``vsock forward`` to a minimal broker."""

from __future__ import annotations

import re
import socket
import struct
import subprocess
import sys
from typing import Any

import pytest

from vsockets.testing import PrivateFabric

from .conftest import Serve

pika: Any = pytest.importorskip("pika", reason="needs pika")


class Broker:
    """The part of AMQP 0-9-1 that a queue of one message needs."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._message: list[bytes] = []

    def serve(self) -> None:
        spec = pika.spec
        assert self._read(8) == b"AMQP\0\0\x09\x01"
        self._send(0, spec.Connection.Start(server_properties={}, mechanisms="PLAIN"))
        answers = {
            spec.Connection.StartOk: spec.Connection.Tune(0, 131_072, 0),
            spec.Connection.Open: spec.Connection.OpenOk(),
            spec.Connection.Close: spec.Connection.CloseOk(),
            spec.Channel.Open: spec.Channel.OpenOk(),
            spec.Channel.Close: spec.Channel.CloseOk(),
            spec.Queue.Declare: spec.Queue.DeclareOk("q", 0, 0),
            spec.Basic.Get: spec.Basic.GetOk(1, False, "", "q", 0),
        }
        while True:
            raw, frame = self._frame()
            if not isinstance(frame, pika.frame.Method):  # a header or body frame of a message
                self._message.append(raw)
            elif (answer := answers.get(type(frame.method))) is not None:
                self._send(frame.channel_number, answer)
                if isinstance(frame.method, spec.Basic.Get):
                    self._sock.sendall(b"".join(self._message))

    def _send(self, channel: int, method: Any) -> None:
        self._sock.sendall(pika.frame.Method(channel, method).marshal())

    def _frame(self) -> tuple[bytes, Any]:
        head = self._read(7)
        raw = head + self._read(struct.unpack(">I", head[3:])[0] + 1)
        return raw, pika.frame.decode_frame(raw)[1]

    def _read(self, size: int) -> bytes:
        data = self._sock.recv(size, socket.MSG_WAITALL)
        if len(data) < size:
            raise ConnectionResetError
        return data


def test_message_round_trip(fabric: PrivateFabric, guest: int, serve: Serve) -> None:
    port = serve(lambda sock: Broker(sock).serve())
    forward = ("forward", "tcp:127.0.0.1:0", f"vsock:host:{port}")
    with subprocess.Popen(
        [sys.executable, "-m", "vsockets.cli", *forward], stderr=subprocess.PIPE, text=True
    ) as forwarder:
        try:
            assert forwarder.stderr is not None
            found = re.search(r"listening on tcp:(\S+):(\d+)", forwarder.stderr.readline())
            assert found
            where = pika.ConnectionParameters(found[1], int(found[2]), heartbeat=0)
            with pika.BlockingConnection(where) as connection:
                channel = connection.channel()
                channel.queue_declare("q")
                channel.basic_publish("", "q", b"a message")
                _, _, body = channel.basic_get("q")
                assert body == b"a message"
        finally:
            forwarder.terminate()
