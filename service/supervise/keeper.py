# SPDX-License-Identifier: Apache-2.0
"""The keeper: holds what must outlive the backend, and starts it again when it dies.

A minimal supervisor, for hosts where systemd does not supervise the backend: it speaks systemd's
protocol (fd_store.py) and does nothing else. It has one thread, so that it can fork a successor
instead of starting it: all imports are done already, and a death costs guests milliseconds.

    the backend dies         -> fork the next, with all that is held as LISTEN_FDS
    it ends by itself        -> end with its status (it sent STOPPING, or was never READY)
    SIGTERM, SIGINT          -> pass on to the backend
    SIGHUP                   -> have the program as it is installed now check itself; then exec it,
                                have the backend leave, and fork its successor
    another keeper follows   -> once the backend has left to it, wait until its backend serves, and
                                end; or fork the next after all, if that keeper dies before

It blocks only in poll: not for a check, nor for the reader of its log.

If the keeper dies, the backend goes on serving and starts another keeper, which watches it by pidfd
(a keeper need not be the parent of its backend).
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import gc
import math
import os
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from cowshed.cache.errors import UsageError
from cowshed.service.persist.fd_store import FIRST_FD, listen_environment
from cowshed.service.persist.kept_counts import LOG_COUNTS, LOG_GROUP, KeptCounts
from cowshed.service.persist.notice import FOLLOWER, LEFT, NOT_HELD, Groups, Notice
from cowshed.service.runtime.file_limit import raise_file_limit
from cowshed.service.runtime.log_sink import LogSink
from cowshed.service.runtime.logs import (
    EventLog,
    logging_abandon,
    logging_count_lost,
    logging_report_lost,
)
from cowshed.service.runtime.loop import LEAVE, ignore_stop_signals
from cowshed.service.settings.config_text import CONFIG_FD, config_text_make
from cowshed.service.supervise.layouts import ALL_LAYOUTS
from cowshed.service.supervise.reload_check import ReloadCheck
from cowshed.service.supervise.run_lock import EXIT_TAKEN
from cowshed.service.supervise.serve_command import serve_command

__all__ = ["KEEPER_PID", "Keeper", "kept_before"]

_log = EventLog("cowshed.keeper")

_SOCKET_PREFIX: Final = "keeper."
KEEPER_PID: Final = "COWSHED_KEEPER_PID"
_UCRED: Final = struct.Struct("3i")
_MAX_DATAGRAM: Final = 4096
_MAX_FDS: Final = 253
_PASSED_ON: Final = (signal.SIGTERM, signal.SIGINT)
_KEPT_PID: Final = "COWSHED_KEPT_PID"
_NOTIFY_GROUP: Final = "keeper/notify"
# Restarts after deaths in quick succession back off, while guests wait; they never stop.
_QUICK_SECONDS: Final = 5.0
_MAX_DELAY_SECONDS: Final = 10.0
_TELL_AGAIN_SECONDS: Final = 1.0


def _notify_socket(run_dir: Path) -> socket.socket:
    """Make the keeper's socket in run_dir, private to this user: other senders could block us.

    Removes those of dead keepers. Raises UsageError if the folder cannot be used.
    """
    try:
        return _bind(run_dir)
    except OSError as error:
        raise UsageError(
            f"cannot use run-dir {str(run_dir)!r}: {error.strerror or error}; "
            "name another with --run-dir"
        ) from error


def _bind(run_dir: Path) -> socket.socket:
    run_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
    for left in run_dir.glob(f"{_SOCKET_PREFIX}*"):
        if not Path(f"/proc/{left.name.removeprefix(_SOCKET_PREFIX)}").exists():
            left.unlink(missing_ok=True)
    path = run_dir / f"{_SOCKET_PREFIX}{os.getpid()}"
    path.unlink(missing_ok=True)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    os.fchmod(sock.fileno(), 0o600)  # bind gives the path this mode at once
    sock.bind(str(path))
    return sock


class Keeper:
    """Keeps one backend. serve() runs in the forked child, and returns its exit status.

    Invariant: _groups are owned, and are what the living backend sent to be held.
    """

    def __init__(
        self, serve: Callable[[], int], run_dir: Path, groups: Groups | None = None
    ) -> None:
        self._serve = serve
        self._groups: Groups = groups or {}
        inherited = self._groups.pop(_NOTIFY_GROUP, None)
        if inherited is None:
            self._socket = _notify_socket(run_dir)
        else:
            self._socket = socket.socket(fileno=inherited[0])
        raise_file_limit()  # the keeper holds nearly as many descriptors as the backend has
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._socket.setblocking(False)
        self._pid = 0
        self._pidfd = -1
        self._ready = self._stopping = self._reloading = self._replacing = False
        self._follower_pid = 0
        self._follower_pidfd = -1
        self._is_left = False
        self._predecessor = ""
        self._nr_quick_deaths = 0
        self._check: ReloadCheck | None = None
        self._log_counts: KeptCounts | None = None
        self._count_log(self._groups)
        self._wake_reader, self._wake_writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    @property
    def address(self) -> str:
        """The path of the keeper's socket, which the backend gets as NOTIFY_SOCKET."""
        return str(self._socket.getsockname())

    def run(self, watch_pid: int | None = None) -> int:
        """Keep the living backend watch_pid, or start one; return the last backend's status."""
        self.take_signals()
        if watch_pid is None:
            self._start()
        else:
            self._adopt(watch_pid)
        return self._keep()

    def replace(self, pid: int) -> int:
        """Replace backend pid by one of this program; return the last backend's status."""
        self._adopt(pid)
        self._replacing = True
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, LEAVE)
        return self.run(pid)

    def copy_of(self, pid: int) -> tuple[int, int]:
        """Hold what another keeper's backend sends.

        Returns two descriptors to poll: the first is readable when receive() must be called, the
        second once the backend has ended. ProcessLookupError if there is no backend pid.
        """
        self._adopt(pid)
        return self._socket.fileno(), self._pidfd

    def receive(self) -> bool:
        """Hold what has arrived; True once that backend has left to us."""
        self._receive()
        return self._is_left

    def succeed(self, predecessor: str) -> int:
        """Start the successor of a backend that left to us; return the last backend's status.

        predecessor is the address of its keeper, which is notified once our backend serves. If it
        never does, we end, and that keeper starts a successor.
        """
        self._end_copy(predecessor)
        self.take_signals()
        self._start()
        return self._keep()

    def give(self, predecessor: str) -> tuple[Groups, Callable[[], None]]:
        """Give up the held groups to a backend that follows one that left, without a keeper.

        That backend must make the returned call once it serves.
        """
        self._end_copy(predecessor)
        groups, self._groups = self._groups, {}
        return groups, self._send_goodbye

    def close(self) -> None:
        """Close all that is held, and remove the socket."""
        for fds in self._groups.values():
            _close_all(fds)
        self._groups.clear()
        if self._log_counts is not None:
            self._log_counts.close()
        Path(self.address).unlink(missing_ok=True)
        self._socket.close()

    def _end_copy(self, predecessor: str) -> None:
        os.close(self._pidfd)
        self._pid, self._pidfd = 0, -1
        self._predecessor = predecessor
        self._ready = False

    def _send_goodbye(self) -> None:
        """Notify the predecessor's keeper, if there is one, that our backend serves."""
        if self._predecessor:
            try:
                self._socket.sendto(Notice({"STOPPING": "1"}).encode(), self._predecessor)
            except BlockingIOError:
                return  # _poll tries again soon: that keeper waits for it
            except OSError:  # that keeper is gone already
                pass
            self._predecessor = ""

    def take_signals(self) -> None:
        """Install the signal handlers; must be called before others learn that the keeper runs."""
        signal.set_wakeup_fd(self._wake_writer, warn_on_full_buffer=False)
        for number in _PASSED_ON:
            signal.signal(number, self._pass_on)
        signal.signal(signal.SIGHUP, self._reload)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {*_PASSED_ON, signal.SIGHUP})

    def _adopt(self, pid: int) -> None:
        if self._pidfd < 0:
            self._pid, self._pidfd = pid, os.pidfd_open(pid)
        self._ready = True

    def _keep(self) -> int:
        while True:
            status = self._watch()
            if status is not None:
                ignore_stop_signals()
                Path(self.address).unlink(missing_ok=True)
                return status
            self._start()

    def _pass_on(self, number: int, _: object) -> None:
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)
        else:
            self._stopping = True

    def _reload(self, *_: object) -> None:
        self._reloading = True

    def _begin_check(self) -> None:
        """Begin a check of the program as it is installed now; cancel an older one."""
        self._reloading = False
        self._end_check()
        try:
            self._check = ReloadCheck()
        except UsageError as error:
            _refuse_reload(error)

    def _end_check(self) -> None:
        check, self._check = self._check, None
        if check is not None:
            check.cancel()

    def _become_anew(self, check: ReloadCheck) -> None:
        """Exec the program as it is installed now; log a refusal if the check failed."""
        self._check = None
        try:
            text = check.end(ALL_LAYOUTS)
        except UsageError as error:
            _refuse_reload(error)
            return
        environment = {**os.environ, _KEPT_PID: str(self._pid)}
        groups = {**self._groups, _NOTIFY_GROUP: [self._socket.detach()]}
        variables, fds = listen_environment(groups, os.getpid())
        if text is not None:
            # Above the numbers that the held descriptors are moved to next.
            least = FIRST_FD + len(fds)
            environment[CONFIG_FD] = str(fcntl.fcntl(config_text_make(text), fcntl.F_DUPFD, least))
        _number_from(FIRST_FD, fds, inheritable=True)
        # Notices from here on wait in the socket, and signals until the new program has handlers.
        signal.pthread_sigmask(signal.SIG_BLOCK, {*_PASSED_ON, signal.SIGHUP})
        os.execve(sys.executable, serve_command(), environment | variables)

    def _poll(self, *fds: int) -> set[int]:
        """Wait for a descriptor, a signal or a retry that is due; return the ready descriptors."""
        poll = select.poll()
        for fd in (*fds, self._socket.fileno(), self._wake_reader):
            poll.register(fd, select.POLLIN)
        if self._ready:
            self._send_goodbye()
        is_reported = logging_report_lost() and not (self._ready and self._predecessor)
        seconds = None if is_reported else _TELL_AGAIN_SECONDS
        if self._check is not None:
            poll.register(self._check.fd, select.POLLIN)
            seconds = min(self._check.seconds_left, seconds or math.inf)
        ready = {fd for fd, _ in poll.poll(None if seconds is None else 1000 * seconds)}
        if self._wake_reader in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(self._wake_reader, 512)
        return ready

    def _watch(self) -> int | None:
        """Hold what the backend sends until it is gone; the exit status if no successor is due."""
        born = time.monotonic()
        while True:
            ready = self._poll(self._pidfd)
            # First, since READY may be there: a reload requested before it is not requested again.
            self._receive()
            check = self._check
            if check is not None and self._ready and (check.fd in ready or check.is_late()):
                self._become_anew(check)
            if self._reloading and self._ready:
                self._begin_check()
            if self._pidfd in ready:
                break
        self._receive()  # what the backend sent before it died
        gone, self._pidfd = self._pidfd, -1
        os.close(gone)
        return self._after_death(time.monotonic() - born)

    def _after_death(self, lived_seconds: float) -> int | None:
        status = 0
        with contextlib.suppress(ChildProcessError):
            status = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        if status == EXIT_TAKEN:  # another daemon serves: no successor is needed
            return int(not self._ready)
        if self._stopping or not self._ready:
            return status if status >= 0 else 128 - status
        if self._follower_pidfd >= 0:
            return self._wait_for_follower()
        if self._replacing:
            self._replacing = False
            _log.notice("replaced", pid=self._pid)
            return None
        died = f"killed by {signal.Signals(-status).name}" if status < 0 else f"status {status}"
        quick = lived_seconds < _QUICK_SECONDS
        self._nr_quick_deaths = self._nr_quick_deaths + 1 if quick else 0
        delay = min(_MAX_DELAY_SECONDS, 0.1 * 2 ** (self._nr_quick_deaths - 2))
        if self._nr_quick_deaths < 2:
            delay = 0.0
        nr_fds = sum(len(fds) for fds in self._groups.values())
        _log.error(
            "backend-died",
            "guests wait for its successor" + (f", which starts in {delay:.1f} s" if delay else ""),
            pid=self._pid,
            how=died,
            descriptors=nr_fds,
        )
        select.select([self._wake_reader], [], [], delay)
        return status if self._stopping else None

    def _wait_for_follower(self) -> int | None:
        """Return 0 once the follower's backend serves; None if it died, and ours must go on."""
        while True:
            ready = self._poll(self._follower_pidfd)
            self._receive()
            if self._stopping:
                _log.notice("taken-over", pid=self._follower_pid)
                return 0
            if self._follower_pidfd in ready:
                _log.error(
                    "takeover-failed",
                    "the successor ended before it served; this program goes on",
                    pid=self._follower_pid,
                )
                self._expect(0)
                return None

    def _expect(self, pid: int) -> None:
        """Expect the keeper pid to follow; 0: none."""
        if self._follower_pidfd >= 0:
            os.close(self._follower_pidfd)
        self._follower_pid, self._follower_pidfd = 0, -1
        if pid:
            with contextlib.suppress(ProcessLookupError):
                self._follower_pidfd = os.pidfd_open(pid)
                self._follower_pid = pid

    def _receive(self) -> None:
        while True:
            try:
                room = socket.CMSG_SPACE(4 * _MAX_FDS) + socket.CMSG_SPACE(_UCRED.size)
                datagram, ancillary, flags, address = self._socket.recvmsg(
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
            notice = Notice.parse(datagram)
            if sender == self._pid and flags & socket.MSG_CTRUNC:
                _close_all(fds.tolist())
                self._refuse(notice.fields.get("FDNAME", ""), address)
            elif sender == self._pid:
                self._obey(notice, fds.tolist())
            else:
                _close_all(fds.tolist())
                if sender == self._follower_pid != 0:
                    self._stopping |= notice.fields.get("STOPPING") == "1"

    def _refuse(self, name: str, address: Any) -> None:
        """Report a group that cannot be held whole to the backend; none of it is held."""
        with contextlib.suppress(OSError):  # the backend is gone, or does not read now
            self._socket.sendto(Notice({NOT_HELD: name}).encode(), address)

    def _obey(self, notice: Notice, fds: list[int]) -> None:
        fields = notice.fields
        name = fields.get("FDNAME", "stored")
        if fields.get("FDSTORE") == "1":
            self._groups.setdefault(name, []).extend(fds)
            self._count_log({name: fds})
        else:
            _close_all(fds)
        if fields.get("FDSTOREREMOVE") == "1":
            _close_all(self._groups.pop(name, []))
        self._stopping |= fields.get("STOPPING") == "1"
        self._is_left |= fields.get(LEFT) == "1"
        if FOLLOWER in fields:
            self._expect(int(fields[FOLLOWER]))
        if fields.get("READY") == "1":
            self._ready = True

    def _count_log(self, groups: Groups) -> None:
        """Count the keeper's lost log lines in the backend's memfd, if groups has it."""
        if LOG_GROUP not in groups:
            return
        counts = KeptCounts(LOG_COUNTS, os.dup(groups[LOG_GROUP][0]))
        if self._log_counts is not None:
            self._log_counts.close()
        self._log_counts = counts
        logging_count_lost(lambda nr: counts.add("keeper", nr))

    def _start(self) -> None:
        pid = os.fork()
        if pid == 0:
            self._become_backend()
        self._pid, self._pidfd = pid, os.pidfd_open(pid)

    def _become_backend(self) -> None:
        """In the child: drop all of the keeper but the held groups, and serve; never returns."""
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            for number in _PASSED_ON:
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
            address = self.address
            # Close these first: held descriptors are moved to their numbers next.
            logging_abandon()
            if self._check is not None:
                self._check.close()
            if self._log_counts is not None:
                self._log_counts.close()
            self._socket.close()
            os.close(self._wake_reader)
            os.close(self._wake_writer)
            variables, fds = listen_environment(self._groups, os.getpid())
            _number_from(FIRST_FD, fds)
            variables |= {"NOTIFY_SOCKET": address, KEEPER_PID: str(os.getppid())}
            os.environ.update(variables)
            gc.freeze()  # what was imported stays shared with the keeper
            status = self._serve()
        except OSError as error:
            sink = LogSink(2)
            sink.write(f"cowshed: cannot start a backend: {error}\n".encode())
            sink.close()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)


def _refuse_reload(why: UsageError) -> None:
    _log.error("reload-refused", f"{why}; everything stays as it is")


def kept_before() -> int:
    """Return the pid of the backend that this process kept before its exec; 0: none."""
    return int(os.environ.pop(_KEPT_PID, "0"))


def _number_from(first: int, fds: list[int], *, inheritable: bool = False) -> None:
    """Move descriptors to first, first + 1, ..., in order; closes the originals.

    Uses one free number at a time: a keeper may hold nearly as many as its limit allows.
    """
    at = list(fds)
    places = {fd: place for place, fd in enumerate(fds)}
    for place, number in enumerate(range(first, first + len(fds))):
        fd = at[place]
        del places[fd]
        if fd == number:
            os.set_inheritable(number, inheritable)
            continue
        if (in_the_way := places.pop(number, None)) is not None:
            moved = fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, first)
            at[in_the_way] = moved
            places[moved] = in_the_way
        os.dup2(fd, number, inheritable=inheritable)
        os.close(fd)


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
