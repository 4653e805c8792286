"""The host's commands to a guest's tools (TCLO), without input and output.

The guest connects, and the host sends one command at a time; the tools answer ``OK text`` or
``ERROR text``.  First the tools are reset, and register their capabilities; only then do they
obey the commands that change the machine's state.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from .limits import GUESTRPC_COMMANDS_MAX
from .packets import Packet, encode

#: Changes of the machine's state, by the name that ``vsock guestinfo send`` has for them.
STATE_CHANGES = {
    "halt": b"OS_Halt",
    "reboot": b"OS_Reboot",
    "power-on": b"OS_PowerOn",
    "suspend": b"OS_Suspend",
    "resume": b"OS_Resume",
}

#: The daemon's name for itself; the one of a user's session is ``toolbox-dnd``.
_DAEMON = b"ATR toolbox"

#: Sent once the tools have answered ``reset``.  Without time synchronisation, which needs commands
#: of the backdoor that QEMU lacks; with a report of the guest's address.
_FIRST = (b"Capabilities_Register", b"Set_Option synctime 0", b"Set_Option broadcastIP 1")


class CommandFailed(Exception):
    """A command that the tools have refused, or not answered."""


@dataclass
class _Command:
    text: bytes
    answered: Callable[[bytes | CommandFailed], object]


class CommandChannel:
    """The commands of one connection of a guest's tools.

    ``send`` gets the bytes to send.  ``ready`` is called when the tools obey commands, and only if
    they are the tools' daemon.
    """

    def __init__(self, send: Callable[[bytes], object], ready: Callable[[], object]) -> None:
        self.is_daemon = False
        self._send = send
        self._ready = ready
        self._waiting: deque[_Command] = deque()
        self._sent: _Command | None = None
        self._command(b"reset", self._was_reset)

    @property
    def is_waiting(self) -> bool:
        """True while the tools have yet to answer a command."""
        return self._sent is not None

    def command(self, text: bytes, answered: Callable[[bytes | CommandFailed], object]) -> None:
        """Send a command; ``answered`` is called with the text of the answer, or with the failure.

        Raises CommandFailed when too many commands wait.
        """
        if len(self._waiting) >= GUESTRPC_COMMANDS_MAX:
            raise CommandFailed(f"{GUESTRPC_COMMANDS_MAX} commands wait already")
        self._command(text, answered)

    def receive(self, packet: Packet) -> None:
        """Handle a packet of the tools: a ping, or the answer to the command that was sent."""
        if packet.is_ping or self._sent is None:
            return
        command, self._sent = self._sent, None
        word, _, rest = packet.payload.rstrip(b"\0").partition(b" ")
        refused = CommandFailed(f"the tools refuse {command.text.decode()}: {rest!a:.80}")
        command.answered(rest if word == b"OK" else refused)
        self._send_next()

    def close(self) -> None:
        """Fail all commands that wait for an answer."""
        commands = [*([self._sent] if self._sent else ()), *self._waiting]
        self._sent = None
        self._waiting.clear()
        for command in commands:
            command.answered(CommandFailed("the tools have closed the connection"))

    def _command(self, text: bytes, answered: Callable[[bytes | CommandFailed], object]) -> None:
        self._waiting.append(_Command(text, answered))
        self._send_next()

    def _send_next(self) -> None:
        if self._sent is None and self._waiting:
            self._sent = self._waiting.popleft()
            self._send(encode(self._sent.text))

    def _was_reset(self, answer: bytes | CommandFailed) -> None:
        if answer != _DAEMON:
            return  # tools of a user's session, or an error: no commands
        self.is_daemon = True
        for text in _FIRST[:-1]:
            self._command(text, lambda answer: None)
        self._command(_FIRST[-1], lambda answer: self._ready())
