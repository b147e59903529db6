# SPDX-License-Identifier: Apache-2.0
"""The standby list: whose bytes it keeps, who gets them back, and what room it takes."""

import errno
import os
import random
import time

import pytest
from domains import in_thread
from stage import (
    EXTENT_PAGES,
    MakeStage,
    Stage,
    content,
    fail_at,
    let_go,
    stop_at,
    until,
    wait_at,
)

from cowshed.accounting import EvictReason, LatencyKind, evict, read_latency
from cowshed.cache import ExtentState, StoreEvent, UsageError
from cowshed.cache._core import lib

ABSENT, LOADING, RESIDENT, EVICTING = ExtentState
LOADED, SOFT_HIT, DROPPED = StoreEvent
EXTENT_BYTES = 65536
NR_EXTENTS = 12


@pytest.fixture
def stage(make_stage: MakeStage) -> Stage:
    """An image of twelve extents, a capacity of eleven, of which four may be in standby."""
    return make_stage(nr_pages=NR_EXTENTS * EXTENT_PAGES, capacity=11, standby=4)


def of(extent: int) -> bytes:
    return content(extent * EXTENT_PAGES, EXTENT_PAGES)


def events(stage: Stage) -> list[tuple[StoreEvent, int]]:
    """The events since the last call, of the one image."""
    return [(kind, extent) for kind, (_, extent), _ in stage.store.take_events() or ()]


def memory_extents(stage: Stage) -> float:
    """What frames and standby list take of the machine's memory, in extents."""
    fds = (stage.image.frames_fd, stage.store.standby_fd)
    return sum(os.fstat(fd).st_blocks for fd in fds) * 512 / EXTENT_BYTES


def test_a_touch_brings_the_bytes_back_and_reads_no_source(stage: Stage) -> None:
    guest = stage.guest()
    assert guest.read(3 * EXTENT_PAGES, EXTENT_PAGES) == of(3)
    loads = stage.image.counters().loads
    stage.to_standby(3)
    assert stage.state(3) is ABSENT
    assert (stage.store.counters().standby_extents, memory_extents(stage)) == (1, 1)
    assert stage.frame(3 * EXTENT_PAGES) == bytes(4096)
    fail_at(lib.POINT_LOAD_READ, errno.EIO)
    assert guest.read(3 * EXTENT_PAGES, EXTENT_PAGES) == of(3)
    counters = stage.image.counters()
    assert (counters.loads, counters.soft_hits, counters.standby_unmaps) == (loads, 1, 1)
    assert counters.evictions == 0
    latencies = [read_latency([guest.account], kind).count for kind in LatencyKind]
    assert latencies == [1, 1, 0], "hit, miss, write"
    assert (stage.store.counters().standby_extents, memory_extents(stage)) == (0, 1)
    assert events(stage) == [(LOADED, 3), (SOFT_HIT, 3)]
    stage.store.check()


def test_a_load_without_room_drops_the_oldest_and_waits_for_nobody(stage: Stage) -> None:
    guest = stage.guest()
    stage.load(0, 10)  # and one more for bytes on their way
    stage.to_standby(5, 2, 7)
    events(stage)
    for extent in (10, 11):
        assert guest.read(extent * EXTENT_PAGES) == content(extent * EXTENT_PAGES)
    assert events(stage) == [(DROPPED, 5), (LOADED, 10), (DROPPED, 2), (LOADED, 11)]
    assert stage.image.counters().evictions_pressure == 2
    assert stage.store.counters().standby_extents == 1
    assert memory_extents(stage) == 10
    stage.store.check()


def test_many_at_once_all_come_into_the_list(stage: Stage) -> None:
    stage.load(0, 10)
    assert evict(stage.image, [7, 1, 5, 3], EvictReason.STANDBY) == [7, 1, 5, 3]
    assert stage.store.counters().standby_extents == 4
    assert stage.image.counters().evictions == 0


