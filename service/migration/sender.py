# SPDX-License-Identifier: Apache-2.0
"""The source's sections of a handoff, written in order to a file or to the target."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from cowshed.accounting.page_runs import (
    PackedRuns,
    count_pages,
    packed_runs,
    page_bitmap,
    split_runs,
)
from cowshed.cache import ExtentState, Image
from cowshed.service.images.working_sets import WorkingSets
from cowshed.service.migration.compression import CompressionChoice
from cowshed.service.migration.image_source import bytes_to_send, check_source, image_sections
from cowshed.service.migration.link import Link, Reach
from cowshed.service.migration.migrating import MigratingGuest, thaw_all
from cowshed.service.migration.resumption import Prefix, page_digest
from cowshed.service.settings.domains import DomainMembers
from cowshed.transport.handoff.sections import (
    MAX_PAGES,
    PAGE_BYTES,
    XXH128,
    ControlMessage,
    Dropped,
    Header,
    ImageSection,
    ImageWhole,
    Missing,
    Pages,
    Section,
    StateWriter,
    Totals,
    WorkingSetSection,
)

__all__ = ["Progress", "Sender"]

# A round that finds at most _FEW_PAGES dirty pages is the last before the freeze. So is the last of
# _MAX_IDLE_ROUNDS rounds that found not much fewer than the best before them.
_FEW_PAGES: Final = 64
_MAX_ROUNDS: Final = 30
_MAX_IDLE_ROUNDS: Final = 3
_EXTENTS_AT_ONCE: Final = 1 << 16
_RUNS_AT_ONCE: Final = 1 << 16


@dataclass
class Progress:
    """The progress of a handoff; total_bytes grows with the pages that guests write meanwhile.

    image_bytes is the part of done_bytes that is of images.
    """

    total_bytes: int = 0
    done_bytes: int = 0
    nr_round: int = 0
    sent_bytes: int = 0
    started: float = field(default_factory=time.monotonic)
    frozen_seconds: float = 0.0
    image_bytes: int = 0

    def expect(self, nr_pages: int) -> None:
        """Set the number of pages left to send."""
        self.done_bytes = max(0, self.total_bytes - nr_pages * PAGE_BYTES)
        self.total_bytes = self.done_bytes + nr_pages * PAGE_BYTES

    def as_json(self) -> dict[str, Any]:
        """Return the progress for the command and for status."""
        seconds = time.monotonic() - self.started
        rate = self.done_bytes / seconds if seconds > 0 else 0.0
        left = max(0, self.total_bytes - self.done_bytes)
        return {
            "done_bytes": self.done_bytes,
            "total_bytes": self.total_bytes,
            "image_bytes": self.image_bytes,
            "round": self.nr_round,
            "sent_bytes": self.sent_bytes,
            "rate_bytes_per_second": round(rate),
            "seconds_left": round(left / rate, 1) if rate else None,
        }


class Sender:
    """Writes a handoff's sections. Every method may wait for the link, and raises as it does.

    Invariant: _sent has, for each guest, the pages that the other end has, current or outdated;
    _known the digests of those from before an export was resumed.
    """

    def __init__(
        self,
        link: Link,
        migrating: Sequence[MigratingGuest],
        images: Sequence[Image],
        progress: Progress,
        prefix: Prefix | None = None,
    ) -> None:
        """migrating and images must be in the prefix's order, if there is a prefix."""
        self._link = link
        self._migrating: Final = migrating
        self._images: Final = images
        self._writer = StateWriter(prefix.mark if prefix else None)
        # Any compression takes longer than copies within a host do; a file is to be small.
        self._writer.compress(link.reach is not Reach.HOST)
        self._choice = CompressionChoice() if link.reach is Reach.NETWORK else None
        self.progress: Final = progress
        self._known = prefix.pages if prefix else [{} for _ in migrating]
        self._sent = [page_bitmap(known) for known in self._known]
        self._tracked = False
        self._frozen_at: float | None = None

    def of(self, migrating: Sequence[MigratingGuest], images: Sequence[Image]) -> Sender:
        """Return a sender for these guests and images that continues this one's stream."""
        sender = Sender(self._link, migrating, images, self.progress)
        sender._writer = self._writer
        return sender

    def use_features(self, features: object) -> None:
        """Use what the other end has announced, if it has: an older one announces nothing."""
        if isinstance(features, list) and XXH128 in features:
            self._writer.use_xxh128()

    def track(self) -> None:
        """Begin to track guests' writes; thaw() ends it."""
        self._tracked = True
        for each in self._migrating:
            each.track(True)

    def freeze(self) -> None:
        """Freeze every guest."""
        self._frozen_at = time.monotonic()
        for each in self._migrating:
            each.freeze()

    def thaw(self) -> None:
        """Thaw guests here and end tracking; does nothing without track()."""
        if self._tracked:
            thaw_all(self._migrating)
        self._tracked = False
        self.end_frozen()

    def end_frozen(self) -> None:
        """Record how long guests were frozen, once they run again, here or at the target."""
        if self._frozen_at is not None:
            self.progress.frozen_seconds = time.monotonic() - self._frozen_at
            self._frozen_at = None

    def send(self, kind: str, **fields: Any) -> None:
        """Send a control message to the other end."""
        self._put(ControlMessage({"say": kind, **fields}))

    def offer(
        self,
        handoff: str,
        *,
        with_images: bool = False,
        allowed: Callable[[Image], DomainMembers | None] = lambda _: None,
    ) -> None:
        """Send the list of images and guests. with_images: bytes of images will follow, too."""
        self._put(Header(handoff, f"{socket.gethostname()}:{os.getpid()}", int(time.time())))
        numbers = {}
        for no, image in enumerate(self._images):
            numbers[image] = no
            source = os.fsencode(image.source.path).decode("ascii", "backslashreplace")
            self._put(
                ImageSection(
                    image.name,
                    image.domain,
                    image.size_bytes,
                    image.extent_bytes,
                    image.digest,
                    source,
                    with_images,
                    _lists(allowed(image)),
                )
            )
        for each in self._migrating:
            self._put(each.section(numbers[each.image]))

    def send_image(
        self, no: int, hot: Sequence[int], look: Callable[[], None], kept: bytearray | None = None
    ) -> None:
        """Send the bytes of an image, hot extents first; calls look() for each section.

        kept has the pages that the other end already has. Raises SourceError.
        """
        image, progress = self._images[no], self.progress
        check_source(image)
        before = progress.image_bytes
        expected = bytes_to_send(image)
        progress.total_bytes += expected
        for nr_bytes, section in image_sections(no, image, hot, kept):
            look()
            if section is not None:
                self._put(section)
            progress.image_bytes += nr_bytes
            progress.done_bytes += nr_bytes
        progress.total_bytes += progress.image_bytes - before - expected
        check_source(image)
        self._put(ImageWhole(no))

    def send_working_sets(self, working_sets: WorkingSets, but: Container[int] = ()) -> None:
        """Send the hot extents, in order: the recorded ones, then all others that are resident.

        Extents that were prefetched and not touched yet would be hits here, and so they are there.
        but has the numbers of images whose working sets were sent before.
        """
        for no, image in enumerate(self._images):
            if no in but:
                continue
            extents = list(dict.fromkeys([*working_sets.recorded(image), *_resident(image)]))
            for first in range(0, len(extents), _EXTENTS_AT_ONCE):
                some = extents[first : first + _EXTENTS_AT_ONCE]
                self._put(WorkingSetSection(no, tuple(some)))

    def send_private(self) -> None:
        """Send every private page: at first all are dirty."""
        self.send_dirty()

    def send_dirty(self) -> int:
        """Send the pages written since the last round; return how many were dirty."""
        self.progress.nr_round += 1
        dirty = [each.take_dirty() for each in self._migrating]
        nr = sum(map(count_pages, dirty))
        self.progress.total_bytes += PAGE_BYTES * nr
        for no, pages in enumerate(dirty):
            self._send_pages(no, pages & self._migrating[no].private())
        self.progress.done_bytes = self.progress.total_bytes
        return nr

    def send_until_few(self) -> None:
        """Send rounds of dirty pages, until one finds few or several in a row gain too little.

        The remaining pages are sent while guests are frozen.
        """
        fewest, nr_idle = 0, 0
        for _ in range(_MAX_ROUNDS):
            nr = self.send_dirty()
            if nr <= _FEW_PAGES or nr_idle == _MAX_IDLE_ROUNDS:
                return
            nr_idle += 1
            if not fewest or nr < fewest * 3 // 4:
                fewest, nr_idle = nr, 0

    def send_last(self) -> None:
        """Send the remaining pages and the totals of guests, which must be frozen; then END."""
        for no, each in enumerate(self._migrating):
            dirty, private = each.take_dirty(), each.private()
            self._send_pages(no, (dirty | ~self._sent[no]) & private)
            # None are left if it left meanwhile, when its pages were read as zeros. While it is
            # frozen it gets no new charge that would have to be settled.
            private &= each.private(settles=False)
            for runs in split_runs(self._sent[no] & ~private, 1 << 40):
                self._put(Dropped(no, tuple(runs)))
            self._sent[no] = private
            self._put(Totals(no, count_pages(private), each.counters()))
        self._give(self._writer.end())
        self.progress.done_bytes = self.progress.total_bytes

    def send_missing(self) -> list[int]:
        """List the pages of guests, which must be frozen, then END; return the pages to push."""
        missing = []
        for no, each in enumerate(self._migrating):
            private = each.private()
            runs = [run for part in split_runs(private, 1 << 44) for run in part]
            for at in range(0, len(runs), _RUNS_AT_ONCE):
                self._put(Missing(no, tuple(runs[at : at + _RUNS_AT_ONCE])))
            self._put(Totals(no, count_pages(private), each.counters()))
            missing.append(private)
        self._give(self._writer.end())
        self.progress.total_bytes = PAGE_BYTES * sum(map(count_pages, missing))
        return missing

    def push(self, no: int, runs: Sequence[tuple[int, int]], content: bytearray) -> None:
        """Send missing pages of a guest, at most MAX_PAGES."""
        self._put(Pages(no, tuple(runs), bytes(content)))

    def _send_pages(self, no: int, pages: int) -> None:
        for runs in packed_runs(pages, MAX_PAGES):
            if self._known[no]:
                self._send_news(no, runs)
            else:
                nr_bytes = sum(nr for _, nr in runs) * PAGE_BYTES
                self._send_runs(no, runs, nr_bytes)
                self.progress.done_bytes += nr_bytes
        self._sent[no] |= pages

    def _send_runs(self, no: int, runs: PackedRuns, nr_bytes: int) -> None:
        if self._choice is not None:
            self._writer.compress(self._choice.next())
        began = time.monotonic()
        self._give(self._writer.pages(no, runs, nr_bytes, partial(self._migrating[no].load, runs)))
        if self._choice is not None:
            self._choice.note(nr_bytes, time.monotonic() - began)

    def _send_news(self, no: int, runs: PackedRuns) -> None:
        content = bytearray(sum(nr for _, nr in runs) * PAGE_BYTES)
        self._migrating[no].load(runs, memoryview(content))
        self.progress.done_bytes += len(content)
        news, kept = self._news(no, runs, bytes(content))
        if news:
            self._put(Pages(no, news, kept))

    def _news(
        self, no: int, runs: PackedRuns, content: bytes
    ) -> tuple[list[tuple[int, int]], bytes]:
        """Leave out the pages of which the other end has the current bytes."""
        known = self._known[no]
        news: list[tuple[int, int]] = []
        kept: list[bytes] = []
        at = 0
        for first, nr in runs:
            for page in range(first, first + nr):
                bytes_of_page = content[at : at + PAGE_BYTES]
                at += PAGE_BYTES
                if known.get(page) != page_digest(bytes_of_page):
                    known.pop(page, None)
                    kept.append(bytes_of_page)
                    if news and sum(news[-1]) == page:
                        news[-1] = news[-1][0], news[-1][1] + 1
                    else:
                        news.append((page, 1))
        return news, b"".join(kept)

    def _put(self, section: Section) -> None:
        self._give(self._writer.write(section))

    def _give(self, raw: bytes | memoryview) -> None:
        self._link.send(raw)
        self.progress.sent_bytes = self._writer.nr_bytes


def _resident(image: Image) -> Iterator[int]:
    states, mark = image.states(), bytes([ExtentState.RESIDENT])
    at = states.find(mark)
    while at >= 0:
        yield at
        at = states.find(mark, at + 1)


def _lists(members: DomainMembers | None) -> dict[str, tuple[int | str, ...]] | None:
    if members is None:
        return None
    return {
        "uids": tuple(sorted(members.uids)),
        "gids": tuple(sorted(members.gids)),
        "clients": tuple(sorted(members.clients)),
    }
