"""Replacement of ``socket.socket`` that creates vSockets sockets for AF_VSOCK."""

from __future__ import annotations

import socket as stdlib
from typing import Any

from .model import constants
from .model.constants import AF_VSOCK
from .socket import socket

_original = stdlib.socket


class _Dispatch(type):
    """Metaclass whose instances create a vSockets socket for AF_VSOCK, else a standard socket."""

    def __call__(cls, family: int = -1, *args: Any, **kwargs: Any) -> Any:
        if cls is not Socket:  # a program's subclass of socket.socket
            return super().__call__(family, *args, **kwargs)
        made = socket if family == AF_VSOCK else _original
        return made(family, *args, **kwargs)

    def __instancecheck__(cls, instance: object) -> bool:
        return (
            isinstance(instance, _original)
            if cls is Socket
            else super().__instancecheck__(instance)
        )

    def __subclasscheck__(cls, subclass: type) -> bool:
        return (
            issubclass(subclass, _original)
            if cls is Socket
            else super().__subclasscheck__(subclass)
        )


class Socket(_original, metaclass=_Dispatch):
    """The class ``socket.socket`` after :func:`install`."""

    __slots__ = ()


def install() -> None:
    """Make ``socket.socket(socket.AF_VSOCK, …)`` return a vSockets socket.

    Pure-Python programs then use vSockets unchanged.  Modules that imported the class before
    (``from socket import socket``) keep the original.  A second call has no effect.
    """
    stdlib.socket = Socket  # type: ignore[misc]
    for name in vars(constants):
        if name.startswith(("AF_VSOCK", "SO_VM_SOCKETS_", "VMADDR_")) and not hasattr(stdlib, name):
            setattr(stdlib, name, getattr(constants, name))
