# SPDX-License-Identifier: Apache-2.0
"""Loads of an image without a file: who gets them, in which pieces, and what ends them."""

import contextlib
import errno
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from domains import in_thread
from stage import (
    EXTENT_PAGES,
    PAGE,
    SIGBUS_DEATH,
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

from cowshed.cache import ExtentState, Fetch, FileSource, PageStore, RemoteSource, UsageError
from cowshed.cache._core import lib

ABSENT, LOADING, RESIDENT, EVICTING = ExtentState
EXTENT = EXTENT_PAGES * PAGE
BLOCK = 16  # extents of a demand fetch
MOST = 64  # extents of a prefetch
SECONDS = 60.0


@pytest.fixture
def stage(make_stage: MakeStage) -> Stage:
    """A remote image of four blocks and a bit, which fits into the store."""
    return make_stage(nr_pages=4 * 256 + 40, capacity=96, is_remote=True)


def take(stage: Stage, *, demand_only: bool = False) -> Fetch:
    fetch = stage.queue.take(SECONDS, demand_only=demand_only)
    assert fetch is not None
    return fetch


def extents(fetch: Fetch) -> tuple[int, int]:
    """The extents of a fetch: the first, and how many."""
    return fetch.offset_bytes // EXTENT, -(-fetch.length_bytes // EXTENT)


def source_bytes(stage: Stage, at: int, length: int) -> bytes:
    first, end = at // PAGE, -(-(at + length) // PAGE)
    return content(first, end - first)[at % PAGE :][:length]


def give(stage: Stage, fetch: Fetch, nr_bytes: int | None = None) -> None:
    """Give a fetch all that it wants, or so many bytes, from its beginning."""
    length = fetch.length_bytes if nr_bytes is None else nr_bytes
    assert fetch.fill(source_bytes(stage, fetch.offset_bytes, length))


def answer_one(stage: Stage) -> tuple[int, int]:
    """Take a fetch and give all of it; return its extents."""
    fetch = take(stage)
    give(stage, fetch)
    fetch.end()
    return extents(fetch)


def test_an_extent_is_published_as_soon_as_its_bytes_are_there(stage: Stage) -> None:
    guest = stage.guest()
    read = guest.start("read", offset=5 * EXTENT, length=PAGE)
    fetch = take(stage)
    assert extents(fetch) == (0, BLOCK)
    assert not fetch.is_prefetch
    give(stage, fetch, 5 * EXTENT + EXTENT - 1)
    assert list(stage.image.states(0, 7)) == [RESIDENT] * 5 + [LOADING] * 2
    assert not guest.answered(read)
    assert stage.frame(5 * EXTENT_PAGES) == bytes(PAGE)  # no part of an extent is in the frames
    assert fetch.fill(source_bytes(stage, 6 * EXTENT - 1, 1))
    assert bytes.fromhex(guest.finish(read)) == content(5 * EXTENT_PAGES)
    assert stage.store.counters().loading_extents == BLOCK - 6
    stage.store.check()
    fetch.end()
    assert stage.audit().mismatches == []


@pytest.mark.parametrize("cut_bytes", [0, 1, 100, 4095])
def test_bytes_come_in_any_portions_and_the_last_page_may_be_partial(
    make_stage: MakeStage, rng: random.Random, cut_bytes: int
) -> None:
    nr_pages = 37
    stage = make_stage(nr_pages=nr_pages, cut_bytes=cut_bytes, capacity=64, is_remote=True)
    assert stage.image.prefetch(0, 3) == 3
    fetch = take(stage)
    assert (fetch.offset_bytes, fetch.length_bytes) == (0, stage.size_bytes)
    at = 0
    while at < stage.size_bytes:
        length = min(
            rng.choice([1, 100, PAGE, EXTENT - 1, EXTENT, 2 * EXTENT]), stage.size_bytes - at
        )
        assert fetch.fill(source_bytes(stage, at, length))
        at += length
        stage.store.check()
    with pytest.raises(UsageError, match="more than a fetch"):
        fetch.fill(b"x")
    fetch.end()
    expected = content(0, nr_pages)[: stage.size_bytes] + bytes(cut_bytes)
    assert os.pread(stage.image.frames_fd, nr_pages * PAGE, 0) == expected
    assert stage.image.counters().load_bytes == stage.size_bytes


def test_demand_goes_before_prefetch_and_threads_can_be_kept_for_it(stage: Stage) -> None:
    stage.image.prefetch(0, 8)
    assert stage.queue.take(0.0, demand_only=True) is None
    assert stage.queue.counters().queued_prefetch == 1
    guest = stage.guest()
    read = guest.start("read", offset=40 * EXTENT, length=PAGE)
    fetch = take(stage, demand_only=True)
    assert (extents(fetch), fetch.is_prefetch) == ((32, BLOCK), False)
    second = take(stage)
    assert (extents(second), second.is_prefetch) == ((0, 8), True)
    assert stage.queue.counters().fetches == 2
    for each in (fetch, second):
        give(stage, each)
        each.end()
    guest.finish(read)
    assert stage.image.counters().demand_loads == 1
    assert stage.image.counters().prefetch_loads == BLOCK + 8 - 1


def test_a_queued_prefetch_that_a_guest_comes_to_need_is_demand(stage: Stage) -> None:
    assert stage.image.prefetch(20, 8) == 8
    guest = stage.guest()
    read = guest.start("read", offset=24 * EXTENT, length=PAGE)
    fetch = take(stage, demand_only=True)
    assert extents(fetch) == (16, BLOCK)
    give(stage, fetch)
    fetch.end()
    guest.finish(read)
    assert stage.queue.counters().queued_prefetch == 0


def test_a_block_is_one_fetch_however_many_guests_touch_it(stage: Stage) -> None:
    guests = [stage.guest() for _ in range(3)]
    places = (33, 47, 40)
    reads = [
        guest.start("read", offset=extent * EXTENT, length=PAGE)
        for guest, extent in zip(guests, places, strict=True)
    ]
    until(lambda: stage.queue.counters().queued_demand == 3, "all three faults are queued")
    fetch = take(stage)
    assert extents(fetch) == (32, BLOCK)
    assert stage.queue.take(0.0) is None
    give(stage, fetch)
    fetch.end()
    for guest, read, extent in zip(guests, reads, places, strict=True):
        assert bytes.fromhex(guest.finish(read)) == content(extent * EXTENT_PAGES)


def test_what_is_resident_in_a_block_is_not_fetched_again(stage: Stage) -> None:
    stage.image.prefetch(5, 1)
    assert answer_one(stage) == (5, 1)
    guest = stage.guest()
    read = guest.start("read", offset=9 * EXTENT, length=PAGE)
    assert answer_one(stage) == (6, 10)
    guest.finish(read)


def test_neighbouring_prefetches_are_one_fetch_of_up_to_four_mib(make_stage: MakeStage) -> None:
    stage = make_stage(nr_pages=100 * EXTENT_PAGES, capacity=1000, is_remote=True)
    assert stage.image.prefetch(0, 100) == 100
    assert stage.queue.counters().queued_prefetch == 7
    assert answer_one(stage) == (0, MOST)
    assert answer_one(stage) == (MOST, 100 - MOST)
    assert stage.queue.counters().queued_prefetch == 0
    assert set(stage.image.states()) == {RESIDENT}


def test_when_room_is_short_nothing_is_fetched_that_nobody_asked_for(
    make_stage: MakeStage,
) -> None:
    stage = make_stage(nr_pages=64 * EXTENT_PAGES, capacity=10, is_remote=True, low_free=6)
    guest = stage.guest()
    read = guest.start("read", offset=20 * EXTENT, length=PAGE)
    assert answer_one(stage) == (20, 4)  # 10 less the low mark
    guest.finish(read)
    read = guest.start("read", offset=40 * EXTENT, length=PAGE)
    assert answer_one(stage) == (40, 1)
    guest.finish(read)


def test_a_fetch_waits_for_room_and_is_taken_once_there_is_some(make_stage: MakeStage) -> None:
    stage = make_stage(nr_pages=64 * EXTENT_PAGES, capacity=4, is_remote=True)
    stage.image.prefetch(0, 1)
    for extent in range(4):
        stage.image.prefetch(extent, 1)
        answer_one(stage) if stage.state(extent) is LOADING else None
    guest = stage.guest()
    read = guest.start("read", offset=30 * EXTENT, length=PAGE)
    assert stage.queue.take(0.0) is None
    taken: list[tuple[int, int]] = []
    thread = in_thread(lambda: taken.append(answer_one(stage)))
    until(lambda: stage.store.counters().nr_waiting_loaders == 1, "the thread waits for room")
    assert os.read(stage.store.pressure_fd, 8)  # the evictor was told
    assert stage.evict(2) == [2]
    thread.join()
    assert taken == [(30, 1)]
    guest.finish(read)
    stage.store.check()


def test_the_evictor_never_waits_for_a_fetch(stage: Stage) -> None:
    stage.image.prefetch(0, 4)
    answer_one(stage)
    stage.image.prefetch(4, 4)
    fetch = take(stage)
    give(stage, fetch, EXTENT)
    assert stage.evict(3, 4, 5) == [3, 4]  # 5 is LOADING
    assert stage.state(5) is LOADING
    fetch.end(errno.EIO)
    assert list(stage.image.states(3, 5)) == [ABSENT] * 5
    assert stage.store.counters().reserved_extents == 3
    stage.store.check()


@pytest.mark.parametrize("err", [errno.EIO, 0])
def test_what_was_not_given_fails_for_those_who_wait_and_nobody_else(
    stage: Stage, err: int
) -> None:
    reader, other, victim = stage.guest(), stage.guest(), stage.guest()
    good = reader.start("read", offset=2 * EXTENT, length=PAGE)
    fetch = take(stage)
    bad = victim.start("touch", page=9 * EXTENT_PAGES)
    until(lambda: victim.account.status().counters.faults_missing == 1, "its fault came")
    victim.wait_stuck(bad)
    give(stage, fetch, 3 * EXTENT + 5)
    fetch.end(err)
    assert victim.ended() == SIGBUS_DEATH
    assert bytes.fromhex(reader.finish(good)) == content(2 * EXTENT_PAGES)
    assert stage.image.counters().load_errors == BLOCK - 3
    read = other.start("read", offset=9 * EXTENT, length=PAGE)
    assert answer_one(stage) == (3, BLOCK - 3)
    assert bytes.fromhex(other.finish(read)) == content(9 * EXTENT_PAGES)
    stage.store.check()


def test_frames_that_cannot_be_written_fail_their_extent_alone(stage: Stage) -> None:
    stage.image.prefetch(0, 4)
    fetch = take(stage)
    fail_at(lib.POINT_LOAD_FILL, errno.ENOSPC, 2)  # the run, then its first extent
    give(stage, fetch)
    fetch.end()
    assert list(stage.image.states(0, 4)) == [ABSENT, RESIDENT, RESIDENT, RESIDENT]
    assert stage.image.counters().load_errors == 1
    stage.store.check()


def test_bytes_that_are_refused_fail_their_extent_alone_and_are_in_no_frame(stage: Stage) -> None:
    stage.image.prefetch(0, 4)
    fetch = take(stage)
    fail_at(lib.POINT_FETCH_FILL, errno.EILSEQ, 2)
    give(stage, fetch)
    fetch.end()
    assert list(stage.image.states(0, 4)) == [ABSENT, RESIDENT, RESIDENT, RESIDENT]
    assert stage.frame(0) == bytes(PAGE)


def test_an_image_is_closed_though_a_fetch_of_it_is_in_hand(tmp_path: Path) -> None:
    with PageStore(80 * EXTENT) as store:
        queue = store.open_queue()
        images = [
            store.open_image(
                name, RemoteSource(f"http://o/{name}", 8 * EXTENT, '"1"', 0), queue=queue
            )
            for name in ("a", "b")
        ]
        for image in images:
            image.prefetch(0, 8)
        first, second = queue.take(SECONDS), queue.take(SECONDS)
        assert first is not None
        assert second is not None
        assert first.fill(content(0, EXTENT_PAGES))
        store.close_image(images[0])
        assert store.counters().reserved_extents == store.counters().loading_extents == 8
        assert not first.fill(content(EXTENT_PAGES, EXTENT_PAGES))
        first.end()
        store.check()
        assert second.fill(content(0, 8 * EXTENT_PAGES))
        second.end()
        assert set(images[1].states()) == {RESIDENT}


def test_an_image_is_closed_once_the_bytes_being_given_are_in_its_frames(tmp_path: Path) -> None:
    with PageStore(80 * EXTENT) as store:
        queue = store.open_queue()
        source = RemoteSource("http://o/a", 8 * EXTENT, '"1"', 0)
        image = store.open_image("a", source, queue=queue)
        image.prefetch(0, 8)
        fetch = queue.take(SECONDS)
        assert fetch is not None
        stop_at(lib.POINT_FETCH_FILL)
        results: list[bool] = []
        filling = in_thread(lambda: results.append(fetch.fill(content(0, EXTENT_PAGES))))
        wait_at(lib.POINT_FETCH_FILL)
        closed = threading.Event()
        closing = in_thread(lambda: (store.close_image(image), closed.set()))
        assert not closed.wait(0.05)
        let_go(lib.POINT_FETCH_FILL)
        closing.join()
        filling.join()
        assert results == [True]
        assert not fetch.fill(content(EXTENT_PAGES, EXTENT_PAGES))
        fetch.end()
        assert store.counters().reserved_extents == 0


def test_a_queued_load_goes_with_its_image_and_with_the_store(stage: Stage) -> None:
    guest = stage.guest()
    guest.start("touch", page=0)
    until(lambda: stage.queue.counters().queued_demand == 1, "the fault is queued")
    stage.store.cancel_loads()
    assert stage.queue.counters().queued_demand == 0
    assert guest.ended() == SIGBUS_DEATH
    assert stage.image.prefetch(0, 8) == 0
    assert stage.queue.take(0.0) is None


def test_a_store_with_a_fetch_in_hand_is_left_open_until_it_ends() -> None:
    store = PageStore(80 * EXTENT)
    queue = store.open_queue()
    source = RemoteSource("http://o/a", 8 * EXTENT, '"1"', 0)
    image = store.open_image("a", source, queue=queue)
    image.prefetch(0, 8)
    fetch = queue.take(SECONDS)
    assert fetch is not None
    assert store.stop(SECONDS)
    store.close()
    assert store.image(image.image_no) is None
    assert not fetch.fill(content(0, EXTENT_PAGES))
    assert not queue.close()
    fetch.end()
    store.close()
    assert queue.close()


def test_threads_that_wait_for_a_fetch_end_when_the_queue_is_stopped(stage: Stage) -> None:
    taken: list[Fetch | None] = []
    threads = [
        in_thread(lambda only=only: taken.append(stage.queue.take(SECONDS, demand_only=only)))
        for only in (True, False)
    ]
    stage.queue.stop()
    for thread in threads:
        thread.join()
    assert taken == [None, None]


def test_an_image_with_a_file_is_loaded_though_nobody_fetches(stage: Stage, tmp_path: Path) -> None:
    path = tmp_path / "local"
    path.write_bytes(content(0, 4 * EXTENT_PAGES))
    local = stage.store.open_image("local", FileSource.open(path))
    for no in range(0, 64, 16):
        stage.image.prefetch(no, 16)
    fetches = [take(stage)]
    local.prefetch(0, 4)
    assert local.wait_loaded(0, 4, 60_000)
    assert set(local.states()) == {RESIDENT}
    for fetch in fetches:
        fetch.end(errno.EIO)


def test_the_age_of_a_silent_fetch_is_the_images(stage: Stage) -> None:
    assert stage.image.read_wait_seconds == 0.0
    stage.image.prefetch(0, 4)
    fetch = take(stage)
    until(lambda: stage.image.read_wait_seconds > 0.05, "the fetch is silent")
    give(stage, fetch, 10)
    until(lambda: stage.image.read_wait_seconds < 0.05, "bytes came")
    fetch.end()
    assert stage.image.read_wait_seconds == 0.0


def test_standby_extents_come_back_without_a_fetch(make_stage: MakeStage) -> None:
    stage = make_stage(nr_pages=12 * EXTENT_PAGES, capacity=11, standby=4, is_remote=True)
    guest = stage.guest()
    read = guest.start("read", offset=3 * EXTENT, length=PAGE)
    answer_one(stage)
    guest.finish(read)
    stage.to_standby(3)
    assert stage.state(3) is ABSENT
    assert guest.read(3 * EXTENT_PAGES, 2) == content(3 * EXTENT_PAGES, 2)
    assert stage.image.counters().soft_hits == 1
    stage.to_standby(3)
    assert stage.image.prefetch(3, 1) == 1
    assert stage.image.wait_loaded(3, 1, 60_000)
    assert stage.queue.counters() == type(stage.queue.counters())(0, 0, 0)


def test_standby_bytes_that_cannot_be_read_are_fetched(make_stage: MakeStage) -> None:
    stage = make_stage(nr_pages=12 * EXTENT_PAGES, capacity=11, standby=4, is_remote=True)
    guest = stage.guest()
    read = guest.start("read", offset=3 * EXTENT, length=PAGE)
    answer_one(stage)
    guest.finish(read)
    stage.to_standby(3)
    stage.store.take_events()
    fail_at(lib.POINT_STANDBY_READ, errno.EIO, 1)
    read = guest.start("read", offset=3 * EXTENT, length=PAGE)
    assert answer_one(stage)[0] == 3
    assert bytes.fromhex(guest.finish(read)) == content(3 * EXTENT_PAGES)
    kinds = [kind.name for kind, place, _ in stage.store.take_events() or () if place[1] == 3]
    assert kinds == ["DROPPED", "LOADED"]
    stage.store.check()
    assert stage.audit().mismatches == []


def test_a_fetched_extent_is_an_event_for_the_policy(stage: Stage) -> None:
    stage.image.prefetch(0, 3)
    answer_one(stage)
    assert stage.store.take_events() == loaded(0, 1, 2)


def fetchers(stage: Stage, rng: random.Random, nr: int) -> list[threading.Thread]:
    """Threads that give what is asked for, in portions, some of it not."""
    seeds = [rng.random() for _ in range(nr)]

    def run(seed: float) -> None:
        mine = random.Random(seed)
        while (fetch := stage.queue.take(SECONDS, demand_only=seed < 0.2)) is not None:
            at, end = fetch.offset_bytes, fetch.offset_bytes + fetch.length_bytes
            while at < end and mine.random() > 0.05:
                length = min(mine.choice([1000, EXTENT, 200_000]), end - at)
                assert fetch.fill(source_bytes(stage, at, length))
                at += length
            fetch.end(errno.EIO)

    return [in_thread(lambda seed=seed: run(seed)) for seed in seeds]


@contextlib.contextmanager
def running(stage: Stage, rng: random.Random) -> Iterator[None]:
    threads = fetchers(stage, rng, 4)
    try:
        yield
    finally:
        stage.queue.stop()
        for thread in threads:
            thread.join()


def test_whatever_is_asked_for_and_evicted_the_frames_are_the_sources(
    make_stage: MakeStage, rng: random.Random
) -> None:
    stage = make_stage(nr_pages=80 * EXTENT_PAGES, capacity=40, standby=8, is_remote=True)
    with running(stage, rng):
        for _ in range(400):
            extent = rng.randrange(80)
            match rng.randrange(4):
                case 0:
                    stage.image.prefetch(extent, min(rng.randrange(1, 30), 80 - extent))
                case 1:
                    stage.image.wait_loaded(extent, 1, 10)
                case 2:
                    stage.evict(extent, at_once=True)
                case 3:
                    some = rng.sample(range(80), 20)
                    stage.evict(*some, at_once=True)
            stage.store.check()
            first = os.pread(stage.image.frames_fd, PAGE, extent * EXTENT)
            if stage.state(extent) is RESIDENT:
                assert first in (content(extent * EXTENT_PAGES), bytes(PAGE))
        stage.store.cancel_loads()
        assert stage.image.wait_loaded(0, 80, 60_000)
    for extent, state in enumerate(stage.image.states()):
        if state == RESIDENT:
            frames = os.pread(stage.image.frames_fd, EXTENT, extent * EXTENT)
            assert frames == content(extent * EXTENT_PAGES, EXTENT_PAGES)
