# SPDX-License-Identifier: Apache-2.0
"""Recomputes from the kernel what the ledger claims, and reports every difference.

Four things are checked. refs: an extent's reference count is the number of accounts whose grant bit
is set. private: the pages an account is charged for are the pages PAGEMAP_SCAN shows as the guest's
own, and a quota's used pages are those its accounts are charged for. Pages of an open region are
charged whether they are the guest's own or not, and all of its extents are granted. In an overlay,
whose guest maps nothing, only private pages have bytes, and its quota has paid for these and for
the pages that requests have in hand. granted: a shared page that is mapped lies in a granted
extent. resident: an extent has all its frames in the memfd when it is RESIDENT and none when it is
ABSENT, and while no extent changes state, the memfd's st_blocks agree. standby: the memory of the
standby list is that of the extents in it.

Guests run meanwhile, so one look may catch a step half done. A mismatch is reported only if several
looks in a row show it, with time for the step to end in between.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from array import array
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Final

from cowshed.accounting.ledger import Account
from cowshed.accounting.overlay import Overlay
from cowshed.cache import CapacityError, ExtentState, Image, PageStore
from cowshed.cache._core import lib
from cowshed.cache.images import PAGE_BYTES

__all__ = ["AuditReport", "Mismatch", "audit"]

# Pauses between looks at a suspect. A guest in the middle of a discard has its pages for a moment
# longer than the ledger, and on a busy host it may not run for a second.
_PAUSES_SECONDS: Final = (0.03, 0.03, 0.03, 0.03, 0.03, 0.1, 0.2, 0.4, 0.8)
# Extents, or bytes of a bitmap, that are skipped in one step if they are all empty.
_STRETCH: Final = 4096
# Mismatches reported of one guest: one that undoes its own protection can cause one per page.
_MOST_OF_A_GUEST: Final = 1000
# The place of a mismatch in a quota; `audit --json` keeps the old word.
_QUOTA: Final = "purse"
# Translate looks: to digits for int(..., 2), 1 if private; and to 1 if mapped and shared.
_PRIVATE: Final = bytes(49 if look == lib.PAGE_LOOK_PRIVATE else 48 for look in range(256))
_SHARED: Final = bytes(look in (lib.PAGE_LOOK_SHARED, lib.PAGE_LOOK_OPEN) for look in range(256))


@dataclass(frozen=True, order=True)
class Mismatch:
    """One difference: where it is, what the ledger says and what the kernel shows."""

    check: str
    domain: str
    image: str
    guest: str
    place: str
    place_no: int
    expected: int = field(compare=False)
    found: int = field(compare=False)

    def as_json(self) -> dict[str, Any]:
        """Return the object that `cowshed audit --json` prints."""
        return {
            "check": self.check,
            "domain": self.domain,
            "image": self.image,
            "guest": self.guest,
            self.place: self.place_no,
            "expected": self.expected,
            "found": self.found,
        }


@dataclass(frozen=True)
class AuditReport:
    """Every mismatch that persisted, and how much was checked."""

    mismatches: list[Mismatch]
    checked: dict[str, int]


Accounts = Mapping[str, Account]
Overlays = Mapping[str, Overlay]


def _none(_: Image) -> AbstractContextManager[Overlays]:
    return contextlib.nullcontext({})


def audit(
    images: Callable[[], list[Image]],
    accounts: Callable[[Image], AbstractContextManager[Accounts]],
    overlays: Callable[[Image], AbstractContextManager[Overlays]] = _none,
    stop: Callable[[], bool] = lambda: False,
) -> AuditReport:
    """Check every image and account; O(pages of all images and guests), milliseconds per GiB.

    accounts gives the accounts of an image's mappings, by guest name, and keeps them open inside
    `with`; overlays does the same for guests that map nothing. Raises CapacityError soon after
    stop() is true: a partial audit is not reported.
    """

    def check_stop() -> None:
        if stop():
            raise CapacityError("the audit was broken off: the backend ends; ask its successor")

    checked: dict[str, int] = {}
    suspects = _look(images, accounts, overlays, checked, check_stop)
    for pause in _PAUSES_SECONDS:
        if not suspects:
            break
        check_stop()
        time.sleep(pause)
        looked = _look(images, accounts, overlays, checked, check_stop)
        seen = {mismatch: mismatch for mismatch in looked}
        suspects = [seen[mismatch] for mismatch in suspects if mismatch in seen]
    return AuditReport(sorted(suspects), checked)


def _look(
    images: Callable[[], list[Image]],
    accounts: Callable[[Image], AbstractContextManager[Accounts]],
    overlays: Callable[[Image], AbstractContextManager[Overlays]],
    checked: dict[str, int],
    check_stop: Callable[[], None],
) -> list[Mismatch]:
    mismatches: list[Mismatch] = []
    names = ["images", "guests", "overlays", "extents", "refs", "private_pages"]
    names += ["resident_extents", "unseen_guests"]
    checked.update(dict.fromkeys(names, 0))
    for image in images():
        with accounts(image) as of_image:
            checked["images"] += 1
            checked["guests"] += len(of_image)
            checked["extents"] += image.nr_extents
            mismatches += _look_at_refs(image, of_image, checked)
            for guest, account in of_image.items():
                check_stop()
                found = _look_at_pages(image, guest, account, checked)
                mismatches += itertools.islice(found, _MOST_OF_A_GUEST)
            mismatches += _look_at_quotas(image, of_image)
        with overlays(image) as kept:
            checked["overlays"] += len(kept)
            for guest, overlay in kept.items():
                check_stop()
                found = _look_at_overlay(image, guest, overlay, checked)
                mismatches += itertools.islice(found, _MOST_OF_A_GUEST)
        mismatches += _look_at_frames(image, checked, check_stop)
    for store in {image.store for image in images()}:
        mismatches += _look_at_standby(store)
    return mismatches


def _look_at_standby(store: PageStore) -> Iterator[Mismatch]:
    before = store.counters()
    found = os.fstat(store.standby_fd).st_blocks * 512 if store.standby_fd >= 0 else 0
    expected = before.standby_pages * PAGE_BYTES
    is_still = not (before.loading_extents or before.standby_moving)
    if found != expected and is_still and store.counters() == before:
        yield Mismatch("standby", "", "", "", "extent", -1, expected, found)


def _look_at_refs(image: Image, accounts: Accounts, checked: dict[str, int]) -> Iterator[Mismatch]:
    refs = image.refs()
    grants = array("I", bytes(4 * image.nr_extents))
    for account in accounts.values():
        account.add_grants(grants)
    checked["refs"] += sum(grants) if accounts else 0
    if refs != grants:
        for extent, (found, expected) in enumerate(zip(refs, grants, strict=True)):
            if found != expected:
                yield Mismatch(
                    "refs", image.domain, image.name, "", "extent", extent, expected, found
                )


def _look_at_pages(
    image: Image, guest: str, account: Account, checked: dict[str, int]
) -> Iterator[Mismatch]:
    try:
        account.settle()
        reserved = account.reserved_bitmap()
        before = account.private_bitmap()
        looks = account.looks()
    except OSError:
        # The guest is ending, and its account with it; or we may not read its page tables.
        checked["unseen_guests"] += 1
        return
    charged = int.from_bytes(before, "little")
    copied = int(looks.translate(_PRIVATE)[::-1], 2)
    checked["private_pages"] += copied.bit_count()
    # A reserved page is charged, whether it was written by now or not.
    may_be = charged & int.from_bytes(reserved, "little")
    for page in _bits((charged ^ copied) & ~may_be):
        is_charged = before[page // 8] >> page % 8 & 1
        yield Mismatch(
            "private", image.domain, image.name, guest, "page", page, is_charged, 1 - is_charged
        )
    for extent, nr_mapped in _mapped_ungranted(image, account, looks.translate(_SHARED)):
        yield Mismatch("granted", image.domain, image.name, guest, "extent", extent, 0, nr_mapped)


def _look_at_quotas(image: Image, accounts: Accounts) -> Iterator[Mismatch]:
    """Compare each quota's used pages with its accounts' charges, once per quota."""
    seen = set()
    for guest, account in accounts.items():
        if account.quota not in seen:
            seen.add(account.quota)
            charged, used = account.count_quota()
            if charged != used:
                yield Mismatch("private", image.domain, image.name, guest, _QUOTA, 0, charged, used)


def _look_at_overlay(
    image: Image, guest: str, overlay: Overlay, checked: dict[str, int]
) -> Iterator[Mismatch]:
    """Check an overlay's pages; its guest maps nothing, so no page table is read."""

    def wrong(place: str, place_no: int, expected: int, found: int) -> Mismatch:
        return Mismatch(
            "private", image.domain, image.name, guest, place, place_no, expected, found
        )

    sums = overlay.sums()
    checked["private_pages"] += sums.private
    if sums.counted != sums.private:
        yield wrong("ledger", 0, sums.counted, sums.private)
    if sums.used != sums.private + sums.in_hand:
        yield wrong(_QUOTA, 0, sums.private + sums.in_hand, sums.used)
    for page in _bits(int.from_bytes(overlay.stray_bitmap(), "little")):
        yield wrong("page", page, 0, 1)


