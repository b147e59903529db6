# SPDX-License-Identifier: Apache-2.0
"""The keeper: holds what must outlive the backend, and starts it again when it dies.

A supervisor as small as can be, for hosts where systemd is not ours: it speaks the same protocol
(fd_store.py) and does nothing else. It has one thread, so that a successor can be forked instead of
started: what the backend imports is there already, and a death costs guests milliseconds.

    the one it started dies  -> fork the next, with all that is held as LISTEN_FDS
    it ends by itself        -> end with its status (it said STOPPING, or was never READY)
    SIGTERM, SIGINT, SIGHUP  -> passed on

The keeper's own death: the backend notices, goes on serving, and starts another keeper, which
watches it by pidfd (a keeper need not be the parent of who it keeps).
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import gc
import os
import secrets
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from typing import Final

from cowshed.service.fd_store import FIRST_FD, Groups, Notice, listen_environment
from cowshed.service.logs import EventLog
from cowshed.service.loop import ignore_stop_signals

__all__ = ["KEEPER_PID", "Keeper", "notify_address"]

_log = EventLog("cowshed.keeper")

KEEPER_PID: Final = "COWSHED_KEEPER_PID"

_UCRED: Final = struct.Struct("3i")
_MAX_DATAGRAM: Final = 4096
_MAX_FDS: Final = 253
_PASSED_ON: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# Deaths in quick succession are made up for ever more slowly; guests wait, and none is given up.
_QUICK_SECONDS: Final = 5.0
_MAX_DELAY_SECONDS: Final = 10.0
_FAR_FD: Final = 512


def notify_address() -> str:
    """Make up an address for NOTIFY_SOCKET that nobody else has."""
    return f"@cowshed-keeper-{os.getpid()}-{secrets.token_hex(8)}"


class Keeper:
    """Keeps one backend. serve() is what a child does; it gets the environment set and returns.

    Invariant: groups are owned, and are what the living backend asked to hold.
    """

    def __init__(self, serve: Callable[[], int]) -> None:
        self._serve = serve
        self._groups: Groups = {}
        self._address = notify_address()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._socket.bind(b"\0" + self._address[1:].encode())
        self._socket.setblocking(False)
        self._pid = 0
        self._pidfd = -1
        self._ready = self._stopping = False
        self._nr_quick_deaths = 0
        self._wake_reader, self._wake_writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    @property
    def address(self) -> str:
        """What the backend is told as NOTIFY_SOCKET."""
        return self._address

    def run(self, watch_pid: int | None = None) -> int:
        """Keep a backend, one that lives already if watch_pid names it; the last one's status."""
        signal.set_wakeup_fd(self._wake_writer, warn_on_full_buffer=False)
        for number in _PASSED_ON:
            signal.signal(number, self._pass_on)
        if watch_pid is None:
            self._start()
        else:
            self._pid, self._pidfd = watch_pid, os.pidfd_open(watch_pid)
            self._ready = True
        while True:
            status = self._watch()
            if status is not None:
                ignore_stop_signals()
                return status
            self._start()

    def _pass_on(self, number: int, _: object) -> None:
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)
        elif number != signal.SIGHUP:
            self._stopping = True

    def _watch(self) -> int | None:
        """Hold what is given, until the backend is gone; its status if that is the end."""
        born = time.monotonic()
        poll = select.poll()
        for fd in (self._socket.fileno(), self._pidfd, self._wake_reader):
            poll.register(fd, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll()}
            if self._wake_reader in ready:
                with contextlib.suppress(BlockingIOError):
                    os.read(self._wake_reader, 512)
            if self._socket.fileno() in ready:
                self._receive()
            if self._pidfd in ready:
                break
        self._receive()  # what it sent before it died
        gone, self._pidfd = self._pidfd, -1
        os.close(gone)
        return self._after_death(time.monotonic() - born)

    def _after_death(self, lived_seconds: float) -> int | None:
        status = 0
        with contextlib.suppress(ChildProcessError):
            status = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        if self._stopping or not self._ready:
            return status if status >= 0 else 128 - status
        died = f"killed by {signal.Signals(-status).name}" if status < 0 else f"status {status}"
        quick = lived_seconds < _QUICK_SECONDS
        self._nr_quick_deaths = self._nr_quick_deaths + 1 if quick else 0
        delay = min(_MAX_DELAY_SECONDS, 0.1 * 2 ** (self._nr_quick_deaths - 2))
        if self._nr_quick_deaths < 2:
            delay = 0.0
        nr_fds = sum(len(fds) for fds in self._groups.values())
        _log.error(
            "backend-died",
            "guests wait for its successor" + (f", which waits {delay:.1f} s" if delay else ""),
            pid=self._pid,
            how=died,
            descriptors=nr_fds,
        )
        select.select([self._wake_reader], [], [], delay)
        return status if self._stopping else None

    def _receive(self) -> None:
        while True:
            try:
                room = socket.CMSG_SPACE(4 * _MAX_FDS) + socket.CMSG_SPACE(_UCRED.size)
                datagram, ancillary, _, _ = self._socket.recvmsg(
                    _MAX_DATAGRAM, room, socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                return
            sender, fds = 0, array.array("i")
            for level, kind, value in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    fds.frombytes(value[: len(value) // 4 * 4])
                elif (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
                    sender = _UCRED.unpack(value)[0]
            self._obey(Notice.parse(datagram), fds.tolist() if sender == self._pid else [], sender)
            if sender != self._pid:
                _close_all(fds.tolist())

    def _obey(self, notice: Notice, fds: list[int], sender: int) -> None:
        if sender != self._pid:
            return
        fields = notice.fields
        name = fields.get("FDNAME", "stored")
        if fields.get("FDSTORE") == "1":
            self._groups.setdefault(name, []).extend(fds)
        else:
            _close_all(fds)
        if fields.get("FDSTOREREMOVE") == "1":
            _close_all(self._groups.pop(name, []))
        self._ready |= fields.get("READY") == "1"
        self._stopping |= fields.get("STOPPING") == "1"

    def _start(self) -> None:
        pid = os.fork()
        if pid == 0:
            self._become_backend()
        self._pid, self._pidfd = pid, os.pidfd_open(pid)

    def _become_backend(self) -> None:
        """In the child: nothing of the keeper is left but what it holds; never returns."""
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            for number in _PASSED_ON:
                signal.signal(number, signal.SIG_DFL)
            self._socket.close()
            os.close(self._wake_reader)
            os.close(self._wake_writer)
            variables, fds = listen_environment(self._groups, os.getpid())
            _number_from(FIRST_FD, fds)
            variables |= {"NOTIFY_SOCKET": self._address, KEEPER_PID: str(os.getppid())}
            os.environ.update(variables)
            gc.freeze()  # what was imported stays shared with the keeper
            status = self._serve()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)


def _number_from(first: int, fds: list[int]) -> None:
    """Move descriptors to first, first + 1, ..., in order; closes the originals."""
    far = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, max(_FAR_FD, first + len(fds))) for fd in fds]
    _close_all(fds)
    for number, fd in enumerate(far, first):
        os.dup2(fd, number, inheritable=False)
        os.close(fd)


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
