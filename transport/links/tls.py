# SPDX-License-Identifier: Apache-2.0
"""TLS without a socket: ciphertext in, plaintext out, and the other way round.

Always mutual: each end shows a certificate that the other's CA has signed. The name in its
certificate identifies the client (certificate_name). TLS 1.2 or newer.
"""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import Mapping
from typing import Any, Final

from cowshed.cache.errors import PeerError, UsageError

__all__ = ["TlsSession", "certificate_name", "client_context", "server_context"]

_READ_BYTES: Final = 64 << 10
_NEEDED: Final = ("cert", "key", "ca")


def server_context(options: Mapping[str, str], what: str) -> ssl.SSLContext:
    """Make the context of a listener that demands a certificate from every client.

    options are cert, key and ca, each a PEM file; what names the listener in a UsageError.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_REQUIRED
    return _loaded(context, options, what)


def client_context(options: Mapping[str, str], what: str) -> ssl.SSLContext:
    """Make the context of a client, which shows its certificate and checks the server's."""
    return _loaded(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), options, what)


def _loaded(context: ssl.SSLContext, options: Mapping[str, str], what: str) -> ssl.SSLContext:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    missing = [name for name in _NEEDED if name not in options]
    if missing:
        raise UsageError(
            f"{what} lacks {', '.join(missing)}: add ?cert=FILE&key=FILE&ca=FILE, "
            "or set COWSHED_TLS_CERT, COWSHED_TLS_KEY and COWSHED_TLS_CA"
        )
    try:
        context.load_verify_locations(cafile=options["ca"])
    except (OSError, ssl.SSLError) as error:
        raise UsageError(f"{what}: cannot use ca {options['ca']!r}: {_reason(error)}") from error
    try:
        context.load_cert_chain(options["cert"], options["key"], password=_no_password)
    except (OSError, ssl.SSLError) as error:
        raise UsageError(
            f"{what}: cannot use cert {options['cert']!r} with key {options['key']!r}: "
            f"{_reason(error)}"
        ) from error
    return context


def _no_password() -> str:
    # Without this, OpenSSL would ask for the passphrase at the terminal.
    raise UsageError("a TLS key is encrypted; give one without a passphrase")


def certificate_name(certificate: Mapping[str, Any] | None) -> str:
    """Return a checked certificate's name: its first DNS name, else URI or e-mail, else CN.

    "" if there is none. The argument is the result of SSLObject.getpeercert().
    """
    if not certificate:
        return ""
    others = certificate.get("subjectAltName", ())
    for kind in ("DNS", "URI", "email"):
        for found, value in others:
            if found == kind:
                return str(value)
    for part in certificate.get("subject", ()):
        for key, value in part:
            if key == "commonName":
                return str(value)
    return ""


class TlsSession:
    """One end of a TLS connection: the owner must feed() received bytes and send those in outgoing.

    Every violation, and every invalid certificate, is a PeerError; outgoing then still has the
    alert to be sent. Memory is bounded by what the caller feeds and sends at a time, and by what
    it leaves in outgoing.
    """

    def __init__(
        self, context: ssl.SSLContext, *, server_side: bool, server_name: str | None = None
    ) -> None:
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._object = context.wrap_bio(self._incoming, self._outgoing, server_side, server_name)
        self._unsent = bytearray()
        self.ready = False
        self.ended = False
        if not server_side:
            self._shake()

    @property
    def outgoing(self) -> bytearray:
        """The bytes to be sent; the sender must delete from the front what it sent."""
        if self._outgoing.pending:
            self._unsent += self._outgoing.read()
        return self._unsent

    @property
    def peer_name(self) -> str:
        """The name in the peer's certificate; "" before the handshake is done."""
        return certificate_name(self._object.getpeercert()) if self.ready else ""

    @property
    def peer_names(self) -> list[str]:
        """Every name in the peer's certificate, peer_name first; [] before the handshake."""
        if not self.ready:
            return []
        certificate: Mapping[str, Any] = self._object.getpeercert() or {}
        names = [self.peer_name]
        names += [str(value) for _, value in certificate.get("subjectAltName", ())]
        names += [
            str(value)
            for part in certificate.get("subject", ())
            for key, value in part
            if key == "commonName"
        ]
        return list(dict.fromkeys(filter(None, names)))

    def feed(self, ciphertext: bytes | memoryview) -> bytes:
        """Take received bytes and return the plaintext; sets `ended` once the peer has closed."""
        self._incoming.write(ciphertext)
        if not self.ready and not self._shake():
            return b""
        plain = []
        try:
            while piece := self._object.read(_READ_BYTES):
                plain.append(piece)
            self.ended = True
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLZeroReturnError:
            self.ended = True
        except ssl.SSLError as error:
            raise PeerError(f"TLS: {_reason(error)}") from error
        return b"".join(plain)

    def send(self, plaintext: bytes | memoryview) -> None:
        """Append plaintext, encrypted, to outgoing; only once ready."""
        assert self.ready
        try:
            self._object.write(plaintext)
        except ssl.SSLError as error:
            raise PeerError(f"TLS: {_reason(error)}") from error

    def close(self) -> None:
        """Append the closing alert to outgoing."""
        # unwrap() fails for lack of the peer's alert, which is not needed.
        with contextlib.suppress(ssl.SSLError, ValueError):
            self._object.unwrap()

    def _shake(self) -> bool:
        try:
            self._object.do_handshake()
        except ssl.SSLWantReadError:
            return False
        except ssl.SSLError as error:
            raise PeerError(f"TLS handshake: {_reason(error)}") from error
        self.ready = True
        return True


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the peer's certificate is not valid: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return (error.reason or str(error)).replace("_", " ").lower()
    return getattr(error, "strerror", None) or str(error)
