# SPDX-License-Identifier: Apache-2.0
"""Faults that tests switch on in the core, and what comes of each (docs/testing.md)."""

from __future__ import annotations

import errno

import pytest
from followed import freeze
from stage import (
    EXTENT_PAGES,
    PAGE,
    MakeStage,
    MappedGuest,
    Stage,
    content,
    fail_at,
    let_go,
    private_pages,
    until,
    wait_at,
)

from cowshed.cache._core import lib

NR_PAGES = 8 * EXTENT_PAGES
FOR_EVER = 60_000


def all_of(guest: MappedGuest) -> bytes:
    steps = range(0, NR_PAGES, EXTENT_PAGES)
    return b"".join(guest.read(page, EXTENT_PAGES) for page in steps)


def test_short_reads_of_the_source_are_gone_on_with(stage: Stage) -> None:
    fail_at(lib.POINT_LOAD_SHORT, errno.EIO)
    guest = stage.guest()
    assert all_of(guest) == content(0, NR_PAGES)
    assert stage.image.counters().load_errors == 0
    assert stage.audit().mismatches == []


@pytest.mark.parametrize("point", ["LOAD_READ", "LOAD_FILL"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENODATA, errno.ENOMEM, errno.ENOSPC])
def test_a_load_that_fails_is_an_error_for_who_waits_and_for_nobody_else(
    stage: Stage, point: str, number: int
) -> None:
    guest, other = stage.guest(window=1), stage.guest(window=1)
    other.read(20)
    fail_at(getattr(lib, f"POINT_{point}"), number, 3)
    with pytest.raises(OSError):  # noqa: PT011 (SIGBUS and EFAULT are what the kernel makes of it)
        guest.read(0)
    assert other.read(20) == content(20)
    let_go(getattr(lib, f"POINT_{point}"))
    stage.load()  # a good load mends it
    assert other.read(0) == content(0)
    assert all_of(guest) == content(0, NR_PAGES)
    assert stage.audit().mismatches == []


def test_a_source_that_fails_twice_is_asked_a_third_time(stage: Stage) -> None:
    fail_at(lib.POINT_LOAD_READ, errno.EIO, 2)
    assert stage.guest().read(0) == content(0)
    counters = stage.image.counters()
    assert (counters.load_retries, counters.load_errors) == (2, 0)


def test_a_slow_source_holds_up_nobody_who_does_not_wait_for_it(stage: Stage) -> None:
    slow, quick = stage.guest(window=1), stage.guest(window=1)
    quick.read(20)
    assert lib.point_arm(lib.POINT_LOAD_READ, lib.POINT_DELAY, FOR_EVER, 1) == 0
    ticket = slow.start("read", offset=0, length=PAGE)
    wait_at(lib.POINT_LOAD_READ)
    assert quick.read(20) == content(20)
    quick.call("fill", page=21, nr_pages=1, byte=7)
    assert not slow.answered(ticket)
    let_go(lib.POINT_LOAD_READ)
    assert bytes.fromhex(slow.finish(ticket)) == content(0)


def test_a_delay_ends_by_itself(stage: Stage) -> None:
    assert lib.point_arm(lib.POINT_LOAD_READ, lib.POINT_DELAY, 30, 1) == 0
    assert stage.guest().read(0) == content(0)


def test_a_point_comes_by_chance_as_its_seed_has_it(stage: Stage) -> None:
    def failures(seed: int) -> list[int]:
        stage.evict_all()
        armed = lib.point_arm_some(lib.POINT_LOAD_PUBLISH, lib.POINT_FAIL, errno.EIO, 0, 500, seed)
        assert armed == 0
        failed = []
        for extent in range(stage.image.nr_extents):
            stage.image.prefetch(extent, 1)
            assert stage.image.wait_loaded(extent, 1, 60_000)
            failed.append(stage.image.states(extent, 1)[0] == 0)
        let_go(lib.POINT_LOAD_PUBLISH)
        return failed

    once = failures(7)
    assert once == failures(7)
    assert 0 < sum(once) < len(once)
    assert any(failures(seed) != once for seed in (8, 9, 10))
    assert lib.point_arm_some(lib.POINT_LOAD_READ, lib.POINT_FAIL, 5, 0, 1001, 0) == -errno.EINVAL


def test_a_wake_up_that_is_lost_does_not_keep_a_guest_at_a_quota_that_was_raised(
    stage: Stage,
) -> None:
    guest = stage.guest(quota=1)
    guest.call("fill", page=0, nr_pages=1, byte=1)
    ticket = guest.start("fill", page=1, nr_pages=1, byte=2)
    until(lambda: guest.account.status().stopped_since_ns > 0, "it is stopped")
    fail_at(lib.POINT_WAKE_GUEST, errno.EAGAIN)
    guest.quota.set_quota(8 * PAGE, guest.quota.status().policy)
    guest.handler.resume()
    guest.finish(ticket)
    assert private_pages(guest) == 2
    let_go(lib.POINT_WAKE_GUEST)


def test_a_wake_up_that_is_lost_does_not_keep_a_supplied_guest_from_what_was_loaded(
    stage: Stage,
) -> None:
    guest = stage.machine()
    fail_at(lib.POINT_WAKE_GUEST, errno.EAGAIN)
    assert guest.read(0) == content(0)
    let_go(lib.POINT_WAKE_GUEST)


def test_a_wake_up_that_is_lost_does_not_keep_a_guest_frozen(stage: Stage) -> None:
    guest = stage.guest()
    guest.call("fill", page=0, nr_pages=1, byte=1)
    freeze(guest)
    ticket = guest.start("fill", page=0, nr_pages=1, byte=2)
    guest.wait_stuck(ticket)
    fail_at(lib.POINT_WAKE_GUEST, errno.EAGAIN)
    guest.handler.thaw()
    guest.finish(ticket)
    let_go(lib.POINT_WAKE_GUEST)
    assert guest.read(0) == b"\2" * PAGE


def test_a_guest_is_stopped_though_its_thread_is_not_woken(make_stage: MakeStage) -> None:
    stage = make_stage()
    guest = stage.guest()
    guest.read(0)
    fail_at(lib.POINT_WAKE_GUEST, errno.EAGAIN)
    stage.detach(guest)
    let_go(lib.POINT_WAKE_GUEST)
