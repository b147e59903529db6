# SPDX-License-Identifier: Apache-2.0
"""The daemon's TLS context, made from the files of its table [tls].

Separate from tls_config.py, so that only daemons import ssl.
"""

from __future__ import annotations

import ssl

from cowshed.cache.errors import UsageError
from cowshed.service.settings.tls_config import TlsConfig

__all__ = ["make_context"]


def make_context(config: TlsConfig) -> ssl.SSLContext:
    """Read the files into a server's context, TLS 1.2 or newer. Raises UsageError, one line."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_verify_locations(cafile=config.ca)
    except OSError as error:  # ssl.SSLError is one
        raise UsageError(f"cannot use ca {str(config.ca)!r} of tls: {_reason(error)}") from error
    try:
        context.load_cert_chain(config.cert, config.key, password=_no_passphrase)
    except OSError as error:
        raise UsageError(
            f"cannot use cert {str(config.cert)!r} with key {str(config.key)!r} of tls: "
            f"{_reason(error)}"
        ) from error
    required = config.clients == "required"
    context.verify_mode = ssl.CERT_REQUIRED if required else ssl.CERT_OPTIONAL
    return context


def _no_passphrase() -> str:
    # Without this, OpenSSL would ask for the passphrase at the terminal.
    raise UsageError("key of tls is encrypted: give one without a passphrase")


def _reason(error: OSError) -> str:
    if isinstance(error, ssl.SSLError):
        return (error.reason or "not PEM").replace("_", " ").lower()
    return error.strerror or str(error)