def _mapped_ungranted(image: Image, account: Account, shared: bytes) -> Iterator[tuple[int, int]]:
    """Yield extents that have shared pages mapped without a grant, and how many pages."""
    grants = array("I", bytes(4 * image.nr_extents))
    account.add_grants(grants)
    width = image.extent_pages
    page = shared.find(1)
    while page >= 0:
        extent = page // width
        end = (extent + 1) * width
        if not grants[extent]:
            yield extent, shared.count(1, page, end)
        page = shared.find(1, end)


def _look_at_frames(
    image: Image, checked: dict[str, int], check_stop: Callable[[], None]
) -> Iterator[Mismatch]:
    generation = image.generation
    states = image.states()
    filled = _filled_bytes(image)
    blocks_bytes = os.fstat(image.frames_fd).st_blocks * 512
    resident_bytes = image.resident_bytes
    if image.generation != generation:
        states_after = image.states()
    else:
        states_after = states
        busy = states.count(ExtentState.LOADING) + states.count(ExtentState.EVICTING)
        if not busy and blocks_bytes != resident_bytes:
            yield Mismatch(
                "resident", image.domain, image.name, "", "extent", -1, resident_bytes, blocks_bytes
            )
    checked["resident_extents"] += states.count(ExtentState.RESIDENT)
    wanted = {ExtentState.ABSENT: 0, ExtentState.RESIDENT: 1}
    for extent in _worth_a_look(states, filled, check_stop):
        state = states[extent]
        if state != states_after[extent] or state not in wanted:
            continue
        expected = wanted[ExtentState(state)] * image.extent_bytes_of(extent)
        if filled[extent] != expected:
            yield Mismatch(
                "resident", image.domain, image.name, "", "extent", extent, expected, filled[extent]
            )


