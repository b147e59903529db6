# SPDX-License-Identifier: Apache-2.0
"""Run the backend under a keeper, which restarts it after any number of deaths."""

from __future__ import annotations

import os

from cowshed.cache.errors import CowshedError, UsageError
from cowshed.service.commands.shell import EXIT_FAILED
from cowshed.service.persist.fd_store import has_supervisor, take_inherited
from cowshed.service.runtime.log_sink import LogSink
from cowshed.service.runtime.logs import logging_begin, logging_end
from cowshed.service.runtime.stops import stop_at
from cowshed.service.runtime.text import one_line
from cowshed.service.settings.config import Config, socket_path
from cowshed.service.supervise.keeper import Keeper, kept_before
from cowshed.service.supervise.run_lock import EXIT_TAKEN, TakenError

__all__ = ["run_keeper_of", "run_kept", "run_taking_over"]


def run_kept(config: Config) -> int:
    """Serve until asked to end, through any number of deaths; return the exit status.

    Under systemd, which sets NOTIFY_SOCKET, no keeper is needed.
    """
    if has_supervisor(os.environ):
        return EXIT_FAILED if _run(config) else 0
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


def run_taking_over(config: Config) -> int:
    """Take over from the run-dir's backend and serve; return the exit status.

    Raises CowshedError if the backend does not hand over; it then continues to serve.
    """
    # Imported here because it loads the C core, as in _run.
    from cowshed.service.commands.takeover import take_over
    from cowshed.service.daemon import run

    logging_begin(config.log_format, config.log_level)
    try:
        if not socket_path(config.run_dir).is_socket():
            raise UsageError(
                f"no daemon at {config.run_dir} to take over from: "
                "start it without --takeover, or name its --run-dir"
            )
        keeper, predecessor = take_over(config, lambda: _run(config))
        if config.keeper and not has_supervisor(os.environ):
            return keeper.succeed(predecessor)
        groups, send_goodbye = keeper.give(predecessor)

        def on_serving() -> None:
            send_goodbye()
            keeper.close()

        return run(config, groups, on_serving)
    finally:
        logging_end()


def run_keeper_of(config: Config, pid: int) -> int:
    """Keep a backend that already runs; writes this keeper's address to stdout, one line."""
    logging_begin(config.log_format, config.log_level)
    try:
        stop_at("keeper-begins")
        keeper = Keeper(lambda: _run(config), config.run_dir)
        keeper.take_signals()  # a reload may be requested as soon as the address is known
        os.write(1, f"{keeper.address}\n".encode())
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)  # the backend has closed its end by now
        os.close(null)
        return keeper.run(watch_pid=pid)
    finally:
        logging_end()


def _run(config: Config) -> int:
    # Imported here because it loads the C core; `serve` imports it before a keeper forks.
    from cowshed.service.daemon import run

    status = EXIT_FAILED
    try:
        return run(config)
    except TakenError as error:
        status, message = EXIT_TAKEN, str(error)
    except CowshedError as error:
        message = str(error)
    except OSError as error:
        message = f"cannot serve at {config.run_dir}: {error}"
    sink = LogSink(2)  # stderr may have no reader; this must not block, the keeper waits for us
    sink.write(f"cowshed: {one_line(message)}\n".encode())
    sink.close()
    return status