def test_the_oldest_goes_when_the_list_is_longer_than_it_may_be(stage: Stage) -> None:
    stage.load(0, 10)
    stage.to_standby(*range(6))
    assert stage.store.counters().standby_extents == 4
    assert [kind for kind, _ in events(stage)].count(DROPPED) == 2
    stage.store.set_standby(1, 1)
    assert events(stage) == [(DROPPED, 2), (DROPPED, 3), (DROPPED, 4)]
    assert memory_extents(stage) == 5
    assert stage.image.counters().evictions_pressure == 5
    with pytest.raises(UsageError, match="keeping 5 extents in standby"):
        stage.store.set_standby(5, 1)
    stage.store.set_standby(0, 1)
    assert stage.store.counters().standby_extents == 0
    stage.to_standby(6)
    assert events(stage) == [(DROPPED, 5), (DROPPED, 6)]
    stage.store.check()


def test_a_soft_hit_says_how_many_came_into_the_list_since(stage: Stage) -> None:
    guest = stage.guest()
    stage.load(0, 10)
    stage.to_standby(0, 1, 2, 3)
    stage.store.take_events()
    for extent in (3, 0):
        guest.read(extent * EXTENT_PAGES)
    stage.to_standby(5, 6)
    guest.read(1 * EXTENT_PAGES)
    ages = [age for kind, _, age in stage.store.take_events() or () if kind == SOFT_HIT]
    assert ages == [0, 3 / 4, 1]


def test_samples_outlive_victims(stage: Stage) -> None:
    stage.load(0, 10)
    stage.to_standby(0, reason=EvictReason.SAMPLE)
    stage.to_standby(1, 2, 3, 4)
    events(stage)
    assert stage.image.counters().standby_samples == 1
    stage.store.set_standby(1, 1)
    assert events(stage) == [(DROPPED, 2), (DROPPED, 3), (DROPPED, 4)]
    stage.store.set_standby(0, 1)
    assert events(stage) == [(DROPPED, 0)]
    assert [(end.extent, end.touched) for end in stage.store.take_sample_ends()] == [(0, False)]


def test_an_extent_on_its_way_back_is_not_dropped(stage: Stage) -> None:
    guest = stage.guest()
    stage.load(0, 10)
    stage.to_standby(1, 2)
    stop_at(lib.POINT_STANDBY_READ)
    waiting = guest.start("read", offset=EXTENT_BYTES, length=4096)
    wait_at(lib.POINT_STANDBY_READ)
    stop_at(lib.POINT_LOAD_READ)
    stage.image.prefetch(2, 1)
    stage.store.set_standby(0, 1)
    let_go(lib.POINT_LOAD_READ)
    let_go(lib.POINT_STANDBY_READ)
    assert bytes.fromhex(guest.finish(waiting)) == content(EXTENT_PAGES)
    assert stage.image.wait_loaded(2, 1, 60_000)
    assert stage.image.counters().loads == 10
    stage.store.check()


def test_a_hung_source_holds_up_no_soft_hit(make_stage: MakeStage) -> None:
    stage = make_stage(nr_pages=NR_EXTENTS * EXTENT_PAGES, capacity=11, standby=4, nr_loaders=1)
    guest = stage.guest()
    stage.load(0, 4)
    stage.to_standby(0, 1, 2)
    stop_at(lib.POINT_LOAD_READ, 0)
    stuck = guest.start("read", offset=8 * EXTENT_BYTES, length=4096)
    wait_at(lib.POINT_LOAD_READ)
    for extent in (2, 0):
        assert guest.read(extent * EXTENT_PAGES) == content(extent * EXTENT_PAGES)
    let_go(lib.POINT_LOAD_READ)
    assert bytes.fromhex(guest.finish(stuck)) == content(8 * EXTENT_PAGES)


