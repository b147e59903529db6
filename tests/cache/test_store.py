# SPDX-License-Identifier: Apache-2.0
"""The page store: what an extent may be, who may take it away, and that room is never exceeded."""

import errno
import random
import select
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from domains import in_thread
from stage import (
    MakeStage,
    Stage,
    content,
    fail_at,
    let_go,
    loaded,
    stop_at,
    until,
    wait_at,
)

from cowshed.cache import CapacityError, ExtentState, PageStore, UsageError
from cowshed.cache._core import lib

ABSENT, LOADING, RESIDENT, EVICTING = ExtentState
EXTENT_BYTES = 65536


def frames(stage: Stage, extent: int) -> bytes:
    return b"".join(stage.frame(page) for page in range(extent * 16, extent * 16 + 16))


def test_an_extent_goes_from_absent_over_loading_to_resident(stage: Stage) -> None:
    assert set(stage.image.states()) == {ABSENT}
    stop_at(lib.POINT_LOAD_READ)
    assert stage.image.prefetch(3, 1) == 1
    wait_at(lib.POINT_LOAD_READ)
    assert stage.state(3) is LOADING
    assert stage.store.counters().loading_extents == stage.store.counters().reserved_extents == 1
    assert not stage.image.wait_loaded(3, 1, 1)
    let_go(lib.POINT_LOAD_READ)
    assert stage.image.wait_loaded(3, 1, 60_000)
    assert stage.state(3) is RESIDENT
    assert frames(stage, 3) == content(48, 16)
    assert stage.image.resident_bytes == EXTENT_BYTES


def test_frames_that_are_filled_and_not_published_are_not_resident(stage: Stage) -> None:
    stop_at(lib.POINT_LOAD_PUBLISH)
    stage.image.prefetch(0, 1)
    wait_at(lib.POINT_LOAD_PUBLISH)
    assert (stage.state(0), stage.image.resident_bytes) == (LOADING, 0)
    assert stage.evict(0) == []
    let_go(lib.POINT_LOAD_PUBLISH)


def test_an_evicted_extent_is_evicting_then_absent_and_gives_its_room_back(stage: Stage) -> None:
    stage.load(0, 2)
    stop_at(lib.POINT_EVICT_PUNCH)
    thread = in_thread(lambda: stage.evict(1))
    wait_at(lib.POINT_EVICT_PUNCH)
    assert stage.state(1) is EVICTING
    assert stage.store.counters().reserved_extents == 2  # the frames are there yet
    assert stage.evict(1) == []
    let_go(lib.POINT_EVICT_PUNCH)
    thread.join()
    assert (stage.state(0), stage.state(1)) == (RESIDENT, ABSENT)
    assert stage.store.counters().reserved_extents == 1
    assert frames(stage, 1) == bytes(EXTENT_BYTES)
    assert stage.image.counters().evictions == 1


def test_eviction_takes_each_named_extent_once_and_ignores_those_that_cannot_go(
    stage: Stage,
) -> None:
    stage.load(0, 4)
    assert stage.evict(2, 7, 2, 1, 999, 1) == [1, 2]
    assert stage.image.counters().evictions == 2
    assert stage.image.resident_bytes == 2 * EXTENT_BYTES


def test_frames_never_exceed_the_capacity_and_a_loader_without_room_says_so(
    make_stage: MakeStage,
) -> None:
    stage = make_stage(capacity=4)
    stage.load(0, 4)
    select.select([stage.store.pressure_fd], [], [], 0)
    assert stage.image.prefetch(6, 1) == 1
    until(lambda: stage.store.counters().nr_waiting_loaders, "a loader waits for room")
    assert select.select([stage.store.pressure_fd], [], [], 60)[0]
    assert stage.store.counters().free_extents == 0
    assert stage.state(6) is LOADING
    assert frames(stage, 6) == bytes(EXTENT_BYTES)
    assert stage.evict(0) == [0]
    assert stage.image.wait_loaded(6, 1, 60_000)
    assert stage.state(6) is RESIDENT


