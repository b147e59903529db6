# SPDX-License-Identifier: Apache-2.0
"""One holder of our descriptors: what it has been told to hold, and what it has yet to be told.

A holder (systemd, a keeper of ours, a program that takes over) may be away, busy or full at any
moment. So what it should hold is remembered here as a difference, and sent as far as it can be
each time that send() is called:

    stale       it was sent, and is to be dropped
    unsent      it is to be sent
    notices     how we are (READY, STOPPING), after all that

No message is sent twice to a holder, and a group's removal goes before a group of the same name.
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

# What says that nobody is there, as opposed to something about one message.
_AWAY: Final = (errno.ECONNREFUSED, errno.ENOENT, errno.ENOTCONN, errno.EACCES, errno.EPROTOTYPE)
_MAX_DATAGRAM: Final = 4096


class FdKeeper:
    """What one supervisor holds. Not thread-safe; close() it.

    sent are the groups that it holds already. Invariants: unsent and sent have nothing in common
    but what is stale; stale is part of sent.
    """

    def __init__(self, address: str, sent: Iterable[str] = ()) -> None:
        """UsageError if the address cannot be one."""
        self._address: Final = _socket_address(address)
        self._sent = set(sent)
        self._stale: set[str] = set()
        self._unsent: dict[str, None] = {}  # in order
        self._notices: deque[Mapping[str, str]] = deque()
        self._is_connected = False
        self.is_slow = False
        self.is_full = False
        # Connected, so that the kernel says when a full one takes more. Never waits.
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._socket.setblocking(False)
        self._socket.bind("")  # a name that the kernel chooses, to be answered at

    def close(self) -> None:
        """Tell it no more; it goes on holding what it holds."""
        self._socket.close()

    def fileno(self) -> int:
        """Ready to write when it takes more, to read when it has said something."""
        return self._socket.fileno()

    @property
    def address(self) -> str:
        """Where it is told, as a NOTIFY_SOCKET."""
        return os.fsdecode(self._address.replace(b"\0", b"@", 1))

    @property
    def nr_unsent(self) -> int:
        """How many groups it is to hold and does not."""
        return len(self._unsent)

    @property
    def is_done(self) -> bool:
        """Whether it was told everything."""
        return not (self._unsent or self._stale or self._notices)

    def want(self, names: Iterable[str]) -> None:
        """Have these groups held, those that are not yet."""
        for name in names:
            if name not in self._sent or name in self._stale:
                self._unsent[name] = None

    def drop(self, name: str) -> None:
        """Have a group held no more."""
        self._unsent.pop(name, None)
        if name in self._sent:
            self._stale.add(name)

    def note(self, fields: Mapping[str, str]) -> None:
        """Have it told how we are, after all that it is to hold."""
        self._notices.append(fields)

    def send(self, groups: Groups, seconds: float = 0.0) -> OSError | None:
        """Send what is left to be; what kept it from that, if anything.

        Waits for a full one for so many seconds, and not at all again until one has taken all.
        """
        deadline = time.monotonic() + (0.0 if self.is_slow else seconds)
        while (error := self._send_some(groups)) is not None:
            if not self.is_full:
                return error
            left = deadline - time.monotonic()
            if left <= 0 or not _takes_more(self._socket, left):
                self.is_slow = True
                return TimeoutError("it takes no more just now")
        self.is_slow = False
        return None

    def refused(self) -> list[str]:
        """Groups that it has just said it could not hold; they are unsent again."""
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
                    first = first or error  # one that cannot be sent keeps no other
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
    """Give the address that a NOTIFY_SOCKET stands for; '@' begins an abstract one."""
    if text.startswith("@"):
        return b"\0" + os.fsencode(text[1:])
    if text.startswith("/"):
        return os.fsencode(text)
    raise UsageError(f"NOTIFY_SOCKET is {text!r}; it must begin with '/' or '@'")
