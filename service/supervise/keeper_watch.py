# SPDX-License-Identifier: Apache-2.0
"""The backend's watch of its keeper: replaces a dead one, and sends it what it lacks."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable
from typing import Final

from cowshed.service.persist.fd_store import FdStore
from cowshed.service.runtime.logs import EventLog
from cowshed.service.runtime.loop import READ, WRITE, Loop
from cowshed.service.settings.config_text import CONFIG_FD, config_text_make
from cowshed.service.supervise.keeper import KEEPER_PID
from cowshed.service.supervise.serve_command import KEEPER_OF, serve_command

__all__ = ["KeeperWatch"]

_log = EventLog("cowshed.keeper")

_RETRY_SECONDS: Final = 5.0
_SEND_AGAIN_SECONDS: Final = 0.5
# A keeper loads its program at start, maybe from a disk that hangs.
_START_SECONDS: Final = 30.0

_OnStarted = Callable[[subprocess.Popen[bytes], str], None]


class KeeperWatch:
    """Notices that the keeper died, starts another and has it hold everything.

    Until then guests are served as before, but the backend's death would be final. pid is the
    keeper's, 0 if there is none. For the loop's thread.
    """

    def __init__(self, fd_store: FdStore, loop: Loop, config_text: str | None = None) -> None:
        """config_text is the configuration's, for later keepers; None: there is no file."""
        self._fd_store = fd_store
        self._loop = loop
        self._config_text = config_text
        self._pidfd = -1
        self._watched: set[int] = set()
        self._is_timed = False
        self._lacked = False
        self.pid = int(os.environ.pop(KEEPER_PID, "0"))
        fd_store.on_unsent = lambda: loop.call(self._reconcile)
        if self.pid:
            self._watch(self.pid)
        self._reconcile()

    @property
    def kind(self) -> str:
        """What would start the successor: "own" (our keeper), "systemd", or "none"."""
        if self.pid:
            return "own" if self._pidfd >= 0 else "none"
        return "systemd" if self._fd_store.kept else "none"

    @property
    def nr_not_held(self) -> int:
        """How many groups of descriptors a successor would lack if this backend died now."""
        return self._fd_store.nr_not_held

    def close(self) -> None:
        """Stop watching; the keeper keeps what it holds."""
        self._forget_fds()
        self._close_pidfd()

    def _close_pidfd(self) -> None:
        if self._pidfd >= 0:
            self._loop.forget(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1

    def _watch(self, pid: int) -> None:
        try:
            self._pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            self._on_death()
            return
        self._loop.watch(self._pidfd, READ, self._on_death)

    def _on_death(self, *_: int) -> None:
        self._forget_fds()
        self._close_pidfd()
        self._fd_store.lose()
        with contextlib.suppress(ChildProcessError):  # the first one is our parent
            os.waitpid(self.pid, os.WNOHANG)
        _log.error("keeper-died", "starting another; until then our death would be final")
        self._start()

    def _start(self) -> None:
        command = [*serve_command(), KEEPER_OF, str(os.getpid())]
        environment = dict(os.environ)
        passed: list[int] = []
        try:
            if self._config_text is not None:
                passed.append(config_text_make(self._config_text))
                environment[CONFIG_FD] = str(passed[0])
            keeper = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                pass_fds=passed,
                env=environment,
            )
        except OSError as error:
            self._start_later(error)
            return
        finally:
            for fd in passed:
                os.close(fd)
        _StartedKeeper(keeper, self._loop, self._on_started)

    def _on_started(self, keeper: subprocess.Popen[bytes], address: str) -> None:
        if not address:
            self._loop.once(_RETRY_SECONDS, self._start)
            return
        self.pid = keeper.pid
        try:
            self._fd_store.move(address)
            self._watch(keeper.pid)
        except OSError as error:  # no descriptor is left for its socket, or its pidfd
            self._fd_store.lose()
            keeper.kill()
            self._start_later(error)
            return
        keeper.returncode = 0  # it outlives us: keeps subprocess from waiting for it
        self._lacked = True
        _log.notice("keeper-changed", pid=keeper.pid)
        self._reconcile()

    def _start_later(self, error: OSError) -> None:
        _log.error("no-keeper", f"cannot start a keeper: {error}; trying again soon")
        self._loop.once(_RETRY_SECONDS, self._start)

    def _reconcile(self, *_: int) -> None:
        """Send what is not held: now, when the keeper takes more, or after a while."""
        self._forget_fds()
        if refused := self._fd_store.take_refused():
            _log.error(
                "not-held",
                "the keeper has no room for more descriptors: raise its limit (LimitNOFILE, "
                "ulimit -Hn)",
                group=refused[0],
                groups=len(refused),
            )
            self._lacked = True
            self._send_later()
        elif self._fd_store.reconcile():
            if self._lacked:
                self._lacked = False
                _log.notice("held", groups=len(self._fd_store.groups))
        else:
            self._lacked = True
            if self._fd_store.is_keeper_full:
                self._watch_fd(self._fd_store.keeper_fd(), WRITE)
            if self._fd_store.needs_time:
                self._send_later()
        self._watch_fd(self._fd_store.keeper_fd(), READ)

    def _send_later(self) -> None:
        if not self._is_timed:
            self._is_timed = True
            self._loop.once(_SEND_AGAIN_SECONDS, self._on_time)

    def _on_time(self) -> None:
        self._is_timed = False
        self._reconcile()

    def _watch_fd(self, fd: int, events: int) -> None:
        if fd in self._watched:
            self._loop.change(fd, READ | WRITE)
        elif fd >= 0:
            self._watched.add(fd)
            self._loop.watch(fd, events, self._reconcile)

    def _forget_fds(self) -> None:
        for fd in self._watched:
            self._loop.forget(fd)
        self._watched.clear()


class _StartedKeeper:
    """A keeper that was started: calls on_started(keeper, address) once it has printed its address.

    The address is "" if the keeper ended before, or printed nothing in time; it is killed then.
    """

    def __init__(self, keeper: subprocess.Popen[bytes], loop: Loop, on_started: _OnStarted) -> None:
        assert keeper.stdout is not None
        self._keeper = keeper
        self._output = keeper.stdout
        self._loop = loop
        self._on_started = on_started
        self._is_over = False
        os.set_blocking(self._output.fileno(), False)
        loop.watch(self._output.fileno(), READ, self._on_output)
        loop.once(_START_SECONDS, self._on_time)

    def _on_output(self, fd: int, _: int) -> None:
        line = os.read(fd, 4096).decode(errors="replace").strip()
        self._end(line, f"the keeper ended with status {self._keeper.poll()}")

    def _on_time(self) -> None:
        if not self._is_over:
            self._end("", f"a keeper was not ready within {_START_SECONDS:.0f} s; trying again")

    def _end(self, address: str, why: str) -> None:
        self._is_over = True
        self._loop.forget(self._output.fileno())
        self._output.close()
        if not address:
            _log.error("no-keeper", why)
            # Not waited for here: subprocess reaps it when the next one is started.
            with contextlib.suppress(ProcessLookupError):
                self._keeper.send_signal(signal.SIGKILL)
        self._on_started(self._keeper, address)
