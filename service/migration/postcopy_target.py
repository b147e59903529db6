# SPDX-License-Identifier: Apache-2.0
"""The target's side of post-copy: guests that are here while some of their pages are missing.

The source pushes pages; a thread requests at once those that a client waits for. If the source is
lost, the target waits until it connects again, and sends it the list of missing pages. After
wait_seconds the missing pages are lost: reads of them fail until the source connects after all or
the guest writes the page anew. Pages that arrived stay.

Overlays may be discarded meanwhile, so each is accessed only inside OverlayTable.using(). Lock
order: the handoff target's, then the overlay table's. _lock is taken without any other.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from cowshed.accounting import MissingPages
from cowshed.accounting.page_runs import count_pages
from cowshed.cache import PeerError, SourceError
from cowshed.cache.images import PAGE_BYTES
from cowshed.service.migration.postcopy_source import messages_of
from cowshed.service.overlays.overlays import OverlayGuest, OverlayTable
from cowshed.service.runtime.logs import EventLog
from cowshed.transport.handoff.sections import ControlMessage, Pages

__all__ = ["GuestMissing", "PostcopyTarget"]

_log = EventLog("cowshed.handoff")

Send = Callable[[ControlMessage], None]


@dataclass(frozen=True)
class GuestMissing:
    """The missing pages of one guest."""

    guest: OverlayGuest
    missing_pages: int
    lost_pages: int


class PostcopyTarget:
    """The guests of one handoff, by number; None for one no longer here. Must be closed.

    Invariant: _send sends to the source while that is connected; else it is None and, unless
    _deadline is None, the thread waits for the source until then. Both are under _lock.
    """

    def __init__(
        self,
        handoff: str,
        guests: Sequence[OverlayGuest | None],
        overlays: OverlayTable,
        wait_seconds: float,
        on_filled: Callable[[PostcopyTarget], None],
    ) -> None:
        """on_filled(postcopy) is called, in the post-copy's thread, once nothing is missing."""
        self.handoff: Final = handoff
        self._guests = list(guests)
        self._overlays = overlays
        self._wait_seconds = wait_seconds
        self._on_filled = on_filled
        self._lock = threading.Lock()
        self._send: Send | None = None
        self._deadline: float | None = time.monotonic() + wait_seconds
        self._wanted = [0] * len(guests)
        self._closed = False
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._fds = self._event_fds()
        self._thread = threading.Thread(target=self._run, name="late-pages", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """Stop the thread; no overlay is accessed any more."""
        self._closed = True
        os.eventfd_write(self._wake, 1)

    @property
    def sizes_bytes(self) -> list[int]:
        """The sizes of the guests' images, by number."""
        return [0 if guest is None else guest.image.size_bytes for guest in self._guests]

    @property
    def keys(self) -> list[tuple[str, str]]:
        """Domains and names, by number."""
        return [("", "") if guest is None else guest.request.key for guest in self._guests]

    @contextmanager
    def _of(self, no: int) -> Iterator[tuple[OverlayGuest, MissingPages] | None]:
        """Yield a guest, kept from being discarded while the block lasts; None if it is gone."""
        guest = self._guests[no] if no < len(self._guests) else None
        if self._closed or guest is None:
            yield None
            return
        with self._overlays.using(guest) as is_here:
            yield (guest, MissingPages(guest.overlay)) if is_here else None

    def _event_fds(self) -> dict[int, int]:
        """Duplicate the event descriptors that signal wanted pages; map them to guests' numbers."""
        fds = {}
        for no in range(len(self._guests)):
            with self._of(no) as found:
                if found is not None and found[1].fd >= 0:
                    fds[os.dup(found[1].fd)] = no
        return fds

    # The source.

    def connect(self, send: Send) -> None:
        """Request pages by send(message), which may raise PeerError, from now on."""
        for no in range(len(self._guests)):
            with self._of(no) as found:
                if found is not None:
                    found[1].find()
        with self._lock:
            self._send, self._deadline = send, None
        os.eventfd_write(self._wake, 1)

    def disconnect(self, send: Send) -> None:
        """Begin to wait for a lost source; does nothing if it has connected again since."""
        with self._lock:
            if self._send != send:
                return
            self._send = None
            self._deadline = time.monotonic() + self._wait_seconds
        for each in self.missing():
            _log.warning(
                "late-pages-waited-for",
                f"their source is gone; it has {self._wait_seconds:g} s to connect again",
                overlay=each.guest.label,
                pages=each.missing_pages,
            )
        os.eventfd_write(self._wake, 1)

    def missing_messages(self) -> list[ControlMessage]:
        """Return the messages that list the missing pages; only the last has "more": false."""
        messages = []
        for no in range(len(self._guests)):
            with self._of(no) as found:
                bitmap = 0 if found is None else found[1].bitmap()
            if bitmap:
                messages += messages_of("lacking", no, bitmap, more=True)
        last = {"say": "lacking", "guest": 0, "runs": [], "more": False}
        return [*messages, ControlMessage(last)]

    def take(self, section: Pages) -> None:
        """Store pushed pages. Raises SourceError if there is no room for them."""
        at, content = 0, memoryview(section.content)
        with self._of(section.guest) as found:
            if found is None:
                return
            for first, nr in section.runs:
                try:
                    found[1].arrive(first, content[at : at + nr * PAGE_BYTES])
                except OSError as error:
                    raise SourceError(f"no room for private pages: {error.strerror}") from error
                at += nr * PAGE_BYTES

    def lose(self, no: int, runs: Sequence[tuple[int, int]]) -> None:
        """Mark pages that the source no longer has as lost. PeerError if beyond the image."""
        with self._of(no) as found:
            if found is None:
                return
            guest, missing = found
            nr_pages = guest.image.nr_pages
            if any(first + nr > nr_pages for first, nr in runs):
                raise PeerError(f"peer lost pages of guest {guest.name!r} past its image's end")
            nr = sum(missing.lose(*run) for run in runs)
        if nr:
            _log_lost(guest, nr, "the source no longer has them")

    @property
    def nr_missing(self) -> int:
        """The number of missing pages."""
        nr = 0
        for no in range(len(self._guests)):
            with self._of(no) as found:
                nr += 0 if found is None else found[1].nr_left
        return nr

    @property
    def is_filled(self) -> bool:
        """Whether nothing is missing; False once closed, since overlays cannot be read then."""
        return not self.nr_missing and not self._closed

    @property
    def is_hopeless(self) -> bool:
        """Whether all missing pages are lost."""
        missing = self.missing()
        return bool(missing) and all(each.missing_pages == each.lost_pages for each in missing)

    def missing(self) -> list[GuestMissing]:
        """Return the missing pages of each guest that misses some."""
        result = []
        for no in range(len(self._guests)):
            with self._of(no) as found:
                if found is not None and found[1].nr_left:
                    result.append(GuestMissing(found[0], found[1].nr_left, found[1].nr_lost))
        return result

    def flush(self) -> None:
        """Sync the pages that arrived. Raises SourceError, also if closed meanwhile."""
        for no in range(len(self._guests)):
            with self._of(no) as found:
                if found is not None:
                    found[0].overlay.flush()
        if self._closed:
            raise SourceError("the backend ends before it has all pages of its guests")

    # The thread.

    def _run(self) -> None:
        poll = select.poll()
        for fd in (self._wake, *self._fds):
            poll.register(fd, select.POLLIN)
        try:
            while True:
                left = None if self._deadline is None else self._deadline - time.monotonic()
                ready = poll.poll(None if left is None else max(0, left * 1000))
                if self._closed:
                    break
                for fd, _ in ready:
                    if fd == self._wake:
                        os.eventfd_read(self._wake)
                    else:
                        self._note_wanted(self._fds[fd])
                self._ask()
                self._look_at_clock()
                if self.is_filled:
                    self._on_filled(self)
                    break
        finally:
            for fd in (self._wake, *self._fds):
                poll.unregister(fd)
            for fd in self._fds:
                os.close(fd)

    def _note_wanted(self, no: int) -> None:
        with self._of(no) as found:
            if found is not None:
                self._wanted[no] |= found[1].take_wanted()

    def _ask(self) -> None:
        """Request wanted pages if the source is connected; else they stay in _wanted."""
        with self._lock:
            send = self._send
        if send is None:
            return
        for no, wanted in enumerate(self._wanted):
            if not wanted:
                continue
            self._wanted[no] = 0
            try:
                for message in messages_of("want", no, wanted):
                    send(message)
            except PeerError as error:
                self._wanted[no] = wanted
                _log.info("late-pages-unasked", str(error), pages=count_pages(wanted))
                return

    def _look_at_clock(self) -> None:
        """Mark the missing pages as lost if the source did not connect in time."""
        with self._lock:
            if self._deadline is None or time.monotonic() < self._deadline:
                return
            self._deadline = None
        for each in self.missing():
            no = self._guests.index(each.guest)
            with self._of(no) as found:
                nr = 0 if found is None else found[1].lose(0, each.guest.image.nr_pages)
            if nr:
                _log_lost(each.guest, nr, f"their source was gone for {self._wait_seconds:g} s")


def _log_lost(guest: OverlayGuest, nr_pages: int, why: str) -> None:
    _log.error(
        "pages-lost",
        f"{why}: reads of them fail until the guest writes them anew or the source connects again",
        overlay=guest.label,
        pages=nr_pages,
    )
