# SPDX-License-Identifier: Apache-2.0
"""Races, each held at its narrowest point: faults, loads, evictions, settlings, guests' writes."""

import fcntl
import struct
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from stage import (
    ANSWER_SECONDS,
    PAGE,
    MappedGuest,
    Stage,
    content,
    let_go,
    private_pages,
    stop_at,
    until,
    wait_at,
    write_faults,
)

from cowshed.cache import ExtentState
from cowshed.cache._core import lib

SHARED, PRIVATE = lib.PAGE_LOOK_SHARED, lib.PAGE_LOOK_PRIVATE


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool
        for point in range(lib.POINT_NR):
            let_go(point)


def evict_to(
    stage: Stage, pool: ThreadPoolExecutor, point: int, *extents: int
) -> Future[list[int]]:
    """Begin an eviction and leave it standing at a point."""
    stop_at(point)
    going = pool.submit(stage.evict, *extents)
    wait_at(point)
    return going


def misses(guest: MappedGuest) -> int:
    return guest.account.status().counters.misses


@pytest.mark.parametrize("point", [lib.POINT_EVICT_PUNCH, lib.POINT_EVICT_REVOKE])
def test_a_fault_on_an_extent_that_is_going_waits_and_loads_it_anew(
    stage: Stage, pool: ThreadPoolExecutor, point: int
) -> None:
    stage.load()
    before, fresh = stage.guest(window=1), stage.guest(window=1)
    before.read(3)
    going = evict_to(stage, pool, point, 0)
    read = fresh.start("read", offset=4 * PAGE, length=8)
    write = before.start("write", offset=5 * PAGE, given_hex="07")
    until(lambda: misses(fresh) == 1 and misses(before) == 1, "both wait for the extent")
    assert stage.state(0) is ExtentState.EVICTING
    let_go(point)
    assert going.result(ANSWER_SECONDS) == [0]
    assert bytes.fromhex(fresh.finish(read)) == content(4)[:8]
    before.finish(write)
    assert before.read(5) == b"\7" + content(5)[1:]
    assert before.read(3) == content(3)
    assert stage.image.counters().loads == stage.image.nr_extents + 1
    assert stage.image.refs()[0] == 2
    assert stage.audit().mismatches == []


def test_a_reader_of_mapped_pages_goes_on_until_the_punch(
    stage: Stage, pool: ThreadPoolExecutor
) -> None:
    guest = stage.guest(window=16)
    guest.read(0, 16)
    going = evict_to(stage, pool, lib.POINT_EVICT_PUNCH, 0)
    assert guest.read(0, 16) == content(0, 16)
    let_go(lib.POINT_EVICT_PUNCH)
    going.result(ANSWER_SECONDS)
    assert guest.read(0, 16) == content(0, 16)


def test_a_write_in_the_middle_of_an_eviction_keeps_its_copy_and_its_charge(
    stage: Stage, pool: ThreadPoolExecutor
) -> None:
    guest = stage.guest()
    guest.read(0, 16)
    going = evict_to(stage, pool, lib.POINT_EVICT_PUNCH, 0)
    guest.call("poke", page=2, byte=9)  # mapped: the event needs no extent
    let_go(lib.POINT_EVICT_PUNCH)
    going.result(ANSWER_SECONDS)
    assert guest.read(2) == b"\x09" + content(2)[1:]
    assert private_pages(guest) == 1
    assert stage.audit().mismatches == []


def test_an_eviction_between_charge_and_copy_leaves_no_charge_for_nothing(stage: Stage) -> None:
    guest = stage.guest(write_window=4)
    guest.read(0, 16)
    stop_at(lib.POINT_WRITE_CHARGED)
    write = guest.start("write", offset=0, given_hex="07")
    wait_at(lib.POINT_WRITE_CHARGED)
    assert guest.account.status().private_pages == 4
    with ThreadPoolExecutor() as pool:
        going = pool.submit(stage.evict, 0)
        until(lambda: stage.state(0) is ExtentState.EVICTING, "the eviction is on its way")
        let_go(lib.POINT_WRITE_CHARGED)
        assert going.result(ANSWER_SECONDS) == [0]
    guest.finish(write)
    assert guest.read(0) == b"\7" + content(0)[1:]
    looks = stage.looks(guest, 0, 16)
    assert private_pages(guest) == looks.count(PRIVATE) == 1
    assert stage.audit().mismatches == []


def test_a_copy_made_while_its_page_is_being_settled_stays_charged_and_writable(
    stage: Stage, pool: ThreadPoolExecutor
) -> None:
    """The settling looks, protects, and looks again: in between the guest may have written."""
    guest = stage.guest(write_window=4)
    guest.read(0, 16)
    guest.call("poke", page=0, byte=1)
    stop_at(lib.POINT_SETTLE_PROTECTED)
    settling = pool.submit(guest.account.settle)
    wait_at(lib.POINT_SETTLE_PROTECTED)
    write = guest.start("write", offset=PAGE, given_hex="02")  # protected again: it must ask
    guest.wait_stuck(write)
    let_go(lib.POINT_SETTLE_PROTECTED)
    settling.result(ANSWER_SECONDS)
    guest.finish(write)
    assert guest.read(1) == b"\2" + content(1)[1:]
    assert private_pages(guest) == stage.looks(guest, 0, 16).count(PRIVATE) == 2
    guest.call("poke", page=1, byte=3)  # and it is its own: no event
    assert stage.audit().mismatches == []


