"""ssh over vSockets: paramiko on both sides."""

from __future__ import annotations

import socket
import threading

import pytest

from .conftest import Serve, example


def test_paramiko(guest: int, serve: Serve) -> None:
    module = example("paramiko_client")
    paramiko = module.paramiko
    host_key = paramiko.ECDSAKey.generate()

    class Server(paramiko.ServerInterface):  # type: ignore[misc,name-defined]
        def check_auth_password(self, username: str, password: str) -> int:
            right = (username, password) == ("alice", "secret")
            return int(paramiko.AUTH_SUCCESSFUL if right else paramiko.AUTH_FAILED)

        def check_channel_request(self, kind: str, chanid: int) -> int:
            return int(paramiko.OPEN_SUCCEEDED)

        def check_channel_exec_request(self, channel: object, command: bytes) -> bool:
            self.channel, self.command = channel, command
            return True

    def talk(sock: socket.socket) -> None:
        transport = paramiko.Transport(sock)
        transport.add_server_key(host_key)
        server = Server()
        # With an event it does not raise EOFError for a client that leaves early, the second one.
        transport.start_server(event=threading.Event(), server=server)
        channel = None
        while channel is None and transport.is_active():
            channel = transport.accept(0.1)  # the end of the transport does not end it
        if channel is not None:
            while not hasattr(server, "command"):
                transport.join(0.01)
            channel.sendall(b"you output " + server.command)
            channel.send_exit_status(0)
            channel.close()
        transport.join(30)  # its thread uses the socket until it ends, and logs errors

    port = serve(talk)
    options = {"username": "alice", "allow_agent": False, "look_for_keys": False, "timeout": 30}
    with pytest.MonkeyPatch.context() as patch:
        # As known_hosts would: this key is expected.
        patch.setattr(
            paramiko.SSHClient,
            "load_system_host_keys",
            lambda client: client.get_host_keys().add("vsock-2", host_key.get_name(), host_key),
        )
        with module.connect(2, port, password="secret", **options) as client:
            _, out, _ = client.exec_command("hello")
            assert out.read() == b"you output hello"
        with pytest.raises(paramiko.AuthenticationException):
            module.connect(2, port, password="guessed", **options)
