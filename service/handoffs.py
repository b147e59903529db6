# SPDX-License-Identifier: Apache-2.0
"""Handoffs in the daemon: both roles, the operators' requests, and resuming after a restart."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Container, Iterator
from typing import Any, Final

from cowshed.cache import CapacityError, Image, UsageError
from cowshed.service.frontends.unix.unix_server import UnixServer
from cowshed.service.host import Host
from cowshed.service.images.incoming_images import ImageFolder
from cowshed.service.images.loading import load
from cowshed.service.metrics.service_counters import DrainStatistics
from cowshed.service.migration.carriers import MigratingCarrier, may_carry
from cowshed.service.migration.dial import REPLY_SECONDS, dial_target
from cowshed.service.migration.drain import Drain
from cowshed.service.migration.file import export_state, import_state
from cowshed.service.migration.handoff_target import HandoffTarget
from cowshed.service.migration.image_intake import Publish
from cowshed.service.migration.link import Link, SocketLink, open_link
from cowshed.service.migration.migrating import (
    MigratingGuest,
    MigratingMapping,
    MigratingOverlay,
    thaw_all,
)
from cowshed.service.migration.record import HandoffRecord
from cowshed.service.migration.state import Phase
from cowshed.service.operators.control import Control
from cowshed.service.overlays.overlays import OverlayGuest
from cowshed.service.runtime.logs import EventLog
from cowshed.service.settings.domains import DomainMembers
from cowshed.transport.messages.fields import take_optional_number, take_text

__all__ = ["HandoffService"]

_log = EventLog("cowshed.handoff")

Body = dict[str, Any]
Disconnect = Callable[[OverlayGuest], None]

_REPORT_SECONDS: Final = 0.2
_TURN_SECONDS: Final = 5.0
_LEAVE_SECONDS: Final = 0.05


class HandoffService:
    """One drain at a time, and any number of incoming handoffs. Requests run in workers.

    Invariant: _drain is the drain in progress, or the last one until guests come back.
    """

    def __init__(
        self,
        host: Host,
        control: Control,
        record: HandoffRecord,
        unix_server: UnixServer,
        disconnect: Disconnect,
        image_folder: ImageFolder | None,
        publish: Publish,
    ) -> None:
        """disconnect(guest) ends the connections of an overlay's clients; in the loop.

        image_folder stores received images; publish(image, spec) has them served, from any thread.
        """
        self.record: Final = record
        self.counters: Final = host.counters
        self.working_sets: Final = host.working_sets
        self._store = host.store
        self._guests = host.guests
        self._overlays = host.overlays
        self._access = host.access
        self._open_regions = host.evictor.open_regions
        self._loop = host.loop
        self._unix_server = unix_server
        self._disconnect = disconnect
        self._drain: Drain | None = None
        self.target: Final = HandoffTarget(
            host.store,
            host.evictor,
            host.overlays,
            record,
            load,
            self._on_owner,
            host.config.late_wait,
            image_folder,
            publish,
            self._why_no_guests,
        )
        control.add("drain", self._do_drain, is_quick=False)
        control.add("drain-abort", self._do_abort, is_quick=False)
        control.add("drain-state", self._do_state, is_quick=True)
        control.add("export", self._do_export, is_quick=False)
        control.add("import", self._do_import, is_quick=False)
        control.add("handoff", self._do_handoff, is_quick=True)

    def resume(self) -> None:
        """Resume what was recorded before a restart; must precede serving any guest."""
        self.target.resume()
        if self.record.source is None:
            # Accounts stay frozen over a restart. No commit was requested: the guests are ours.
            thaw_all(self.migrating())
            return
        self._drain = Drain.resume(self)
        if self._drain.phase is Phase.MOVED:
            self.notify_moved(self._drain.migrating, self._drain.uri)
        self._drain.start()
        _log.notice("drain-resumed", phase=str(self._drain.phase), to=self._drain.uri)

    def stop(self) -> None:
        """Abort what is in progress, as the daemon stops; after a finished drain, start anew."""
        self.target.stop()
        drain = self._drain
        if drain is not None and not drain.over.is_set() and drain.phase is not Phase.COMMIT:
            try:
                drain.abort()
                drain.join(1)
            except UsageError as error:
                _log.warning("drain-not-over", f"the next start continues it: {error}")
        source = self.record.source
        if source is not None and source["phase"] is Phase.MOVED:
            self.record.set_source(None)

    # DrainHost.

    def images(self) -> list[Image]:
        """Return the images served."""
        return list(self._store)

    def allowed(self, image: Image) -> DomainMembers | None:
        """Return who of its domain may use an image; None: all of the domain."""
        return self._access.allowed(image)

    def migrating(
        self, carry_to: str = "", carried: Container[tuple[str, str]] = ()
    ) -> list[MigratingGuest]:
        """Return every guest; those in carried, or that may carry to carry_to, as carriers."""
        with self._guests.lock:
            mapped = [
                MigratingCarrier(guest, self._guests)
                if (guest.domain, guest.name) in carried or may_carry(guest, carry_to)
                else MigratingMapping(guest, self._guests)
                for guest in self._guests
            ]
        with self._overlays.lock:
            return [*mapped, *(MigratingOverlay(guest) for guest in self._overlays)]

    def close_admission(self, uri: str | None) -> None:
        """Redirect new guests to uri; None: admit them again."""
        self._access.moved_to = uri
        if uri is not None and self._open_regions is not None:
            # A program that takes its pages along must see every change to them.
            self._open_regions.close_all()

    def wait_admitted(self) -> None:
        """Wait for one turn of the loop, which admits guests, so that all admitted ones are seen.

        Also waits for handoffs that are being admitted; later ones are denied.
        """
        self.target.wait_admitted()
        turned = threading.Event()
        self._loop.call(turned.set)
        turned.wait(_TURN_SECONDS)

    def connect(
        self, uri: str, look: Callable[[], None], reply_seconds: float = REPLY_SECONDS
    ) -> Link:
        """Connect to the target."""
        return dial_target(uri, look, reply_seconds)

    def send_on(self, migrating: list[MigratingGuest], uri: str) -> None:
        """End the connections of overlays' clients."""
        self._loop.call(lambda: self._disconnect_all(migrating, uri))

    def _disconnect_all(self, migrating: list[MigratingGuest], uri: str) -> None:
        for each in migrating:
            if isinstance(each, MigratingOverlay) and each.guest.nr_clients:
                _log.notice("disconnected", f"it moved to {uri}", overlay=each.guest.label)
                self._disconnect(each.guest)

    def notify_moved(self, migrating: list[MigratingGuest], uri: str) -> None:
        """Notify guests that map, and end the connections of those that do not."""
        self._loop.call(lambda: self._notify(migrating, uri))

    def _notify(self, migrating: list[MigratingGuest], uri: str) -> None:
        for each in migrating:
            if isinstance(each, MigratingMapping):
                event: Body = {"event": "moved", "uri": uri, "token": each.token}
                if isinstance(each, MigratingCarrier):
                    event |= {"carries": True, "digest": each.image.digest}
                self._unix_server.notify(each.guest, event)
            elif isinstance(each, MigratingOverlay):
                self._retire(each.guest, uri)

    def _retire(self, guest: OverlayGuest, uri: str) -> None:
        """Withdraw an overlay that moved, once its clients' connections have ended."""
        if guest.nr_clients:
            _log.notice("disconnected", f"it moved to {uri}", overlay=guest.label)
            self._disconnect(guest)
        self._retire_later(guest)

    def _retire_later(self, guest: OverlayGuest) -> None:
        if guest.nr_clients:
            self._loop.once(_LEAVE_SECONDS, lambda: self._retire_later(guest))
        else:
            self._overlays.withdraw(guest)

    def _why_no_guests(self) -> str:
        """Return why we cannot receive guests now; "" if we can."""
        drain = self._drain
        if drain is None or drain.dry_run:
            return ""
        if drain.phase is Phase.MOVED:
            drain.over.wait(_TURN_SECONDS)  # it is about to record that
        if drain.over.is_set():
            return ""
        return f"a drain to {drain.uri} is under way here: wait until it is over"

    def _on_owner(self, names: list[str]) -> None:
        """Note that guests were received: a drained backend admits guests again."""
        if self._drain is not None and self._drain.phase is Phase.MOVED:
            if self.record.source is not None:  # else it was deleted with the record that we own
                self.record.set_source(None)
            self._drain = None
            self.close_admission(None)
            self.counters.drain = DrainStatistics()
            _log.notice("serves-again", guests=len(names))

    # Operators' requests.

    def _do_drain(self, request: Body, fds: list[int]) -> Iterator[Body]:
        uri = take_text(request, "to", max_length=4096)
        timeout_ms = take_optional_number(request, "timeout_ms", minimum=1)
        post_copy = request.get("post_copy") is True
        if post_copy and fds:
            raise UsageError(
                "a file cannot be asked for pages later: drain to it without post-copy"
            )
        before = self._drain
        if before is not None and not before.over.is_set():
            raise UsageError(
                f"a drain to {before.uri} is under way; wait for it, or abort it with "
                "'cowshed drain --abort'"
            )
        if before is not None and before.phase is Phase.MOVED:
            raise UsageError(f"this backend was drained to {before.uri}; nothing is left to drain")
        drain = Drain(
            self,
            uri,
            link=open_link(fds.pop()) if fds else None,
            timeout=None if timeout_ms is None else timeout_ms / 1000,
            dry_run=request.get("dry_run") is True,
            with_images=request.get("with_images") is True,
            post_copy=post_copy,
        )
        self._drain = drain
        try:
            drain.start()
        except CapacityError:
            self._drain = before
            raise
        while not drain.over.wait(_REPORT_SECONDS):
            yield {"progress": drain.report()}
        if drain.dry_run:
            self._drain = None
            if drain.blockers or drain.would_move:
                yield {"drain": drain.report()}
                return
        if drain.error is not None:
            raise drain.error
        yield {"drain": drain.report()}

    def _do_abort(self, _: Body, __: list[int]) -> Iterator[Body]:
        drain = self._drain
        if drain is None or drain.phase is Phase.ABORTED:
            raise UsageError("no drain is under way: there is nothing to abort")
        drain.abort()
        while not drain.over.wait(_REPORT_SECONDS):
            yield {"progress": drain.report()}
        yield {"drain": drain.report()}

    def _do_state(self, _: Body, __: list[int]) -> Iterator[Body]:
        yield {"drain": self.state()}

    def state(self) -> Body | None:
        """Return the drain in progress or the last one, for status; None if there was none."""
        return None if self._drain is None else self._drain.report()

    def _do_export(self, request: Body, fds: list[int]) -> Iterator[Body]:
        yield from export_state(
            _only(fds),
            self,
            with_images=request.get("with_images") is True,
            resume=request.get("resume") is True,
        )

    def _do_import(self, _: Body, fds: list[int]) -> Iterator[Body]:
        if why := self._why_no_guests():
            raise UsageError(why)
        for reply in import_state(_only(fds), self.target.receiver()):
            if "progress" not in reply:
                self._on_owner(reply["guests"])
            yield reply

    def _do_handoff(self, _: Body, fds: list[int]) -> Iterator[Body]:
        link = open_link(_only(fds))
        if not isinstance(link, SocketLink):
            link.close()
            raise UsageError("a handoff needs the descriptor of a stream socket; send one")
        self.target.begin(link, f"an operator, daemon {os.getpid()}")
        yield {}


def _only(fds: list[int]) -> int:
    if len(fds) != 1:
        raise UsageError(f"{len(fds)} descriptors were sent; send exactly one")
    return fds.pop()