def test_prefetch_asks_only_for_absent_extents_and_for_an_eighth_of_the_store(
    make_stage: MakeStage,
) -> None:
    stage = make_stage(nr_pages=64 * 16, capacity=40)
    stage.load(2, 1)
    assert stage.image.prefetch(0, 64) == 40 // 8 + 1
    assert stage.image.wait_loaded(0, 64, 60_000)
    assert list(stage.image.states(0, 8)) == [RESIDENT] * 7 + [ABSENT]
    assert stage.image.counters().loads == 7
    assert stage.image.counters().demand_loads == 0


def test_ranges_outside_the_image_are_refused_and_change_nothing(stage: Stage) -> None:
    nr = stage.image.nr_extents
    for first, count in ((nr, 1), (0, nr + 1), (nr + 1, 0), (1, 2**64 - 1)):
        for call in (stage.image.prefetch, stage.image.unpin, stage.image.states):
            with pytest.raises((UsageError, MemoryError, OverflowError)):
                call(first, count)
        with pytest.raises(UsageError):
            stage.image.pin(first, count, 100)
    assert not any(stage.image.pins())


def test_a_pinned_extent_is_not_evicted_until_every_pin_is_taken_back(stage: Stage) -> None:
    stage.load(0, 2)
    stage.image.pin(0, 1, 8)
    stage.image.pin(0, 2, 8)
    assert stage.store.counters().pinned_extents == 2
    assert stage.evict(0, 1) == []
    stage.image.unpin(0, 2)
    assert stage.evict(0, 1) == [1]
    stage.image.unpin(0, 1)
    assert stage.evict(0, 1) == [0]
    assert stage.store.counters().pinned_extents == 0


def test_an_absent_extent_may_be_pinned_and_stays_once_loaded(stage: Stage) -> None:
    stage.image.pin(5, 1, 8)
    stage.load(5, 1)
    assert stage.evict(5) == []


def test_a_pin_that_is_too_many_and_an_unpin_that_has_no_pin_do_nothing(stage: Stage) -> None:
    stage.image.pin(0, 2, 3)
    with pytest.raises(CapacityError):
        stage.image.pin(1, 3, 3)
    with pytest.raises(UsageError):
        stage.image.unpin(0, 3)
    assert list(stage.image.pins()) == [1, 1, 0, 0, 0, 0, 0, 0]
    assert stage.store.counters().pinned_extents == 2


def test_a_frame_that_cannot_be_written_leaves_the_extent_absent_and_empty(stage: Stage) -> None:
    fail_at(lib.POINT_LOAD_FILL, errno.ENOSPC)
    stage.image.prefetch(0, 1)
    assert stage.image.wait_loaded(0, 1, 60_000)
    assert stage.state(0) is ABSENT
    assert stage.image.counters().load_errors == 1
    assert stage.store.counters().reserved_extents == 0
    let_go(lib.POINT_LOAD_FILL)
    stage.load(0, 1)
    assert frames(stage, 0) == content(0, 16)


def test_a_load_that_fails_at_the_last_moment_keeps_no_frames(stage: Stage) -> None:
    fail_at(lib.POINT_LOAD_PUBLISH, errno.EIO)
    stage.image.prefetch(0, 1)
    assert stage.image.wait_loaded(0, 1, 60_000)
    assert (stage.state(0), frames(stage, 0)) == (ABSENT, bytes(EXTENT_BYTES))


def test_a_passing_error_of_the_source_is_retried(stage: Stage) -> None:
    fail_at(lib.POINT_LOAD_READ, errno.EIO, nr_times=2)
    stage.image.prefetch(0, 1)
    assert stage.image.wait_loaded(0, 1, 60_000)
    assert stage.state(0) is RESIDENT
    assert (stage.image.counters().load_retries, stage.image.counters().load_errors) == (2, 0)


