# SPDX-License-Identifier: Apache-2.0
"""Settling: what was charged against what the kernel did, and what the kernel says of a page."""

import contextlib
import os

from stage import PAGE, Stage, content, private_pages, until, write_faults

from cowshed.cache._core import lib

ABSENT, SHARED, OPEN, PRIVATE = (
    lib.PAGE_LOOK_ABSENT,
    lib.PAGE_LOOK_SHARED,
    lib.PAGE_LOOK_OPEN,
    lib.PAGE_LOOK_PRIVATE,
)


def test_the_four_looks_of_a_page(stage: Stage) -> None:
    stage.load()
    guest = stage.guest(window=4, write_window=2)
    guest.read(4)
    guest.call("poke", page=6, byte=1)
    looks = stage.looks(guest, 3, 6)
    assert looks == bytes([ABSENT, SHARED, SHARED, PRIVATE, OPEN, ABSENT])


def test_an_evicted_page_is_absent_and_a_private_one_stays(stage: Stage) -> None:
    guest = stage.guest()
    guest.read(0, 16)
    guest.call("poke", page=3, byte=1)
    stage.evict(0)
    assert guest.account.looks()[:16] == bytes([ABSENT] * 3 + [PRIVATE] + [ABSENT] * 12)
    assert private_pages(guest) == 1


def test_settling_twice_gives_back_once(stage: Stage) -> None:
    guest = stage.guest(write_window=8)
    guest.read(0, 16)
    guest.call("poke", page=0, byte=1)
    assert guest.account.status().private_pages == 8
    assert lib.account_settle(guest.account.cdata) == 7
    assert lib.account_settle(guest.account.cdata) == 0
    assert guest.account.status().private_pages == 1
    assert guest.account.status().counters.uncharged_pages == 7


def test_a_settled_page_costs_its_guest_no_event_and_one_given_up_costs_one(stage: Stage) -> None:
    guest = stage.guest(write_window=8)
    guest.read(0, 16)
    guest.call("poke", page=0, byte=1)
    guest.account.settle()
    faults = write_faults(guest)
    guest.call("poke", page=0, byte=2)
    assert write_faults(guest) == faults
    guest.call("poke", page=1, byte=2)
    assert write_faults(guest) == faults + 1


def test_pages_written_through_an_open_window_are_found(stage: Stage) -> None:
    guest = stage.guest(write_window=8)
    guest.read(0, 16)
    for page in (0, 2, 5):
        guest.call("poke", page=page, byte=1)
    assert write_faults(guest) == 1
    assert private_pages(guest) == 3
    assert [page for page in range(16) if guest.read(page) != content(page)] == [0, 2, 5]


def test_a_large_ledger_is_settled_in_batches(stage: Stage) -> None:
    guest = stage.guest(write_window=64)
    for extent in range(8):
        guest.read(extent * 16, 16)
    for page in range(0, 128, 16):
        guest.call("poke", page=page, byte=1)
    assert private_pages(guest) == 8
    assert stage.looks(guest, 0, 128).count(OPEN) == 0


def test_a_page_in_swap_is_still_private(stage: Stage) -> None:
    """Without swap MADV_PAGEOUT leaves the page where it is: the facts hold either way."""
    guest = stage.guest()
    guest.call("fill", page=3, nr_pages=1, byte=7)
    guest.call("page_out", page=3, nr_pages=1)
    assert stage.looks(guest, 3) == bytes([PRIVATE])
    assert private_pages(guest) == 1
    assert guest.read(3) == b"\7" * PAGE


def test_a_poisoned_page_is_not_private(stage: Stage) -> None:
    guest = stage.guest(window=1)
    os.truncate(stage.path, PAGE)
    ticket = guest.start("read", offset=40 * PAGE, length=1)
    with contextlib.suppress(OSError):
        guest.finish(ticket)
    until(lambda: guest.account.status().counters.poisoned_pages == 1, "the poison is counted")
    assert stage.looks(guest, 40) == bytes([ABSENT])
    assert private_pages(guest) == 0


def test_charges_stand_while_the_kernel_cannot_be_asked(stage: Stage) -> None:
    guest = stage.guest(write_window=4)
    guest.read(0, 16)
    guest.call("poke", page=0, byte=1)
    guest.process.kill()
    guest.process.wait()
    assert lib.account_settle(guest.account.cdata) <= 0
    assert guest.account.status().private_pages == 4
