"""TLS for the link: HTTP/2 by ALPN, and certificates at both ends."""

from __future__ import annotations

import ssl
from pathlib import Path

_PROTOCOL = "h2"


def client_context(
    authority: Path, certificate: Path | None = None, key: Path | None = None
) -> ssl.SSLContext:
    """For the host proxy: the far end must be one that ``authority`` (PEM) vouches for.

    ``certificate`` is our own, with its ``key`` unless that is in the same file.  Raises OSError.
    """
    context = ssl.create_default_context(cafile=authority)
    context.minimum_version = ssl.TLSVersion.TLSv1_2  # RFC 9113, section 9.2
    if certificate is not None:
        context.load_cert_chain(certificate, key)
    context.set_alpn_protocols([_PROTOCOL])
    return context


def server_context(
    certificate: Path, key: Path | None = None, authority: Path | None = None
) -> ssl.SSLContext:
    """For the AMQP proxy: with ``authority`` only clients that it vouches for.  Raises OSError."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(certificate, key)
    if authority is not None:
        context.load_verify_locations(authority)
        context.verify_mode = ssl.CERT_REQUIRED
    context.set_alpn_protocols([_PROTOCOL])
    return context
