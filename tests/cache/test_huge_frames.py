# SPDX-License-Identifier: Apache-2.0
"""Extents of 2 MiB beside smaller ones: frames of huge pages, and room for each extent at once."""

from __future__ import annotations

import errno
import mmap
import os
import random
import subprocess
import sys
from contextlib import closing, suppress
from pathlib import Path

import pytest
from domains import NOBODY, plain_environment
from stage import PAGE, MakeStage, Stage, content, loaded, private_pages, until

from cowshed.accounting import EvictReason, evict
from cowshed.cache import (
    HUGE_EXTENT_BYTES,
    CapacityError,
    ExtentState,
    FileSource,
    Image,
    StoreEvent,
    UsageError,
    probe_huge_frames,
)

HUGE_PAGES = HUGE_EXTENT_BYTES // PAGE
ROOM = 32  # of an extent of 2 MiB, in extents of 64 KiB

pytestmark = pytest.mark.skipif(
    probe_huge_frames() is not None, reason="needs to mount a tmpfs: run as root"
)


@pytest.fixture
def huge(make_stage: MakeStage) -> Stage:
    """A store of extents of 64 KiB with an image of three of 2 MiB; the last has 35 pages."""
    return make_stage(
        nr_pages=2 * HUGE_PAGES + 35, capacity=3 * ROOM, image_extent_pages=HUGE_PAGES, standby=8
    )


def blocks_bytes(image: Image) -> int:
    return os.fstat(image.frames_fd).st_blocks * 512


def small_image(stage: Stage, folder: Path, nr_extents: int) -> Image:
    path = folder / "small"
    path.write_bytes(content(0, nr_extents * 16))
    return stage.store.open_image("small", FileSource.open(path))


def load(image: Image, first: int = 0, nr: int | None = None) -> None:
    nr = image.nr_extents - first if nr is None else nr
    for extent in range(first, first + nr):
        image.prefetch(extent, 1)
        assert image.wait_loaded(extent, 1, 60_000)


def test_frames_are_huge_pages_on_a_file_system_that_nobody_sees(huge: Stage) -> None:
    os.pwrite(huge.image.frames_fd, b"x", 5 * PAGE)  # a memfd would take one page
    assert blocks_bytes(huge.image) == HUGE_EXTENT_BYTES
    assert os.lseek(huge.image.frames_fd, 0, os.SEEK_HOLE) == HUGE_EXTENT_BYTES
    device = os.fstat(huge.image.frames_fd).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    assert number not in [mount.split()[2] for mount in mounts]
    assert huge.image.scrub() == 1


def test_each_image_has_a_file_system_of_its_own(huge: Stage, tmp_path: Path) -> None:
    other = huge.store.open_image(
        "other", FileSource.open(huge.path), extent_bytes=HUGE_EXTENT_BYTES
    )
    assert os.fstat(other.frames_fd).st_dev != os.fstat(huge.image.frames_fd).st_dev


def test_extents_are_loaded_whole_and_the_last_takes_only_its_pages(huge: Stage) -> None:
    huge.load()
    assert [huge.frame(no) for no in range(huge.image.nr_pages)] == [
        content(no) for no in range(huge.image.nr_pages)
    ]
    assert blocks_bytes(huge.image) == huge.image.resident_bytes == huge.image.map_bytes
    assert huge.store.counters().reserved_extents == 2 * ROOM + 3
    assert [huge.image.room_of(extent) for extent in range(3)] == [ROOM, ROOM, 3]
    assert huge.image.room_extents == 2 * ROOM + 3
    assert huge.evict(2) == [2]
    assert blocks_bytes(huge.image) == 2 * HUGE_EXTENT_BYTES
    assert huge.evict_all() == [0, 1]
    assert (blocks_bytes(huge.image), huge.store.counters().reserved_extents) == (0, 0)


