# SPDX-License-Identifier: Apache-2.0
"""Reads: what a fault maps, who is answered by one load, and what an eviction costs a guest."""

import random

import pytest
from stage import (
    PAGE,
    MakeStage,
    Stage,
    content,
    let_go,
    read_faults,
    stop_at,
    until,
    wait_at,
    write_faults,
)

from cowshed.cache import ExtentState, UsageError
from cowshed.cache._core import lib
from cowshed.faults import FaultHandler, FaultOptions

ABSENT, SHARED = lib.PAGE_LOOK_ABSENT, lib.PAGE_LOOK_SHARED


def test_a_window_of_one_page_maps_that_page_alone(stage: Stage) -> None:
    stage.load()
    guest = stage.guest(window=1)
    guest.read(21)
    until(lambda: guest.account.status().counters.mapped_pages == 1, "it is counted")
    looks = guest.account.looks()
    assert [page for page, look in enumerate(looks) if look != ABSENT] == [21]
    assert guest.account.status().granted_extents == 1


def test_a_fixed_window_maps_its_aligned_pages_where_they_are_resident(stage: Stage) -> None:
    stage.load(0, 2)
    stage.load(3, 1)
    guest = stage.guest(window=64)
    guest.read(5)
    until(lambda: guest.account.status().counters.mapped_pages == 48, "the window is mapped")
    looks = guest.account.looks()
    assert looks[:64] == bytes([SHARED] * 32 + [ABSENT] * 16 + [SHARED] * 16)
    assert stage.state(2) is ExtentState.ABSENT
    assert list(stage.image.refs()) == [1, 1, 0, 1, 0, 0, 0, 0]
    faults = read_faults(guest)
    assert guest.read(48, 16) == content(48, 16)
    assert read_faults(guest) == faults == 1


def test_a_walk_through_the_image_costs_few_faults(make_stage: MakeStage) -> None:
    stage = make_stage(nr_pages=64 * 16, capacity=80)
    stage.load()
    guest = stage.guest()
    for extent in range(64):
        assert guest.read(extent * 16, 16) == content(extent * 16, 16)
    assert read_faults(guest) <= 16
    assert guest.account.status().granted_extents == 64


def test_a_walk_through_an_absent_image_is_read_ahead(make_stage: MakeStage) -> None:
    stage = make_stage(nr_pages=64 * 16, capacity=160)
    guest = stage.guest()
    for extent in range(64):
        assert guest.read(extent * 16, 16) == content(extent * 16, 16)
    counters = stage.image.counters()
    assert counters.loads == 64
    assert counters.demand_loads < 64
    assert stage.audit().mismatches == []


def test_random_reads_of_a_resident_image_converge(
    make_stage: MakeStage, rng: random.Random
) -> None:
    stage = make_stage(nr_pages=64 * 16, capacity=80)
    stage.load()
    guest = stage.guest()
    for page in rng.sample(range(64 * 16), 400):
        assert guest.read(page) == content(page)
    assert read_faults(guest) <= 64


def test_one_load_answers_every_guest_that_waits(stage: Stage) -> None:
    guests = [stage.guest(window=1) for _ in range(6)]
    stop_at(lib.POINT_LOAD_PUBLISH)
    tickets = [guest.start("read", offset=i * PAGE, length=8) for i, guest in enumerate(guests)]
    wait_at(lib.POINT_LOAD_PUBLISH)
    until(lambda: all(g.account.status().counters.misses == 1 for g in guests), "all ask for it")
    for guest, ticket in zip(guests, tickets, strict=True):
        guest.wait_stuck(ticket)
    let_go(lib.POINT_LOAD_PUBLISH)
    for i, (guest, ticket) in enumerate(zip(guests, tickets, strict=True)):
        assert bytes.fromhex(guest.finish(ticket)) == content(i)[:8]
    assert stage.image.counters().loads == stage.image.counters().demand_loads == 1
    assert stage.image.refs()[0] == 6
    assert stage.evict(0) == [0]  # no hold is left behind
    assert stage.image.refs()[0] == 0


