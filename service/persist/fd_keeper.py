# SPDX-License-Identifier: Apache-2.0
"""One supervisor that holds our descriptors: the groups sent to it, and those still to be sent.

A supervisor (systemd, our keeper, a program that takes over) may be gone, busy or full at any
moment. So this class remembers the difference from what it should hold, and each send() sends as
much of it as the supervisor takes:

    stale       groups that were sent and must be dropped
    unsent      groups that must be sent
    notices     our state (READY, STOPPING), sent last

No message is sent twice to a supervisor, and a group's removal goes before a new group of its name.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from cowshed.cache.errors import UsageError
from cowshed.service.persist.notice import NOT_HELD, Groups, Notice

__all__ = ["FdKeeper"]

# Errors of a supervisor that is gone, as opposed to errors of one message.
_AWAY: Final = (errno.ECONNREFUSED, errno.ENOENT, errno.ENOTCONN, errno.EACCES, errno.EPROTOTYPE)
_MAX_DATAGRAM: Final = 4096


class FdKeeper:
    """The groups that one supervisor holds. Not thread-safe; the owner must close() it.

    Invariants: (1) groups both in _unsent and in _sent are stale; (2) _stale is part of _sent.
    """

    def __init__(self, address: str, sent: Iterable[str] = ()) -> None:
        """sent are the groups that it holds already. UsageError for an invalid address."""
        self._address: Final = _socket_address(address)
        self._sent = set(sent)
        self._stale: set[str] = set()
        self._unsent: dict[str, None] = {}  # in order
        self._notices: deque[Mapping[str, str]] = deque()
        self._is_connected = False
        self.is_slow = False
        self.is_full = False
        # Connected, so that poll shows when a full supervisor takes more. Never blocks.
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._socket.setblocking(False)
        self._socket.bind("")  # the kernel chooses a name, for the supervisor to answer to

    def close(self) -> None:
        """Close the socket; the supervisor keeps what it holds."""
        self._socket.close()

    def fileno(self) -> int:
        """Return the socket: writable when the supervisor takes more, readable when it answered."""
        return self._socket.fileno()

    @property
    def address(self) -> str:
        """The supervisor's address, in the form of NOTIFY_SOCKET."""
        return os.fsdecode(self._address.replace(b"\0", b"@", 1))

    @property
    def nr_unsent(self) -> int:
        """The number of groups that it should hold and does not."""
        return len(self._unsent)

    @property
    def is_done(self) -> bool:
        """Whether everything was sent."""
        return not (self._unsent or self._stale or self._notices)

    def want(self, names: Iterable[str]) -> None:
        """Queue those of these groups that it does not hold."""
        for name in names:
            if name not in self._sent or name in self._stale:
                self._unsent[name] = None

    def drop(self, name: str) -> None:
        """Queue the removal of a group."""
        self._unsent.pop(name, None)
        if name in self._sent:
            self._stale.add(name)

    def note(self, fields: Mapping[str, str]) -> None:
        """Queue a notice of our state, to be sent after all groups."""
        self._notices.append(fields)

    def send(self, groups: Groups, seconds: float = 0.0) -> OSError | None:
        """Send everything queued; return the error that prevented it, or None.

        Waits for a full supervisor at most so many seconds, and not again until it has taken all.
        """
        deadline = time.monotonic() + (0.0 if self.is_slow else seconds)
        while (error := self._send_some(groups)) is not None:
            if not self.is_full:
                return error
            left = deadline - time.monotonic()
            if left <= 0 or not _takes_more(self._socket, left):
                self.is_slow = True
                return TimeoutError("the supervisor takes no more just now")
        self.is_slow = False
        return None

    def refused(self) -> list[str]:
        """Return the groups that it has reported it cannot hold; they are queued again."""
        refused: list[str] = []
        while True:
            try:
                datagram = self._socket.recv(_MAX_DATAGRAM)
            except OSError:
                return refused
            name = Notice.parse(datagram).fields.get(NOT_HELD, "")
            if name in self._sent - self._stale:
                self._sent.discard(name)
                self._unsent[name] = None
                refused.append(name)

    def _send_some(self, groups: Groups) -> OSError | None:
        first = None
        self.is_full = False
        try:
            self._connect()
            for name in sorted(self._stale):
                self._send_one({"FDSTOREREMOVE": "1", "FDNAME": name})
                self._stale.discard(name)
                self._sent.discard(name)
            for name in list(self._unsent):
                try:
                    self._send_one({"FDSTORE": "1", "FDNAME": name, "FDPOLL": "0"}, groups[name])
                except OSError as error:
                    if self.is_full or error.errno in _AWAY:
                        raise
                    first = first or error  # one group's error must not keep others from being sent
                else:
                    del self._unsent[name]
                    self._sent.add(name)
            while self._notices:
                self._send_one(self._notices[0])
                self._notices.popleft()
        except OSError as error:
            self._is_connected &= error.errno not in _AWAY
            return error
        return first

    def _connect(self) -> None:
        if not self._is_connected:
            self._socket.connect(self._address)
            self._is_connected = True

    def _send_one(self, fields: Mapping[str, str], fds: Sequence[int] = ()) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, _int_array(fds))] if fds else []
        try:
            self._socket.sendmsg([Notice(fields).encode()], rights)
        except BlockingIOError:
            self.is_full = True
            raise


def _takes_more(sock: socket.socket, seconds: float) -> bool:
    poll = select.poll()
    poll.register(sock, select.POLLOUT)
    with contextlib.suppress(InterruptedError):
        return bool(poll.poll(1000 * seconds))
    return False


def _int_array(fds: Sequence[int]) -> bytes:
    return b"".join(fd.to_bytes(4, "little") for fd in fds)


def _socket_address(text: str) -> bytes:
    """Return the address of a NOTIFY_SOCKET; '@' begins an abstract one."""
    if text.startswith("@"):
        return b"\0" + os.fsencode(text[1:])
    if text.startswith("/"):
        return os.fsencode(text)
    raise UsageError(f"NOTIFY_SOCKET is {text!r}; it must begin with '/' or '@'")