def test_a_stray_of_2_mib_is_not_resident_and_goes(huge: Stage) -> None:
    huge.load(1, 1)
    with mmap.mmap(
        huge.image.guest_fd, PAGE, mmap.MAP_SHARED, mmap.PROT_READ, offset=7 * PAGE
    ) as unguarded:
        unguarded[:1]
    assert blocks_bytes(huge.image) > huge.image.resident_bytes == HUGE_EXTENT_BYTES
    assert huge.state(0) is ExtentState.ABSENT
    assert huge.image.scrub() == 1
    assert blocks_bytes(huge.image) == HUGE_EXTENT_BYTES
    assert huge.frame(HUGE_PAGES) == content(HUGE_PAGES)


def test_a_load_overwrites_a_stray_of_2_mib(huge: Stage) -> None:
    with mmap.mmap(huge.image.guest_fd, PAGE, mmap.MAP_SHARED, mmap.PROT_READ) as unguarded:
        unguarded[:1]
    huge.load(0, 1)
    assert [huge.frame(no) for no in range(HUGE_PAGES)] == [content(no) for no in range(HUGE_PAGES)]
    assert huge.image.scrub() == 0


def test_a_load_waits_for_room_for_all_of_its_extent_and_is_not_overtaken(
    make_stage: MakeStage, tmp_path: Path
) -> None:
    stage = make_stage(
        nr_pages=HUGE_PAGES, capacity=2 * ROOM, image_extent_pages=HUGE_PAGES, nr_loaders=1
    )
    small = small_image(stage, tmp_path, ROOM + 2)
    load(small, 0, ROOM + 1)
    stage.image.prefetch(0, 1)
    until(lambda: stage.store.counters().nr_waiting_loaders, "the loader waits for room")
    assert stage.store.counters().free_extents == ROOM - 1
    assert (stage.state(0), blocks_bytes(stage.image)) == (ExtentState.LOADING, 0)
    small.prefetch(ROOM + 1, 1)  # there is room for this one: what the first one waits for
    assert evict(small, [0]) == [0]
    assert stage.image.wait_loaded(0, 1, 60_000)
    assert stage.store.counters().free_extents == 0
    assert evict(small, [1]) == [1]
    assert small.wait_loaded(ROOM + 1, 1, 60_000)
    stage.store.check()


def test_standby_extents_make_room_for_a_large_one(make_stage: MakeStage, tmp_path: Path) -> None:
    stage = make_stage(
        nr_pages=HUGE_PAGES, capacity=2 * ROOM, image_extent_pages=HUGE_PAGES, standby=ROOM
    )
    small = small_image(stage, tmp_path, 2 * ROOM - 1)
    load(small)
    unmapped = list(range(ROOM))
    while unmapped:
        unmapped = unmapped[len(evict(small, unmapped, EvictReason.STANDBY)) :]
    assert stage.store.counters().standby_extents == ROOM
    stage.load()
    counters = stage.store.counters()
    assert counters.reserved_extents == 2 * ROOM - 1
    assert counters.standby_extents == 0
    assert stage.frame(HUGE_PAGES - 1) == content(HUGE_PAGES - 1)
    stage.store.check()


def test_the_standby_list_takes_no_large_extent(huge: Stage) -> None:
    huge.load()
    assert huge.store.take_events() == loaded(0, 1, 2)
    huge.to_standby(1)
    assert huge.store.take_events() == [(StoreEvent.DROPPED, (0, 1), 0.0)]
    counters = huge.store.counters()
    assert (counters.standby_extents, counters.reserved_extents) == (0, ROOM + 3)
    assert huge.image.counters().evictions_pressure == 1
    huge.load(1, 1)
    assert huge.image.counters().loads == 4


def test_pins_count_the_room_of_extents(huge: Stage) -> None:
    with pytest.raises(CapacityError):
        huge.image.pin(0, 3, 2 * ROOM + 2)
    huge.image.pin(0, 3, 2 * ROOM + 3)
    assert huge.store.counters().pinned_extents == 2 * ROOM + 3
    huge.image.unpin(1, 2)
    assert huge.store.counters().pinned_extents == ROOM
    huge.store.check()


