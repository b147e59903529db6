# SPDX-License-Identifier: Apache-2.0
"""Open regions: the kernel maps them at its own speed, and every page stays accounted for."""

import errno
from concurrent.futures import ThreadPoolExecutor

import pytest
from followed import dirty
from regions import (
    NO_LIMIT,
    REGION,
    begin_opening,
    charged,
    check_books,
    check_bytes,
    close,
    collapse,
    faults,
    open_region,
    pool,
    two,
)
from stage import (
    ANSWER_SECONDS,
    PAGE,
    MakeStage,
    Stage,
    content,
    fail_at,
    let_go,
    stop_at,
    until,
    wait_at,
)

from cowshed.accounting import QuotaPolicy
from cowshed.cache._core import lib

__all__ = ["pool", "two"]


def test_an_open_region_is_read_and_written_without_a_fault(two: Stage) -> None:
    guest = two.guest(quota=REGION)
    assert open_region(guest) == 0
    assert charged(guest) == (0, REGION)
    assert guest.quota.status().used_pages == REGION
    for page in range(0, REGION, 16):
        assert guest.read(page, 16) == content(page, 16)
    guest.call("fill", page=3, nr_pages=5, byte=7)
    assert faults(guest) == 0
    assert charged(guest) == (5, REGION - 5)
    assert guest.account.status().counters.cow_breaks == 5
    check_books(two)
    assert close(guest) == 1
    assert charged(guest) == (5, 0)
    assert guest.quota.status().used_pages == 5
    check_bytes(guest, dict.fromkeys(range(3, 8), 7))
    check_books(two)


def test_what_was_private_before_is_charged_once(two: Stage) -> None:
    guest = two.guest(quota=REGION)
    guest.call("fill", page=3, nr_pages=5, byte=7)
    assert open_region(guest) == 0
    assert charged(guest) == (5, REGION - 5)
    guest.call("fill", page=4, nr_pages=1, byte=8)
    assert charged(guest) == (5, REGION - 5)
    close(guest)
    assert charged(guest) == (5, 0)
    assert guest.account.status().counters.cow_breaks == 5
    check_books(two)


def test_a_closed_region_is_as_one_that_never_was_open(two: Stage) -> None:
    guest = two.guest(quota=REGION, write_window=1)
    open_region(guest)
    guest.read(3)
    guest.call("fill", page=9, nr_pages=1, byte=1)
    close(guest)
    before = faults(guest)
    guest.call("fill", page=9, nr_pages=1, byte=2)  # its own: no fault
    assert faults(guest) == before
    guest.call("poke", page=3, byte=5)
    assert faults(guest) > before
    assert charged(guest) == (2, 0)
    check_books(two)


@pytest.mark.parametrize("policy", [QuotaPolicy.STOP, QuotaPolicy.KILL])
def test_a_region_is_not_opened_unless_the_quota_has_room_for_all_of_it(
    two: Stage, policy: QuotaPolicy
) -> None:
    guest = two.guest(quota=REGION - 1, policy=policy)
    assert open_region(guest) == errno.EDQUOT
    guest.call("fill", page=0, nr_pages=1, byte=1)
    guest.quota.set_quota(REGION * PAGE, policy)
    assert open_region(guest) == 0
    assert charged(guest) == (1, REGION - 1)
    check_books(two)


def test_without_a_limit_it_is_opened_and_counted(two: Stage) -> None:
    guest = two.guest(quota=1, policy=QuotaPolicy.ALLOW)
    assert open_region(guest) == 0
    guest.call("fill", page=0, nr_pages=3, byte=1)
    assert charged(guest) == (3, REGION - 3)
    close(guest)
    assert charged(guest) == (3, 0)


def test_a_guest_that_needs_its_quota_has_its_regions_closed(two: Stage) -> None:
    guest = two.guest(quota=REGION + 2)
    open_region(guest)
    guest.call("fill", page=0, nr_pages=3, byte=1)
    guest.call("fill", page=REGION, nr_pages=8, byte=2)
    assert guest.account.status().open_regions == 0
    assert charged(guest) == (11, 0)
    # And not opened again at once, to be closed again at once.
    assert open_region(guest) == errno.EDQUOT
    guest.call("fill", page=REGION + 8, nr_pages=REGION - 9, byte=2)
    assert charged(guest) == (REGION + 2, 0)
    check_books(two)


def test_accounts_of_one_quota_close_each_others_regions(two: Stage) -> None:
    first = two.guest(quota=REGION + 1)
    second = two.guest(quota=first.quota)
    open_region(first)
    second.call("fill", page=0, nr_pages=4, byte=2)
    assert first.account.status().open_regions == 0
    assert charged(first) == (0, 0)
    assert charged(second) == (4, 0)
    check_books(two)