def protect(guest: MappedGuest, page: int, on: bool) -> None:
    address = guest.base + page * PAGE
    fcntl.ioctl(guest.fds[0], 0xC018AA06, struct.pack("QQQ", address, PAGE, on))


def test_a_copy_made_between_look_and_protection_is_charged_and_opened_again(
    stage: Stage, pool: ThreadPoolExecutor
) -> None:
    """Played behind the settling's back: the page opens, is written, and is protected once more."""
    guest = stage.guest(write_window=4)
    guest.read(0, 16)
    guest.call("poke", page=0, byte=1)
    stop_at(lib.POINT_SETTLE_PROTECTED)
    settling = pool.submit(guest.account.settle)
    wait_at(lib.POINT_SETTLE_PROTECTED)
    protect(guest, 1, False)
    guest.call("poke", page=1, byte=5)
    protect(guest, 1, True)
    let_go(lib.POINT_SETTLE_PROTECTED)
    settling.result(ANSWER_SECONDS)
    assert guest.account.status().private_pages == 2
    faults = write_faults(guest)
    guest.call("poke", page=1, byte=7)
    assert write_faults(guest) == faults
    assert stage.looks(guest, 0, 4) == bytes([PRIVATE, PRIVATE, SHARED, SHARED])


def test_many_guests_at_a_load_that_is_about_to_be_published_are_all_answered(
    stage: Stage,
) -> None:
    guests = [stage.guest(window=1) for _ in range(4)]
    stop_at(lib.POINT_LOAD_PUBLISH)
    tickets = [
        (guest, page, guest.start("read", offset=page * PAGE, length=8))
        for guest in guests
        for page in (0, 9)
    ]
    wait_at(lib.POINT_LOAD_PUBLISH)
    for guest, _, ticket in tickets:
        guest.wait_stuck(ticket)
    assert stage.evict(0) == []
    let_go(lib.POINT_LOAD_PUBLISH)
    for guest, page, ticket in tickets:
        assert bytes.fromhex(guest.finish(ticket)) == content(page)[:8]
    assert stage.image.counters().loads == 1
    assert stage.image.refs()[0] == 4


def test_a_load_that_fails_with_many_waiting_fails_for_each_and_leaves_nothing(
    stage: Stage,
) -> None:
    guests = [stage.guest(window=1) for _ in range(3)]
    stop_at(lib.POINT_LOAD_FILL)
    tickets = [guest.start("read", offset=0, length=8) for guest in guests]
    wait_at(lib.POINT_LOAD_FILL)
    until(lambda: all(misses(guest) == 1 for guest in guests), "all wait")
    assert lib.point_arm(lib.POINT_LOAD_PUBLISH, lib.POINT_FAIL, 5, 1) == 0
    let_go(lib.POINT_LOAD_FILL)
    for guest, ticket in zip(guests, tickets, strict=True):
        with pytest.raises(OSError, match="Input/output"):
            guest.finish(ticket)
    assert stage.state(0) is ExtentState.ABSENT
    assert stage.store.counters().reserved_extents == 0
    assert list(stage.image.refs()) == [0] * 8
    assert stage.audit().mismatches == []


def test_a_fault_read_before_pages_are_given_back_is_answered_and_nothing_stays_charged(
    stage: Stage,
) -> None:
    guest = stage.guest(window=1)
    guest.call("fill", page=0, nr_pages=4, byte=1)
    stop_at(lib.POINT_FAULT_READ)
    read = guest.start("read", offset=25 * PAGE, length=8)
    wait_at(lib.POINT_FAULT_READ)
    discard = guest.start("discard", page=0, nr_pages=4)
    until(lambda: guest.where(discard).startswith("userfaultfd_event"), "REMOVE is queued")
    let_go(lib.POINT_FAULT_READ)
    assert bytes.fromhex(guest.finish(read)) == content(25)[:8]
    guest.finish(discard)
    assert private_pages(guest) == 0
    assert guest.read(0, 4) == content(0, 4)


def test_an_old_report_of_a_fault_on_a_page_that_is_private_now_wakes_its_thread(
    stage: Stage,
) -> None:
    """Two threads fault on one page, the first report makes it private, the second finds it so."""
    stage.load()
    guest = stage.guest(window=1)
    stop_at(lib.POINT_FAULT_READ)
    first = guest.start("write", offset=30 * PAGE, given_hex="01")
    wait_at(lib.POINT_FAULT_READ)
    writes = [guest.start("write", offset=5 * PAGE + i, given_hex="09") for i in range(3)]
    for ticket in writes:
        guest.wait_stuck(ticket)
    let_go(lib.POINT_FAULT_READ)
    for ticket in [first, *writes]:
        guest.finish(ticket)
    assert guest.read(5) == b"\x09" * 3 + content(5)[3:]
    assert private_pages(guest) == 2
    assert stage.audit().mismatches == []


def test_a_guest_detached_while_its_extent_is_held_leaves_no_hold(
    stage: Stage, pool: ThreadPoolExecutor
) -> None:
    stage.load()
    guest = stage.guest(window=1)
    stop_at(lib.POINT_FAULT_HELD)
    guest.start("read", offset=0, length=8)
    wait_at(lib.POINT_FAULT_HELD)
    leaving = pool.submit(stage.detach, guest)
    assert stage.evict(0, at_once=True) == []
    let_go(lib.POINT_FAULT_HELD)
    leaving.result(ANSWER_SECONDS)
    assert stage.evict(0) == [0]
    assert list(stage.image.refs()) == [0] * 8
