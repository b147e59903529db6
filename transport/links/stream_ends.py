# SPDX-License-Identifier: Apache-2.0
"""Connect to and listen at tcp://host:port, tls://host:port and vsock://cid:port.

TLS is imported where it is used: most guests and commands connect to their own host, and importing
ssl takes longer than importing this package. A daemon imports it at start.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from cowshed.cache.errors import PeerError, UsageError
from cowshed.transport.links.acceptor import Acceptor
from cowshed.transport.links.addresses import Address, parse_stream_uri
from cowshed.transport.links.stream import StreamConnection
from cowshed.transport.links.unix import CONNECT_SECONDS
from cowshed.transport.messages.protocol import MAX_REPLY_BYTES, MAX_REQUEST_BYTES

if TYPE_CHECKING:
    import ssl

__all__ = ["StreamListener", "connect", "listen", "tune"]

# A peer that acknowledges no data for so long is taken for gone.
_USER_TIMEOUT_MS: Final = 30_000
_KEEPALIVE: Final = ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 4))


def connect(uri: str, timeout: float = CONNECT_SECONDS) -> StreamConnection:
    """Connect, to send requests and receive replies; the first send or receive starts TLS.

    Raises UsageError for a URI that cannot be used, PeerError if nobody answers in time.
    """
    address = parse_stream_uri(uri)
    tls = None
    if address.scheme == "tls":
        from cowshed.transport.links.tls import TlsSession, client_context

        context = client_context(address.options, address.without_options)
        server_name = address.options.get("server_name", address.host)
        tls = TlsSession(context, server_side=False, server_name=server_name)
    try:
        sock = _connected(address, timeout)
    except OSError as error:
        reason = (
            f"no answer in {timeout:g} s" if isinstance(error, TimeoutError) else error.strerror
        )
        raise PeerError(
            f"cannot connect to {address.without_options}: {reason}; is the backend running?"
        ) from error
    return StreamConnection(sock, address.without_options, tls, MAX_REPLY_BYTES, MAX_REQUEST_BYTES)


def _connected(address: Address, timeout: float) -> socket.socket:
    if address.scheme != "vsock":
        sock = socket.create_connection((address.host, address.port), timeout)
        tune(sock)
        return sock
    sock = _vsock(address)
    try:
        sock.settimeout(timeout)
        sock.connect((address.cid, address.port))
    except BaseException:
        sock.close()
        raise
    return sock


def _vsock(address: Address) -> socket.socket:
    if not hasattr(socket, "AF_VSOCK"):
        raise UsageError(
            f"cannot use {address.uri!r}: this Python knows no vsock; use tcp:// or tls://"
        )
    try:
        return socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    except OSError as error:
        raise UsageError(
            f"cannot use {address.uri!r}: this kernel has no vsock ({error.strerror}); "
            "load vsock, or use tcp:// or tls://"
        ) from error


def tune(sock: socket.socket) -> None:
    """Make a tcp socket send at once, and notice a peer that is gone without closing."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE:
        sock.setsockopt(socket.IPPROTO_TCP, option, value)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _USER_TIMEOUT_MS)


class StreamListener:
    """A listening stream socket, owned. uri is its address, with the port that the kernel chose."""

    def __init__(
        self, sock: socket.socket, address: Address, context: ssl.SSLContext | None
    ) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._context = context
        self._is_vsock: Final = address.scheme == "vsock"
        self.scheme: Final = address.scheme
        port = sock.getsockname()[1]
        host = f"[{address.host}]" if ":" in address.host else address.host
        self.uri: Final = f"{address.scheme}://{host}:{port}"
        self._acceptor: Final = Acceptor()

    def __enter__(self) -> StreamListener:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fileno(self) -> int:
        """Return the socket's descriptor, -1 once closed."""
        return self._socket.fileno()

    @property
    def is_local(self) -> bool:
        """Whether only this host can connect."""
        return not self._is_vsock and self._socket.getsockname()[0].startswith(("127.", "::1"))

    def accept(self) -> StreamConnection | None:
        """Accept a waiting peer; None if none waits, or it had to be refused."""
        connection = self.accept_any()
        if connection is None or not connection.no_room:
            return connection
        connection.close()
        self._acceptor.refill()
        return None

    def refill(self) -> None:
        """Refill the reserve of descriptors, after a refused peer was closed."""
        self._acceptor.refill()

    def accept_any(self) -> StreamConnection | None:
        """Accept a waiting peer, even one that must be refused (no_room set); None if none waits.

        The caller must send a refused peer the reason, close it, and refill().
        """
        taken = self._acceptor.accept_any(self._socket)
        if taken is None:
            return None
        sock, name, no_room = taken
        if not self._is_vsock:
            tune(sock)
        host = f"[{name[0]}]" if ":" in str(name[0]) else name[0]
        tls = None
        if self._context is not None:
            from cowshed.transport.links.tls import TlsSession

            tls = TlsSession(self._context, server_side=True)
        where = f"{self.scheme}://{host}:{name[1]}"
        connection = StreamConnection(sock, where, tls, MAX_REQUEST_BYTES, MAX_REPLY_BYTES)
        connection.no_room = no_room
        return connection

    def close(self) -> None:
        """Close the socket. Idempotent."""
        if self._socket.fileno() < 0:
            return
        self._socket.close()
        self._acceptor.close()


def listen(
    uri: str,
    backlog: int = 128,
    context: ssl.SSLContext | None = None,
    opened_by: Callable[[Callable[[], socket.socket]], socket.socket] | None = None,
) -> StreamListener:
    """Listen; on tls, clients must show a certificate that ca signed.

    context is used for tls if the URI and the environment name no files. opened_by, if given, is
    called with a function that makes the socket, and may return one that listens there already.
    Raises UsageError if listening fails.
    """
    address = parse_stream_uri(uri)
    if address.scheme != "tls":
        context = None
    elif address.options or context is None:
        from cowshed.transport.links.tls import server_context

        context = server_context(address.options, address.without_options)
    try:
        sock = (opened_by or _call)(lambda: _bound(address, backlog))
    except OSError as error:
        reason = error.strerror or str(error)
        raise UsageError(f"cannot listen at {address.without_options}: {reason}") from error
    return StreamListener(sock, address, context)


def _call(make: Callable[[], socket.socket]) -> socket.socket:
    return make()


def _bound(address: Address, backlog: int) -> socket.socket:
    if address.scheme == "vsock":
        sock = _vsock(address)
        place: tuple[object, ...] = (address.cid, address.port)
    else:
        family, kind, proto, _, place = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, proto)
    try:
        if address.scheme != "vsock":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(place)
        sock.listen(backlog)
    except BaseException:
        sock.close()
        raise
    return sock
