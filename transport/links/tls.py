# SPDX-License-Identifier: Apache-2.0
"""TLS without a socket: ciphertext in, plaintext out, and the other way round.

Mutual always: both ends show a certificate that the other's CA has signed. The name in the client's
certificate is who it is (certificate_name). A server takes TLS 1.2 or newer.
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
    """Make the context of a listener that demands a certificate of whoever connects.

    options are cert, key and ca, each a PEM file; what names the listener in a UsageError.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_REQUIRED
    return _loaded(context, options, what)


def client_context(options: Mapping[str, str], what: str) -> ssl.SSLContext:
    """Make the context of one who connects: it shows its own certificate and checks the other's."""
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
    # Without this, OpenSSL would ask at the terminal of whoever started us.
    raise UsageError("a TLS key is encrypted; give one without a passphrase")


def certificate_name(certificate: Mapping[str, Any] | None) -> str:
    """Give the name a checked certificate is for: its first DNS name, else URI or e-mail, else CN.

    "" for none. The argument is what SSLObject.getpeercert() gives.
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
    """One end of a TLS connection. feed() what came from the socket, send what outgoing holds.

    Every violation, and every certificate that does not hold, is a PeerError, after which outgoing
    still has the alert to be sent. Memory: what was fed and not taken, and what was sent and not
    passed on; the caller bounds both by how much it gives at a time.
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
        """What is to go to the socket; del what went from its front."""
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
        """Take what came; give the plaintext there is. `ended` is set once the peer has closed."""
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
        """Put plaintext behind what is outgoing; only once ready."""
        assert self.ready
        try:
            self._object.write(plaintext)
        except ssl.SSLError as error:
            raise PeerError(f"TLS: {_reason(error)}") from error

    def close(self) -> None:
        """Put the closing alert behind what is outgoing."""
        # The peer's own, for which it would wait, nobody needs.
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
        return f"the peer's certificate does not hold: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return (error.reason or str(error)).replace("_", " ").lower()
    return getattr(error, "strerror", None) or str(error)