def test_a_soft_hit_waits_for_no_source_of_what_is_loaded_ahead_beside_it(
    make_stage: MakeStage,
) -> None:
    stage = make_stage(nr_pages=NR_EXTENTS * EXTENT_PAGES, capacity=11, standby=4, nr_loaders=1)
    guest = stage.guest()
    stage.load(0, 2)
    stage.to_standby(1)
    stop_at(lib.POINT_LOAD_READ, 0)
    stuck = guest.start("read", offset=8 * EXTENT_BYTES, length=4096)
    wait_at(lib.POINT_LOAD_READ)
    assert stage.image.prefetch(1, 2) == 2
    assert guest.read(EXTENT_PAGES) == content(EXTENT_PAGES)
    assert stage.state(2) is LOADING
    let_go(lib.POINT_LOAD_READ)
    guest.finish(stuck)


@pytest.mark.parametrize("is_touched", [True, False])
def test_a_sample_that_is_loaded_ahead_ends_then(stage: Stage, is_touched: bool) -> None:
    guest = stage.guest()
    stage.load(0, 4)
    began = time.monotonic()
    stage.to_standby(1, reason=EvictReason.SAMPLE)
    stop_at(lib.POINT_STANDBY_READ)
    assert stage.image.prefetch(1, 1) == 1
    wait_at(lib.POINT_STANDBY_READ)
    waiting = guest.start("read", offset=EXTENT_BYTES, length=4096) if is_touched else None
    if is_touched:  # its fault is read, and waits for the load
        until(lambda: guest.account.status().counters.misses == 1, "it is a waiter")
    let_go(lib.POINT_STANDBY_READ)
    if waiting is not None:
        guest.finish(waiting)
    assert stage.image.wait_loaded(1, 1, 60_000)
    (end,) = stage.store.take_sample_ends()
    assert (end.extent, end.touched) == (1, is_touched)
    assert began <= end.unmapped_at <= end.ended_at <= time.monotonic()
    assert stage.store.take_sample_ends() == []


def test_bytes_that_cannot_be_copied_are_dropped_or_read_again(stage: Stage) -> None:
    guest = stage.guest()
    stage.load(0, 4)
    events(stage)
    fail_at(lib.POINT_STANDBY_FILL, errno.ENOMEM)
    stage.to_standby(0)
    let_go(lib.POINT_STANDBY_FILL)
    assert events(stage) == [(DROPPED, 0)]
    assert stage.image.counters().evictions_pressure == 1
    stage.to_standby(1, 2)
    fail_at(lib.POINT_STANDBY_READ, errno.EIO)
    assert guest.read(EXTENT_PAGES, EXTENT_PAGES) == of(1)
    stage.load(2, 1)
    let_go(lib.POINT_STANDBY_READ)
    assert stage.image.counters().soft_hits == 0
    assert guest.read(2 * EXTENT_PAGES, EXTENT_PAGES) == of(2)
    until(lambda: stage.image.wait_loaded(0, NR_EXTENTS, 100), "nothing is loaded ahead any more")
    assert memory_extents(stage) == stage.store.counters().reserved_extents
    assert stage.store.counters().standby_extents == 0
    stage.store.check()


def test_what_is_loaded_ahead_comes_back_and_is_no_hit(stage: Stage) -> None:
    stage.load(0, 6)
    stage.to_standby(1, 2, 4)
    events(stage)
    fail_at(lib.POINT_LOAD_READ, errno.EIO)
    stage.load(1, 4)
    assert sorted(events(stage)) == [(LOADED, 1), (LOADED, 2), (LOADED, 4)]
    assert stage.image.counters().soft_hits == 0
    assert stage.image.counters().loads == 6
    stage.store.check()


def test_a_drop_on_request_is_counted_as_one(stage: Stage) -> None:
    stage.load(0, 6)
    stage.to_standby(1, 2, 4)
    assert stage.image.drop_standby(2, 9) == 2 * EXTENT_BYTES
    assert stage.image.counters().evictions_request == 2
    assert stage.store.counters().standby_extents == 1
    assert memory_extents(stage) == 4
    with pytest.raises(UsageError):
        stage.image.drop_standby(5, NR_EXTENTS)


