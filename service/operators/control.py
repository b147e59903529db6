# SPDX-License-Identifier: Apache-2.0
"""The operators' requests to a running daemon: each is a function from the request to its replies.

Requests are untrusted: transport.messages reads the fields, and refuses bad ones. Everything here
runs in worker threads, never in the loop that answers guests.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

from cowshed.accounting import audit
from cowshed.cache import CapacityError, ExtentState, Image, UsageError
from cowshed.service.host import Host
from cowshed.service.images.loading import load
from cowshed.service.overlays.overlays import OverlayGuest
from cowshed.service.reports.status import StatusReader
from cowshed.service.runtime import test_points
from cowshed.service.runtime.sizes import format_bytes
from cowshed.service.settings.domains import Identity
from cowshed.service.settings.names import find_for_operator
from cowshed.service.settings.quotas import check_quota
from cowshed.transport.messages.fields import take_optional_number, take_text

__all__ = ["Control"]

Body = dict[str, Any]

# The size of a reply is limited.
_MOST_MISMATCHES: Final = 10_000


class Control:
    """The operations, by name. perform() may be called from any thread."""

    def __init__(
        self, host: Host, status: StatusReader, is_stopping: Callable[[], bool] = lambda: False
    ) -> None:
        """is_stopping() returns whether long operations must end."""
        self._store = host.store
        self._access = host.access
        self._evictor = host.evictor
        self._guests = host.guests
        self._overlays = host.overlays
        self._status = status
        self._working_sets = host.working_sets
        self._counters = host.counters
        self._warming = host.warming
        self.is_stopping: Final = is_stopping
        self._quick = {"status", "quota", "warm-abort"}
        self._with_fds: dict[str, Callable[[Body, list[int]], Iterable[Body]]] = {}
        self._ops: dict[str, Callable[[Body], Iterable[Body]]] = {
            "status": self._do_status,
            "audit": self._do_audit,
            "pin": self._do_pin,
            "unpin": self._do_unpin,
            "warm": self._do_warm,
            "warm-abort": self._do_warm_abort,
            "evict": self._do_evict,
            "quota": self._do_quota,
            "discard": self._do_discard,
        }
        if test_points.ENABLED:
            self._ops["point"] = test_points.arm

    def knows(self, op: str) -> bool:
        """Whether op is one of the operations here."""
        return op in self._ops or op in self._with_fds

    def is_quick(self, op: str, request: Body) -> bool:
        """Whether a request takes milliseconds and never waits for a disk."""
        if op == "quota" and self._overlays.in_files:  # an overlay's quota is kept in its files
            name = request.get("guest")
            return not any(name in (of.name, f"{of.domain}/{of.name}") for of in self._overlays)
        return op in self._quick

    def add(
        self, op: str, perform: Callable[[Body, list[int]], Iterable[Body]], *, is_quick: bool
    ) -> None:
        """Add an operation that takes descriptors; those it leaves in the list are closed."""
        self._with_fds[op] = perform
        if is_quick:
            self._quick.add(op)

    def perform(self, op: str, request: Body, fds: list[int] | None = None) -> Iterator[Body]:
        """Yield the replies to a request as they come; raises CowshedError for a refusal.

        fds came with it; those that the operation does not take out are closed in the end.
        """
        fds = fds or []
        try:
            known = self._ops.get(op)
            for reply in known(request) if known else self._with_fds[op](request, fds):
                yield {"ok": True, **reply}
        finally:
            while fds:
                os.close(fds.pop())

    def find_image(self, name: str) -> Image:
        """Return the image that an operator names; UsageError names the choices."""
        return find_for_operator(self._store, name)

    def find_guest_image(self, name: str, identity: Identity) -> Image:
        """Return the image that a guest names; UsageError names those it may use."""
        return self._access.find(self._store, name, identity)

    def check_open(self) -> None:
        """Raise MovedError while this backend is drained, and after it."""
        self._access.check_open()

    def status(self) -> dict[str, Any]:
        """Return a new object of `cowshed status --json`; from any thread."""
        return self._status.read()

    def _do_status(self, _: Body) -> Iterator[Body]:
        yield {"status": self._status.read()}

    def _do_audit(self, _: Body) -> Iterator[Body]:
        report = audit(
            lambda: list(self._store),
            self._guests.accounts,
            self._overlays.of_image,
            lambda: self.is_stopping(),
        )
        self._counters.note_audit(mismatch.check for mismatch in report.mismatches)
        yield {
            "mismatches": [mismatch.as_json() for mismatch in report.mismatches[:_MOST_MISMATCHES]],
            "left_out": max(0, len(report.mismatches) - _MOST_MISMATCHES),
            "checked": report.checked,
        }

    def _do_pin(self, request: Body) -> Iterator[Body]:
        image, extents = self._range(request)
        most = max(0, self._evictor.max_pinned_extents)
        most_bytes = most * image.store.extent_bytes
        try:
            self._evictor.pin(image, extents)
        except CapacityError as error:
            raise CapacityError(
                f"cannot pin {format_bytes(len(extents) * image.extent_bytes)} of {image.label!r}: "
                f"at most {format_bytes(most_bytes)} of the capacity can be pinned; "
                "unpin something, or raise the capacity"
            ) from error
        for _ in load(image, extents):
            if self.is_stopping():
                raise CapacityError(f"{image.label!r} is pinned and not loaded: the daemon ends")
        os.eventfd_write(self._store.wanted_fd, 1)  # to be opened
        yield {"pinned_bytes": _pinned_bytes(image)}

    def _do_unpin(self, request: Body) -> Iterator[Body]:
        image, extents = self._range(request)
        try:
            image.unpin(extents.start, len(extents))
        except UsageError as error:
            raise UsageError(
                f"not all of the {format_bytes(len(extents) * image.extent_bytes)} of "
                f"{image.label!r} are pinned; name a range that was pinned (see status)"
            ) from error
        yield {"pinned_bytes": _pinned_bytes(image)}

    def _do_warm(self, request: Body) -> Iterator[Body]:
        image, extents = self._range(request)
        whole = request.get("offset") is None and request.get("length") is None
        first = self._working_sets.recorded(image) if whole else []
        room = self._evictor.watermarks.capacity_extents - self._evictor.watermarks.high_free
        # At most as many as there is room for: an image may have a billion extents.
        most = max(0, room // image.room_of(0))
        wanted = list(itertools.islice(_in_order(first, extents), most))
        states, in_standby = image.states(), image.in_standby()
        loads_before = image.counters().loads
        absent = sum(
            states[extent] != ExtentState.RESIDENT and not in_standby[extent] for extent in wanted
        )
        with self._warming.enter(image, "warm", len(wanted)) as warm:
            for warm.done_extents in load(image, wanted):
                if warm.is_aborted:
                    raise UsageError(
                        f"warming {image.label!r} was aborted by an operator, with "
                        f"{format_bytes(warm.done_bytes)} of "
                        f"{format_bytes(warm.total_bytes or 0)} done; warm it again to go on"
                    )
                progress = {"done_bytes": warm.done_bytes, "total_bytes": warm.total_bytes}
                yield {"progress": progress}
        loaded = min(image.counters().loads - loads_before, absent)
        yield {
            "loaded_bytes": loaded * image.extent_bytes,
            "already_bytes": (len(wanted) - loaded) * image.extent_bytes,
            "left_out_bytes": (len(extents) - len(wanted)) * image.extent_bytes,
        }

    def _do_warm_abort(self, request: Body) -> Iterator[Body]:
        image = self.find_image(take_text(request, "image"))
        warms = self._warming.abort(image)
        if not warms:
            raise UsageError(
                f"image {image.label!r} is not being warmed; 'cowshed status' shows which are"
            )
        yield {
            "done_bytes": sum(warm.done_bytes for warm in warms),
            "total_bytes": sum(warm.total_bytes or 0 for warm in warms),
        }

    def _do_evict(self, request: Body) -> Iterator[Body]:
        image, extents = self._range(request)
        resident = list(_resident(image, extents))
        gone = self._evictor.evict_now(image, resident)
        dropped_bytes = image.drop_standby(extents.start, len(extents))
        pins = image.pins()
        kept = set(resident) - set(gone)
        yield {
            "evicted_bytes": sum(map(image.extent_bytes_of, gone)) + dropped_bytes,
            "kept_bytes": sum(image.extent_bytes_of(extent) for extent in kept),
            "kept_why": "pinned" if any(pins[extent] for extent in kept) else "busy",
        }

    def _do_quota(self, request: Body) -> Iterator[Body]:
        name = take_text(request, "guest")
        quota_bytes = take_optional_number(request, "quota_bytes")
        if quota_bytes is not None:
            check_quota(quota_bytes)
        everybody = [*self._guests, *self._overlays]
        guest = find_for_operator(everybody, name, "guest")
        if isinstance(guest, OverlayGuest):
            self._overlays.set_quota(guest, quota_bytes)
            yield {"quota_bytes": quota_bytes}
            return
        with self._guests.lock:
            guest = self._guests.find(name)  # it may have left
            guest.set_quota(quota_bytes)
        yield {"quota_bytes": quota_bytes}

    def _do_discard(self, request: Body) -> Iterator[Body]:
        overlay = take_text(request, "overlay", max_length=300)
        yield {"private_bytes": self._overlays.discard(overlay)}

    def _range(self, request: Body) -> tuple[Image, range]:
        """Return the image and the extents that a request's byte range touches."""
        image = self.find_image(take_text(request, "image"))
        offset = take_optional_number(request, "offset") or 0
        length = take_optional_number(request, "length")
        if length is None:
            length = max(0, image.size_bytes - offset)
        if length == 0 or offset + length > image.map_bytes:
            raise UsageError(
                f"{length} bytes at {offset} are not a part of {image.label!r}, "
                f"which has {image.size_bytes} bytes; give a range inside"
            )
        first = offset // image.extent_bytes
        return image, range(first, (offset + length - 1) // image.extent_bytes + 1)


def _in_order(first: Iterable[int], then: Iterable[int]) -> Iterator[int]:
    """Yield the items of both, each once."""
    seen = dict.fromkeys(first)
    yield from seen
    yield from (extent for extent in then if extent not in seen)


def _resident(image: Image, extents: range) -> Iterator[int]:
    """Yield the resident extents in order; searches the states with bytes.find, for speed."""
    states, resident = image.states(extents.start, len(extents)), bytes([ExtentState.RESIDENT])
    at = states.find(resident)
    while at >= 0:
        yield extents.start + at
        at = states.find(resident, at + 1)


def _pinned_bytes(image: Image) -> int:
    pins = image.pins()
    return (len(pins) - pins.count(0)) * image.extent_bytes