def test_a_smaller_quota_closes_regions(two: Stage) -> None:
    guest = two.guest(quota=2 * REGION)
    open_region(guest, 0)
    open_region(guest, 1)
    guest.call("fill", page=0, nr_pages=4, byte=2)
    guest.quota.set_quota(8 * PAGE, QuotaPolicy.STOP)
    guest.account.shrink()
    assert guest.account.status().open_regions == 0
    assert guest.quota.status().used_pages == 4


@pytest.mark.parametrize("policy", list(QuotaPolicy))
def test_a_writer_races_closings_against_its_quota(two: Stage, policy: QuotaPolicy) -> None:
    limit = REGION + 8
    guest = two.guest(quota=limit, policy=policy)
    collapse(two, 0)
    hammer = guest.start("hammer", seed=5, nr_pages=REGION, nr_writes=3000)
    opened = 0
    while opened < 4 or not guest.answered(hammer):
        if guest.answered(hammer):
            guest.finish(hammer)
            hammer = guest.start("hammer", seed=5, nr_pages=REGION, nr_writes=3000)
        opened += guest.account.open_region(0, 0, NO_LIMIT) == 0
        used = guest.quota.status().used_pages
        assert used <= limit or policy is QuotaPolicy.ALLOW
        close(guest)
        guest.account.check()
    guest.finish(hammer)
    close(guest)
    until(lambda: not two.audit().mismatches, "the discards are handled")
    private, reserved = charged(guest)
    assert (private, reserved) == (guest.quota.status().used_pages, 0)
    check_books(two)


def test_a_write_between_the_steps_of_a_closing_is_charged(
    two: Stage, pool: ThreadPoolExecutor
) -> None:
    guest = two.guest(quota=REGION, write_window=1)
    open_region(guest)
    guest.call("poke", page=0, byte=1)  # from here on the kernel maps it page by page
    guest.read(0, 8)
    stop_at(lib.POINT_CLOSE_GUARDED)
    closing = pool.submit(close, guest)
    wait_at(lib.POINT_CLOSE_GUARDED)
    guest.call("poke", page=3, byte=1)  # it is mapped, and not protected yet
    stop_at(lib.POINT_CLOSE_PROTECTED)
    let_go(lib.POINT_CLOSE_GUARDED)
    wait_at(lib.POINT_CLOSE_PROTECTED)
    late = guest.start("write", offset=4 * PAGE, given_hex="07")
    guest.wait_stuck(late)
    let_go(lib.POINT_CLOSE_PROTECTED)
    assert closing.result(ANSWER_SECONDS) == 1
    guest.finish(late)
    assert charged(guest) == (3, 0)
    assert guest.read(3) == b"\1" + content(3)[1:]
    assert guest.read(4) == b"\7" + content(4)[1:]
    check_books(two)


def test_at_the_quota_a_write_after_the_closing_waits(two: Stage) -> None:
    guest = two.guest(quota=REGION, write_window=1)
    open_region(guest)
    guest.call("fill", page=0, nr_pages=REGION, byte=1)
    close(guest)
    late = guest.start("write", offset=REGION * PAGE, given_hex="07")
    until(lambda: guest.account.status().stopped_since_ns, "it stops")
    assert not guest.answered(late)
    assert charged(guest) == (REGION, 0)


@pytest.mark.parametrize("kind", ["read", "write"])
def test_a_fault_that_was_read_before_the_opening_goes_on(
    two: Stage, pool: ThreadPoolExecutor, kind: str
) -> None:
    guest = two.guest(quota=REGION, window=1, write_window=1)
    guest.read(5)
    collapse(two, 0)
    stop_at(lib.POINT_FAULT_READ)
    more = {"given_hex": "07"} if kind == "write" else {"length": 8}
    ticket = guest.start(kind, offset=5 * PAGE, **more)
    wait_at(lib.POINT_FAULT_READ)
    assert open_region(guest) == 0
    let_go(lib.POINT_FAULT_READ)
    guest.finish(ticket)
    assert charged(guest)[0] == (kind == "write")
    assert guest.account.status().broken == 0
    check_books(two)


def test_an_answer_that_meets_an_opening_breaks_nothing(
    two: Stage, pool: ThreadPoolExecutor
) -> None:
    guest = two.guest(window=16)
    collapse(two, 0)
    stop_at(lib.POINT_FAULT_HELD)
    read = guest.start("read", offset=5 * PAGE, length=8)
    wait_at(lib.POINT_FAULT_HELD)
    assert open_region(guest) == 0
    let_go(lib.POINT_FAULT_HELD)
    guest.finish(read)
    assert guest.account.status().broken == 0
    check_bytes(guest, {})
    check_books(two)


