# SPDX-License-Identifier: Apache-2.0
"""`cowshed serve --takeover`: another program, in another process, continues to serve the guests.

Slow work comes before any request to the running backend: loading this program, reading the
configuration, opening the sources. Then this process requests a copy of the descriptors held for
the successor. The backend continues to serve, reports each group that comes or goes, and finally
leaves. This process forks its own backend when the old one has ended, as after any other death.
operators/takeover.py says which keeper starts the next backend if a process dies in between.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from cowshed.cache import FileSource
from cowshed.cache.errors import CowshedError, PeerGoneError, UsageError
from cowshed.service.images.extents import resolve_extents
from cowshed.service.operators.control_client import ControlClient
from cowshed.service.operators.takeover import described
from cowshed.service.runtime.stops import stop_at
from cowshed.service.settings.config import Config
from cowshed.service.settings.images import ImageSpec
from cowshed.service.supervise.keeper import Keeper
from cowshed.service.supervise.layouts import ALL_LAYOUTS, LAYOUTS

__all__ = ["take_over"]

_POLL: Final = select.POLLIN


class _Left:
    """The result of a request made in another thread; done_fd is readable when it is there."""

    def __init__(self, ask: Callable[[], dict[str, Any]]) -> None:
        self.reply: dict[str, Any] = {}
        self.error: CowshedError | None = None
        self._ask = ask
        self.done_fd, self._done = os.pipe2(os.O_CLOEXEC)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.reply = self._ask()
        except CowshedError as error:
            self.error = error
        finally:
            os.close(self._done)

    def close(self) -> None:
        self._thread.join()
        os.close(self.done_fd)


def take_over(config: Config, serve: Callable[[], int]) -> tuple[Keeper, str]:
    """Have the run-dir's backend leave; return a keeper, for serve, with all its descriptors.

    Also returns the address of the backend's keeper, "" for none, which waits to be notified that
    we serve. Raises CowshedError, one line, if the backend did not leave to us; it, or its
    successor, then continues to serve.
    """
    config = resolve_extents(config, is_logged=False)
    images = [_described(spec, config.extent_of(spec)) for spec in config.images]
    with ControlClient(config.run_dir) as client:
        met = _meet(
            client,
            uid=os.geteuid(),
            layouts=LAYOUTS,
            all_layouts=ALL_LAYOUTS,
            extent_bytes=config.extent_bytes,
            images=images,
        )
        keeper = Keeper(serve, config.run_dir)
        try:
            _have_left(client, keeper, met["pid"])
        except BaseException:
            keeper.close()
            raise
    stop_at("takeover-follows")
    return keeper, str(met["keeper"])


def _have_left(client: ControlClient, keeper: Keeper, pid: int) -> None:
    socket_fd, gone_fd = keeper.copy_of(pid)
    poll = select.poll()
    poll.register(socket_fd, _POLL)
    _ask(client, keeper, poll, "hold", address=keeper.address)
    stop_at("takeover-held")
    with contextlib.suppress(PeerGoneError):  # it may be gone before the reply
        _ask(client, keeper, poll, "leave")
    poll.register(gone_fd, _POLL)
    while not any(fd == gone_fd for fd, _ in poll.poll()):
        keeper.receive()
    if not keeper.receive():
        raise CowshedError(
            "the daemon died during the takeover: its keeper starts another; try again"
        )


def _meet(client: ControlClient, **about_us: Any) -> dict[str, Any]:
    try:
        return client.request("takeover", step="meet", pid=os.getpid(), **about_us)
    except CowshedError as error:
        if "'takeover' is known" in str(error):
            raise UsageError(
                "the daemon's version has no takeover: reload it instead (SIGHUP)"
            ) from error
        raise


def _ask(
    client: ControlClient, keeper: Keeper, poll: select.poll, step: str, **fields: Any
) -> dict[str, Any]:
    """Request a step, and receive descriptors meanwhile: the daemon waits for us to take them."""
    left = _Left(lambda: client.request("takeover", step=step, pid=os.getpid(), **fields))
    try:
        poll.register(left.done_fd, _POLL | select.POLLHUP)
        while not any(fd == left.done_fd for fd, _ in poll.poll()):
            keeper.receive()
        poll.unregister(left.done_fd)
    finally:
        left.close()
    keeper.receive()
    if left.error is not None:
        raise left.error
    return left.reply


def _described(spec: ImageSpec, extent_bytes: int) -> dict[str, Any]:
    """Describe an image that we would serve.

    One that cannot be opened may be served all the same, from the backend's open descriptor.
    """
    try:
        with contextlib.closing(FileSource.open(Path(spec.source))) as source:
            return described(spec.domain, spec.name, source.size_bytes, extent_bytes)
    except CowshedError as error:
        return described(spec.domain, spec.name, None, extent_bytes, str(error))
