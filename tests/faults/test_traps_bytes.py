# SPDX-License-Identifier: Apache-2.0
"""Kernel behaviour that would give wrong bytes or free memory, and what prevents it.

One test for each way to fall in; docs/traps.md tells how each fails without its cure.
"""

from __future__ import annotations

import errno
import mmap
import os
import signal

import pytest
from domains import ANSWER_SECONDS, NOBODY, MakeImage, StartDaemon, StartGuest
from stage import (
    EXTENT_PAGES,
    PAGE,
    SIGBUS_DEATH,
    SIGSEGV_DEATH,
    MakeStage,
    Stage,
    content,
    fail_at,
    let_go,
    private_pages,
    stop_at,
    until,
    wait_at,
)

from cowshed.cache import ExtentState, probe_huge_frames
from cowshed.cache._core import lib

HUGE_PAGES = 512


def test_trap_01_a_hole_is_never_read_as_zeros(stage: Stage) -> None:
    guest = stage.guest(window=1)
    assert guest.call("touch", page=20) == content(20)[0]
    assert guest.read(21) == content(21)
    stage.evict_all()
    assert guest.read(20) == content(20)


def test_trap_01_memory_locked_in_advance_is_not_filled_with_zeros(stage: Stage) -> None:
    guest = stage.guest(window=1, lock_all=True)
    assert os.stat(stage.image.frames_fd).st_blocks == 0
    assert guest.call("touch", page=20) == content(20)[0]
    assert guest.read(21) == content(21)


def test_trap_01_a_zero_frame_that_a_reader_left_is_not_taken_for_the_image(stage: Stage) -> None:
    guest = stage.guest(window=1)
    with mmap.mmap(stage.image.guest_fd, PAGE, mmap.MAP_SHARED, mmap.PROT_READ) as unguarded:
        assert unguarded[:PAGE] == bytes(PAGE)
    assert os.lseek(stage.image.frames_fd, 0, os.SEEK_DATA) == 0  # it is in the memfd now
    assert guest.read(0) == content(0)
    assert guest.account.status().counters.faults_minor == 1


def test_trap_01_a_forked_child_has_no_unguarded_copy_of_the_mapping(stage: Stage) -> None:
    guest = stage.guest()
    assert -guest.call("fork_touch", page=3) == SIGSEGV_DEATH
    assert stage.state(0) is ExtentState.ABSENT
    assert guest.read(3) == content(3)


def test_trap_01_a_dead_backend_means_sigbus_and_not_zeros(
    make_image: MakeImage, start_daemon: StartDaemon, start_guest: StartGuest
) -> None:
    daemon = start_daemon("--image", f"disk={make_image(1 << 20)}", "--capacity", "1M")
    guest = start_guest(daemon.uri, NOBODY)
    guest.call("open", image="disk", guest="g")
    guest.call("read", offset=0, length=8)
    daemon.kill()
    guest.start("touch", pages=[255])
    assert guest.process.stdout is not None
    assert guest.process.stdout.readline() == b""  # else what it read
    assert guest.process.wait(ANSWER_SECONDS) == -signal.SIGBUS


@pytest.mark.parametrize("extent_pages", [EXTENT_PAGES, HUGE_PAGES])
def test_trap_02_another_user_cannot_change_or_keep_shared_frames(
    make_stage: MakeStage, extent_pages: int
) -> None:
    if extent_pages == HUGE_PAGES and probe_huge_frames() is not None:
        pytest.skip("needs to mount a tmpfs: run as root")
    stage = make_stage(nr_pages=2 * extent_pages + 9, extent_pages=extent_pages)
    stage.load()
    attacker = stage.guest(uid=NOBODY)
    before = [stage.frame(page) for page in range(stage.image.nr_pages)]
    came = attacker.call(
        "attack",
        fds=(stage.image.guest_fd,),
        backend_pid=os.getpid(),
        backend_fd=stage.image.frames_fd,
    )
    assert len(came) == 11
    assert "DONE" not in came.values(), came
    assert [stage.frame(page) for page in range(stage.image.nr_pages)] == before
    assert stage.evict_all() == list(range(stage.image.nr_extents))
    assert os.fstat(stage.image.frames_fd).st_blocks == 0