def test_an_answer_that_meets_the_opening_half_done_breaks_nothing(
    two: Stage, pool: ThreadPoolExecutor
) -> None:
    guest = two.guest(window=16)
    collapse(two, 0)
    stop_at(lib.POINT_FAULT_HELD)
    read = guest.start("read", offset=5 * PAGE, length=8)
    wait_at(lib.POINT_FAULT_HELD)
    stop_at(lib.POINT_OPEN_BARE)
    opening = begin_opening(pool, guest)
    wait_at(lib.POINT_OPEN_BARE)
    let_go(lib.POINT_FAULT_HELD)
    guest.finish(read)
    let_go(lib.POINT_OPEN_BARE)
    assert opening.result(ANSWER_SECONDS) == 0
    assert guest.account.status().broken == 0
    check_bytes(guest, {})
    check_books(two)


def test_windows_of_a_neighbour_stop_at_an_open_region(two: Stage) -> None:
    guest = two.guest(quota=4 * REGION, window=0, write_window=64)
    open_region(guest, 0)
    for page in range(2 * REGION - 1, REGION - 1, -16):
        guest.read(page - 15, 16)
    for page in range(REGION, REGION + 64, 8):
        guest.call("fill", page=page, nr_pages=8, byte=1)
    assert guest.account.status().broken == 0
    check_bytes(guest, dict.fromkeys(range(REGION, REGION + 64), 1))
    check_books(two)


def test_a_guest_in_exact_mode_beside_an_open_one_faults_and_is_charged(two: Stage) -> None:
    exact, opened = two.guest(write_window=1), two.guest()
    exact.read(0, 16)
    exact.call("fill", page=2, nr_pages=1, byte=9)
    before = faults(exact)
    assert open_region(opened) == 0  # the collapse unmaps the frames
    assert exact.read(0) == content(0)
    exact.call("poke", page=5, byte=1)
    assert faults(exact) > before
    assert charged(exact) == (2, 0)
    assert exact.read(5) == b"\1" + content(5)[1:]
    opened.call("fill", page=2, nr_pages=1, byte=8)
    assert exact.read(2) == b"\x09" * PAGE
    check_books(two)


def test_extents_of_an_open_region_are_evicted_by_nobody(two: Stage) -> None:
    first, second = two.guest(), two.guest()
    open_region(first)
    open_region(second)
    assert two.evict(0, 1, 31, at_once=True) == []
    assert two.image.counters().lent_regions == 1
    assert two.image.statistics().pinned_bytes == 0
    close(first)
    assert two.evict(0, at_once=True) == []
    close(second)
    assert two.evict(0, 1, at_once=True) == [0, 1]
    check_bytes(first, {})
    check_books(two)


def test_no_more_is_pinned_than_is_allowed(two: Stage) -> None:
    guest = two.guest()
    collapse(two, 0, 1)
    assert guest.account.open_region(0, 0, 32) == 0
    assert guest.account.open_region(1, 0, 63) == -errno.ENOSPC
    assert guest.account.open_region(1, 0, 64) == 0


def test_only_what_is_resident_and_one_huge_page_is_opened(two: Stage) -> None:
    guest = two.guest()
    assert guest.account.open_region(0, 0, NO_LIMIT) == -errno.ESTALE
    collapse(two, 0)
    assert two.evict(7) == [7]
    assert two.image.collapse(0, NO_LIMIT) == -errno.ESTALE
    assert guest.account.open_region(0, 0, NO_LIMIT) == -errno.ESTALE
    assert guest.account.open_region(2, 0, NO_LIMIT) == -errno.ERANGE  # the short tail
    assert guest.account.open_region(99, 0, NO_LIMIT) == -errno.ERANGE
    assert two.store.counters().pinned_extents == 0
    two.load()
    assert open_region(guest) == 0
    check_books(two)


@pytest.mark.parametrize("refused", [errno.EAGAIN, errno.ENOMEM, errno.EINVAL])
def test_a_refused_collapse_is_counted_and_leaves_all_as_it_was(two: Stage, refused: int) -> None:
    guest = two.guest()
    fail_at(lib.POINT_COLLAPSE, refused, 1)
    assert two.image.collapse(0, NO_LIMIT) == -refused
    assert two.image.counters().collapse_failures == 1
    assert guest.account.open_region(0, 0, NO_LIMIT) == -errno.ESTALE
    assert guest.read(3) == content(3)
    assert open_region(guest) == 0
    check_books(two)


