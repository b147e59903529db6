# SPDX-License-Identifier: Apache-2.0
"""A takeover by another program, in the backend that leaves (commands/takeover.py: the follower).

    meet    check that the follower could go on; return our pid and our keeper's address
    hold    send the follower all groups, which it holds besides our keeper
    leave   send our keeper the follower's pid, notify the follower that we leave, and end

Until the follower is notified, its death changes nothing. From then on our keeper waits until the
follower serves; if the follower dies first, our keeper starts a successor of this program. So at
each instruction exactly one process is to start the next backend.
"""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Iterator
from typing import Any, Final

from cowshed.cache import Image, UsageError
from cowshed.service.host import Host
from cowshed.service.operators.control import Control
from cowshed.service.persist.notice import FOLLOWER, LEFT
from cowshed.service.runtime.logs import EventLog
from cowshed.service.runtime.loop import READ
from cowshed.service.runtime.stops import stop_at
from cowshed.service.supervise.layouts import ALL_LAYOUTS
from cowshed.transport.messages.fields import (
    take_choice,
    take_number,
    take_optional_text,
    take_text,
)

__all__ = ["TakeoverHandler", "described"]

_log = EventLog("cowshed.takeover")

Body = dict[str, Any]

_PATIENCE_SECONDS: Final = 1.0