def test_one_load_answers_every_thread_of_a_guest(stage: Stage) -> None:
    guest = stage.guest(window=1)
    stop_at(lib.POINT_LOAD_PUBLISH)
    tickets = [guest.start("read", offset=page * PAGE, length=8) for page in (0, 7, 15, 7)]
    wait_at(lib.POINT_LOAD_PUBLISH)
    for ticket in tickets:
        guest.wait_stuck(ticket)
    let_go(lib.POINT_LOAD_PUBLISH)
    for ticket, page in zip(tickets, (0, 7, 15, 7), strict=True):
        assert bytes.fromhex(guest.finish(ticket)) == content(page)[:8]
    assert stage.image.counters().loads == 1


def test_waiters_of_a_queued_prefetch_are_not_kept_waiting_behind_it(stage: Stage) -> None:
    guest = stage.guest(window=1)
    # Not in the read: after a second of it, others would take the loaders' place.
    stop_at(lib.POINT_LOAD_FILL, nr_times=3)
    for nr, extent in enumerate((0, 2, 4), start=1):
        stage.image.prefetch(extent, 1)
        wait_at(lib.POINT_LOAD_FILL, nr)
    assert stage.image.prefetch(6, 1) == 1  # queued behind the three that stand
    assert guest.read(6 * 16) == content(6 * 16)
    assert stage.image.counters().loads == 1


def test_evictions_under_a_live_mapping_are_never_noticed(stage: Stage, rng: random.Random) -> None:
    guests = [stage.guest(window=rng.choice([0, 1, 4, 64])) for _ in range(3)]
    written: dict[tuple[int, int], int] = {}
    for _ in range(120):
        i, page = rng.randrange(3), rng.randrange(stage.image.nr_pages)
        match rng.randrange(4):
            case 0:
                byte = rng.randrange(1, 256)
                guests[i].call("fill", page=page, nr_pages=1, byte=byte)
                written[i, page] = byte
            case 1:
                stage.evict(*rng.sample(range(stage.image.nr_extents), 3))
            case _:
                found = guests[i].read(page)
                mine = written.get((i, page))
                assert found == (content(page) if mine is None else bytes([mine]) * PAGE)
    stage.evict_all()
    assert stage.audit().mismatches == []
    for i, guest in enumerate(guests):
        assert guest.account.status().private_pages == sum(of == i for of, _ in written)


def test_an_evicted_extent_is_granted_to_nobody_until_it_is_touched(stage: Stage) -> None:
    one, two = stage.guest(window=1), stage.guest(window=1)
    one.read(0), two.read(0)
    assert stage.image.refs()[0] == 2
    stage.evict(0)
    assert stage.image.refs()[0] == 0
    assert stage.looks(one, 0) == stage.looks(two, 0) == bytes([ABSENT])
    two.read(0)
    assert stage.image.refs()[0] == 1
    assert (one.account.status().granted_extents, two.account.status().granted_extents) == (0, 1)


def test_hits_misses_and_kinds_of_faults_are_counted(stage: Stage) -> None:
    guest = stage.guest(window=1)
    guest.read(0)
    guest.read(1)
    guest.call("poke", page=0, byte=1)
    counters = guest.account.status().counters
    assert (counters.misses, counters.hits) == (1, 0) or counters.hits == 1
    assert write_faults(guest) == 1
    assert counters.faults_missing + counters.faults_minor >= 1


def test_the_order_of_first_touches_is_kept(stage: Stage) -> None:
    guest = stage.guest(window=1)
    for extent in (5, 1, 3, 1, 5):
        guest.read(extent * 16)
    stage.evict_all()
    guest.read(0)
    guest.read(5 * 16)
    assert stage.image.first_touches() == [5, 1, 3, 0]


def test_an_image_with_a_partial_last_page_reads_zeros_behind_its_end_alone(
    make_stage: MakeStage,
) -> None:
    stage = make_stage(nr_pages=35, cut_bytes=100)
    guest = stage.guest()
    assert guest.read(34) == content(34)[:-100] + bytes(100)
    stage.evict(2)
    guest.call("write", offset=35 * PAGE - 101, given_hex="ff")
    assert guest.read(34)[-101:] == b"\xff" + bytes(100)
    assert stage.audit().mismatches == []


def test_impossible_windows_are_refused(stage: Stage) -> None:
    guest = stage.guest()
    for window in (1, 4095, 3 * PAGE, 32 << 20):
        with pytest.raises(UsageError, match="power of two"):
            FaultOptions(window_bytes=window)
        with pytest.raises(UsageError, match="power of two"):
            FaultOptions(write_window_bytes=window)
    guest.read(0)
    handler = guest.handler
    assert isinstance(handler, FaultHandler)