def test_a_prefetch_asks_for_an_eighth_of_the_room(make_stage: MakeStage) -> None:
    stage = make_stage(nr_pages=20 * HUGE_PAGES, capacity=16 * ROOM, image_extent_pages=HUGE_PAGES)
    assert stage.image.prefetch(0, 20) == 3
    assert stage.image.wait_loaded(0, 20, 60_000)


@pytest.mark.parametrize("extent_bytes", [32 << 10, 96 << 10, 4 << 20])
def test_other_sizes_of_extents_are_refused(huge: Stage, extent_bytes: int) -> None:
    with closing(FileSource.open(huge.path)) as source, pytest.raises(UsageError, match="opening"):
        huge.store.open_image("other", source, extent_bytes=extent_bytes)


def test_random_steps_on_both_sizes_keep_the_stores_invariants(
    make_stage: MakeStage, tmp_path: Path, rng: random.Random
) -> None:
    capacity = 3 * ROOM
    stage = make_stage(
        nr_pages=3 * HUGE_PAGES + 35, capacity=capacity, image_extent_pages=HUGE_PAGES, standby=20
    )
    images = [stage.image, small_image(stage, tmp_path, 80)]

    def all_loaded() -> bool:
        if stage.store.counters().nr_waiting_loaders:
            for each in images:
                evict(each, range(each.nr_extents))
        return all(each.wait_loaded(0, each.nr_extents, 0) for each in images)

    for step in range(300):
        image = rng.choice(images)
        extent = rng.randrange(image.nr_extents)
        match rng.randrange(5):
            case 0 | 1:
                image.prefetch(extent, min(rng.choice((1, 5)), image.nr_extents - extent))
            case 2:
                evict(image, [extent], rng.choice((EvictReason.STANDBY, EvictReason.REQUEST)))
            case 3:
                image.drop_standby(extent, 1)
            case 4:
                with suppress(CapacityError):
                    image.pin(extent, 1, ROOM)
                    image.unpin(extent, 1)
        stage.store.check()
        if step % 10 == 0:  # while nothing moves, memory is what is counted
            until(all_loaded, "no load is under way")
            counters = stage.store.counters()
            taken = sum(-(-each.resident_bytes // (16 * PAGE)) for each in images)
            assert counters.reserved_extents == taken
            assert counters.reserved_extents + counters.standby_extents <= capacity
            assert [blocks_bytes(each) for each in images] == [
                each.resident_bytes for each in images
            ]
    for each in images:
        for extent, state in enumerate(each.states()):
            if state == ExtentState.RESIDENT:
                nr_pages = each.extent_bytes_of(extent) // PAGE
                first = extent * each.extent_pages
                assert os.pread(each.frames_fd, nr_pages * PAGE, first * PAGE) == content(
                    first, nr_pages
                )


def test_a_guest_reads_and_writes_across_extents_while_they_come_and_go(
    huge: Stage, rng: random.Random
) -> None:
    guest = huge.guest(quota=64)
    written: set[int] = set()
    for _ in range(200):
        page = rng.randrange(huge.image.nr_pages)
        if rng.random() < 0.2 and len(written) < 40:
            guest.call("fill", page=page, nr_pages=1, byte=7)
            written.add(page)
        assert guest.read(page) == (b"\7" * PAGE if page in written else content(page))
        if rng.random() < 0.2:
            huge.evict(page // HUGE_PAGES)
    huge.store.check()
    assert private_pages(guest) == len(written)
    assert huge.audit().mismatches == []


def test_without_the_right_to_mount_the_probe_says_why() -> None:
    script = (
        "import os, sys; from cowshed.cache import probe_huge_frames; os.setuid(int(sys.argv[1]));"
        "print(probe_huge_frames().errno)"
    )
    told = subprocess.run(
        [sys.executable, "-c", script, str(NOBODY)],
        env=plain_environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(told.stdout) == errno.EPERM