class TakeoverHandler:
    """Answers the requests of a follower; one takeover at a time.

    Invariant: _pidfd is of the follower that holds a copy of everything, or -1.
    """

    def __init__(self, host: Host, control: Control) -> None:
        self._store = host.store
        self._guests = host.guests
        self._overlays = host.overlays
        self._fd_store = host.fd_store
        self._keeper = host.watch
        self._loop = host.loop
        self._leave = host.loop.leave
        self._lock = threading.Lock()
        self._pid = 0
        self._pidfd = -1
        self._is_leaving = False
        control.add("takeover", self._perform, is_quick=False)

    @property
    def is_leaving(self) -> bool:
        """Whether this backend leaves to a follower."""
        return self._is_leaving

    def hand_over(self) -> bool:
        """After the end of the loop: notify keeper and follower; whether this process must end now.

        False if the follower is gone; then everything is as if it had never asked.
        """
        if not self._is_leaving:
            return True
        stop_at("takeover-leaving")
        self._fd_store.notify(**{FOLLOWER: str(self._pid)})  # dropped if no keeper lives now
        self._fd_store.reconcile(_PATIENCE_SECONDS)
        stop_at("takeover-told")
        try:
            if select.select([self._pidfd], [], [], 0)[0]:
                raise ProcessLookupError(f"process {self._pid} is gone")
            self._fd_store.notify_copy(**{LEFT: "1"})
        except OSError as error:
            self._fd_store.notify(**{FOLLOWER: "0"})
            self._forget(str(error))
            return False
        stop_at("takeover-left")
        return True

    def _perform(self, request: Body, _: list[int]) -> Iterator[Body]:
        step = take_choice(request, "step", ("meet", "hold", "leave"))
        pid = take_number(request, "pid", minimum=1)
        if step == "meet":
            self._check_follower(request)
            yield {"pid": os.getpid(), "keeper": self._keeper_address()}
        elif step == "hold":
            stop_at("takeover-holding")
            yield {"groups": self._keep(pid, take_text(request, "address", max_length=107))}
        else:
            with self._lock:
                if pid != self._pid:
                    raise UsageError("nothing is held for this takeover: start it again")
                self._is_leaving = True
            self._loop.call(self._leave)
            yield {}

    def _check_follower(self, request: Body) -> None:
        """Raise UsageError if the follower could not go on with what this backend serves."""
        uid = take_number(request, "uid")
        if uid != os.geteuid():
            raise UsageError(
                f"the daemon runs as uid {os.geteuid()}, and you are uid {uid}: "
                "take over as the same user"
            )
        if self._keeper.kind == "systemd":
            raise UsageError(
                "the daemon is systemd's, which would start it again beside yours: "
                "use 'systemctl reload' on its unit, which replaces it too"
            )
        layouts = take_optional_text(request, "all_layouts") or take_text(request, "layouts")
        if layouts != ALL_LAYOUTS:
            raise UsageError(
                f"the daemon keeps its ledger in layout {ALL_LAYOUTS}, and this program in "
                f"{layouts}: hand its guests to a daemon of this program with 'cowshed drain' "
                "instead"
            )
        extent_bytes = take_number(request, "extent_bytes")
        served_bytes = self._store.default_extent_bytes
        if extent_bytes != served_bytes:
            raise UsageError(
                f"the daemon has extents of {served_bytes} bytes, and the new "
                f"configuration of {extent_bytes}: take over with the same, or restart it"
            )
        self._check_images(request.get("images"), extent_bytes)

    def _check_images(self, listed: object, extent_bytes: int) -> None:
        if not isinstance(listed, list):
            raise UsageError("a takeover needs the list of its images")
        named = {
            (each.get("domain"), each.get("name")): each
            for each in listed
            if isinstance(each, dict)
        }
        served = {(image.domain, image.name) for image in self._store}
        for key, each in named.items():
            if key not in served and each.get("size_bytes") is None:
                raise UsageError(str(each.get("why", "an image has no size")))
        for image in self._store:
            users = self._users(image)
            there = named.get((image.domain, image.name))
            size_bytes = there and there.get("size_bytes")
            if users and there is None:
                raise UsageError(
                    f"image {image.label!r} is not in the new configuration, and {len(users)} "
                    f"guests use it ({users[0]}, ...): add it, or end them first"
                )
            if there is not None:
                # Programs of older releases send none: all their images have the default extents.
                self._check_extents(image, there.get("extent_bytes", extent_bytes))
            if size_bytes is not None and size_bytes != image.size_bytes:
                raise UsageError(
                    f"image {image.label!r} has {image.size_bytes} bytes, and {size_bytes} in the "
                    "new configuration: an image is never changed; serve that under another name"
                )

    @staticmethod
    def _check_extents(image: Image, extent_bytes: object) -> None:
        if extent_bytes != image.extent_bytes:
            raise UsageError(
                f"image {image.label!r} has extents of {image.extent_bytes} bytes, and of "
                f"{extent_bytes} in the new configuration: take over with the same, or restart "
                "the daemon"
            )

    def _users(self, image: Image) -> list[str]:
        with self._guests.lock:
            users = [guest.name for guest in self._guests if guest.image is image]
        with self._overlays.lock:
            return users + [guest.name for guest in self._overlays if guest.image is image]

    def _keeper_address(self) -> str:
        return self._fd_store.address if self._keeper.kind == "own" else ""

    def _keep(self, pid: int, address: str) -> int:
        with self._lock:
            if self._pid:
                raise UsageError(f"process {self._pid} takes over already: wait for it, or end it")
            try:
                pidfd = os.pidfd_open(pid)
            except OSError as error:
                raise UsageError(f"there is no process {pid}: {error.strerror}") from error
            try:
                nr_groups = self._fd_store.copy_to(address)
            except OSError as error:
                os.close(pidfd)
                self._fd_store.end_copy()
                raise UsageError(f"cannot send all groups to process {pid}: {error}") from error
            self._pid, self._pidfd = pid, pidfd
        self._loop.call(lambda: self._loop.watch(pidfd, READ, self._on_gone))
        _log.notice("takeover-begins", pid=pid, groups=nr_groups)
        return nr_groups

    def _on_gone(self, *_: int) -> None:
        self._forget("it ended")

    def _forget(self, why: str) -> None:
        with self._lock:
            pid, pidfd = self._pid, self._pidfd
            self._pid, self._pidfd, self._is_leaving = 0, -1, False
            self._fd_store.end_copy()
        self._loop.forget(pidfd)
        os.close(pidfd)
        _log.warning("takeover-failed", f"{why}; everything stays as it is", pid=pid)


def described(
    domain: str, name: str, size_bytes: int | None, extent_bytes: int, why: str = ""
) -> Body:
    """Return the follower's description of an image that it would serve.

    size_bytes is None, with the reason why, if its source cannot be opened: then the takeover goes
    on only if this backend serves the image now.
    """
    return {
        "domain": domain,
        "name": name,
        "size_bytes": size_bytes,
        "extent_bytes": extent_bytes,
        "why": why,
    }