def test_trap_03_an_eviction_does_not_shrink_the_file_and_private_pages_survive(
    stage: Stage,
) -> None:
    guest = stage.guest()
    last = stage.image.nr_pages - 1
    for page in (0, 17, last):
        guest.call("fill", page=page, nr_pages=1, byte=7)
    stage.load()
    assert len(stage.evict_all()) == stage.image.nr_extents
    assert [guest.read(page) for page in (0, 17, last)] == [b"\7" * PAGE] * 3
    assert os.fstat(stage.image.frames_fd).st_size == stage.image.map_bytes


def test_trap_07_a_page_is_not_punched_between_look_and_map(stage: Stage) -> None:
    stage.load()
    guest = stage.guest(window=1)
    stop_at(lib.POINT_FAULT_HELD)
    ticket = guest.start("touch", page=5)
    wait_at(lib.POINT_FAULT_HELD)
    assert stage.evict(0, 1, at_once=True) == [1]
    assert stage.state(0) is ExtentState.RESIDENT
    let_go(lib.POINT_FAULT_HELD)
    assert guest.finish(ticket) == content(5)[0]
    assert guest.account.status().broken == 0
    assert stage.evict(0) == [0]


def test_trap_08_a_page_mapped_for_reading_still_asks_before_its_first_write(stage: Stage) -> None:
    guest = stage.guest(quota=1)
    assert guest.read(0, 16) == content(0, 16)
    guest.call("poke", page=0, byte=1)
    ticket = guest.start("write", offset=PAGE, given_hex="01")
    until(lambda: guest.account.status().stopped_since_ns, "the guest stops at its quota")
    guest.wait_stuck(ticket)
    assert private_pages(guest) == 1
    assert stage.looks(guest, 1) == bytes([lib.PAGE_LOOK_SHARED])


def test_trap_13_a_failed_load_is_sigbus_there_and_nowhere_else(stage: Stage) -> None:
    victim, other = stage.guest(window=1), stage.guest(window=1)
    fail_at(lib.POINT_LOAD_READ, errno.EIO)
    victim.start("touch", page=5)
    assert victim.ended() == SIGBUS_DEATH
    with pytest.raises(OSError, match="Input/output error"):
        other.read(5)
    assert stage.image.counters().load_retries >= 2
    let_go(lib.POINT_LOAD_READ)
    assert other.read(4) == content(4)
    assert other.read(40) == content(40)


def test_trap_13_a_good_load_repairs_what_a_bad_one_poisoned(stage: Stage) -> None:
    guest = stage.guest(window=1)
    fail_at(lib.POINT_LOAD_READ, errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        guest.read(5)
    let_go(lib.POINT_LOAD_READ)
    until(lambda: guest.account.status().counters.poisoned_pages == 1, "the poison is counted")
    stage.load(0, 1)
    until(lambda: guest.account.status().counters.repaired_pages, "the page is repaired")
    assert guest.read(5) == content(5)
    guest.call("poke", page=5, byte=1)
    assert private_pages(guest) == 1
    assert stage.audit().mismatches == []


def test_trap_13_a_short_source_is_an_error_and_nothing_of_it_is_resident(stage: Stage) -> None:
    guest = stage.guest(window=1)
    assert guest.read(0) == content(0)
    os.truncate(stage.path, 20 * PAGE + 100)
    with pytest.raises(OSError, match="Input/output error"):
        guest.read(20)
    with pytest.raises(OSError, match="Input/output error"):
        guest.read(60)
    assert stage.state(1) is stage.state(3) is ExtentState.ABSENT
    assert stage.frame(20) == stage.frame(60) == bytes(PAGE)
    assert guest.read(1) == content(1)  # resident before
    assert stage.image.look_at_source() is not None
