# SPDX-License-Identifier: Apache-2.0
"""A region is opened again for one guest while it is being closed for others."""

import os

import pytest
from regions import NO_LIMIT, REGION, collapse, two
from stage import PAGE, MappedGuest, Stage, make_stage

from cowshed.accounting import CloseReason, QuotaPolicy
from cowshed.faults import FaultOptions
from cowshed.service.guests.guests import GuestProcess, GuestTable, Mapping, OpenRequest
from cowshed.service.guests.opener import Opener
from cowshed.service.images.evictor import Evictor

__all__ = ["make_stage", "two"]


def enter(table: GuestTable, stage: Stage, guest: MappedGuest, name: str) -> Mapping:
    request = OpenRequest(name, stage.image, None, QuotaPolicy.STOP, FaultOptions(PAGE, PAGE, 0))
    peer = GuestProcess(os.getpid(), 0)
    entry = table.reserve(request, peer)
    entry.mappings.append(Mapping(entry, peer, "unix", guest.account, guest.handler, []))
    return entry.mappings[0]


def test_it_can_be_closed_again(two: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    table, evictor = GuestTable(), Evictor(two.store)
    first, second = (enter(table, two, two.guest(), name) for name in ("first", "second"))
    opener = Opener(two.store, table, evictor)
    collapse(two, 0)
    for mapping in (first, second):
        assert mapping.account.open_region(0, 0, NO_LIMIT) == 0
    opener._policy.note_opened((two.image.image_no, 0), 0.0)
    really_close = second.account.close_regions

    def close_late(*args: int) -> int:
        """Close; meanwhile the first guest, which was closed before, has the opener open it."""
        nr_closed = really_close(*args)
        monkeypatch.undo()
        opener._open(first, 0, NO_LIMIT)
        return nr_closed

    monkeypatch.setattr(second.account, "close_regions", close_late)
    extents = range(REGION // two.image.extent_pages)
    opener.close_range(two.image, 0, len(extents), CloseReason.REQUEST)
    assert (first.account.open_regions(), second.account.open_regions()) == ([0], [])
    assert evictor.evict_now(two.image, extents) == list(extents)
    assert first.account.open_regions() == []
