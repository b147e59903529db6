# SPDX-License-Identifier: Apache-2.0
"""Clients enter overlays here: in the loop, which never waits for --overlay-dir.

An overlay in files is made in a side thread, under no lock. All clients that request it meanwhile
wait, and get the same one. If none of them enters once it is made, it is removed again. Overlays in
memory, and existing ones, are entered at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from cowshed.accounting import QuotaPolicy
from cowshed.cache import Image
from cowshed.cache.errors import CapacityError, CowshedError, SourceError
from cowshed.service.overlays.claims import Claim, check_may_enter
from cowshed.service.overlays.overlays import OverlayGuest, OverlayTable
from cowshed.service.runtime.logs import EventLog
from cowshed.service.runtime.side_threads import SideThreads
from cowshed.transport.links.no_room import no_room

__all__ = ["Entering", "Entrance", "NotYetError"]

_log = EventLog("cowshed.overlays")

_STOP_SECONDS: Final = 1.0


class NotYetError(Exception):
    """The overlay is being made, or the last of that name removed: enter again after on_made()."""


@dataclass(eq=False)
class Entering:
    """One client, for Entrance.enter(): on_made is called once for each NotYetError, in the loop.

    error is why the overlay could not be made, until the next enter() raises it.
    """

    on_made: Callable[[], None]
    error: CowshedError | None = None
    making: _Making | None = None
    waits_for_name: bool = False

    def give_up(self) -> None:
        """Cancel the wait: the client has gone, and on_made is not called any more."""
        self.waits_for_name = False
        if self.making is not None:
            self.making.waiting.remove(self)
            self.making = None


@dataclass(eq=False)
class _Making:
    """An overlay that a side thread makes; has_digest: its record has its image's digest."""

    image: Image
    name: str
    owner: str
    has_digest: bool
    waiting: list[Entering] = field(default_factory=list)


class Entrance:
    """Lets clients enter the overlays of a table; all in the loop. Close it before the table.

    post(call), from any thread, has the loop call call(). Invariant: an overlay that is being made
    is in _makings, and not in the table.
    """

    def __init__(
        self, table: OverlayTable, side: SideThreads, post: Callable[[Callable[[], None]], None]
    ) -> None:
        self._table = table
        self._side = side
        self._post = post
        self._makings: dict[tuple[str, str], _Making] = {}
        self._numbers = itertools.count()  # makes names unique, so that no call waits for another
        self._made: list[OverlayGuest] = []  # made, and not in the table yet

    def check(self, image: Image, name: str, claim: Claim) -> None:
        """Raise what enter() would raise, as far as is known beforehand."""
        making = self._makings.get((image.domain, name))
        if making is None:
            self._table.check(image, name, claim)
        else:
            check_may_enter(making, image, claim)

    def enter(
        self,
        client: Entering,
        image: Image,
        name: str,
        claim: Claim,
        *,
        quota_bytes: int | None = None,
        policy: QuotaPolicy | None = None,
    ) -> OverlayGuest:
        """As OverlayTable.enter(), or NotYetError: then enter again after on_made."""
        error, client.error = client.error, None
        if error is not None:
            raise error
        key = image.domain, name
        making = self._makings.get(key)
        if making is not None:
            check_may_enter(making, image, claim)
        else:
            with self._table.lock:  # nothing is removed between these looks
                if self._table.when_free(key, lambda: self._post(lambda: _go_on(client))):
                    client.waits_for_name = True
                    raise NotYetError
                if not self._table.in_files or self._table.get(*key) is not None:
                    return self._table.enter(
                        image, name, claim, quota_bytes=quota_bytes, policy=policy
                    )
            making = self._begin(image, name, claim, quota_bytes, policy)
        making.waiting.append(client)
        client.making = making
        raise NotYetError

    def begin(self, what: str, call: Callable[[], None]) -> None:
        """Run a call that may wait for a disk in a side thread; from any thread.

        CapacityError, and it is not run, if no thread can be started.
        """
        if not self._side.run(f"{what} {next(self._numbers)}", call):
            raise CapacityError(no_room("the backend can start no thread"))

    def close(self) -> bool:
        """Remove overlays that were made and not entered; the loop has ended.

        False if a file system still hangs: then an abandoned thread uses an image.
        """
        has_ended = self._side.wait_all(_STOP_SECONDS)
        for guest in self._made:
            self._table.unstage(guest)
        return has_ended

    def _begin(
        self,
        image: Image,
        name: str,
        claim: Claim,
        quota_bytes: int | None,
        policy: QuotaPolicy | None,
    ) -> _Making:
        record = self._table.record(image, name, claim, quota_bytes, policy)
        making = _Making(image, name, record.owner, self._table.knows_digest(image))

        def make() -> None:
            guest: OverlayGuest | None = None
            error: CowshedError | None = SourceError("the daemon failed; see its log")
            try:
                guest, error = self._table.make(image, record), None
                self._made.append(guest)
            except CowshedError as failed:
                error = failed
            except OSError as failed:
                error = SourceError(f"cannot make overlay {record.label!r}: {failed}")
            finally:
                self._post(lambda: self._end(making, guest, error))

        self.begin(f"make overlay {record.label}", make)
        self._makings[image.domain, name] = making
        return making

    def _end(self, making: _Making, guest: OverlayGuest | None, error: CowshedError | None) -> None:
        """Let the waiting clients enter, before any other can; in the loop."""
        del self._makings[making.image.domain, making.name]
        with self._table.lock:
            if guest is not None:
                self._made.remove(guest)
                self._table.place(guest)
            waiting, making.waiting = making.waiting, []
            for client in waiting:
                client.making = None
                client.error = error
            for client in waiting:
                client.on_made()
            if guest is None:
                return
            is_unused = self._table.withdraw_unused(guest)
        try:
            if is_unused:
                self.begin(f"remove overlay {guest.label}", lambda: self._remove(guest))
            elif not making.has_digest and self._table.knows_digest(making.image):
                # The digest became known meanwhile, when the overlay was not in the table yet.
                self.begin(f"keep digest of {guest.label}", lambda: self._table.keep_digest(guest))
        except CapacityError as failed:
            what = "not-discarded" if is_unused else "overlay-source-not-kept"
            _log.warning(what, str(failed), overlay=guest.label)
            if is_unused:
                self._table.insert(guest)

    def _remove(self, guest: OverlayGuest) -> None:
        self._table.unstage(guest)
        _log.info("overlay-discarded", overlay=guest.label, private=0)


def _go_on(client: Entering) -> None:
    """Let a client enter that has waited for its name, unless it has gone; in the loop."""
    if client.waits_for_name:
        client.waits_for_name = False
        client.on_made()