def test_the_end_of_an_image_waits_for_its_loads(stage: Stage) -> None:
    stop_at(lib.POINT_LOAD_READ)
    stage.image.prefetch(0, 1)
    wait_at(lib.POINT_LOAD_READ)
    with ThreadPoolExecutor() as pool:
        closing = pool.submit(stage.store.close_image, stage.image)
        thread_is_in = threading.Event()
        pool.submit(thread_is_in.set).result()
        assert not closing.done()
        let_go(lib.POINT_LOAD_READ)
        closing.result(60)
    assert stage.store.counters().reserved_extents == 0


def test_the_end_of_an_image_waits_for_loaders_that_have_published_and_not_answered(
    stage: Stage,
) -> None:
    stop_at(lib.POINT_LOAD_ANSWER)
    stage.image.prefetch(0, 1)
    wait_at(lib.POINT_LOAD_ANSWER)
    assert stage.state(0) is RESIDENT
    with ThreadPoolExecutor() as pool:
        closing = pool.submit(stage.store.close_image, stage.image)
        with pytest.raises(TimeoutError):
            closing.result(0.1)
        let_go(lib.POINT_LOAD_ANSWER)
        closing.result(60)
    assert stage.store.counters().reserved_extents == 0


def test_what_became_resident_is_told_once_in_order(stage: Stage) -> None:
    for extent in (5, 0, 3):
        stage.load(extent, 1)
    assert stage.store.take_events() == loaded(5, 0, 3)
    assert stage.store.take_events() == []


def test_insertions_that_nobody_took_are_reported_as_lost_and_not_invented(
    make_stage: MakeStage,
) -> None:
    stage = make_stage(nr_pages=16, extent_pages=1, capacity=16)
    rounds = (4 * 16 + 1024) // 16 + 1
    for _ in range(rounds):
        stage.load()
        stage.evict_all()
    assert stage.store.take_events() is None
    stage.load(7, 1)
    assert stage.store.take_events() == loaded(7)


def test_the_generation_changes_with_every_state(stage: Stage) -> None:
    seen = [stage.image.generation]
    stage.load(0, 1)
    seen.append(stage.image.generation)
    stage.evict(0)
    seen.append(stage.image.generation)
    assert seen == sorted(set(seen))
    assert stage.image.generation == seen[-1]


def test_a_store_smaller_than_an_extent_is_refused() -> None:
    with pytest.raises(CapacityError, match="give at least that"):
        PageStore(EXTENT_BYTES - 1, extent_bytes=EXTENT_BYTES)
    with pytest.raises(UsageError):
        PageStore(1 << 20, extent_bytes=3 * 4096)


def test_random_loads_evictions_and_pins_keep_the_books(
    make_stage: MakeStage, rng: random.Random
) -> None:
    stage = make_stage(nr_pages=12 * 16 + 5, capacity=6)
    image, nr = stage.image, stage.image.nr_extents
    pins = [0] * nr
    for _ in range(300):
        extent = rng.randrange(nr)
        match rng.randrange(4):
            case 0 | 1 if stage.store.counters().free_extents:
                image.prefetch(extent, 1)
                image.wait_loaded(0, nr, 60_000)
            case 2:
                states, pinned = image.states(), pins[extent]
                wanted = [extent] if states[extent] == RESIDENT and not pinned else []
                assert stage.evict(extent) == wanted
            case 3 if sum(map(bool, pins)) < 3 or pins[extent]:
                if pins[extent] and rng.random() < 0.6:
                    image.unpin(extent, 1)
                    pins[extent] -= 1
                else:
                    image.pin(extent, 1, 6)
                    pins[extent] += 1
        stage.store.check()
        states = image.states()
        resident = [e for e in range(nr) if states[e] == RESIDENT]
        counters = stage.store.counters()
        assert set(states) <= {ABSENT, RESIDENT}
        assert counters.reserved_extents == len(resident) <= 6
        assert image.resident_bytes == sum(image.extent_bytes_of(e) for e in resident)
        assert list(image.pins()) == pins
        assert counters.pinned_extents == sum(map(bool, pins))
    assert stage.audit().mismatches == []
