# SPDX-License-Identifier: Apache-2.0
"""The source of a post-copy handoff: pushes pages to a target that already owns the guests.

Pages that the target requests go first. The pages are frozen, so each is sent once per connection.
Pages that ended with their guest are reported as gone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

from cowshed.accounting.page_runs import PackedRuns, count_pages, split_runs
from cowshed.cache import PeerError
from cowshed.service.migration.migrating import MigratingGuest, MigratingMapping
from cowshed.service.migration.sender import Sender
from cowshed.service.runtime.logs import EventLog
from cowshed.service.runtime.stops import stop_at
from cowshed.transport.handoff.sections import PAGE_BYTES, ControlMessage
from cowshed.transport.messages.fields import take_number

__all__ = ["MAX_MESSAGE_RUNS", "PostcopySource", "bitmap_of_runs", "messages_of", "take_runs"]

_log = EventLog("cowshed.drain")

_BATCH_PAGES: Final = 64  # bounds how long a requested page waits for the current batch
MAX_MESSAGE_RUNS: Final = 4096


def bitmap_of_runs(runs: Sequence[tuple[int, int]]) -> int:
    """Convert runs to a bitmap."""
    bitmap = 0
    for first, nr in runs:
        bitmap |= ((1 << nr) - 1) << first
    return bitmap


def take_runs(message: ControlMessage) -> list[tuple[int, int]]:
    """Read a message's runs of pages; PeerError if malformed. Does not check any image's size."""
    found = message.body.get("runs")
    if not isinstance(found, list) or len(found) > MAX_MESSAGE_RUNS:
        raise PeerError(f"control message {message.kind!r} has no list of runs of pages")
    runs = []
    for run in found:
        if not (isinstance(run, list) and len(run) == 2 and all(type(no) is int for no in run)):
            raise PeerError(
                f"control message {message.kind!r} has {run!r}"[:100] + " for a run of pages"
            )
        first, nr = run
        if not (0 <= first < 1 << 44 and 0 < nr < 1 << 44):
            raise PeerError(f"control message {message.kind!r} has {nr} pages from {first}")
        runs.append((first, nr))
    return runs


class PostcopySource:
    """Pushes pages of guests by number; a guest that is no longer here is None.

    Invariant: _left has, by guest, the bits of the pages that are still to be pushed.
    """

    def __init__(self, migrating: Sequence[MigratingGuest | None], left: Sequence[int]) -> None:
        self.nr_pages: Final = sum(map(count_pages, left))
        self._migrating: Final = migrating
        self._left = [_bytes(bitmap) for bitmap in left]
        self._here = [
            _bytes(0 if each is None else bitmap & each.private())
            for each, bitmap in zip(migrating, left, strict=True)
        ]
        self._asked: deque[tuple[int, list[int]]] = deque()
        self._in_order = (
            (guest, [page for first, nr in runs for page in range(first, first + nr)])
            for guest, bitmap in enumerate(left)
            for runs in split_runs(bitmap, _BATCH_PAGES)
        )

    def run(self, sender: Sender, hear: Callable[[bool], ControlMessage | None]) -> ControlMessage:
        """Push until the target sends "filled"; return that message.

        hear(wait) returns the target's next message; None if none is there and wait is false.
        Raises PeerError once the target is gone.
        """
        while True:
            batch = self._next_batch()
            while (message := hear(batch is None)) is not None:
                if message.kind == "filled":
                    return message
                self._take(message)
                batch = batch or self._next_batch()
            if batch is not None:
                self._send(sender, *batch)
                stop_at("source-pushed")

    def _take(self, message: ControlMessage) -> None:
        if message.kind != "want":
            raise PeerError(f"the target sent {message.kind!r} while pages are pushed")
        guest = take_number(message.body, "guest", maximum=len(self._migrating) - 1)
        limit = 8 * len(self._left[guest])
        for first, nr in take_runs(message):
            for at in range(first, min(first + nr, limit), _BATCH_PAGES):
                pages = range(at, min(at + _BATCH_PAGES, first + nr, limit))
                self._asked.append((guest, list(pages)))

    def _next_batch(self) -> tuple[int, list[int]] | None:
        """Return a guest and pages to push: requested ones, else the next in order; None: done."""
        while self._asked:
            guest, pages = self._asked.popleft()
            if pages := [page for page in pages if _has(self._left[guest], page)]:
                return guest, pages
        for guest, pages in self._in_order:
            if pages := [page for page in pages if _has(self._left[guest], page)]:
                return guest, pages
        return None

    def _send(self, sender: Sender, guest: int, pages: list[int]) -> None:
        each = self._migrating[guest]
        runs = _runs([page for page in pages if _has(self._here[guest], page)])
        content = _load(each, runs) if each is not None and runs else None
        if content is not None:
            sender.push(guest, runs, content)
        gone = [page for page in pages if content is None or not _has(self._here[guest], page)]
        if gone:
            _log.error(
                "pages-gone",
                "they ended with their guest, or with a backend that died",
                guest="?" if each is None else each.name,
                pages=len(gone),
            )
            sender.send("gone", guest=guest, runs=[list(run) for run in _runs(gone)])
        sender.progress.done_bytes += len(pages) * PAGE_BYTES
        for page in pages:
            self._left[guest][page // 8] &= ~(1 << page % 8)


def _bytes(bitmap: int) -> bytearray:
    return bytearray(bitmap.to_bytes((bitmap.bit_length() + 7) // 8, "little"))


def _has(bits: bytearray, page: int) -> bool:
    return page // 8 < len(bits) and bool(bits[page // 8] >> page % 8 & 1)


def _runs(pages: list[int]) -> list[tuple[int, int]]:
    """Group ascending pages into runs."""
    runs: list[tuple[int, int]] = []
    for page in pages:
        if runs and sum(runs[-1]) == page:
            runs[-1] = runs[-1][0], runs[-1][1] + 1
        else:
            runs.append((page, 1))
    return runs


def _load(each: MigratingGuest, runs: list[tuple[int, int]]) -> bytearray | None:
    """Copy pages; None if they are gone."""
    content = bytearray(sum(nr for _, nr in runs) * PAGE_BYTES)
    try:
        each.load(PackedRuns.of(runs), memoryview(content))
    except PeerError as error:
        _log.info("pages-unreadable", str(error), guest=each.name)
        return None
    # If the guest left meanwhile, load() may have returned zeros.
    if isinstance(each, MigratingMapping) and not each.is_here:
        return None
    return content


def messages_of(kind: str, guest: int, bitmap: int, **fields: Any) -> list[ControlMessage]:
    """Return messages that list a guest's pages; at least one."""
    runs = [list(run) for part in split_runs(bitmap, 1 << 44) for run in part]
    return [
        ControlMessage(
            {"say": kind, "guest": guest, "runs": runs[at : at + MAX_MESSAGE_RUNS], **fields}
        )
        for at in range(0, max(1, len(runs)), MAX_MESSAGE_RUNS)
    ]
