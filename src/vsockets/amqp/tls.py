"""TLS contexts for the connection between host proxy and AMQP proxy, with ALPN "h2"."""

from __future__ import annotations

import ssl
from pathlib import Path

_PROTOCOL = "h2"


def client_context(
    authority: Path, certificate: Path | None = None, key: Path | None = None
) -> ssl.SSLContext:
    """Return the host proxy's context; the server's certificate must be signed by ``authority``.

    ``certificate`` (PEM) is the host proxy's own; ``key`` is omitted if it is in the same file.
    Raises OSError.
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
    """Return the AMQP proxy's context.

    With ``authority``, clients need a certificate that it has signed.  All files are PEM.
    Raises OSError.
    """
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(certificate, key)
    if authority is not None:
        context.load_verify_locations(authority)
        context.verify_mode = ssl.CERT_REQUIRED
    context.set_alpn_protocols([_PROTOCOL])
    return context
