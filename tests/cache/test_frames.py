# SPDX-License-Identifier: Apache-2.0
"""Frames that nobody loaded: what they are taken for, and that they go."""

import fcntl
import mmap
import os

from stage import PAGE, MakeStage, Stage, content

from cowshed.cache import ExtentState


def leave_stray(stage: Stage, page: int) -> None:
    """Read a hole as a hostile or careless guest could, which puts a zero frame there."""
    with mmap.mmap(
        stage.image.guest_fd, PAGE, mmap.MAP_SHARED, mmap.PROT_READ, offset=page * PAGE
    ) as unguarded:
        unguarded[:1]


def blocks_bytes(stage: Stage) -> int:
    return os.fstat(stage.image.frames_fd).st_blocks * 512


def test_scrub_empties_what_nobody_loaded_and_nothing_else(stage: Stage) -> None:
    stage.load(2, 2)
    for page in (0, 5, 64, 127):
        leave_stray(stage, page)
    assert blocks_bytes(stage) == (2 * 16 + 4) * PAGE
    assert stage.image.scrub() == 3
    assert blocks_bytes(stage) == stage.image.resident_bytes == 2 * 16 * PAGE
    assert stage.image.counters().strays == 3
    assert stage.image.counters().evictions == 0
    assert stage.store.counters().reserved_extents == 2
    assert stage.frame(40) == content(40)
    assert stage.image.scrub() == 0


def test_a_load_overwrites_a_stray_frame(stage: Stage) -> None:
    leave_stray(stage, 3)
    stage.load(0, 1)
    assert [stage.frame(page) for page in range(16)] == [content(page) for page in range(16)]
    assert stage.image.scrub() == 0


def test_a_stray_frame_is_not_resident(stage: Stage) -> None:
    leave_stray(stage, 3)
    assert stage.state(0) is ExtentState.ABSENT
    assert stage.image.resident_bytes == 0
    assert stage.evict(0) == []


def test_the_last_partial_extent_is_punched_whole(make_stage: MakeStage) -> None:
    stage = make_stage(nr_pages=35, cut_bytes=100)
    stage.load()
    assert blocks_bytes(stage) == 35 * PAGE
    assert stage.evict(2) == [2]
    assert blocks_bytes(stage) == 32 * PAGE
    assert os.fstat(stage.image.frames_fd).st_size == 35 * PAGE
    assert stage.evict(0, 1) == [0, 1]
    assert blocks_bytes(stage) == 0


def test_frames_have_no_permissions_and_guests_a_read_only_description(stage: Stage) -> None:
    assert os.fstat(stage.image.frames_fd).st_mode & 0o777 == 0
    flags = fcntl.fcntl(stage.image.guest_fd, fcntl.F_GETFL)
    assert flags & os.O_ACCMODE == os.O_RDONLY
