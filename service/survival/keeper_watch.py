# SPDX-License-Identifier: Apache-2.0
"""In the backend: its keeper, and another one when that dies."""

from __future__ import annotations

import contextlib
import os
import subprocess
from typing import Final

from cowshed.service.runtime.logs import EventLog
from cowshed.service.runtime.loop import READ, Loop
from cowshed.service.survival.fd_store import FdStore
from cowshed.service.survival.keeper import KEEPER_OF, KEEPER_PID, serve_command

__all__ = ["KeeperWatch"]

_log = EventLog("cowshed.keeper")

_RETRY_SECONDS: Final = 5.0


class KeeperWatch:
    """Notices that our keeper died, starts another and hands it everything.

    Until the other has it, our death would cost the guests their backend; nothing else. pid is our
    keeper's, 0 if we have none.
    """

    def __init__(self, fd_store: FdStore, loop: Loop) -> None:
        self._fd_store = fd_store
        self._loop = loop
        self._pidfd = -1
        self.pid = int(os.environ.pop(KEEPER_PID, "0"))
        if self.pid:
            self._watch(self.pid)

    @property
    def kind(self) -> str:
        """Who would start our successor: "own" (a keeper of ours), "systemd", or "none"."""
        if self.pid:
            return "own" if self._pidfd >= 0 else "none"
        return "systemd" if self._fd_store.kept else "none"

    def close(self) -> None:
        """Stop looking."""
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
        self.close()
        _log.error("keeper-died", "another is started; until then our death would be final")
        self._start()

    def _start(self) -> None:
        command = [*serve_command(), KEEPER_OF, str(os.getpid())]
        try:
            keeper = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        except OSError as error:
            _log.error("no-keeper", f"cannot start a keeper: {error}; trying again soon")
            self._loop.once(_RETRY_SECONDS, self._start)
            return
        assert keeper.stdout is not None
        said = keeper.stdout
        os.set_blocking(said.fileno(), False)

        def on_said(fd: int, _: int) -> None:
            line = said.readline().decode().strip()
            self._loop.forget(fd)
            said.close()
            if line:
                self._move(line, keeper)
            else:
                _log.error("no-keeper", f"the keeper ended with status {keeper.wait()}")
                self._loop.once(_RETRY_SECONDS, self._start)

        self._loop.watch(said.fileno(), READ, on_said)

    def _move(self, address: str, keeper: subprocess.Popen[bytes]) -> None:
        with contextlib.suppress(OSError):
            self._fd_store.move(address)
        keeper.returncode = 0  # it outlives us: nobody is to wait for it
        self.pid = keeper.pid
        self._watch(keeper.pid)
        _log.notice("keeper-changed", pid=keeper.pid)
