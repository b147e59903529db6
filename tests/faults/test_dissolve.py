# SPDX-License-Identifier: Apache-2.0
"""A huge page of frames is dissolved before a part of it is evicted: nobody sees it zeroed."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
from regions import (
    NO_LIMIT,
    REGION,
    check_books,
    check_bytes,
    close,
    collapse,
    open_region,
    pool,
    two,
)
from stage import ANSWER_SECONDS, PAGE, Stage, content, fail_at, let_go, stop_at, wait_at

from cowshed.cache import ExtentState
from cowshed.cache._core import lib

__all__ = ["pool", "two"]


def blocks(stage: Stage) -> int:
    return os.fstat(stage.image.frames_fd).st_blocks * 512 // PAGE


def test_an_eviction_of_a_part_leaves_the_rest_resident_and_frees_its_memory(two: Stage) -> None:
    guest = two.guest()
    guest.read(0, 16)
    collapse(two, 0)
    loads = two.image.counters().loads
    assert two.evict(3, 9) == [3, 9]
    assert not two.image.is_collapsed(0)
    assert two.image.states().count(ExtentState.ABSENT) == 2
    assert blocks(two) == 2 * REGION + 64 - 32
    assert two.image.counters().loads == loads
    check_bytes(guest, {})
    assert two.image.counters().loads == loads + 2
    check_books(two)


def test_a_page_that_the_kernel_reads_meanwhile_keeps_its_bytes(two: Stage) -> None:
    guest = two.guest()
    collapse(two, 0)
    guest.read(3 * 16, 16)
    guest.call("splice", page=3 * 16 + 5)
    assert two.evict(3) == [3]
    assert bytes.fromhex(guest.call("spliced")) == content(3 * 16 + 5)
    assert blocks(two) == 2 * REGION + 64 - 16
    check_books(two)


def test_a_region_that_goes_whole_is_not_dissolved_first(two: Stage) -> None:
    guest = two.guest()
    collapse(two, 0, 1)
    stop_at(lib.POINT_DISSOLVE)
    assert len(two.evict(*range(32))) == 32
    assert lib.point_wait(lib.POINT_DISSOLVE, 1, 0) < 0
    assert two.image.is_collapsed(1)
    check_bytes(guest, {})
    check_books(two)


def test_who_touches_it_meanwhile_waits_and_no_source_is_read(
    two: Stage, pool: ThreadPoolExecutor
) -> None:
    guest = two.guest(window=16)
    collapse(two, 0)
    loads = two.image.counters().loads
    stop_at(lib.POINT_DISSOLVE)
    evicting = pool.submit(two.evict, 3)
    wait_at(lib.POINT_DISSOLVE)
    assert two.state(9) is ExtentState.EVICTING
    read = guest.start("read", offset=9 * 16 * PAGE, length=8)
    guest.wait_stuck(read)
    let_go(lib.POINT_DISSOLVE)
    assert evicting.result(ANSWER_SECONDS) == [3]
    assert bytes.fromhex(guest.finish(read)) == content(9 * 16)[:8]
    assert two.image.counters().loads == loads
    check_books(two)


def test_a_held_extent_puts_it_off(two: Stage, pool: ThreadPoolExecutor) -> None:
    guest = two.guest(window=16)
    collapse(two, 0)
    stop_at(lib.POINT_FAULT_HELD)
    read = guest.start("read", offset=9 * 16 * PAGE, length=8)
    wait_at(lib.POINT_FAULT_HELD)
    assert two.evict(3, at_once=True) == []
    assert two.image.is_collapsed(0)
    assert two.state(3) is ExtentState.RESIDENT
    let_go(lib.POINT_FAULT_HELD)
    guest.finish(read)
    assert two.evict(3) == [3]
    check_books(two)


def test_pinned_extents_stay_and_the_others_go(two: Stage) -> None:
    guest = two.guest()
    collapse(two, 0)
    two.image.pin(5, 2, 1000)
    assert len(two.evict(*range(32), at_once=True)) == 30
    assert two.state(5) is ExtentState.RESIDENT
    two.image.unpin(5, 2)
    check_bytes(guest, {})
    check_books(two)


def test_frames_that_cannot_be_written_again_are_loaded_again(two: Stage) -> None:
    guest = two.guest()
    guest.read(0, 16)
    collapse(two, 0)
    fail_at(lib.POINT_LOAD_FILL, errno.ENOMEM, 1)
    two.evict(3)
    let_go(lib.POINT_LOAD_FILL)
    assert two.image.states()[:32] == bytes(32)
    assert two.image.refs()[0] == 0
    check_bytes(guest, {})
    check_books(two)


@pytest.mark.parametrize("is_open", [False, True])
def test_a_region_is_collapsed_and_opened_again_afterwards(two: Stage, is_open: bool) -> None:
    guest = two.guest()
    if is_open:
        assert open_region(guest) == 0
        close(guest)
    else:
        collapse(two, 0)
    two.evict(3)
    assert two.image.collapse(0, NO_LIMIT) == -errno.ESTALE
    two.load()
    assert open_region(guest) == 0
    check_bytes(guest, {})
    check_books(two)


def test_extents_are_lent_by_themselves_or_in_a_huge_page_not_both(two: Stage) -> None:
    """A zerocopy guest's loan of a part would keep the rest of its region in memory."""
    image = two.image
    assert lib.store_lend(image.cdata, 5, 1, 1000) == 0
    assert image.collapse(0, 1000) == -errno.EBUSY
    assert image.counters().collapse_failures == 0
    assert lib.store_end_loan(image.cdata, 5, 1) == 0
    collapse(two, 0)
    assert lib.store_lend(image.cdata, 5, 1, 1000) == -errno.EBUSY
    assert lib.store_lend(image.cdata, 0, 32, 1000) == 0
    assert two.evict(3, at_once=True) == []
    assert lib.store_end_loan(image.cdata, 0, 32) == 0
    assert two.evict(3, at_once=True) == [3]
    assert lib.store_lend(image.cdata, 5, 1, 1000) == 0
    assert lib.store_end_loan(image.cdata, 5, 1) == 0
    check_books(two)


def test_none_is_lent_by_itself_while_its_region_is_collapsed(
    two: Stage, pool: ThreadPoolExecutor
) -> None:
    stop_at(lib.POINT_COLLAPSE)
    collapsing = pool.submit(two.image.collapse, 0, 1000)
    wait_at(lib.POINT_COLLAPSE)
    assert lib.store_lend(two.image.cdata, 5, 1, 1000) == -errno.EBUSY
    assert lib.store_lend(two.image.cdata, 32, 1, 1000) == 0
    let_go(lib.POINT_COLLAPSE)
    assert collapsing.result(ANSWER_SECONDS) == 0
    assert lib.store_end_loan(two.image.cdata, 32, 1) == 0
    check_books(two)
