# SPDX-License-Identifier: Apache-2.0
"""The backend and its keeper: serve under one, and have another when it dies."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from typing import Final

import click

from cowshed.cache.errors import CowshedError
from cowshed.service.config import Config
from cowshed.service.fd_store import FdStore, take_inherited
from cowshed.service.keeper import KEEPER_PID, Keeper, kept_before
from cowshed.service.logs import EventLog, logging_begin, logging_end
from cowshed.service.loop import READ, Loop
from cowshed.service.shell import EXIT_FAILED
from cowshed.service.text import one_line

__all__ = ["KeeperWatch", "run_keeper_of", "run_kept"]

_log = EventLog("cowshed.keeper")

_RETRY_SECONDS: Final = 5.0


def run_kept(config: Config) -> int:
    """Serve until told to end, through any number of deaths; the exit status.

    Under systemd, which sets NOTIFY_SOCKET, there is no need for a keeper of ours.
    """
    if "NOTIFY_SOCKET" in os.environ:
        return _run(config)
    logging_begin(config.log_format, config.log_level)
    try:
        pid = kept_before()
        if pid:
            return Keeper(lambda: _run(config), config.run_dir, take_inherited(os.environ)).replace(
                pid
            )
        return Keeper(lambda: _run(config), config.run_dir).run()
    finally:
        logging_end()


def run_keeper_of(config: Config, pid: int) -> int:
    """Keep a backend that runs already; tells it where, by one line on stdout."""
    logging_begin(config.log_format, config.log_level)
    try:
        keeper = Keeper(lambda: _run(config), config.run_dir)
        os.write(1, f"{keeper.address}\n".encode())
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)  # the backend has closed its end by now
        os.close(null)
        return keeper.run(watch_pid=pid)
    finally:
        logging_end()


def _run(config: Config) -> int:
    # Imports the C core: only who serves pays for it, and a keeper before it forks.
    from cowshed.service.daemon import run

    try:
        return run(config)
    except CowshedError as error:
        message = str(error)
    except OSError as error:
        message = f"cannot serve at {config.run_dir}: {error}"
    click.echo(f"cowshed: {one_line(message)}", err=True)
    return EXIT_FAILED


class KeeperWatch:
    """In the backend: notices that its keeper died, starts another and hands it everything.

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
        command = [*sys.orig_argv, "--keeper-of", str(os.getpid())]
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
