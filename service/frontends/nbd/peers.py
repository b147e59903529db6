# SPDX-License-Identifier: Apache-2.0
"""The peer of an NBD socket, and NBD's listening sockets: at a path, or at HOST:PORT."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from cowshed.cache.errors import UsageError
from cowshed.service.overlays.claims import Claim
from cowshed.service.settings.domains import Identity, is_operator
from cowshed.service.settings.endpoint import Endpoint

__all__ = ["NbdPeer", "listen_path", "listen_tcp", "peer_of", "tune"]

_UCRED: Final = struct.Struct("iII")
_BACKLOG: Final = 512
# A peer that vanished is noticed in 60 + 6 * 10 seconds at most.
_TCP_OPTIONS: Final = (
    (socket.TCP_NODELAY, 1),
    (socket.TCP_KEEPIDLE, 60),
    (socket.TCP_KEEPINTVL, 10),
    (socket.TCP_KEEPCNT, 6),
    (socket.TCP_USER_TIMEOUT, 120_000),
)


@dataclass(frozen=True)
class NbdPeer:
    """A client. pid is 0 over TCP; address is "" over a unix socket."""

    identity: Identity
    pid: int
    address: str

    @property
    def is_local(self) -> bool:
        """Whether it came over a unix socket, where the kernel reports its user."""
        return not self.address

    @property
    def counted_as(self) -> int | str:
        """The key that its connections are counted under."""
        return self.address if self.identity.uid is None else self.identity.uid

    @property
    def claim(self) -> Claim:
        """Its claim to overlays: its certificate's name takes precedence over its user."""
        identity = self.identity
        owners = [f"client {identity.client_name}"] if identity.client_name else []
        owners += [f"uid {identity.uid}"] if identity.uid is not None else []
        return Claim(
            owners=tuple(owners or [self.address]),
            counted_as=self.counted_as,
            is_operator=is_operator(identity.uid),
            transport="nbd",
            uid=-1 if identity.uid is None else identity.uid,
            pid=self.pid,
        )

    @property
    def who(self) -> dict[str, object]:
        """Its fields in a log line."""
        identity = self.identity
        who: dict[str, object] = {}
        if identity.client_name:
            who["client"] = identity.client_name
        if identity.uid is not None:
            return {**who, "pid": self.pid, "uid": identity.uid}
        return {**who, "address": self.address.removeprefix("address ")}

    def named(self, client_name: str | None) -> NbdPeer:
        """Return the same peer with its certificate's name."""
        return replace(self, identity=replace(self.identity, client_name=client_name))


def peer_of(sock: socket.socket) -> NbdPeer:
    """Ask the kernel for the peer; OSError if it has disconnected."""
    if sock.family == socket.AF_UNIX:
        packed = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        pid, uid, gid = _UCRED.unpack(packed)
        return NbdPeer(Identity(uid, gid), pid, "")
    return NbdPeer(Identity(), 0, f"address {sock.getpeername()[0]}")


def tune(sock: socket.socket) -> None:
    """Make a client's socket non-blocking and, over TCP, enable keepalive and a send timeout."""
    sock.setblocking(False)
    if sock.family != socket.AF_UNIX:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _TCP_OPTIONS:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)


def listen_path(path: Path) -> socket.socket:
    """Listen at a path for anybody on this host; replaces the socket of a dead daemon.

    The caller must hold the run-dir's lock, so no live daemon listens there. UsageError on failure.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISSOCK(os.stat(path, follow_symlinks=False).st_mode):
                raise UsageError(f"cannot listen at {path}: it exists and is no socket; move it")
            os.unlink(path)
        # bind() gives the path the socket's mode less the umask: closed to others until the chmod.
        os.fchmod(sock.fileno(), 0o600)
        sock.bind(str(path))
        os.chmod(path, 0o666)
        return _listening(sock)
    except OSError as error:
        sock.close()
        raise UsageError(f"cannot listen at {path}: {error.strerror}") from error
    except UsageError:
        sock.close()
        raise


def listen_tcp(endpoint: Endpoint) -> socket.socket:
    """Listen at HOST:PORT; UsageError on failure."""
    sock = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            endpoint.host, endpoint.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        return _listening(sock)
    except (OSError, UnicodeError) as error:
        if sock is not None:
            sock.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(
            f"cannot listen for NBD at {endpoint}: {reason}; give another address with --nbd"
        ) from error


def _listening(sock: socket.socket) -> socket.socket:
    sock.setblocking(False)
    sock.listen(_BACKLOG)
    return sock