def _worth_a_look(
    states: bytes, filled: array[int], check_stop: Callable[[], None]
) -> Iterator[int]:
    """Yield extents in order, without stretches where all are ABSENT and none has frames."""
    nothing = array("Q", bytes(8 * _STRETCH))
    for start in range(0, len(states), _STRETCH):
        check_stop()
        end = min(start + _STRETCH, len(states))
        is_absent = states.count(ExtentState.ABSENT, start, end) == end - start
        if not is_absent or filled[start:end] != nothing[: end - start]:
            yield from range(start, end)


def _filled_bytes(image: Image) -> array[int]:
    """Bytes of frames per extent, from the memfd's own map of data and holes."""
    filled = array("Q", bytes(8 * image.nr_extents))
    step = image.extent_bytes
    end = 0
    while True:
        try:
            start = os.lseek(image.frames_fd, end, os.SEEK_DATA)
            end = os.lseek(image.frames_fd, start, os.SEEK_HOLE)
        except OSError:
            return filled  # ENXIO: no more data
        while start < end:
            extent = start // step
            stop = min(end, (extent + 1) * step)
            filled[extent] += stop - start
            start = stop


def _bits(number: int) -> Iterator[int]:
    """Yield the positions of the set bits, lowest first; O(1) each and O(length) in all."""
    whole = number.to_bytes((number.bit_length() + 7) // 8, "little")
    for start in range(0, len(whole), _STRETCH):
        stretch = whole[start : start + _STRETCH]
        if stretch.count(0) == len(stretch):
            continue  # at memory's speed
        for at, byte in enumerate(stretch, start):
            while byte:
                low = byte & -byte
                yield at * 8 + low.bit_length() - 1
                byte ^= low