def test_a_fault_on_an_extent_that_is_going_to_standby_gets_it_back(stage: Stage) -> None:
    guest = stage.guest()
    stage.load(0, 2)
    stop_at(lib.POINT_EVICT_REVOKE)
    thread = in_thread(lambda: stage.to_standby(1))
    wait_at(lib.POINT_EVICT_REVOKE)
    waiting = guest.start("read", offset=EXTENT_BYTES, length=EXTENT_BYTES)
    guest.wait_stuck(waiting)
    fail_at(lib.POINT_LOAD_READ, errno.EIO)
    let_go(lib.POINT_EVICT_REVOKE)
    assert bytes.fromhex(guest.finish(waiting)) == of(1)
    thread.join()
    assert stage.image.counters().soft_hits == 1


def test_loads_cancelled_on_their_way_back_leave_the_list_whole(stage: Stage) -> None:
    guest = stage.guest()
    stage.load(0, 10)
    stage.to_standby(1, 2, 3)
    stop_at(lib.POINT_STANDBY_READ)
    first = guest.start("read", offset=EXTENT_BYTES, length=4096)
    wait_at(lib.POINT_STANDBY_READ)
    stage.image.prefetch(2, 2)
    stage.store.cancel_loads()
    with pytest.raises(OSError, match="Input/output error"):
        guest.finish(first)
    let_go(lib.POINT_STANDBY_READ)
    until(lambda: stage.image.wait_loaded(0, 10, 100), "no load is left")
    assert stage.image.counters().soft_hits == 0
    stage.store.check()


def test_closing_an_image_gives_its_standby_bytes_back(stage: Stage) -> None:
    stage.load(0, 6)
    stage.to_standby(0, 1, 2)
    stage.store.close_image(stage.image)
    counters = stage.store.counters()
    assert (counters.standby_extents, counters.reserved_extents) == (0, 0)
    assert os.fstat(stage.store.standby_fd).st_blocks == 0
    stage.store.check()


@pytest.mark.parametrize("seed", range(4))
def test_any_order_of_loads_unmaps_and_drops_keeps_bytes_and_bounds(
    make_stage: MakeStage, seed: int
) -> None:
    stage = make_stage(nr_pages=NR_EXTENTS * EXTENT_PAGES, capacity=9, standby=4)
    guest = stage.guest()
    rng = random.Random(seed)
    reasons = (EvictReason.STANDBY, EvictReason.SAMPLE, EvictReason.REQUEST)
    for _ in range(400):
        extents = rng.sample(range(NR_EXTENTS), 3)
        match rng.randrange(5):
            case 0 | 1:
                waiting = guest.start("read", offset=extents[0] * EXTENT_BYTES, length=4096)
                while not guest.answered(waiting):
                    if stage.store.counters().nr_waiting_loaders:
                        evict(stage.image, [rng.randrange(NR_EXTENTS)])
                answer = bytes.fromhex(guest.finish(waiting))
                assert answer == content(extents[0] * EXTENT_PAGES)
            case 2 | 3:
                evict(stage.image, extents, rng.choice(reasons))
            case _:
                stage.store.set_standby(rng.randrange(5), 1)
        counters = stage.store.counters()
        assert counters.reserved_extents + counters.standby_extents <= 9
        assert memory_extents(stage) <= 9
        stage.store.check()


def test_a_walk_comes_to_each_resident_extent_once_in_a_round(stage: Stage) -> None:
    for extent in (1, 4, 5, 10):
        stage.load(extent, 1)
    found, at = [], 7  # 7 0 5 10 3 8 1 6 11 4 9 2
    for _ in range(4):
        extent, at = stage.image.walk_resident(at, 5, NR_EXTENTS)
        found.append(extent)
    assert found == [5, 10, 1, 4]
    stage.evict(4)
    assert stage.image.walk_resident(4, 5, 2) == (None, 2)