def test_a_part_of_an_image_is_opened_where_it_has_whole_regions(two: Stage) -> None:
    guest = two.guest(part=(REGION, REGION + 64))
    collapse(two, 0)
    assert guest.account.open_region(0, 0, NO_LIMIT) == -errno.ENXIO
    assert open_region(guest, 1) == 0
    check_books(two)


def test_a_mapping_that_is_not_written_costs_no_quota(two: Stage) -> None:
    guest = two.guest(quota=1)
    guest.account.set_read_only(True)
    assert open_region(guest) == 0
    assert charged(guest) == (0, 0)
    assert guest.read(5) == content(5)
    check_books(two)
    assert close(guest) == 1
    check_books(two)


def test_writes_to_a_mapping_that_was_not_to_be_written_are_found(two: Stage) -> None:
    guest = two.guest(quota=1)
    guest.account.set_read_only(True)
    open_region(guest)
    guest.call("fill", page=3, nr_pages=2, byte=1)
    assert {each.check for each in two.audit().mismatches} == {"private"}
    close(guest)
    assert charged(guest) == (2, 0)  # past its quota
    check_books(two)


def test_tracking_closes_regions_and_opens_none(two: Stage) -> None:
    guest = two.guest()
    open_region(guest)
    guest.call("fill", page=3, nr_pages=2, byte=1)
    guest.handler.track(True)
    assert guest.account.status().open_regions == 0
    assert dirty(guest) == [3, 4]
    assert open_region(guest) == errno.EBUSY
    guest.call("poke", page=9, byte=1)
    assert dirty(guest) == [9]
    guest.handler.track(False)
    assert open_region(guest) == 0
    check_books(two)


def test_a_freeze_closes_regions_and_loses_no_write(two: Stage) -> None:
    guest = two.guest()
    open_region(guest)
    guest.call("fill", page=3, nr_pages=2, byte=1)
    guest.handler.freeze()
    assert guest.account.status().open_regions == 0
    assert charged(guest) == (2, 0)
    late = guest.start("write", offset=4 * PAGE, given_hex="07")
    guest.wait_stuck(late)
    assert open_region(guest) == errno.EBUSY
    guest.handler.thaw()
    guest.finish(late)
    assert guest.read(4) == b"\7" + b"\1" * (PAGE - 1)
    check_books(two)


def test_a_guest_that_leaves_gives_everything_back(two: Stage) -> None:
    guest = two.guest(quota=REGION)
    open_region(guest)
    guest.call("fill", page=3, nr_pages=2, byte=1)
    two.detach(guest)
    assert guest.quota.status().used_pages == 0
    assert two.image.counters().lent_regions == 0
    assert two.store.counters().pinned_extents == 0
    assert len(two.evict_all()) == two.image.nr_extents


def test_a_guest_that_was_killed_has_its_regions_closed(two: Stage) -> None:
    guest = two.guest(quota=REGION)
    open_region(guest)
    guest.call("fill", page=3, nr_pages=2, byte=1)
    guest.process.kill()
    guest.process.wait()
    assert close(guest) == 1
    assert two.store.counters().pinned_extents == 0
    assert guest.quota.status().used_pages == 0


def test_a_fault_thread_names_regions_worth_opening(make_stage: MakeStage) -> None:
    stage = make_stage(nr_pages=2 * REGION + 64)
    stage.load()
    guest = stage.guest(window=1)
    guest.read(0)
    assert guest.account.take_wanted(8) == []
    for page in (100, 200, 300):
        guest.read(page)
    assert guest.account.take_wanted(8) == [0]
    assert guest.account.take_wanted(8) == []
    collapse(stage, 1)
    guest.read(REGION + 1)
    assert guest.account.take_wanted(8) == [1]
    for page in range(2 * REGION, 2 * REGION + 64, 8):
        guest.read(page)
    assert guest.account.take_wanted(8) == []  # the tail is never opened


def test_a_load_that_failed_before_the_opening_poisons_nothing(
    two: Stage, pool: ThreadPoolExecutor
) -> None:
    guest = two.guest(window=16)
    two.evict(3)
    fail_at(lib.POINT_LOAD_READ, errno.EIO)
    stop_at(lib.POINT_LOAD_ANSWER)
    read = guest.start("read", offset=3 * 16 * PAGE, length=8)
    wait_at(lib.POINT_LOAD_ANSWER)  # it has failed, and its waiter does not know yet
    let_go(lib.POINT_LOAD_READ)
    two.load()
    assert open_region(guest) == 0
    let_go(lib.POINT_LOAD_ANSWER)
    assert bytes.fromhex(guest.finish(read)) == content(3 * 16)[:8]
    assert guest.account.status().counters.poisoned_pages == 0
    check_bytes(guest, {})
    check_books(two)
